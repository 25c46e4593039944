"""Checkpoints and the Hub: cards, export, and looking into a checkpoint before it is loaded."""

from typing import TYPE_CHECKING

from ..importing import when_first_used


if TYPE_CHECKING:
    from .export import export_model
    from .info import describe

__all__ = ["describe", "export_model"]
__getattr__ = when_first_used(__name__, {"describe": "info", "export_model": "export"})
