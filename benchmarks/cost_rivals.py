"""The models that benchmarks/cost.py compares, by name: `mha`, `gqa-sas`, `sas-k5-kept`, `sas-no_blocks`, ...

A name is a kind of attention and what shall be otherwise, joined by hyphens. Kinds: `mha`, `gqa` (4 key-value heads),
`mqa`, `mla`, `tpa`, `optimised`, `efficient`, `super`; `sas` is `mha-sas`; `llama` is Transformers' model of the same
shape; `paper` is SAS's Appendix L module in our backbone. Then, in any order:

    sas          simulated: three times the heads, half as many features again
    x4           four times the heads (`paper` too)
    k5           head convolutions of kernel size 5 (`paper` too)
    heads        heads alone: keys as wide as values
    base         the cache holds the base heads
    kept         the simulation is kept for the backward pass, not run again
    no_products  simulation and rotation as modules (and then kept, for recomputation needs the products)
    no_blocks    attention by PyTorch's own kernel
    no_mean      W^O before the mean over groups
    plain        kept and all of the above: what a reader of the paper would write
    fused        each side of attention by one function of `torch.compile` (`compile_simulation`)
    compiled     by `torch.compile` (every kind, `mha-compiled` and `llama-compiled` too)
    regional     the same layer by layer, which compiles one for all (Accelerate's `compile_regions`)
"""

import re

import torch
from accelerate.utils import compile_regions
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sas_hf import SASGPTConfig, SASGPTForCausalLM
from sas_hf.configurations import named_config
from sas_hf.modeling.attention import SASAttention
from sas_hf.modeling.positions import rotate_leading_features


AttentionInterface.register("pytorch_sdpa", sdpa_attention_forward)  # Transformers' own, under a name of its own
AttentionMaskInterface.register("pytorch_sdpa", sdpa_mask)

KINDS = {
    "mha": {},
    "gqa": {"attention_type": "gqa", "num_key_value_heads": 4},
    **{kind: {"attention_type": kind} for kind in ("mqa", "mla", "tpa", "optimised", "efficient", "super")},
    "llama": {},
    "paper": {},
    "sas": {},
}


def _without_products(layer: SASAttention) -> None:
    for side in (layer.q_simulation, layer.k_simulation, layer.v_simulation):
        side.register_forward_hook(lambda *_: None)  # what is watched runs as it is written


def _without_blocks(layer: SASAttention) -> None:
    layer.config._attn_implementation = "pytorch_sdpa"


class EveryGroup(nn.Module):
    """W^O as the paper has it: of every group, and then their mean."""

    def __init__(self, o_proj: nn.Linear):
        super().__init__()
        self.o_proj = o_proj

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """`[B, T, Ĥ·D_v]` to `[B, T, C]`."""
        return self.o_proj(heads.unflatten(2, (-1, self.o_proj.in_features))).mean(dim=2)


def _without_mean(layer: SASAttention) -> None:
    layer.o_proj, layer.num_simulated_groups = EveryGroup(layer.o_proj), 1


TRICKS = {"products": _without_products, "blocks": _without_blocks, "mean": _without_mean}
COMPILED = ("compiled", "regional")  # changes of every kind
CHANGES = re.compile(
    r"sas|base|kept|plain|heads|fused|x[1-9]\d*|k[1-9]\d*|" + "|".join(COMPILED) + "|no_(" + "|".join(TRICKS) + ")"
)


def parse(name: str) -> tuple[str, list[str]]:
    """Kind and changes of a name.

    Raises:
        ValueError: for an unknown kind or change, or a change of a simulation that is not there.
    """
    kind, *changes = name.split("-")
    if kind not in KINDS:
        raise ValueError(f"The model {name!r} is of an unknown kind; kinds are {', '.join(KINDS)}.")
    wrong = [change for change in changes if not CHANGES.fullmatch(change)]
    of_simulation = [change for change in changes if change not in COMPILED]
    if wrong or (of_simulation and kind not in ("sas", "paper") and "sas" not in changes):
        raise ValueError(
            f"The model {name!r} is not known; after the kind, and `sas` for kinds that do not simulate, may follow "
            f"x2, k5, heads, base, kept, plain, fused, {', '.join(COMPILED)}, "
            f"{', '.join('no_' + trick for trick in TRICKS)}."
        )
    return kind, changes


def backbone(layers: int, vocabulary: int, positions: int, width: int | None = None) -> dict:
    """What all models of a comparison share: fields that Llama's configuration has, too."""
    wide = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 3 * width} if width else {}
    return wide | {
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def make_config(name: str, size: str, **shared) -> SASGPTConfig:
    """Its configuration in the backbone of `size` (of `llama` that of `mha`).

    Raises:
        ValueError: for a name or a shape that cannot be.
    """
    kind, changes = parse(name)
    fields = KINDS[kind] | shared
    config = named_config(f"mha-{size}", **fields)
    if kind not in ("sas", "paper") and "sas" not in changes:
        return config
    fields["simulated_head_dim"] = config.query_head_dim * 3 // 2
    fields["num_simulated_heads"] = 3 * config.num_attention_heads
    for change in changes:
        if change[0] == "x":
            fields["num_simulated_heads"] = int(change[1:]) * config.num_attention_heads
        elif change in ("kept", "plain"):
            fields["recompute_simulation"] = False
        elif change == "heads":
            fields["simulated_head_dim"] = None
        elif change == "fused":
            fields["compile_simulation"] = True
        elif change == "base":
            fields["simulation_cache"] = "base"
        elif change[0] == "k":
            fields["simulation_kernel_size"] = int(change[1:])
    return named_config(f"mha-{size}", **fields)


class PaperAttention(nn.Module):
    """Appendix L as printed (convolutions, maps, softmax attention, output projection before the mean), with the
    backbone's rotary positions; made of one of our layers, whose parameters it takes."""

    mixes_tokens = rotates_at_use = False  # what the backbone asks of a layer

    def __init__(self, layer: SASAttention):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **_):
        layer = self.layer
        batch, length = hidden_states.shape[:2]
        query, (key, value) = layer.project_queries(hidden_states), layer.project_state(hidden_states)

        def simulate(simulation, heads):
            x = heads.reshape(batch * length, *heads.shape[2:])
            for maps in simulation:
                x = maps.expansion(x)
                x = maps.residual(F.relu(x)) + x
            return x.reshape(batch, length, -1, x.shape[-1])

        query = rotate_leading_features(simulate(layer.q_simulation, query), position_embeddings).transpose(1, 2)
        key = rotate_leading_features(simulate(layer.k_simulation, key), position_embeddings).transpose(1, 2)
        value = simulate(layer.v_simulation, value).transpose(1, 2)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, scale=layer.scaling
        )
        return EveryGroup(layer.o_proj)(output.transpose(1, 2).flatten(2)), None


def make_model(name: str, size: str, **shared) -> nn.Module:
    """A random model of that name; `shared` are fields of the backbone."""
    torch.manual_seed(0)
    kind, changes = parse(name)
    config = make_config(name, size, **shared)
    if kind == "llama":
        fields = ("hidden_size", "intermediate_size", "num_attention_heads", "tie_word_embeddings")
        model = LlamaForCausalLM(LlamaConfig(**shared | {field: getattr(config, field) for field in fields}))
        layers = []
    else:
        model = SASGPTForCausalLM(config)
        layers = model.model.layers
    for layer in layers:
        if kind == "paper":
            layer.self_attn = PaperAttention(layer.self_attn)
            continue
        for trick, switch_off in TRICKS.items():
            if "plain" in changes or f"no_{trick}" in changes:
                switch_off(layer.self_attn)
    if "compiled" in changes:
        model.compile()
    return compile_regions(model, dynamic=False, fullgraph=True) if "regional" in changes else model


def heads_times(name: str) -> int | None:
    """Ĥ/H of SAS over MHA that differs in that alone, 1/Ĥ being `mha` itself; `None` for other models."""
    if name == "sas":
        return 3
    found = re.fullmatch(r"sas-x(\d+)", name)
    return int(found[1]) if found else None
