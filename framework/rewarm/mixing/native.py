"""The C++ picks of ``csrc/cpu/sampler.cpp``, where the native library was built."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "_native" / "librewarm_cpu.so"
"""Where installation leaves the library; numpy does the same work without it."""


@cache
def sampler_library(path: Path = LIBRARY) -> ctypes.CDLL | None:
    """The library with ``rewarm_sampler_draw`` declared, or None where there is none."""
    if not path.exists():
        return None
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "rewarm_sampler_draw"):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.rewarm_sampler_draw.restype = number
    library.rewarm_sampler_draw.argtypes = [
        number, pointer, pointer, pointer, pointer, pointer, pointer, number, pointer, pointer,
        ctypes.POINTER(ctypes.c_int64),
    ]  # fmt: skip
    return library
