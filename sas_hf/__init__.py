"""sas_hf: Simulated Attention Score and other better attentions for Hugging Face Transformers.

Importing it registers the architectures with the Auto classes: at once where Transformers is imported already, else
as soon as it is, by whomever. All else is imported when first used: `import sas_hf` alone imports neither Transformers
nor torch.
"""

import importlib.util
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from .companions import tell_companions
from .importing import AfterImport, FormerPaths
from .version import __version__


if TYPE_CHECKING:  # what `__getattr__` gives
    from .configurations import named_config
    from .looking import look
    from .modeling import (
        SASEncoderConfig,
        SASEncoderForMaskedLM,
        SASEncoderForMultipleChoice,
        SASEncoderForQuestionAnswering,
        SASEncoderForSequenceClassification,
        SASEncoderForTokenClassification,
        SASEncoderModel,
        SASGPTConfig,
        SASGPTForCausalLM,
        SASGPTForQuestionAnswering,
        SASGPTForSequenceClassification,
        SASGPTForTokenClassification,
        SASGPTModel,
        SASSeq2SeqConfig,
        SASSeq2SeqForConditionalGeneration,
        SASSeq2SeqModel,
        SASViTConfig,
        SASViTForImageClassification,
        SASViTForMaskedImageModeling,
        SASViTModel,
    )
    from .modeling.image_processing_sas_vit import SASViTImageProcessor

__all__ = [
    "SASEncoderConfig",
    "SASEncoderForMaskedLM",
    "SASEncoderForMultipleChoice",
    "SASEncoderForQuestionAnswering",
    "SASEncoderForSequenceClassification",
    "SASEncoderForTokenClassification",
    "SASEncoderModel",
    "SASGPTConfig",
    "SASGPTForCausalLM",
    "SASGPTForQuestionAnswering",
    "SASGPTForSequenceClassification",
    "SASGPTForTokenClassification",
    "SASGPTModel",
    "SASSeq2SeqConfig",
    "SASSeq2SeqForConditionalGeneration",
    "SASSeq2SeqModel",
    "SASViTConfig",
    "SASViTForImageClassification",
    "SASViTForMaskedImageModeling",
    "SASViTModel",
    "__version__",
    "look",
    "named_config",
]
HAS_PILLOW = importlib.util.find_spec("PIL") is not None
if HAS_PILLOW:
    __all__ += ["SASViTImageProcessor"]

# Of the names that are not from `.modeling`.
PLACES = {
    "SASViTImageProcessor": ".modeling.image_processing_sas_vit",
    "look": ".looking",
    "named_config": ".configurations",
}

# Where modules are that have moved, by their former names; both import the same.
MOVED = {
    "card": "hub.card",
    "checkpoints": "hub.checkpoints",
    "dtypes": "hub.dtypes",
    "eval.papers": "report.printed",
    "export": "hub.export",
    "figures": "report.figures",
    "files": "report.files",
    "image_data": "data.images",
    "image_files": "data.image_files",
    "info": "hub.info",
    "modeling.base_projections": "modeling.kinds",
    "modeling.fast_simulation": "modeling.fused_simulation",
    "tables": "report.tables",
    "text": "data.text",
    "text_files": "data.text_files",
    "training.chat": "training.tasks.chat",
    "training.images": "training.tasks.image_classification",
}


def __getattr__(name: str):
    if name == "SASViTImageProcessor" and not HAS_PILLOW:
        raise ImportError("SASViTImageProcessor needs Pillow, which is not installed: pip install pillow")
    if name in MOVED:
        return import_module(f".{name}", __name__)
    if name not in __all__ and name not in ("configurations", "modeling"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("transformers")  # first, and ours with it: two threads that import either wait for each other once
    if name in __all__:
        return getattr(import_module(PLACES.get(name, ".modeling"), __name__), name)
    return import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _import_architectures() -> None:
    """Registers them: each model file does so when it is imported."""
    if f"{__name__}.modeling" not in sys.modules:  # where its import is under way, it is what imports Transformers
        import_module(".modeling", __name__)


sys.meta_path.insert(
    0, FormerPaths({f"{__name__}.{former}": f"{__name__}.{place}" for former, place in MOVED.items()})
)
if "transformers" in sys.modules:
    _import_architectures()
else:
    sys.meta_path.insert(0, AfterImport("transformers", _import_architectures))
tell_companions()
