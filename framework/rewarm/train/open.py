"""Opening a run that has trained, to look at its model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from rewarm.checkpoint import store
from rewarm.config.load import apply_override, build
from rewarm.config.run import RunConfig
from rewarm.engine.base import Engine
from rewarm.errors import UserError
from rewarm.train.stage import Stage, resolve_stage
from rewarm.train.state import MODEL

LAYOUT = ("parallel", "distributed", "megatron")
"""Settings of a run that belong to the machines it trained on; looking at its model starts from the defaults."""


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run and one of its checkpoints."""

    config: RunConfig
    checkpoint: Path

    def stage(self, num_ranks: int) -> Stage:
        """Its resolved stage."""
        return resolve_stage(self.config, num_ranks)

    def engine(self, stage: Stage) -> Engine:
        """The model of the checkpoint, on the ranks of this job. Collective."""
        from rewarm.engine.build import build_engine

        engine = build_engine(self.config, stage.architecture, stage.names)
        engine.load(self.checkpoint / MODEL, optimizer=False)
        return engine


def open_run(path: str | Path, overrides: Iterable[str] = ()) -> OpenRun:
    """Find a run's configuration and the checkpoint that is meant.

    Args:
        path: a run folder (its newest whole checkpoint), or a ``checkpoints/step-<n>`` folder inside one.
        overrides: ``a.b.c=value``; the layout is one process unless they say otherwise.

    Raises:
        UserError: if the path is neither, or no checkpoint is whole.
    """
    folder = Path(path)
    is_checkpoint = store.step_of(folder) is not None and folder.parent.name == "checkpoints"
    run = folder.resolve().parent.parent if is_checkpoint else folder.resolve()
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{path} is neither a run (no config.yaml) nor a checkpoint of one",
            fix="name a run folder such as runs/NAME, or runs/NAME/checkpoints/step-N",
        )
    values = yaml.safe_load((run / "config.yaml").read_text())
    for section in LAYOUT:
        values.pop(section, None)
    # The folder may have been moved or renamed since it was written.
    values["name"], values["runs_folder"] = run.name, str(run.parent)
    for override in overrides:
        apply_override(values, override)
    config = build(values, source=str(run / "config.yaml"))
    return OpenRun(config, _checked(folder) if is_checkpoint else _newest(run))


def _newest(run: Path) -> Path:
    damages = []
    for checkpoint in store.list_checkpoints(run / "checkpoints"):
        try:
            store.verify(checkpoint)
            return checkpoint
        except store.DamagedCheckpoint as damage:
            damages.append(str(damage))
    raise UserError(
        f"{run} has no whole checkpoint" + (f" ({damages[0]})" if damages else ""), fix="let it train and save first"
    )


def _checked(checkpoint: Path) -> Path:
    try:
        store.verify(checkpoint)
    except store.DamagedCheckpoint as damage:
        raise UserError(f"{checkpoint} is damaged: {damage}", fix="name another checkpoint of the run") from damage
    return checkpoint.resolve()
