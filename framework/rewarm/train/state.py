"""What a checkpoint holds, and how a run is put back from one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarm.errors import UserError

if TYPE_CHECKING:
    from rewarm.train.run import Run

MODEL = "model"
RANDOM = "random"


def checkpoint_state(run: Run) -> dict[str, Any]:
    """Everything that can change the next step but is not sharded, as plain JSON values."""
    return {
        "step": run.step,
        "tokens": run.tokens,
        "learning_rate": run.last_learning_rate,
        "sampler": run.feed.state_dict(),
        "replay": run.stage.replay_windows,
        "hooks": run.extra_state,
        "architecture": run.stage.architecture.to_dict(),
        "layout": _layout(run),
        "threads": run.threads,
        "engine": run.config.engine,
        "precision": run.config.precision,
    }


def _layout(run: Run) -> dict[str, Any]:
    return {"ranks": run.engine.world_size, **run.config.parallel.model_dump(mode="json")}


def prepare_sharded(run: Run, folder: Path) -> None:
    """Write the lineage up to here and make the folders that every rank writes into. On the main rank alone."""
    losses = run.tracker.last_losses
    lineage = run.stage.lineage(run.last_learning_rate, run.tokens, run.feed.cursors(), losses)
    for place in (folder, run.folder):
        lineage.save(place)
    (folder / MODEL).mkdir()
    (folder / RANDOM).mkdir()


def write_sharded(run: Run, folder: Path) -> None:
    """Write the model, the optimizer and every rank's random state. Collective."""
    run.engine.save(folder / MODEL, optimizer=True)
    (folder / RANDOM / f"rank-{run.engine.rank:05d}.pickle").write_bytes(pickle.dumps(run.engine.rng_state()))


def restore(run: Run, checkpoint: Path, state: dict[str, Any]) -> None:
    """Put a run back to where a checkpoint was taken. Collective.

    On the layout it was saved with this is exact. On another one the sharded state is resharded, the samples are the
    same, and the random state, which belongs to ranks, starts from the seed.

    Args:
        run: freshly assembled; its sampler is restored by the assembly.
        checkpoint: verified.
        state: its ``state.json``.
    """
    if state["engine"] != run.config.engine:
        raise UserError(
            f"{checkpoint} was saved by engine={state['engine']}, this run has engine={run.config.engine}",
            fix=f"set engine={state['engine']}, or start a new stage with parent={checkpoint}",
        )
    run.engine.load(checkpoint / MODEL, optimizer=True)
    run.step, run.tokens = int(state["step"]), int(state["tokens"])
    run.last_learning_rate = state["learning_rate"]
    run.extra_state = dict(state["hooks"])
    if state["layout"] == _layout(run):
        run.threads = list(state.get("threads", []))
        saved = checkpoint / RANDOM / f"rank-{run.engine.rank:05d}.pickle"
        run.engine.set_rng_state(pickle.loads(saved.read_bytes()))
    elif run.config.optimizer.eight_bit:
        run.tracker.message("on another layout 8-bit moments lie in other blocks, and are rounded once more")
