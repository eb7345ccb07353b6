"""Opening a model that has trained or was imported, to look at it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarm.checkpoint import store
from rewarm.checkpoint.distributed import read_state
from rewarm.config.load import apply_override, build
from rewarm.config.run import RunConfig
from rewarm.config.saved import read_saved
from rewarm.config.training import without_unread
from rewarm.engine.base import Engine
from rewarm.errors import UserError
from rewarm.model.description import ModelDescription
from rewarm.train.parent import find_parent
from rewarm.train.stage import Stage, resolve_stage
from rewarm.train.state import MODEL

_OF_THE_MACHINE = ("parallel", "distributed", "megatron", "offload", "tracking", "stop_at")
"""Settings of a run that belong to the machines it trained on, or to one invocation; looking at its model starts from
the defaults."""


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A checkpoint with what is needed to run its model."""

    config: RunConfig
    folder: Path
    """The run folder."""
    checkpoint: Path
    architecture: ModelDescription
    tokenizer: Path | None
    companions: Path | None
    """Folder with what goes along with an export: tokenizer, generation config, licence."""

    def stage(self, num_ranks: int) -> Stage:
        """The resolved stage of the run; an imported model has none."""
        return resolve_stage(self.config, num_ranks)

    def engine(self, *, optimizer: bool = False) -> Engine:
        """The model on the ranks of this job, with its optimizer's state if that is asked for. Collective."""
        from rewarm.engine.build import build_engine

        engine = build_engine(with_fp32_state(self.config), self.architecture, list(self.config.data))
        engine.load(self.checkpoint / MODEL, optimizer=optimizer)
        return engine


def with_fp32_state(config: RunConfig) -> RunConfig:
    """The same run with the optimizer's state as checkpoints hold it, which is so read and written without loss."""
    if not config.optimizer.eight_bit:
        return config
    plain = config.optimizer.model_copy(update={"name": "adamw"})
    return config.model_copy(update={"optimizer": plain})


def open_model(path: str | Path, overrides: Iterable[str] = ()) -> OpenModel:
    """Find a checkpoint and the configuration that goes with it.

    Args:
        path: a run folder (its newest whole checkpoint), or a ``checkpoints/step-<n>`` folder inside one.
        overrides: ``a.b.c=value``; the layout is one process unless they say otherwise.

    Raises:
        UserError: if the path is neither, or the checkpoint is damaged.
    """
    found = find_parent(str(path))
    if found.checkpoint is None:
        raise UserError(
            f"{path} is a Hugging Face folder, and a run is needed here", fix="name a run folder such as runs/NAME"
        )
    try:
        store.verify(found.checkpoint)
    except store.DamagedCheckpoint as damage:
        raise UserError(f"{found.checkpoint} is damaged: {damage}", fix="name another one of the run") from damage
    folder = found.folder.resolve()
    values = _settings(folder, found.checkpoint, found.architecture)
    for section in _OF_THE_MACHINE:
        values.pop(section, None)
    values["schedule"] = without_unread(values.get("schedule"))
    kept = values.pop("deepspeed", None)
    # Whether the model's Python files may run is for the one to say who runs this, and never for the folder.
    values["deepspeed"] = {key: kept[key] for key in ("attention",) if isinstance(kept, dict) and key in kept}
    # The folder may have been moved or renamed since it was written, and the weights are in the checkpoint.
    values |= {"name": folder.name, "runs_folder": str(folder.parent)}
    for override in overrides:
        apply_override(values, override)
    config = build(values, source=str(path))
    return OpenModel(config, folder, found.checkpoint.resolve(), found.architecture, found.tokenizer, found.companions)


def _settings(folder: Path, checkpoint: Path, architecture: ModelDescription) -> dict[str, Any]:
    """The run's own settings, or, for an imported model, which has none, as few as an engine needs."""
    if (folder / "config.yaml").is_file():
        return read_saved(folder)
    return {
        "parent": str(checkpoint),
        "precision": read_state(checkpoint)["precision"],
        "data": {},
        "engine": read_state(checkpoint)["engine"],
        "batch": {"sequence_length": min(256, architecture.max_position_embeddings or 256)},
    }
