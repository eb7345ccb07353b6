"""Files that travel with the weights, and folders that appear only when whole."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rewarm.data.model_folder import TOKENIZER_FILES, list_files, read_json
from rewarm.data.tokenizer import tokenizer_fingerprint
from rewarm.errors import UserError

_BESIDE = ("generation_config.json", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_BESIDE_LIMIT = 8 * 2**20
_OF_THE_CLASS = ("model_type", "model_name", "tokenizer_class", "transformers_version")
"""Keys of config.json by which ``AutoTokenizer`` chooses a class."""


def carry_files(
    source: str | Path, target: str | Path, *, kind: Literal["all", "tokenizer", "model"] = "all"
) -> list[str]:
    """Copy tokenizer, generation, chat template and licence files from one Hugging Face folder to another.

    Args:
        source: where the model or the tokenizer came from.
        target: an existing folder; files of the same name are replaced.
        kind: ``tokenizer`` for the tokenizer's files alone, ``model`` for the others: generation config and licence.

    Returns:
        Names of what was copied, sorted.

    Raises:
        UserError: if one of them is a link out of the folder, a pipe, a device or too large.
    """
    target = Path(target)
    found = list_carried(source, kind=kind)
    for name, path in found.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    return sorted({name.partition("/")[0] for name in found})


def list_carried(source: str | Path, *, kind: Literal["all", "tokenizer", "model"] = "all") -> dict[str, Path]:
    """What :func:`carry_files` copies: name -> path without links.

    Raises:
        UserError: as :func:`carry_files`.
    """
    found = list_files(source, TOKENIZER_FILES) if kind != "model" else {}
    return found | (list_files(source, _BESIDE, _BESIDE_LIMIT) if kind != "tokenizer" else {})


def carry_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer so that it makes the same ids where it now lies.

    ``AutoTokenizer`` looks into the config.json beside a tokenizer for its class, so that much of it goes along.

    Args:
        source: the tokenizer's folder.
        target: an existing folder.

    Raises:
        UserError: as :func:`carry_files`, and if the copy makes other ids.
    """
    carry_files(source, target, kind="tokenizer")
    config = read_json(source, "config.json") or {}
    kept = {key: config[key] for key in _OF_THE_CLASS if config.get(key) is not None}
    if kept:
        (target / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    if tokenizer_fingerprint(target) != tokenizer_fingerprint(source):
        raise UserError(
            f"the tokenizer {source} makes other ids once its files are copied to another folder",
            fix="save it whole: AutoTokenizer.from_pretrained(folder).save_pretrained(other), and name that folder",
        )


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
