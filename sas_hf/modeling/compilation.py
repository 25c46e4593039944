"""A function through `torch.compile`, or as it is where compiling fails."""

from collections.abc import Callable

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)


class Compiled:
    """
    `function`, compiled when it is first called, in one graph with its backward pass.

    Where that fails, for want of a compiler or for a reason of PyTorch's, the function itself is called from then on,
    which one warning tells.

    Args:
        function: of tensors, without effects.
        backend: `torch.compile`'s.
    """

    # A graph for each new type, mode (training or not, autocast) and kind of shape: more would be a fault.
    GRAPHS = 64

    def __init__(self, function: Callable, backend: str = "inductor"):
        self.function, self.backend = function, backend
        self.compiled: Callable | None = None
        self.failed = False

    def __call__(self, *arguments):
        if self.failed or torch.compiler.is_compiling():  # a part of a larger graph then
            return self.function(*arguments)
        if self.compiled is None:
            self.compiled = torch.compile(  # type: ignore[call-overload]  # which lack the last two parameters
                self.function,
                fullgraph=True,
                backend=self._compile_both_passes,
                recompile_limit=self.GRAPHS,
                isolate_recompiles=True,
            )
        try:
            return self.compiled(*arguments)
        except Exception as error:
            result = self.function(*arguments)  # raises what is not the compiler's fault
            self.failed = True
            reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])  # whose, and which
            logger.warning(f"`compile_simulation`: compiling failed, so the simulation runs uncompiled ({reason}).")
            return result

    def _compile_both_passes(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        """The backend's code for the backward pass is made now, not when it is needed, where nothing could be done."""
        from torch._dynamo import lookup_backend
        from torch._functorch import config

        with config.patch(force_non_lazy_backward_lowering=True):
            return lookup_backend(self.backend)(graph, inputs)
