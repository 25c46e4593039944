"""Items that are measured or counted instead of trained, by kind:
`function(place, folder, command, progress, **arguments)`, the last of them from the declaration."""

from .inference_time import inference_time
from .operations import operations
from .parameters import parameters
from .step_time import step_time


MEASURED = {
    "parameters": parameters,
    "inference-time": inference_time,
    "step-time": step_time,
    "operations": operations,
}
