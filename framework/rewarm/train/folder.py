"""The run folder: what is written before the first step, and what a resume may change."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rewarm.config.load import dump
from rewarm.config.run import RunConfig
from rewarm.errors import UserError
from rewarm.train.companions import keep_companions

if TYPE_CHECKING:
    from rewarm.train.stage import Stage

FREE_AT_RESUME = (
    "stop_at", "parallel", "activation_recomputation", "evaluation", "checkpoint", "tracking", "distributed",
    "batch.micro_batch_size", "megatron.attention", "megatron.overlap_communication", "deepspeed",
    "offload", "runs_folder", "parent", "replay.paths",
)  # fmt: skip
"""Settings that leave the samples and the schedule as they are. Everything else makes another stage."""


def prepare_folder(config: RunConfig) -> Path:
    """Make the run folder.

    Raises:
        UserError: if it cannot be written.
    """
    folder = config.folder
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the run folder {folder} cannot be written: {error.strerror}",
            fix="make it writable, or set runs_folder to a place that is",
        ) from error
    return folder


def open_logs(folder: Path, rank: int) -> None:
    """Send this rank's log records to ``logs/rank-<r>.log``."""
    handler = logging.FileHandler(folder / "logs" / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("rewarm")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.info("started: %s", " ".join(sys.argv))


def check_same_stage(config: RunConfig, folder: Path) -> list[str]:
    """Compare the configuration with the one the run was started with.

    Returns:
        A message for each setting that changed and may.

    Raises:
        UserError: if a setting changed that makes another stage.
    """
    before = _flatten(yaml.safe_load((folder / "config.yaml").read_text()))
    before.setdefault("replay.windows", "all" if config.replay.fraction > 0 else "seen")  # of a run before the setting
    now = _flatten(yaml.safe_load(dump(config)))
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
        for name in ("metrics.jsonl", "evaluation.jsonl", "mixture.jsonl"):
            (folder / name).unlink(missing_ok=True)
        keep_companions(folder, stage.tokenizer, stage.origin.parent, stage.trained)
        stage.lineage(None, 0, dict.fromkeys(stage.names, 0)).save(folder)
    aside = folder / "config.yaml.new"
    aside.write_text(dump(config))
    os.replace(aside, folder / "config.yaml")
