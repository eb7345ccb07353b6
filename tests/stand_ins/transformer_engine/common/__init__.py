"""See the package."""

from . import recipe

__all__ = ["recipe"]
