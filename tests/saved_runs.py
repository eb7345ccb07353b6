"""Run folders that an earlier version wrote, see ``fixtures/format-1/README.md``."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parent / "fixtures" / "format-1" / "runs.tar.xz"


def unpack_runs(folder: Path) -> Path:
    """Two bare domains, three configurations, and the runs ``base``, ``continue`` and ``zero`` in ``runs``."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def digest(folder: Path) -> dict[str, str]:
    """Every name in a folder, with the digest of the content of files."""
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def flip(path: Path, place: float = 0.5) -> None:
    """Flip one bit in the middle of a file, or at another share of its length."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)
