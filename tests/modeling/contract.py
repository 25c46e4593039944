"""What checkpoints of this and earlier versions hold, recorded in `contract.json`: configurations, weights, outputs.

    python tests/modeling/contract.py

adds what is new. What is recorded is not changed: it is in checkpoints that people have.
"""

import json
import re
import sys
from pathlib import Path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers import (
    ENCODER_BASE,
    ENCODER_VARIANTS,
    SEQ2SEQ_BASE,
    SEQ2SEQ_VARIANTS,
    VIT_BASE,
    VIT_VARIANTS,
    gpt_config,
)
from transformers import PreTrainedConfig, PreTrainedModel

import sas_hf
from sas_hf import SASEncoderConfig, SASSeq2SeqConfig, SASViTConfig


FILE = Path(__file__).with_name("contract.json")
PLAIN = ("mha", "learned", "mla", "tpa", "optimised", "efficient", "super", "qk_norm", "post_norm", "parallel")
SIMULATED = ("sas_k5_gqa", "head_only", "feature_only", "sas_learned", "mla_sas", "tpa_sas", "optimised_sas")
SIMULATED += ("efficient_sas", "values_only", "beyond_paper", "mla_beyond_paper")
KINDS = (*PLAIN, *SIMULATED)
HEADS = (
    "SASGPTModel",
    "SASGPTForSequenceClassification",
    "SASGPTForTokenClassification",
    "SASGPTForQuestionAnswering",
)
IMAGE_KINDS = (
    "vit",
    "mean",
    "distilled",
    "oblong",
    "sas",
    "mla_sas",
    "tpa_sas",
    "optimised",
    "efficient",
    "super_mean",
    "hidden_classifier",
    "beyond_paper",
)
IMAGE_MODELS = {f"SASViTForImageClassification/{kind}": kind for kind in IMAGE_KINDS}
IMAGE_MODELS |= {"SASViTModel/vit": "vit", "SASViTForMaskedImageModeling/sas": "sas"}
ENCODER_HEADS = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
ENCODER_MODELS = {f"SASEncoderForMaskedLM/{kind}": kind for kind in ENCODER_VARIANTS}
ENCODER_MODELS |= {f"SASEncoder{head}/sas_k5_gqa": "sas_k5_gqa" for head in ENCODER_HEADS}
ENCODER_MODELS |= {"SASEncoderForSequenceClassification/mean": "mean"}
SEQ2SEQ_MODELS = {f"SASSeq2SeqForConditionalGeneration/{kind}": kind for kind in SEQ2SEQ_VARIANTS}
SEQ2SEQ_MODELS |= {"SASSeq2SeqModel/sas_k5_gqa": "sas_k5_gqa"}
SAVED_BY_TRANSFORMERS = ("transformers_version", "dtype", "architectures")


def checkpoints() -> dict[str, PreTrainedConfig]:
    """The configuration of every recorded checkpoint, by "class/kind"."""
    small = {"num_hidden_layers": 1, "max_position_embeddings": 16, "vocab_size": 19, "pad_token_id": 0}
    without_rope = {"no_rope_layers": [0]}
    kinds = {
        f"SASGPTForCausalLM/{kind}": gpt_config(kind, **small | (without_rope if kind == "qk_norm" else {}))
        for kind in KINDS
    }
    kinds |= {f"{head}/sas_k5_gqa": gpt_config("sas_k5_gqa", **small, num_labels=3) for head in HEADS}
    for name, variant in ENCODER_MODELS.items():
        kinds[name] = SASEncoderConfig(**ENCODER_BASE | ENCODER_VARIANTS[variant] | small)
    for name, variant in SEQ2SEQ_MODELS.items():
        kinds[name] = SASSeq2SeqConfig(**SEQ2SEQ_BASE | SEQ2SEQ_VARIANTS[variant] | small | {"decoder_layers": 1})
    for name, variant in IMAGE_MODELS.items():
        kinds[name] = SASViTConfig(**VIT_BASE | VIT_VARIANTS[variant] | {"num_hidden_layers": 1})
    return kinds


def saved_fields(config: PreTrainedConfig) -> dict:
    """What `save_pretrained` writes of a configuration, but for defaults and what Transformers notes on its own."""
    fields, defaults = json.loads(config.to_json_string()), default_fields(type(config))
    return {
        name: value
        for name, value in fields.items()
        if name not in SAVED_BY_TRANSFORMERS and not (name in defaults and defaults[name] == value)
    }


def default_fields(config_class: type[PreTrainedConfig]) -> dict:
    """The fields that are ours, with their defaults."""
    ours = [base for base in config_class.__mro__ if base.__module__.startswith("sas_hf.")]
    names = [name for base in reversed(ours) for name in base.__annotations__ if name != "model_type"]
    return {name: json.loads(json.dumps(getattr(config_class, name))) for name in names}


def example_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights of these names and shapes that any machine makes alike, no two tensors the same."""
    weights = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        weights[name] = (0.4 * torch.sin(0.7 * steps + index)).view(shape)
    return weights


@torch.no_grad()
def example_output(model: PreTrainedModel) -> list[float]:
    """Nine numbers of the model's first output for a fixed input, in float64."""
    if model.main_input_name == "pixel_values":
        size = (2, model.config.num_channels, *model.config.image_shape)
        inputs = torch.sin(torch.arange(torch.Size(size).numel(), dtype=torch.float64)).view(size)
    else:
        inputs = torch.arange(1, 13).view(2, 6)
        if type(model).__name__.endswith("MultipleChoice"):
            inputs = inputs[None]
    output = model.double().eval()(inputs)[0].flatten()
    return [round(number, 6) for number in output[torch.linspace(0, len(output) - 1, 9).long()].tolist()]


def record(name: str, config: PreTrainedConfig) -> dict:
    """The contract of one checkpoint."""
    model = getattr(sas_hf, name.partition("/")[0])(config)
    shapes = {key: list(weight.shape) for key, weight in model.state_dict().items() if key not in tied_keys(model)}
    model.load_state_dict(example_weights(shapes), strict=False)
    model.tie_weights()
    return {"config": saved_fields(config), "weights": shapes, "output": example_output(model)}


def tied_keys(model: PreTrainedModel) -> set[str]:
    """Names of weights that a checkpoint leaves out, for they are stored under another name."""
    return set(model.all_tied_weights_keys)


def write(contract: dict) -> None:
    """As JSON with a line for every weight and field."""
    text = json.dumps(contract, indent=1)
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: json.dumps(json.loads(numbers[0])), text)
    FILE.write_text(text + "\n")


if __name__ == "__main__":
    contract = json.loads(FILE.read_text()) if FILE.is_file() else {"fields": {}, "checkpoints": {}}
    for name, config in checkpoints().items():
        declared = contract["fields"].setdefault(config.model_type, {})
        declared |= {key: value for key, value in default_fields(type(config)).items() if key not in declared}
        if name not in contract["checkpoints"]:
            contract["checkpoints"][name] = record(name, config)
    write(contract)
