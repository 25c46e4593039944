"""Results out: files that are whole or not there, tables and figures."""

from typing import TYPE_CHECKING

from ..importing import when_first_used


if TYPE_CHECKING:
    from .files import write_atomically

__all__ = ["write_atomically"]
__getattr__ = when_first_used(__name__, {"write_atomically": "files"})
