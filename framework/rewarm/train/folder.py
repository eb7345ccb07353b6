"""The run folder: what is written before the first step, and what a resume may change."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarm.checkpoint.store import list_checkpoints
from rewarm.config.load import dump
from rewarm.config.run import RunConfig
from rewarm.config.saved import FILE_NAME, read_saved
from rewarm.config.yaml_text import parse_yaml
from rewarm.errors import UserError
from rewarm.files import sync_folder, write_whole
from rewarm.resilience.lock import find_owner, is_earlier_attempt, owned
from rewarm.resilience.owner import Owner
from rewarm.train.companions import keep_companions

if TYPE_CHECKING:
    from rewarm.train.stage import Stage

FREE_AT_RESUME = (
    "stop_at", "parallel", "activation_recomputation", "evaluation", "checkpoint", "tracking", "distributed",
    "batch.micro_batch_size", "megatron.attention", "megatron.overlap_communication", "deepspeed",
    "offload", "runs_folder", "parent", "replay.paths",
)  # fmt: skip
"""Settings that leave the samples and the schedule as they are. Everything else makes another stage."""


class RunFolder:
    """The run folder while it is not decided whether the session may write into it.

    Args:
        config: the stage.
        rank: of this process.

    Attributes:
        accepted: True once the session writes.
    """

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.accepted = False
        self._folder = config.folder
        self._made = missing_folders(config.folder)
        # Records wait in memory: a refused session leaves no trace in the folder either.
        self._file = logging.FileHandler(self._folder / "logs" / f"rank-{rank}.log", delay=True)
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._held = logging.handlers.MemoryHandler(100_000, logging.CRITICAL + 1, self._file, flushOnClose=False)
        self._logger = logging.getLogger("rewarm")
        self._logger.addHandler(self._held)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self._logger.info("started: %s", " ".join(sys.argv))

    def prepare(self) -> Path:
        """Make the folder, see that it can be written, and return it. On the main rank."""
        return prepare_folder(self._folder)

    def accept(self) -> None:
        """From here on the session writes."""
        self.accepted = True
        self._keep_logs()

    def refuse(self, *, keep_logs: bool) -> None:
        """Leave the folder as it was, but for the log of a session that failed by no fault of the user's."""
        if self.accepted:
            return
        if keep_logs and (self._folder / "logs").is_dir():
            self._keep_logs()
        self._logger.removeHandler(self._held)
        remove_empty(self._made)

    def _keep_logs(self) -> None:
        self._logger.removeHandler(self._held)
        self._held.flush()
        self._logger.addHandler(self._file)


def missing_folders(folder: Path) -> list[Path]:
    """The folders that making a run folder would make, the innermost first."""
    inner = [folder / "lock", folder / "logs"]
    return [path for path in (*inner, folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that a refused session made, innermost first; one with something in it stays."""
    for path in folders:
        with contextlib.suppress(OSError):
            path.rmdir()


def prepare_folder(folder: Path) -> Path:
    """Make the run folder.

    Raises:
        UserError: if it cannot be written.
    """
    missing = missing_folders(folder)
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
        for made in missing:
            sync_folder(made.parent)
    except OSError as error:
        remove_empty(missing)
        raise UserError(
            f"the run folder {folder} cannot be written: {error.strerror}",
            fix="make it writable, or set runs_folder to a place that is",
        ) from error
    return folder


def check_start(config: RunConfig) -> list[str]:
    """Refuse, without ranks and without writing, a start that could only be refused later.

    Returns:
        A message for each setting that changed since the run was started, and may.

    Raises:
        UserError: if somebody else trains the run, or if this is another stage than the one in its folder.
    """
    owner = find_owner(config.folder)
    if owner is not None and not is_earlier_attempt(owner, Owner.this_process()):
        raise owned(config.folder, owner)
    if not list_checkpoints(config.folder / "checkpoints"):
        return []
    return check_same_stage(config, config.folder)


def check_same_stage(config: RunConfig, folder: Path) -> list[str]:
    """Compare the configuration with the one the run was started with.

    Returns:
        A message for each setting that changed and may.

    Raises:
        UserError: if a setting changed that makes another stage.
    """
    before = _flatten(read_saved(folder))
    before.setdefault("replay.windows", "all" if config.replay.fraction > 0 else "seen")  # of a run before the setting
    now = _flatten(parse_yaml(dump(config)))
    for key in ("extensions", "hooks"):  # an older run has no such section, which says as much as an empty one
        before.setdefault(key, now.get(key) if now.get(key) == {} else None)
        now.setdefault(key, before[key] if before[key] == {} else None)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    refused = [key for key in changed if not _is_free(key, config)]
    if refused:
        key = refused[0]
        raise UserError(
            f"{folder} has checkpoints of a run with {key}={before.get(key)}, and now {key}={now.get(key)}",
            fix=f"put it back, or start another stage: a new name, with parent: {folder}",
        )
    return [f"changed at this resume: {key}={now.get(key)} (was {before.get(key)})" for key in changed]


def _is_free(key: str, config: RunConfig) -> bool:
    # Under weights that follow the losses, when and on what they are measured decides the samples.
    if config.mixture.is_updated and key.startswith("evaluation.") and key != "evaluation.micro_batch_size":
        return False
    # What no rate depends on is refused by now, and older runs hold it.
    if key.removeprefix("schedule.") in config.schedule.unread:
        return True
    # Files may move; that their content is the same is what the sampler checks.
    if key.startswith("data.") and key.endswith(".path"):
        return True
    return any(key == free or key.startswith(free + ".") for free in FREE_AT_RESUME)


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    items = [_flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
    return {key: value for item in items for key, value in item.items()} or {prefix: {}}


def write_run_files(config: RunConfig, stage: Stage, *, started: bool) -> None:
    """Write config.yaml and the tokenizer's copy.

    Args:
        config: the resolved configuration.
        stage: what it was resolved to.
        started: whether the run has checkpoints; a run without any starts from clean files.
    """
    folder = stage.folder
    if not started:
        keep_companions(folder, stage.tokenizer, stage.origin.parent, stage.trained)  # may refuse: before all else
        for name in ("metrics.jsonl", "evaluation.jsonl", "mixture.jsonl"):
            (folder / name).unlink(missing_ok=True)
        stage.lineage(None, 0, dict.fromkeys(stage.names, 0)).save(folder)
    write_whole(folder / FILE_NAME, dump(config))
