"""Items that are measured or counted instead of trained, by kind: `function(place, folder, progress)`."""

from collections.abc import Callable
from pathlib import Path

from .comparison import ItemResult
from .inference_time import inference_time
from .items import Place
from .operations import operations
from .parameters import parameters
from .step_time import step_time


def _timed(measure: Callable[..., ItemResult]) -> Callable[..., ItemResult]:
    def run(place: Place, folder: Path, progress: Callable[[str], None]) -> ItemResult:
        return measure(folder=folder, size=place.size, progress=progress, **place.at.arguments)

    return run


def _operations(place: Place, folder: Path, progress: Callable[[str], None]) -> ItemResult:
    return operations(place.name, place.size, progress=progress, **place.at.arguments)


MEASURED = {
    "parameters": parameters,
    "inference-time": _timed(inference_time),
    "step-time": _timed(step_time),
    "operations": _operations,
}
