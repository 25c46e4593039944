"""sas_hf: Simulated Attention Score and other better attentions for Hugging Face Transformers.

Importing it registers the architectures with the Auto classes; everything else is imported when first used.
"""

from transformers import AutoImageProcessor
from transformers.utils import is_vision_available

from .configurations import named_config
from .modeling import (
    SASGPTConfig,
    SASGPTForCausalLM,
    SASGPTForQuestionAnswering,
    SASGPTForSequenceClassification,
    SASGPTForTokenClassification,
    SASGPTModel,
    SASViTConfig,
    SASViTForImageClassification,
    SASViTForMaskedImageModeling,
    SASViTModel,
)
from .version import __version__


__all__ = [
    "SASGPTConfig",
    "SASGPTForCausalLM",
    "SASGPTForQuestionAnswering",
    "SASGPTForSequenceClassification",
    "SASGPTForTokenClassification",
    "SASGPTModel",
    "SASViTConfig",
    "SASViTForImageClassification",
    "SASViTForMaskedImageModeling",
    "SASViTModel",
    "__version__",
    "named_config",
]

if is_vision_available():
    from .modeling.image_processing_sas_vit import SASViTImageProcessor

    __all__ += ["SASViTImageProcessor"]
    # The models registered themselves when they were imported.
    AutoImageProcessor.register(SASViTConfig, image_processor_classes={"pil": SASViTImageProcessor}, exist_ok=True)


def __getattr__(name: str):
    if name == "SASViTImageProcessor":  # not imported above
        raise ImportError("SASViTImageProcessor needs Pillow, which is not installed: pip install pillow")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
