"""What a model looks at: attention collected from one forward pass, and a page to explore it on."""

from typing import TYPE_CHECKING

from ..importing import when_first_used


if TYPE_CHECKING:
    from .explorer import Look, look

__all__ = ["Look", "look"]
__getattr__ = when_first_used(__name__, {"Look": "explorer", "look": "explorer"})
