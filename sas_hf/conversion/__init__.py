"""An existing checkpoint in, a SAS checkpoint and a fidelity report out; one module per source family."""

from .checkpoint import convert_checkpoint, find_source
from .convert import ConversionError, ConversionOptions, convert_model
from .fidelity import Fidelity, compare_models, gradient_differences
from .fold import fold_checkpoint
from .restore import restore_checkpoint


__all__ = [
    "ConversionError",
    "ConversionOptions",
    "Fidelity",
    "compare_models",
    "convert_checkpoint",
    "convert_model",
    "find_source",
    "fold_checkpoint",
    "gradient_differences",
    "restore_checkpoint",
]
