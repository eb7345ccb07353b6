"""Saving and loading on all ranks at once: every rank hashes its share of the files, errors reach every rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rewarm.checkpoint import store
from rewarm.checkpoint.store import STATE
from rewarm.errors import UserError
from rewarm.files import read_json


class Group(Protocol):
    """What saving needs of an engine."""

    rank: int
    world_size: int

    def broadcast(self, value: Any) -> Any: ...
    def gather(self, value: Any) -> list[Any]: ...


def save_checkpoint(
    group: Group,
    folder: Path,
    step: int,
    prepare: Callable[[Path], None],
    write: Callable[[Path], None],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint and make it visible. Collective.

    Args:
        group: the ranks.
        folder: the run's ``checkpoints`` folder.
        step: the step it is the state after.
        prepare: makes in that folder what the writing ranks need; called on rank 0 alone, so that an error there
            leaves nobody in a collective.
        write: writes the sharded files into a folder; collective.
        state: everything else, plain JSON values; rank 0's is written.
        keep: checkpoints to keep.

    Returns:
        The checkpoint.

    Raises:
        UserError: on every rank, if writing failed anywhere; what was there before is untouched.
    """
    partial = folder / f".partial-step-{step}"

    def begin() -> None:
        if group.rank == 0:
            store.begin(folder, step)
            (partial / STATE).write_text(json.dumps(state, indent=1))
            prepare(partial)

    _together(group, "begin", begin, partial)
    _together(group, "write", lambda: write(partial), partial)
    # On a shared file system the ranks may not see each other's newest files in a listing at once: together they do.
    seen = _together(group, "list", lambda: store.content_files(partial), partial)
    mine = sorted({name for names in seen for name in names})[group.rank :: group.world_size]
    shares = _together(group, "hash", lambda: store.digest_files(partial, mine, sync=True), partial)

    def publish() -> None:
        if group.rank == 0:
            final = store.commit(partial, step, {name: entry for share in shares for name, entry in share.items()})
            store.prune(folder, keep, current=final)

    _together(group, "publish", publish, partial)
    return folder / f"step-{step}"


def _together(group: Group, what: str, action: Callable[[], Any], partial: Path) -> list[Any]:
    """Run an action on every rank and raise on every rank if it failed on one."""
    error: str | None = None
    result: Any = None
    try:
        result = action()
    except (OSError, UserError) as problem:
        reason = problem.message if isinstance(problem, UserError) else problem.strerror or problem
        error = f"rank {group.rank}: {reason}"
    outcomes = group.gather((error, result))
    errors = [problem for problem, _ in outcomes if problem is not None]
    if errors:
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"cannot save a checkpoint to {partial.parent} ({what}): {errors[0]}",
            fix="free space or make the folder writable, then run the same command: it goes on from the last whole "
            "checkpoint",
        )
    return [result for _, result in outcomes]


def find_checkpoint(group: Group, folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole. Collective.

    Args:
        group: the ranks; each reads its share of the files.
        folder: the run's ``checkpoints`` folder.
        report: told of every damaged checkpoint that is skipped.

    Returns:
        The checkpoint, or None if there is none at all.

    Raises:
        UserError: if there are checkpoints but every one is damaged.
    """
    candidates = group.broadcast([str(path) for path in store.list_checkpoints(folder)])
    latest = group.broadcast(store.named_latest(folder))
    if candidates and latest is not None and latest > (store.step_of(Path(candidates[0])) or 0):
        report(f"checkpoint step-{latest}, which {folder / store.LATEST} names, is gone")
    for candidate in map(Path, candidates):
        damage = find_damage(group, candidate)
        if damage is None:
            return candidate
        report(f"checkpoint skipped, it is damaged: {damage}")
    if candidates:
        raise UserError(
            f"every checkpoint in {folder} is damaged",
            fix="restore one; to begin again on purpose give the stage another name, or remove the run folder first",
        )
    return None


def find_damage(group: Group, checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, on every rank; None if its content is what was saved. Collective.

    Args:
        group: the ranks; each reads its share of the files.
        checkpoint: the checkpoint.
    """
    problem: str | None = None
    try:
        names = sorted(store.read_manifest(checkpoint))
        store.verify(checkpoint, names[group.rank :: group.world_size])
    except store.DamagedCheckpoint as damage:
        problem = str(damage)
    return next((text for text in group.gather(problem) if text is not None), None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The plain state that was saved with a checkpoint.

    Raises:
        UserError: if its file is missing or damaged.
    """
    return read_json(checkpoint / STATE, fix="name another checkpoint of the run, or restore this one from a copy")
