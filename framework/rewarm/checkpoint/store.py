"""The folder of a run's checkpoints.

A checkpoint is written into ``.partial-step-<n>``, hashed, synced and renamed to ``step-<n>``; the file ``latest``
is replaced only after that. A process killed at any moment therefore leaves either the old state or the new one.
The functions here know files, not ranks: :mod:`rewarm.checkpoint.distributed` calls them in step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rewarm.files import parse_json, sync_folder, write_whole

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"
"""Names the newest whole checkpoint."""
_NAME = re.compile(r"^step-(\d+)$")
_BLOCK = 1 << 22


class DamagedCheckpoint(Exception):
    """A checkpoint that is not what its manifest says."""


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint folder, or None if it is not one."""
    match = _NAME.match(folder.name)
    return int(match.group(1)) if match else None


def list_checkpoints(store: Path) -> list[Path]:
    """Checkpoint folders, newest first. Partial ones are not listed."""
    if not store.is_dir():
        return []
    found = [folder for folder in store.iterdir() if folder.is_dir() and step_of(folder) is not None]
    return sorted(found, key=lambda folder: step_of(folder) or 0, reverse=True)


def begin(store: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of a step into; what a crash left there before is removed."""
    if not store.is_dir():
        store.mkdir(parents=True)
        sync_folder(store.parent)
    for stale in store.glob(".partial-step-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = store / f".partial-step-{step}"
    partial.mkdir()
    return partial


def content_files(folder: Path) -> list[str]:
    """Relative paths of every file of a checkpoint but its manifest, sorted."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST)


def digest_files(folder: Path, names: Iterable[str], *, sync: bool = False) -> dict[str, dict[str, int | str]]:
    """Size in bytes and BLAKE2b-128 of files of a checkpoint.

    Args:
        folder: the checkpoint.
        names: relative paths.
        sync: also flush each file to the disk.
    """
    entries: dict[str, dict[str, int | str]] = {}
    for name in names:
        with open(folder / name, "rb") as file:
            digest = hashlib.blake2b(digest_size=16)
            while block := file.read(_BLOCK):
                digest.update(block)
            if sync:
                os.fsync(file.fileno())
            entries[name] = {"bytes": file.tell(), "blake2b": digest.hexdigest()}
    return entries


def commit(partial: Path, step: int, entries: dict[str, dict[str, int | str]]) -> Path:
    """Make a written checkpoint visible and name it ``latest``.

    Args:
        partial: the folder from :func:`begin`, complete and synced.
        step: its step.
        entries: the digests of all its files.

    Returns:
        The visible folder.
    """
    store = partial.parent
    write_whole(partial / MANIFEST, json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=1))
    for directory in [path for path in partial.rglob("*") if path.is_dir()] + [partial]:
        sync_folder(directory)
    final = store / f"step-{step}"
    if final.exists():
        # A damaged checkpoint of the same step that a resume stepped over.
        final.rename(store / f".partial-step-{step}-replaced")
    partial.rename(final)
    sync_folder(store)
    write_whole(store / LATEST, final.name + "\n")
    shutil.rmtree(store / f".partial-step-{step}-replaced", ignore_errors=True)
    return final


def read_manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    """The digests a checkpoint was committed with.

    Raises:
        DamagedCheckpoint: if the manifest is missing or unreadable, or of another format.
    """
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder.name}: no readable {MANIFEST} ({error})") from error
    if version != FORMAT:
        raise DamagedCheckpoint(f"{folder.name}: format {version}, this version reads {FORMAT}")
    if not isinstance(files, dict) or STATE not in files or not all(map(_is_entry, files.items())):
        raise DamagedCheckpoint(f"{folder.name}: {MANIFEST} does not list the files of a checkpoint")
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    """True for a file inside the checkpoint with its size and digest."""
    name, entry = item
    parts = name.split("/")
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("blake2b"), str)
        and not {"", ".", ".."} & set(parts)
    )


def named_latest(store: Path) -> int | None:
    """The step that ``latest`` names; None if there is no such file or it names none."""
    try:
        return step_of(Path((store / LATEST).read_text(errors="replace").strip()))
    except OSError:
        return None


def verify(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files with the manifest.

    Args:
        folder: a checkpoint.
        names: which files to read; all of them by default. Sizes are always compared for all.

    Raises:
        DamagedCheckpoint: naming the first file that differs.
    """
    files = read_manifest(folder)
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise DamagedCheckpoint(f"{folder.name}: {name} is missing") from None
        if size != entry["bytes"]:
            raise DamagedCheckpoint(f"{folder.name}: {name} has {size} bytes, not {entry['bytes']}")
    chosen = list(files if names is None else names)
    unlisted = [name for name in chosen if name not in files]
    if unlisted:
        raise DamagedCheckpoint(f"{folder.name}: {MANIFEST} does not list {unlisted[0]}")
    try:
        found = digest_files(folder, chosen)
    except OSError as error:
        raise DamagedCheckpoint(f"{folder.name}: {error}") from error
    for name in chosen:
        if found[name] != files[name]:
            raise DamagedCheckpoint(f"{folder.name}: the content of {name} has changed")


def prune(store: Path, keep: int, *, current: Path) -> list[Path]:
    """Remove all but the newest ``keep`` checkpoints up to and including ``current``.

    Returns:
        The removed folders. Each is renamed out of sight first, so that a half-removed one is never listed.
    """
    older = [folder for folder in list_checkpoints(store) if (step_of(folder) or 0) <= (step_of(current) or 0)]
    removed = older[keep:]
    for folder in removed:
        hidden = store / f".partial-{folder.name}-pruned"
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return removed
