"""The named configurations are the papers' models: every count that the papers print comes out of them."""

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from sas_hf import SASGPTForCausalLM, named_config
from sas_hf.configurations import BASELINE_HEADS, SIZES
from sas_hf.hub.info import describe
from sas_hf.modeling.attention import SASAttention
from sas_hf.modeling.kinds import make_attention
from sas_hf.report.printed import printed


BETTER, SAS = printed("better"), printed("sas")
# What a configuration's name begins with, by the paper's name of its data; the class that counts it.
DATA = {
    "MNIST": ("mnist", AutoModelForImageClassification),
    "CIFAR100": ("cifar100", AutoModelForImageClassification),
    "ImageNet": ("imagenet", AutoModelForImageClassification),
    "IMDB": ("imdb", AutoModelForSequenceClassification),
    "Amazon": ("amazon", AutoModelForSequenceClassification),
    "Europarl and Anki": ("nmt", AutoModelForSeq2SeqLM),
}
ROWS = [(key, row) for key in BETTER if key.startswith("table") and key != "table4" for row in BETTER[key].rows]


def on_meta(model_class, config):
    with torch.device("meta"):
        return getattr(model_class, "from_config", model_class)(config)


def layer_weights(name: str, matrices_only: bool = True, **overrides) -> int:
    """Of one attention layer of a language model; the papers leave the weights of norms out."""
    with torch.device("meta"):
        layer = make_attention(named_config(name, **overrides), layer_idx=0)
    return sum(parameter.numel() for parameter in layer.parameters() if not matrices_only or parameter.ndim > 1)


@pytest.mark.parametrize(
    ("key", "row"), ROWS, ids=[f"{key}-{row.dataset}-{row.model}-{row.values[0]}" for key, row in ROWS]
)
def test_parameters_of_the_second_paper(key, row):
    """Tables 1 to 3 and 5 to 10: of each layer of attention, or of the whole model, for every number of heads."""
    cells = dict(zip(BETTER[key].columns, row.values, strict=True))
    name, model_class = DATA[row.dataset]
    name = f"imagenet-60m-{row.model}" if key == "table7" else f"{name}-{row.model}"
    config = named_config(name)
    assert key == "table7" or cells["hidden size"] == config.hidden_size
    # A configuration has the heads of the ranked rows; the ablations have others.
    assert row.ranks is None or config.num_attention_heads == cells["heads"]
    config = named_config(name, num_attention_heads=cells["heads"])
    assert config.hidden_size == cells["hidden size"]
    assert config.head_dim == cells.get("key size", config.head_dim)
    model = on_meta(model_class, config)
    layers = [module for module in model.modules() if isinstance(module, SASAttention)]
    if key == "table7":
        assert len(layers) == cells["attention layers"]
        assert model.num_parameters() // 10_000 * 10_000 == cells["parameters"]  # cut, not rounded
        return
    (count,) = {sum(parameter.numel() for parameter in layer.parameters()) for layer in layers}  # of each the same
    if key in ("table1", "table3"):
        assert cells["attention parameters of a layer"] == pytest.approx(count, rel=0.016)
    else:
        assert cells["attention parameters of a layer"] == count


def test_totals_of_table_7():
    totals = {kind: describe(named_config(f"imagenet-60m-{kind}")).parameters for kind in ("standard", "optimised")}
    totals |= {kind: describe(named_config(f"imagenet-60m-{kind}")).parameters for kind in ("efficient", "super")}
    assert totals == {
        "standard": 60_543_800,
        "optimised": 60_121_064,
        "efficient": 60_098_744,
        "super": 60_449_798,
    }
    ours = describe(named_config("imagenet-60m-sas")).parameters
    assert totals["standard"] < ours < 1.005 * totals["standard"]
    config = named_config("imagenet-60m-super")
    assert config.max_position_embeddings == 197 and config.intermediate_size == 3072


@pytest.mark.parametrize(
    ("name", "said", "comes_out"),
    [
        ("mnist", 300_000, 276_874),  # Section 4.1; feed-forward width and classifier are not printed
        ("imagenet-60m", 60_000_000, 60_543_800),
        ("imdb", 650_000, 647_554),  # Section 4.2
        ("amazon", 2_600_000, 2_640_069),
    ],
)
def test_totals_of_the_second_paper_s_text(name, said, comes_out):
    total = describe(named_config(f"{name}-standard")).parameters
    assert total == comes_out == pytest.approx(said, rel=0.08)


@pytest.mark.parametrize("row", SAS["table2"].rows, ids=lambda row: f"{row.model}-{row.size}")
def test_heads_of_table_2(row):
    config = named_config(f"{row.model.lower()}-{row.size.lower()}")
    hidden_size, heads, head_size, group_size = row.values
    assert config.hidden_size == hidden_size
    assert (config.num_simulated_heads or config.num_attention_heads) == heads
    assert (config.simulated_head_dim or config.head_dim) == head_size
    if group_size is not None:
        assert config.num_attention_heads == group_size * config.num_key_value_heads


# Attention weights of a layer over MHA's, less 1, in per cent.
MATCHED = {
    "125m": {"mqa": 0, "gqa": 0, "mla": -1.74, "tpa": 7.55},
    "350m": {"mqa": 0, "gqa": 0, "mla": 0.39, "tpa": 2.34},
    "760m": {"mqa": 0, "gqa": 0, "mla": 0.63, "tpa": 0.66},
    "1.5b": {"mqa": 0, "gqa": 0, "mla": 0.70, "tpa": 0.19},
}


@pytest.mark.parametrize("size", SIZES)
def test_baselines_have_the_parameters_of_mha(size):
    """Table 2's TPA has more, with the SAS paper's 36 and 48 heads (the TPA paper's own are 34 and 47)."""
    mha = layer_weights(f"mha-{size}")
    for kind, heads in zip(("mqa", "gqa", "mla", "tpa"), BASELINE_HEADS[size], strict=True):
        count = layer_weights(f"{kind}-{size}")
        if size in MATCHED:
            assert round(100 * (count / mha - 1), 2) == MATCHED[size][kind]
        if (kind, size) not in (("tpa", "125m"), ("tpa", "350m")):
            step = 1 if kind in ("mqa", "mla", "tpa") else 2  # of GQA the groups stay whole
            others = [layer_weights(f"{kind}-{size}", num_attention_heads=heads + more) for more in (-step, step)]
            assert abs(count - mha) < min(abs(other - mha) for other in others)


@pytest.mark.parametrize(("size", "more"), [("350m", 37.11), ("760m", 32.62), ("1.5b", 28.38)])
def test_mla_of_the_public_configurations_has_more_than_mha(size, more):
    count, config = layer_weights(f"mla-{size}-r1024"), named_config(f"mla-{size}-r1024")
    assert config.num_attention_heads == named_config(f"mla-{size}").num_attention_heads
    assert (config.q_lora_rank, config.kv_lora_rank, config.qk_nope_head_dim) == (1024, 512, 32)
    assert round(100 * (count / layer_weights(f"mha-{size}") - 1), 2) == more


def test_variants_of_table_7_of_the_sas_paper():
    names = [row.model.lower() for row in SAS["table7"].rows]
    assert len(names) == 10
    for base, simulated in zip(names[::2], names[1::2], strict=True):
        base, simulated = named_config(f"{base}-125m"), named_config(f"{simulated}-125m")
        times, kernel = (3, 5) if base.num_attention_heads == 12 else (2, 1)
        assert base.num_simulated_heads is None
        assert simulated.num_simulated_heads == times * base.num_attention_heads
        assert simulated.simulation_kernel_size == kernel
        assert simulated.num_attention_heads == base.num_attention_heads


def test_parameters_that_the_simulation_adds():
    """Section 4.3: 0.43M and less than 0.4 % at 125M; less than 0.1 % at 2.7B, of which a little more comes out."""

    def added(size, **fields):
        model = on_meta(SASGPTForCausalLM, named_config(f"sas-{size}", **fields))
        base = on_meta(SASGPTForCausalLM, named_config(f"mha-{size}"))
        weights = [p.numel() for name, p in model.named_parameters() if "_simulation." in name and p.ndim > 1]
        return (
            sum(weights),
            100 * sum(weights) / base.num_parameters(),
            100 * (model.num_parameters() / base.num_parameters() - 1),
        )

    said = {row.size: row.values for row in SAS["section4.3"].rows}
    weights, share, with_biases = added("125m")
    assert weights == 12 * ((12 * 36 + 36 * 36) * 3 + (64 * 96 + 96 * 96) * 2) == 430_848
    assert round(weights, -4) == said["125M"][0]
    assert share < with_biases < said["125M"][1]
    # The paper prints no D̂ for heads of 80; with ours of 120 it is just over the print, with 96 under it.
    weights, share, _ = added("2.7b")
    assert (weights, round(share, 3)) == (2_715_648, 0.103)
    assert added("2.7b", simulated_head_dim=96)[1] < said["2.7B"][1] < share
