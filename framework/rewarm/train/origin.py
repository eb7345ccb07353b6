"""Where a run's weights come from: its own checkpoints first, its parent only when it has none."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path

from rewarm.checkpoint import store
from rewarm.checkpoint.distributed import read_state
from rewarm.config.registry import OPTIMIZERS
from rewarm.config.run import RunConfig
from rewarm.config.saved import FILE_NAME as CONFIG
from rewarm.config.saved import saved_setting
from rewarm.errors import UserError
from rewarm.model.description import ModelDescription
from rewarm.model.files import list_carried
from rewarm.replay.lineage import FILE_NAME as LINEAGE
from rewarm.replay.lineage import Lineage
from rewarm.resilience.status import read_status
from rewarm.train.companions import check_digests
from rewarm.train.parent import Parent, find_parent, from_checkpoint, is_of_a_run


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run starts or goes on from."""

    parent: Parent | None
    """None when the run has no parent, or goes on from its own checkpoints and the parent may be gone."""
    architecture: ModelDescription | None
    """None when the model starts from random weights of the configuration's shape."""
    lineage: Lineage
    """The ancestors, without the run itself."""
    tokenizer: Path | None
    """Tokenizer of the run itself or of its parent."""
    checkpoint: Path | None = None
    """The run's own, from which it goes on; None for a run that starts."""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Identity of the run, wherever its folder lies: given once, when it starts."""


def find_origin(config: RunConfig) -> Origin:
    """Look at the run folder, then at the parent.

    Raises:
        UserError: if the run has no checkpoint of its own and its parent cannot be used as asked; if it has lost the
            checkpoints that it had.
    """
    checkpoint = _own_checkpoint(config.folder)
    if checkpoint is not None:
        if not (config.folder / CONFIG).is_file():
            raise _without_config(config.folder, checkpoint)
        own = from_checkpoint(checkpoint, config.engine)
        itself = own.lineage.stages[-1:]
        if not itself:
            raise UserError(f"{checkpoint / LINEAGE} is damaged: it names no stage", fix="restore it from a copy")
        ancestors = Lineage(own.lineage.stages[:-1])
        return Origin(None, own.architecture, ancestors, own.tokenizer, checkpoint, itself[0].identity)
    check_nothing_lost(config.folder)
    if config.parent is None:
        return Origin(None, None, Lineage(), None)
    parent = find_parent(config.parent, config.engine)
    if parent.companions is not None:
        check_digests(parent.companions)
        list_carried(parent.companions)  # refuses links that lead out
    if parent.checkpoint is None and config.keeps_optimizer_state:
        raise UserError(
            f"optimizer_state=keep, but parent={config.parent} is a Hugging Face folder, which has no optimizer state",
            fix="set optimizer_state=reset, or name a run as parent",
        )
    if config.keeps_optimizer_state:
        _check_optimizer(config, parent)
    return Origin(parent, parent.architecture, parent.lineage, parent.tokenizer)


def _own_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose files are all there; None if there never was one in the folder.

    Raises:
        UserError: if there are some, all of them damaged.
    """
    damages = []
    for checkpoint in store.list_checkpoints(run / "checkpoints"):
        try:
            store.verify(checkpoint, names=(store.STATE, LINEAGE))
            return checkpoint
        except store.DamagedCheckpoint as damage:
            damages.append(str(damage))
    if damages:
        raise UserError(f"every checkpoint of {run} is damaged, the newest: {damages[0]}", fix=_restore(run))
    return None


def _restore(run: Path) -> str:
    return (
        f"restore one of them into {run / 'checkpoints'}; to begin again on purpose give the stage another name, or "
        f"remove {run} first"
    )


def _without_config(run: Path, checkpoint: Path) -> UserError:
    if is_of_a_run(read_state(checkpoint)):
        return UserError(
            f"{run} has checkpoints, but its {CONFIG} is gone: nothing says whether this is the same stage",
            fix=f"restore it from a copy, or give the stage another name, with parent: {run}",
        )
    return UserError(
        f"{run} holds an imported model, and not a run that could go on",
        fix=f"give the stage another name, with parent: {run}",
    )


def check_nothing_lost(run: Path) -> None:
    """Refuse to begin at step 0 in a folder whose run has saved before: its metrics, weight log and lineage would be
    erased. A run that ended before its first checkpoint has lost nothing that could be gone on from.

    Args:
        run: a folder without checkpoints.

    Raises:
        UserError: naming what is still there.
    """
    traces = []
    if store.named_latest(run / "checkpoints") is not None:
        traces.append(f"checkpoints/{store.LATEST}")
    if (run / LINEAGE).is_file() and any(stage.tokens for stage in Lineage.load(run).stages[-1:]):
        traces.append(LINEAGE)
    status = read_status(run)
    if status is not None and status.state != "running" and status.step > 0:
        traces.append("status.json")
    if traces:
        raise UserError(
            f"{run} has no checkpoint, but {' and '.join(traces)} of a run that had saved some: starting at step 0 "
            "would erase its metrics, its weight log and its lineage",
            fix=_restore(run),
        )


def _check_optimizer(config: RunConfig, parent: Parent) -> None:
    """Refuse to keep moments that one of the two update rules does not fill: AdamW would correct the zeros of a
    parent without any as if they stood for all of its updates."""
    before, now = parent.optimizer, config.optimizer.name
    if before is None:
        if not (parent.folder / CONFIG).is_file():
            return  # an imported model: the engine says that its checkpoint holds no optimizer state
        before = saved_setting(parent.folder, "optimizer.name")
    if before not in OPTIMIZERS or OPTIMIZERS[before].target.moments != config.optimizer.rule.moments:
        raise UserError(
            f"optimizer_state=keep, but parent={config.parent} was trained with optimizer.name={before}, and this "
            f"stage has optimizer.name={now}: they do not keep the same moments",
            fix="set optimizer_state=reset, or train with the parent's optimizer",
        )
