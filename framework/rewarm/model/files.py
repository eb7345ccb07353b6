"""Files that travel with the weights, and folders that appear only when whole."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewarm.errors import UserError

TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates",
)
"""What a tokenizer consists of in a Hugging Face folder."""
_BESIDE = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def carry_files(source: str | Path, target: str | Path) -> list[str]:
    """Copy tokenizer, generation, chat template and licence files from one Hugging Face folder to another.

    Args:
        source: where the model or the tokenizer came from.
        target: an existing folder; files of the same name are replaced.

    Returns:
        Names of what was copied, sorted.
    """
    source, target = Path(source), Path(target)
    found = sorted({path for pattern in TOKENIZER_PATTERNS + _BESIDE for path in source.glob(pattern)})
    for path in found:
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)
    return [path.name for path in found]


def is_export(folder: str | Path) -> bool:
    """True for a folder that an export made, which another export may replace: a model with our lineage."""
    return all((Path(folder) / name).is_file() for name in ("config.json", "lineage.json"))


@contextmanager
def written_aside(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder beside ``folder`` that takes its name when the block ends without an error.

    Args:
        folder: the final name; must not exist, be empty, or (with ``replace``) be something that may go.
        replace: take the place of what is there; the old folder stays until the new one is whole.

    Raises:
        UserError: if the name is taken, the place cannot be written, or the disk is full.
    """
    folder = Path(os.path.abspath(folder))
    check_free(folder, replace=replace)
    aside = folder.parent / f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir(parents=True)
        yield aside
        _take_name(aside, folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}", fix="check the permissions and the free space"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_free(folder: str | Path, *, replace: bool = False) -> None:
    """Refuse a folder to write that is taken.

    Raises:
        UserError: if it is a file, or a folder with something in it and ``replace`` is false.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (not replace and any(folder.iterdir()))):
        raise UserError(f"{folder} exists already", fix="choose another folder or remove it")


def _take_name(aside: Path, folder: Path) -> None:
    if not folder.exists():
        aside.rename(folder)
        return
    old = folder.parent / f".{folder.name}.old-{uuid.uuid4().hex[:8]}"
    folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old)
