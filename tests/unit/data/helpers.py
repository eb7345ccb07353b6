"""Small things that several data tests need."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

import rewarm
from rewarm.data.indexed import MAGIC, IndexedWriter


def write_pair(prefix: Path, tokens: np.ndarray, lengths: list[int] | None = None) -> None:
    """A small pair of the given tokens; one document unless lengths are given."""
    writer = IndexedWriter(prefix, tokens.dtype)
    writer.add(tokens, lengths or [len(tokens)])
    writer.close()


def write_sparse_pair(prefix: Path, num_tokens: int, document: int) -> None:
    """A pair of equal documents of zeros whose .bin takes no room on disk."""
    count = num_tokens // document
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(count * document * 2)
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(struct.pack("<9sQBQQ", MAGIC, 1, 8, count, count + 1))
        stream.write(np.full(count, document, np.int32).tobytes())
        stream.write((np.arange(count, dtype=np.int64) * document * 2).tobytes())
        stream.write(np.arange(count + 1, dtype=np.int64).tobytes())


def start_python(*arguments: str, **options: object) -> subprocess.Popen[str]:
    """A Python process of this interpreter that finds this package."""
    environment = {**os.environ, "PYTHONPATH": str(Path(rewarm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [sys.executable, *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
