"""What a stage continues: a run, one of its checkpoints, or a Hugging Face folder. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarm.checkpoint import store
from rewarm.checkpoint.distributed import read_state
from rewarm.config.saved import FILE_NAME as CONFIG
from rewarm.data.tokenizer import has_tokenizer
from rewarm.errors import UserError
from rewarm.model.description import ModelDescription, describe, description_from_dict
from rewarm.replay.lineage import FILE_NAME as LINEAGE
from rewarm.replay.lineage import Lineage

TOKENIZER = "tokenizer"
"""Folder inside a run that keeps a copy of its tokenizer."""


@dataclass(frozen=True, slots=True)
class Parent:
    """A model to start from."""

    folder: Path
    """The run folder, or the Hugging Face folder; of a checkpoint that lies outside of its run, the checkpoint."""
    architecture: ModelDescription
    lineage: Lineage
    """Its ancestors and itself."""
    checkpoint: Path | None = None
    """The checkpoint of a run; None for a Hugging Face folder."""
    optimizer: str | None = None
    """Name of the update rule that the checkpoint's moments are of; None where nobody wrote it down."""

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


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, through links; None if it was copied out of it."""
    place = checkpoint.resolve()
    return checkpoint.parent.parent if _inside_run(checkpoint) else place.parent.parent if _inside_run(place) else None


def _inside_run(checkpoint: Path) -> bool:
    return store.step_of(checkpoint) is not None and checkpoint.parent.name == "checkpoints"


def find_parent(path: str, engine: str | None = None) -> Parent:
    """Tell what a path names.

    Args:
        path: a run folder, a checkpoint of one (a ``checkpoints/step-<n>`` folder, or a link to one or a copy of one
            anywhere), or a Hugging Face folder.
        engine: what will train it; None takes a run with the engine it has.

    Raises:
        UserError: if it is none of them, or a run whose newest checkpoint is not whole.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"parent={path}: there is no such folder",
            fix="name a run folder, a checkpoint inside one (runs/NAME/checkpoints/step-N), or a Hugging Face folder",
        )
    if (folder / store.MANIFEST).is_file() or _inside_run(folder):
        return from_checkpoint(folder, engine)
    if (folder / "checkpoints").is_dir():
        return from_checkpoint(newest_of(folder), engine)
    if (folder / "config.json").is_file():
        return Parent(folder, describe(folder, engine or "megatron"), Lineage.load(folder))
    raise _neither(path, folder)


def _neither(path: str, folder: Path) -> UserError:
    """The error for a folder that is nothing to start from, which says what it looks like."""
    if (folder / store.STATE).is_file():
        return UserError(
            f"parent={path} looks like a checkpoint, but it has no {store.MANIFEST}: it is not whole",
            fix="copy the whole folder again, hidden files too (cp -r), from the run that it came from",
        )
    if (folder.resolve().parent / store.MANIFEST).is_file():
        return UserError(
            f"parent={path} is a part of a checkpoint", fix=f"name the whole of it: parent={folder.parent}"
        )
    inside = store.list_checkpoints(folder)
    if inside:
        return UserError(f"parent={path} is a folder of checkpoints", fix=f"name one of them: parent={inside[0]}")
    return UserError(
        f"parent={path} is neither a run (no checkpoints/) nor a Hugging Face folder (no config.json)",
        fix="name a folder that is one of them"
        + ("; this run has no checkpoint yet" if (folder / CONFIG).exists() else ""),
    )


def newest_of(run: Path) -> Path:
    """The newest checkpoint of a run, which must be whole: an older one is another model, to be asked for by name.

    Raises:
        UserError: if there is none, or if it is incomplete, gone or damaged.
    """
    found = store.list_checkpoints(run / "checkpoints")
    latest = store.named_latest(run / "checkpoints")
    problem = None
    if found and latest is not None and latest > (store.step_of(found[0]) or 0):
        problem, older = f"step-{latest}, which checkpoints/{store.LATEST} names, is not there", found
    elif found:
        problem, older = _damage_of(found[0]), found[1:]
    if found and problem is None:
        return found[0]
    if not found:
        raise UserError(
            f"parent={run} is a run without a whole checkpoint", fix="let it save one first, or name another parent"
        )
    whole = next((checkpoint for checkpoint in older if _damage_of(checkpoint) is None), None)
    raise UserError(
        f"the newest checkpoint of {run} is damaged: {problem}",
        fix="restore it"
        + (f", or name the older one that is to be taken: {whole}" if whole else ", or name another parent"),
    )


def _damage_of(checkpoint: Path) -> str | None:
    """What is seen to be wrong without reading the tensors."""
    try:
        store.verify(checkpoint, names=(store.STATE, LINEAGE))
    except store.DamagedCheckpoint as damage:
        return str(damage)
    return None


def from_checkpoint(checkpoint: Path, engine: str | None = None) -> Parent:
    """A run as it was at one of its checkpoints.

    Args:
        checkpoint: its folder.
        engine: what will train it; None takes it with the engine it has.

    Raises:
        UserError: if the checkpoint is damaged, or another engine wrote it.
    """
    fix = "name another checkpoint of the run, or restore this one with all its files, hidden ones too"
    damage = _damage_of(checkpoint)
    if damage is not None:
        raise UserError(f"parent={checkpoint} is damaged: {damage}", fix=fix)
    state = read_state(checkpoint)
    try:
        architecture = description_from_dict(state["architecture"])
        written_by, optimizer = state["engine"], state.get("optimizer")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"parent={checkpoint} is damaged: {error!r} in {store.STATE}", fix=fix) from error
    run = run_of(checkpoint)
    if engine is not None and written_by != engine:
        raise UserError(
            f"{checkpoint} was saved by engine={written_by}, this run has engine={engine}",
            fix=(f"run: rewarm convert {run} --engine {engine}, or " if run else "") + f"set engine={written_by}",
        )
    return Parent(run or checkpoint, architecture, Lineage.load(checkpoint), checkpoint, optimizer)


def is_of_a_run(state: dict[str, Any]) -> bool:
    """True for the state of a run that trained, false for that of an imported model."""
    return "sampler" in state
