"""See the package."""

from contextlib import nullcontext
from typing import Any


class FP8GlobalStateManager:
    """fp8 is not stood in for."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Never."""
        return False


def fp8_autocast(*args: Any, **kwargs: Any) -> Any:
    """Nothing."""
    return nullcontext()
