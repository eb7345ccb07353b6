"""What a checkpoint holds, and how a run is put back from one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarm.checkpoint.distributed import read_state
from rewarm.checkpoint.random_state import load_random_state, save_random_state
from rewarm.checkpoint.store import STATE
from rewarm.config.run import RunConfig
from rewarm.engine.base import Engine
from rewarm.errors import UserError
from rewarm.train.hooks.build import hooks_state, make_sharded_folders, write_sharded_hooks

if TYPE_CHECKING:
    from rewarm.train.run import Run

MODEL = "model"
RANDOM = "random"
WEIGHT_LOG = "mixture.jsonl"


@dataclass(slots=True)
class Position:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    learning_rate: float | None = None
    hooks: dict[str, Any] = field(default_factory=dict)
    """State of the hooks by name."""
    checkpoint: Path | None = None
    """Where files of hooks stand; None where the run begins."""
    threads: list[int] = field(default_factory=list)
    """Of each rank; empty where they are to be chosen."""


_TYPES: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "tokens": int,
    "learning_rate": (int, float, type(None)),
    "sampler": dict,
    "hooks": dict,
    "architecture": dict,
    "layout": (dict, type(None)),
    "engine": str,
    "precision": str,
}


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """What :func:`checkpoint_state` gave when a run's checkpoint was written.

    Raises:
        UserError: if the file is damaged, or is not of a run that trained.
    """
    state = read_state(checkpoint)
    for name, expected in _TYPES.items():
        if name not in state or not isinstance(state[name], expected):
            raise UserError(
                f"{checkpoint / STATE} is not the state of a run: {name} is {state.get(name, 'missing')!r}",
                fix="restore the checkpoint from a copy, or start another stage with an older one as parent",
            )
    return state


def checkpoint_state(run: Run) -> dict[str, Any]:
    """Everything that can change the next step but is not sharded, as plain JSON values."""
    return {
        "step": run.step,
        "tokens": run.tokens,
        "learning_rate": run.last_learning_rate,
        "sampler": run.feed.state_dict(),
        "replay": run.stage.replay_windows,
        "hooks": hooks_state(run.hooks),
        "architecture": run.stage.architecture.to_dict(),
        "layout": _layout(run.engine, run.config),
        "threads": run.threads,
        "engine": run.config.engine,
        "precision": run.config.precision,
        "optimizer": run.config.optimizer.name,
        "weight_log": _log_digest(run.folder) if run.engine.is_main else None,
    }


def _layout(engine: Engine, config: RunConfig) -> dict[str, Any]:
    return {"ranks": engine.world_size, **config.parallel.model_dump(mode="json")}


def _log_digest(folder: Path, length: int | None = None) -> dict[str, Any]:
    """Length and digest of the weight log, or of its beginning."""
    content = (folder / WEIGHT_LOG).read_bytes()[:length]
    return {"bytes": len(content), "blake2b": hashlib.blake2b(content, digest_size=16).hexdigest()}


def check_weight_log(folder: Path, state: dict[str, Any]) -> None:
    """Refuse a weight log that is not the one a checkpoint was written with, to which lines may have been added.

    Args:
        folder: the run folder.
        state: of the checkpoint; one of an earlier version does not say.

    Raises:
        UserError: if it is missing or changed.
    """
    written = state.get("weight_log")
    fix = f"restore {folder / WEIGHT_LOG} from a copy of the run: it decides which samples follow"
    try:
        found = _log_digest(folder, None if written is None else int(written["bytes"]))
    except OSError as error:
        raise UserError(f"the weight log {folder / WEIGHT_LOG} cannot be read: {error.strerror}", fix=fix) from error
    if written is not None and found != written:
        raise UserError(
            f"the weight log {folder / WEIGHT_LOG} is not what it was at step {state['step']}, when the checkpoint "
            "was written",
            fix=fix,
        )


def prepare_sharded(run: Run, folder: Path) -> None:
    """Write the lineage up to here and make the folders that every rank writes into. On the main rank alone."""
    run.stage.lineage(run.last_learning_rate, run.tokens, run.feed.cursors(), run.tracker.last_losses).save(folder)
    (folder / MODEL).mkdir()
    (folder / RANDOM).mkdir()
    make_sharded_folders(run.hooks, folder)


def write_sharded(run: Run, folder: Path) -> None:
    """Write the model, the optimizer, every rank's random state and what hooks keep in files. Collective."""
    run.engine.save(folder / MODEL, optimizer=True)
    save_random_state(folder / RANDOM, run.engine.rank, run.engine.rng_state())
    write_sharded_hooks(run, folder)


def restore(
    engine: Engine, config: RunConfig, checkpoint: Path, state: dict[str, Any], messages: list[str]
) -> Position:
    """Put the model, the optimizer and the random state back to where a checkpoint was taken. Collective.

    On the layout it was saved with this is exact. On another one the sharded state is resharded, the samples are the
    same, and the random state, which belongs to ranks, starts from the seed.

    Args:
        engine: freshly built.
        config: of the run.
        checkpoint: verified.
        state: its ``state.json``.
        messages: what the user should know is added to it.

    Returns:
        Where the run stands; its sampler and hooks are restored by those who have them.

    Raises:
        UserError: if the checkpoint is of another engine or model, or cannot be read.
    """
    if state["engine"] != config.engine:
        raise UserError(
            f"{checkpoint} was saved by engine={state['engine']}, this run has engine={config.engine}",
            fix=f"set engine={state['engine']}, or start a new stage with parent={checkpoint}",
        )
    engine.load(checkpoint / MODEL, optimizer=True)
    position = Position(int(state["step"]), int(state["tokens"]), state["learning_rate"], dict(state["hooks"]))
    position.checkpoint = checkpoint
    if state["layout"] == _layout(engine, config):
        position.threads = list(state.get("threads", []))
        engine.set_rng_state(load_random_state(checkpoint / RANDOM, engine.rank))
    elif config.optimizer.eight_bit:
        messages.append("on another layout 8-bit moments lie in other blocks, and are rounded once more")
    return position
