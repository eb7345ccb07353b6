"""What a stage continues: a run, one of its checkpoints, or a Hugging Face folder. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rewarm.checkpoint import store
from rewarm.checkpoint.distributed import read_state
from rewarm.data.tokenizer import has_tokenizer
from rewarm.errors import UserError
from rewarm.model.description import ModelDescription, describe, description_from_dict
from rewarm.replay.lineage import Lineage

TOKENIZER = "tokenizer"
"""Folder inside a run that keeps a copy of its tokenizer."""


@dataclass(frozen=True, slots=True)
class Parent:
    """A model to start from."""

    folder: Path
    """The run folder, or the Hugging Face folder."""
    architecture: ModelDescription
    lineage: Lineage
    """Its ancestors and itself."""
    checkpoint: Path | None = None
    """The checkpoint of a run; None for a Hugging Face folder."""

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer it was trained with, or None if it carries none."""
        if self.checkpoint is not None:
            return tokenizer_of(self.folder / TOKENIZER)  # which may hold a licence alone
        return tokenizer_of(self.folder)

    @property
    def companions(self) -> Path | None:
        """Where the generation config and the licence that go with its weights lie, or None if it keeps none."""
        kept = self.folder / TOKENIZER if self.checkpoint is not None else self.folder
        return kept if kept.is_dir() else None


def tokenizer_of(huggingface: Path) -> Path | None:
    """The Hugging Face folder itself if it carries a tokenizer, fast or slow, else None."""
    return huggingface if has_tokenizer(huggingface) else None


def find_parent(path: str, engine: str | None = None) -> Parent:
    """Tell what a path names.

    Args:
        path: a run folder, a ``checkpoints/step-<n>`` folder inside one, or a Hugging Face folder.
        engine: what will train it; None takes a run with the engine it has.

    Raises:
        UserError: if it is none of them, or a run without a whole checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"parent={path}: there is no such folder",
            fix="name a run folder, a checkpoint inside one (runs/NAME/checkpoints/step-N), or a Hugging Face folder",
        )
    if store.step_of(folder) is not None and folder.parent.name == "checkpoints":
        return from_checkpoint(folder, engine)
    if (folder / "checkpoints").is_dir():
        return _from_run(folder, engine)
    if (folder / "config.json").is_file():
        return Parent(folder, describe(folder, engine or "megatron"), Lineage.load(folder))
    raise UserError(
        f"parent={path} is neither a run (no checkpoints/) nor a Hugging Face folder (no config.json)",
        fix="name a folder that is one of them"
        + ("; this run has no checkpoint yet" if (folder / "config.yaml").exists() else ""),
    )


def _from_run(folder: Path, engine: str | None) -> Parent:
    """The newest checkpoint of a run whose files are all there."""
    damages = []
    for checkpoint in store.list_checkpoints(folder / "checkpoints"):
        try:
            store.verify(checkpoint, names=())
            return from_checkpoint(checkpoint, engine)
        except store.DamagedCheckpoint as damage:
            damages.append(str(damage))
    raise UserError(
        f"parent={folder} is a run without a whole checkpoint" + (f" ({damages[0]})" if damages else ""),
        fix="let it save one first, or name another parent",
    )


def from_checkpoint(checkpoint: Path, engine: str | None = None) -> Parent:
    """A run as it was at one of its checkpoints.

    Args:
        checkpoint: its folder.
        engine: what will train it; None takes it with the engine it has.

    Raises:
        UserError: if the checkpoint is damaged, or another engine wrote it.
    """
    try:
        store.verify(checkpoint, names=())
        state = read_state(checkpoint)
        architecture = description_from_dict(state["architecture"])
    except (store.DamagedCheckpoint, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"parent={checkpoint} is damaged: {error}", fix="name another checkpoint of the run") from error
    if engine is not None and state["engine"] != engine:
        run = checkpoint.parent.parent
        raise UserError(
            f"{checkpoint} was saved by engine={state['engine']}, this run has engine={engine}",
            fix=f"run: rewarm convert {run} --engine {engine}, or set engine={state['engine']}",
        )
    return Parent(checkpoint.parent.parent, architecture, Lineage.load(checkpoint), checkpoint)
