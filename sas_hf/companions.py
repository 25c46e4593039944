"""What other libraries are told of our architectures, once they are imported: never by us.

peft: what its methods adapt where nobody names targets. gptqmodel: what GPTQ quantises. Liger: that it has nothing for
them, which it would not say.
"""

import sys
from importlib import import_module

from .importing import AfterImport


MODEL_TYPES = ("sas_gpt", "sas_encoder", "sas_seq2seq", "sas_vit")

# By the names that Llama has for them; a name that a model has not is passed over. Never the simulation: several
# methods refuse its convolutions, and it is small enough to be trained whole.
TARGETS = {
    "q_proj": ("q_proj", "q_b_proj", "q_head_proj", "q_feature_proj"),
    "k_proj": ("k_proj", "kv_b_proj", "k_head_proj", "k_feature_proj"),
    "v_proj": ("v_proj", "kv_b_proj", "v_head_proj", "v_feature_proj"),
    "up_proj": ("up_proj", "fc1"),
    "down_proj": ("down_proj", "fc2"),
    "input_layernorm": ("input_layernorm", "self_attn_layer_norm", "encoder_attn_layer_norm", "layernorm_before"),
    "post_attention_layernorm": (
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "final_layer_norm",
        "layernorm_after",
    ),
    "norm": ("norm", "layernorm"),
}


def tell_companions() -> None:
    """At once where a library is imported already, else as soon as it is, by whomever."""
    for name, tell in COMPANIONS.items():
        if name in sys.modules:
            tell()
        else:
            sys.meta_path.insert(0, AfterImport(name, tell))


def _tell_peft() -> None:
    """Each table has Llama's targets in it: ours are what stands for them."""
    for name, table in vars(import_module("peft.utils.constants")).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in table:
            ours = [target for named in table["llama"] for target in TARGETS.get(named, (named,))]
            for model_type in MODEL_TYPES:
                table.setdefault(model_type, list(dict.fromkeys(ours)))


def _tell_gptqmodel() -> None:
    """A model that it does not know it looks through by itself, but looks for the simulation's layers where they are
    not. It is to quantise what optimum expects when Transformers loads the result: linear maps of no other class."""
    from gptqmodel.models.auto import MODEL_MAP, SUPPORTED_MODELS
    from gptqmodel.models.base import BaseQModel
    from torch import nn

    class SASQModel(BaseQModel):
        def _auto_detect_module_tree(self, model, quant_method):
            tree = super()._auto_detect_module_tree(model, quant_method)
            if tree is not None:
                *path, _, blocks = tree
                layer = model.get_submodule(".".join(path))[0]
                for block in blocks:
                    maps = layer.get_submodule(block).named_children()
                    blocks[block] = tuple(name for name, child in maps if type(child) is nn.Linear)
            return tree

    MODEL_MAP["sas_gpt"] = SASQModel
    SUPPORTED_MODELS.append("sas_gpt")


def _tell_liger() -> None:
    """It passes over a model type that it does not know without a word, and so would the Trainer's
    `use_liger_kernel`."""

    def refuse(model=None) -> None:
        raise ValueError("`use_liger_kernel` is true, but Liger has no kernels for SAS models; leave it out.")

    table = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    table.update(dict.fromkeys(MODEL_TYPES, refuse))


COMPANIONS = {
    "peft.utils.constants": _tell_peft,
    "gptqmodel.models.auto": _tell_gptqmodel,
    "liger_kernel.transformers.monkey_patch": _tell_liger,
}
