"""Items that are measured or counted instead of trained, by kind:
`function(place, folder, command, progress, **arguments)`, the last of them from the declaration."""

from collections.abc import Callable

from .comparison import ItemResult
from .inference_time import inference_time
from .operations import operations
from .parameters import parameters
from .step_time import step_time


MEASURED: dict[str, Callable[..., ItemResult]] = {
    "parameters": parameters,
    "inference-time": inference_time,
    "step-time": step_time,
    "operations": operations,
}
