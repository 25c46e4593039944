"""Weights that a checkpoint or adapter lacks are refused, for every kind of model; grown adapters are whole."""

import copy
import shutil

import pytest
import torch
from helpers import vit
from lm_eval.api.instance import Instance
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sas_hf import SASGPTConfig, SASGPTForCausalLM
from sas_hf.eval import SASHFLM, PerplexityText, Report, evaluate, evaluate_images
from sas_hf.modeling.image_processing_sas_vit import SASViTImageProcessor


# What peft asks Transformers for, and what it says of tied matrices that are both trained.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]
NAME = "model.layers.1.mlp.down_proj.weight"


def without(weights):
    del weights[NAME]


def of_another_shape(weights):
    weights[NAME] = weights[NAME][:, 1:].contiguous()


def not_finite(weights):
    weights[NAME][0, 0] = float("nan")


def with_more(weights):
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32)


def change(file, edit):
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without, f"copy lacks weights of SASGPTForCausalLM: {NAME}"),
        (of_another_shape, rf"holds {NAME} as \[32, 63\], but its config.json asks for \[32, 64\]"),
        (not_finite, f"copy is damaged: {NAME} holds NaN"),
    ],
)
def test_a_language_model_that_is_not_whole(edit, message, copied, text, tmp_path):
    change(copied / "model.safetensors", edit)
    (tmp_path / "text.txt").write_text(text[:2000])
    with pytest.raises(ValueError, match=message):
        evaluate(copied, perplexity=PerplexityText(tmp_path / "text.txt", (64,)), device="cpu")
    with pytest.raises(ValueError, match=message):  # what the harness's own command line makes
        SASHFLM(str(copied), device="cpu")


def test_a_damaged_file(copied):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="The weights of .*copy are damaged"):
        SASHFLM(str(copied), device="cpu")


def test_pickled_weights_are_taken_and_looked_over_as_well(copied):
    weights = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(weights, copied / "pytorch_model.bin")
    assert SASHFLM(str(copied), device="cpu").model.num_parameters() > 0
    without(weights)
    torch.save(weights, copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"lacks weights.*{NAME}"):
        SASHFLM(str(copied), device="cpu")


def test_weights_that_the_model_does_not_have_are_told(copied, text, tmp_path):
    change(copied / "model.safetensors", with_more)
    (tmp_path / "text.txt").write_text(text[:2000])
    result = evaluate(copied, perplexity=PerplexityText(tmp_path / "text.txt", (64,)), device="cpu")
    assert result.unused_weights == ["model.layers.1.self_attn.q_proj.bias"]
    assert "weights that the model does not use" in Report([result]).markdown()


def test_an_image_classifier_that_is_not_whole(tmp_path):
    vit("vit").save_pretrained(tmp_path / "model")
    SASViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(tmp_path / "model")
    for label in ("LABEL_0", "LABEL_1"):
        place = tmp_path / "images" / "test" / label
        place.mkdir(parents=True)
        Image.new("RGB", (12, 12)).save(place / "black.png")
    evaluate_images(tmp_path / "model", tmp_path / "images")
    name = next(
        name for name in load_file(tmp_path / "model" / "model.safetensors") if "query" in name or "q_" in name
    )
    change(tmp_path / "model" / "model.safetensors", lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"lacks weights of SASViTForImageClassification: {name}"):
        evaluate_images(tmp_path / "model", tmp_path / "images")


# Adapters.
@pytest.fixture
def adapter(model, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


LORA = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda weights: weights.pop(LORA),
            "adapter lacks weights of its adapter: .*layers.1.self_attn.q_proj.lora_A",
        ),
        (
            lambda weights: weights.update({LORA.replace("layers.1", "layers.7"): weights[LORA].clone()}),
            "adapter holds weights that .* has no place for: .*layers.7.self_attn.q_proj.lora_A",
        ),
        (lambda weights: weights[LORA].fill_(float("inf")), f"adapter is damaged: {LORA} holds NaN or infinite"),
        (lambda weights: weights.update({LORA: torch.ones(2, 31)}), "adapter does not fit .*size mismatch"),
    ],
    ids=["missing", "beyond", "infinite", "misshapen"],
)
def test_an_adapter_that_does_not_fit(edit, message, adapter, data):
    evaluate(adapter, "arc_easy", data=data, limit=1, device="cpu")
    change(adapter / "adapter_model.safetensors", edit)
    with pytest.raises(ValueError, match=message):
        evaluate(adapter, "arc_easy", data=data, limit=1, device="cpu")


def test_an_adapter_beside_a_model_is_not_put_on_it_unasked(adapter, copied, data):
    for file in adapter.iterdir():
        shutil.copy(file, copied)
    with pytest.raises(ValueError, match=r"copy holds a model and a peft adapter \(adapter_config.json\)"):
        evaluate(copied, "arc_easy", data=data, limit=1, device="cpu")


def scores(model, tokenizer=None):
    """Log-likelihoods that also hold an added token."""
    model = model if isinstance(model, SASHFLM) else SASHFLM(model, tokenizer=tokenizer)
    pairs = [("a", " b"), ("a <new1>", " b"), ("a", " <new1> b")]
    requests = [Instance("loglikelihood", {}, pair, 0, metadata=("task", i, 1)) for i, pair in enumerate(pairs)]
    return torch.tensor([value for value, _ in model.loglikelihood(requests, disable_tqdm=True)])


@pytest.mark.parametrize("simulated", [True, False], ids=["sas", "llama"])
@pytest.mark.parametrize(
    ("tied", "added", "lora"),
    [
        (True, 8, {}),
        (False, 8, {}),
        (False, 8, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (True, 8, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (True, 0, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
    ids=["tied", "untied", "untied and trained", "tied and trained", "none added"],
)
def test_adapters_with_embeddings_of_their_own(simulated, tied, added, lora, config, tokenizer, tmp_path):
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": tied, "initializer_range": 0.2}
    base = SASGPTForCausalLM(SASGPTConfig(**sizes, num_simulated_heads=4)) if simulated else LlamaForCausalLM(
        LlamaConfig(**sizes)
    )  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    own = AutoTokenizer.from_pretrained(tmp_path / "base")
    own.add_tokens([f"<new{number}>" for number in range(added)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if added:
        model.resize_token_embeddings(len(own))
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **lora)
    trained = get_peft_model(model, lora).eval()
    with torch.no_grad():  # as training would: the matrices that are trained part from each other
        for name, weight in trained.named_parameters():
            if "modules_to_save" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    trained.save_pretrained(tmp_path / "adapter")
    own.save_pretrained(tmp_path / "adapter")

    text = tmp_path / "text.txt"
    text.write_text("A few words, one of which is <new1>. " * 10)
    found = evaluate(tmp_path / "adapter", perplexity=PerplexityText(text, (64,)), device="cpu")
    live = evaluate(trained, perplexity=PerplexityText(text, (64,)), tokenizer=own)
    assert found.tasks["perplexity@64"].metrics == live.tasks["perplexity@64"].metrics
    place = str(tmp_path / "adapter")
    asked = SASHFLM(str(tmp_path / "base"), peft=place, tokenizer=place, device="cpu")
    torch.testing.assert_close(scores(asked), scores(trained, own))
    if not added:  # peft puts the same on the base
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), place).eval()
        torch.testing.assert_close(scores(asked), scores(plain, own))


def test_tokens_that_have_no_rows(adapter, checkpoint, copied, tokenizer, data, tmp_path, never_loaded):
    """In a checkpoint or on an adapter: an index error somewhere in the model, once a text has such a token."""
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(adapter)
    for folder in (copied, adapter):
        grown = AutoTokenizer.from_pretrained(folder)
        grown.add_tokens(["<new>"])
        grown.save_pretrained(folder)
        with pytest.raises(ValueError, match=r"has 385 tokens, but `vocab_size` of the model is 384.*resize_token"):
            evaluate(folder, "arc_easy", data=data)
    with pytest.raises(ValueError, match="has 385 tokens, but `vocab_size` of the model is 384"):
        SASHFLM(str(copied), device="cpu")


def test_special_tokens_without_rows_may_be_there_but_not_in_a_text(model, tokenizer):
    """Many tokenizers got a padding token that their model was never given."""
    grown = copy.deepcopy(tokenizer)
    grown.add_special_tokens({"pad_token": "<pad>"})
    scorer = SASHFLM(model, tokenizer=grown, batch_size=2)
    options = {"until": [], "max_gen_toks": 4}
    prompts = [
        Instance("generate_until", {}, (prompt, options), 0, metadata=("task", 0, 1)) for prompt in ("a", "a b c")
    ]
    plain = SASHFLM(model, tokenizer=tokenizer, batch_size=2)
    assert scorer.generate_until(prompts, True) == plain.generate_until(prompts, True)
    for kind, args in (("loglikelihood", ("a<pad>", " b")), ("generate_until", ("a<pad>", options))):
        with pytest.raises(
            ValueError, match="has the token '<pad>' with number 384, but `vocab_size` of the model is 384"
        ):
            getattr(scorer, kind)([Instance(kind, {}, args, 0, metadata=("task", 0, 1))], True)


def test_an_output_that_has_not_grown_with_the_embedding(config, tokenizer, data, tmp_path):
    sizes = config.to_diff_dict() | {"tie_word_embeddings": False}
    SASGPTForCausalLM(SASGPTConfig(**sizes)).save_pretrained(tmp_path / "base")
    model = SASGPTForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(392)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    change(
        tmp_path / "adapter" / "adapter_model.safetensors",
        lambda weights: weights.pop("base_model.model.lm_head.weight"),
    )
    with pytest.raises(ValueError, match="lacks their rows of the output .base_model.model.lm_head.weight"):
        evaluate(tmp_path / "adapter", "arc_easy", data=data, limit=1, device="cpu")
