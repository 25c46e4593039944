"""Tiny smooth models by name: every kind of attention, plain and simulated, in a decoder and in an encoder of images,
beside Transformers' own Llama and ViT; and what to compare of them."""

from collections.abc import Callable

import torch
from helpers import GPT_BASE, MLA, SAS, TPA, VIT_BASE, scramble, token_ids
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from sas_hf import SASGPTConfig, SASGPTForCausalLM, SASViTConfig, SASViTForImageClassification


KINDS = {
    "mha": {},
    "mqa": {"attention_type": "mqa"},
    "gqa": {"attention_type": "gqa", "num_key_value_heads": 2},
    "mla": MLA,
    "tpa": TPA,
    "optimised": {"attention_type": "optimised"},
    "efficient": {"attention_type": "efficient"},
    "super": {"attention_type": "super", "token_mixing_init": "normal"},
}
SIMULATED = {f"{kind}_sas": fields | SAS for kind, fields in KINDS.items() if kind != "super"}
SIMULATED |= {
    "sas_k3": SAS | {"simulation_kernel_size": 3},
    "sas_kept": SAS | {"recompute_simulation": False},
    "heads_only": {"num_simulated_heads": 12},  # one width for keys and values, which PyTorch's fast kernel asks for
    "features_only": {"simulated_head_dim": 12, "num_key_value_heads": 2},
}
# Nothing with kinks, on whose other side differences would be others.
SMOOTH = {"hidden_act": "gelu", "num_hidden_layers": 1}
OURS = {"simulation_act": "gelu"} | SMOOTH
GPT = {"norm_type": "layer_norm", "mlp_type": "plain"} | OURS
MODELS = {f"gpt-{kind}": (SASGPTForCausalLM, GPT_BASE | GPT | fields) for kind, fields in (KINDS | SIMULATED).items()}
MODELS |= {
    f"vit-{kind}": (SASViTForImageClassification, VIT_BASE | OURS | fields)
    for kind, fields in (KINDS | SIMULATED).items()
    if kind not in ("sas_kept", "heads_only", "features_only")
}
MODELS |= {"llama": (LlamaForCausalLM, GPT_BASE | SMOOTH), "vit": (ViTForImageClassification, VIT_BASE | SMOOTH)}
# For promises that depend on how much is rotated, and on a simulation that is one map.
OTHERS = {
    "half_rotated": SAS | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "all_rotated": SAS | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}},
    "linear": SAS | {"simulation_act": "identity", "num_key_value_heads": 2},
}
OTHERS = {f"gpt-{name}": (SASGPTForCausalLM, GPT_BASE | GPT | fields) for name, fields in OTHERS.items()}
CONFIGS = {
    SASGPTForCausalLM: SASGPTConfig,
    SASViTForImageClassification: SASViTConfig,
    LlamaForCausalLM: LlamaConfig,
    ViTForImageClassification: ViTConfig,
}


def make(name: str, implementation: str = "sdpa", dtype: torch.dtype = torch.float64) -> nn.Module:
    model_class, fields = (MODELS | OTHERS)[name]
    model = scramble(model_class(CONFIGS[model_class](**fields)))
    for part in list(model.modules()):
        for child, norm in part.named_children():
            if type(norm).__name__.endswith("RMSNorm"):  # Llama's and ours compute in float32 whatever the type
                exact = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                exact.load_state_dict(norm.state_dict())
                setattr(part, child, exact)
    model.set_attn_implementation(implementation)
    return model.to(dtype)


def takes_tokens(model: nn.Module) -> bool:
    return isinstance(model, (SASGPTForCausalLM, LlamaForCausalLM))


def inputs_of(model: nn.Module, batch: int = 2, length: int = 5) -> torch.Tensor:
    if takes_tokens(model):
        return token_ids(batch, length)
    return torch.randn(batch, 3, 12, 12, dtype=model.dtype)


class Logits(nn.Module):
    """A model from one tensor to one tensor."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.model(inputs, use_cache=False) if takes_tokens(self.model) else self.model(inputs)).logits


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return logits.pow(2).mean()


def assert_near(found, expected, bound: float) -> None:
    """Tensors, or as many of them, within `bound` of the largest entry."""
    found, expected = ((pair,) if isinstance(pair, torch.Tensor) else tuple(pair) for pair in (found, expected))
    scale = max(part.abs().max() for part in expected).item()
    assert scale > 1e-3
    for part, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(part, truth, atol=bound * scale, rtol=0, check_dtype=False)


def answered(record_property, implementation: str, compute: Callable):
    """What `compute` gives, or `None` where PyTorch's attention kernel says that it has no such derivative."""
    try:
        answer = compute()
    except (RuntimeError, NotImplementedError) as error:
        if implementation == "eager" or "scaled_dot_product" not in str(error):
            raise
        record_property("answer", "refused")
        return None
    record_property("answer", "right")
    return answer


def attention_of(model: nn.Module) -> nn.Module:
    return next(part for name, part in model.named_modules() if name.endswith(("self_attn", "attention")))


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """What a layer of attention is made of, down to non-linearities; empty simulations are nothing."""
    parts = attention_of(model).named_modules()
    return {name: part for name, part in parts if name and not (isinstance(part, nn.Sequential) and len(part) == 0)}
