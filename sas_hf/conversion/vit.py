"""ViT checkpoints: every weight keeps its name."""

from ..modeling import SASViTForImageClassification, SASViTForMaskedImageModeling, SASViTModel
from .family import SourceFamily, same


VIT_FIELDS = same(
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "encoder_stride",
    "pooler_output_size",
    "pooler_act",
)

VIT = SourceFamily(
    model_type="vit",
    architectures={
        "ViTModel": SASViTModel,
        "ViTForImageClassification": SASViTForImageClassification,
        "ViTForMaskedImageModeling": SASViTForMaskedImageModeling,
    },
    fields=VIT_FIELDS,
)
