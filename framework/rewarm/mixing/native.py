"""The C++ picks of ``csrc/cpu/sampler.cpp``, where the native library was built."""

from __future__ import annotations

import ctypes
from functools import cache

from rewarm.kernels.native import LIBRARY_FOLDER, open_library


@cache
def sampler_library() -> ctypes.CDLL | None:
    """The library with its sampler declared, or None where it is missing or of other sources.

    Silent, because numpy draws the same samples fast enough for most batches.
    """
    library = open_library(LIBRARY_FOLDER / "librewarm_cpu.so")[0]
    return None if library is None else declare(library)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the sampler's functions their argument types; returns the same library."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.rewarm_sampler_draw.restype = number
    library.rewarm_sampler_draw.argtypes = [
        number, pointer, pointer, pointer, pointer, pointer, pointer, number, pointer, pointer,
        ctypes.POINTER(ctypes.c_int64),
    ]  # fmt: skip
    return library
