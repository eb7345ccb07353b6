"""Loads the compiled library of ``csrc/cpu`` (standard library only: no torch, no numpy).

The library is plain C behind ``ctypes``: it depends neither on Python's nor on torch's binary interface. It is built
by ``pip install``, and in a source tree by ``python setup.py build_ext --inplace``. ``setup.py`` runs this file to
share :func:`source_digest`, so it must import only the standard library at its top.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import warnings
from pathlib import Path

LIBRARY_FOLDER = Path(__file__).parent.parent / "_native"
REBUILD = "python setup.py build_ext --inplace (in a source tree), or install the package again"


def source_digest(folder: Path) -> str:
    """First 16 hex digits of the SHA-256 over names and contents of the sources below ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".cpp", ".h", ".cu"}:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def load() -> ctypes.CDLL | None:
    """The CPU library, or None when it is missing or stale; the first such call warns, saying what to run.

    Callers declare the argument types of the functions they use. Exported names begin with ``rewarm_``.
    """
    library, problem = open_library(LIBRARY_FOLDER / "librewarm_cpu.so")
    if problem is not None:
        warnings.warn(f"{problem}; slower fallbacks are used. To mend it: {REBUILD}", RuntimeWarning, stacklevel=2)
    return library


@functools.cache
def load_cuda() -> ctypes.CDLL | None:
    """The CUDA library, or None, silently: most machines have none. See :func:`why_no_cuda`."""
    return open_library(LIBRARY_FOLDER / "librewarm_cuda.so")[0]


def why_no_cuda() -> str | None:
    """Why :func:`load_cuda` gives None, or None if it does not."""
    return open_library(LIBRARY_FOLDER / "librewarm_cuda.so")[1]


def open_library(path: Path, sources: Path | None = None) -> tuple[ctypes.CDLL | None, str | None]:
    """Open a library and check that it belongs to this package.

    Args:
        path: the ``.so`` file.
        sources: the ``csrc`` folder to compare with; None means the one of the source tree this file lies in, if any.

    Returns:
        The library and None, or None and one sentence that says what is wrong with it.
    """
    from rewarm.versions import __version__

    if not path.exists():
        return None, f"the compiled library {path} is missing (no compiler at install time, or never built)"
    try:
        library = ctypes.CDLL(str(path))
        build = library.rewarm_build
    except (OSError, AttributeError) as error:
        return None, f"the compiled library {path} cannot be loaded: {error}"
    build.restype = ctypes.c_char_p
    version, _, digest = build().decode().partition(" ")
    if version != __version__:
        return None, f"the compiled library {path} is of version {version}, the package is {__version__}"
    sources = sources or Path(__file__).parents[3] / "csrc"
    if (sources / "cpu" / "library.cpp").exists() and digest != source_digest(sources):
        return None, f"the compiled library {path} is older or newer than {sources}"
    return library, None
