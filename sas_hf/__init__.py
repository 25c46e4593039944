"""sas_hf: Simulated Attention Score and other better attentions for Hugging Face Transformers.

Importing it registers the architectures with the Auto classes; everything else is imported when first used.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configurations import named_config
from .modeling import (
    SASGPTConfig,
    SASGPTForCausalLM,
    SASGPTForQuestionAnswering,
    SASGPTForSequenceClassification,
    SASGPTForTokenClassification,
    SASGPTModel,
)
from .version import __version__


__all__ = [
    "SASGPTConfig",
    "SASGPTForCausalLM",
    "SASGPTForQuestionAnswering",
    "SASGPTForSequenceClassification",
    "SASGPTForTokenClassification",
    "SASGPTModel",
    "__version__",
    "named_config",
]


def _register() -> None:
    AutoConfig.register(SASGPTConfig.model_type, SASGPTConfig, exist_ok=True)
    for auto_class, model_class in (  # the base model first: heads built with AutoModel look it up
        (AutoModel, SASGPTModel),
        (AutoModelForCausalLM, SASGPTForCausalLM),
        (AutoModelForSequenceClassification, SASGPTForSequenceClassification),
        (AutoModelForTokenClassification, SASGPTForTokenClassification),
        (AutoModelForQuestionAnswering, SASGPTForQuestionAnswering),
    ):
        auto_class.register(SASGPTConfig, model_class, exist_ok=True)


_register()
