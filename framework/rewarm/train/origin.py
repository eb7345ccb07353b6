"""Where a run's weights come from: its own checkpoints first, its parent only when it has none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from rewarm.checkpoint import store
from rewarm.config.registry import OPTIMIZERS
from rewarm.config.run import RunConfig
from rewarm.errors import UserError
from rewarm.model.description import ModelDescription
from rewarm.model.files import list_carried
from rewarm.replay.lineage import Lineage
from rewarm.train.companions import check_digests
from rewarm.train.parent import Parent, find_parent, from_checkpoint


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


def find_origin(config: RunConfig) -> Origin:
    """Look at the run folder, then at the parent.

    Raises:
        UserError: if the run has no checkpoint of its own and its parent cannot be used as asked.
    """
    for checkpoint in store.list_checkpoints(config.folder / "checkpoints"):
        try:
            store.verify(checkpoint, names=())
        except store.DamagedCheckpoint:
            continue
        if not (config.folder / "config.yaml").is_file():
            raise UserError(
                f"{config.folder} holds an imported model, and not a run that could go on",
                fix=f"give the stage another name, with parent: {config.folder}",
            )
        own = from_checkpoint(checkpoint, config.engine)
        return Origin(None, own.architecture, Lineage(own.lineage.stages[:-1]), own.tokenizer, checkpoint)
    if config.parent is None:
        return Origin(None, None, Lineage(), None)
    parent = find_parent(config.parent, config.engine)
    if parent.companions is not None:
        check_digests(parent.companions)
        list_carried(parent.companions)  # refuses links that lead out
    if parent.checkpoint is None and config.optimizer_state == "keep":
        raise UserError(
            f"optimizer_state=keep, but parent={config.parent} is a Hugging Face folder, which has no optimizer state",
            fix="set optimizer_state=reset, or name a run as parent",
        )
    if config.optimizer_state == "keep":
        _check_optimizer(config, parent)
    return Origin(parent, parent.architecture, parent.lineage, parent.tokenizer)


def _check_optimizer(config: RunConfig, parent: Parent) -> None:
    """Refuse to keep moments that one of the two update rules does not fill: AdamW would correct the zeros of a
    parent without any as if they stood for all of its updates."""
    written = parent.folder / "config.yaml"
    if not written.is_file():
        return  # an imported model: the engine says that its checkpoint holds no optimizer state
    before, now = yaml.safe_load(written.read_text())["optimizer"]["name"], config.optimizer.name
    if before not in OPTIMIZERS or OPTIMIZERS[before].target.moments != config.optimizer.rule.moments:
        raise UserError(
            f"optimizer_state=keep, but parent={config.parent} was trained with optimizer.name={before}, and this "
            f"stage has optimizer.name={now}: they do not keep the same moments",
            fix="set optimizer_state=reset, or train with the parent's optimizer",
        )
