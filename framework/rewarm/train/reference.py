"""Held-out losses of a reference model: from a run that evaluated the same windows, or from ``rewarm evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewarm.checkpoint.distributed import read_state
from rewarm.config.json_text import parse_json
from rewarm.config.run import RunConfig
from rewarm.config.saved import saved_setting
from rewarm.data.domain import Domain
from rewarm.errors import UserError
from rewarm.replay.lineage import Lineage
from rewarm.tracking.metrics import read_lines

SETTING = "mixture.doremi.reference"


def reference_losses(place: Path, config: RunConfig, domains: Sequence[Domain]) -> dict[str, float]:
    """Losses of a reference model on the windows that a stage evaluates.

    Args:
        place: a run, one of its checkpoints, or a file of ``rewarm evaluate --json``.
        config: of the stage.
        domains: of the stage, those that a loss is wanted for.

    Returns:
        Nats per token by name, as :class:`~rewarm.evaluation.held_out.HeldOutLoss` has them.

    Raises:
        UserError: if the losses are not there, or are of other windows.
    """
    if place.is_file():
        return _from_file(place, config, domains)
    run, step = _run_of(place)
    _check_same_windows(run, config, domains)
    lines = [line for line in read_lines(run / "evaluation.jsonl") if step is None or line["step"] == step]
    if not lines:
        raise UserError(
            f"{SETTING}={place}: the run has no evaluation of step {step}",
            fix=f"measure it: rewarm evaluate {place} --json > reference.json, and name that file",
        )
    # By content: the reference may have known a domain by another name.
    names = {domain.fingerprint: domain.name for domain in Lineage.load(run).domains()}
    return {domain.name: _loss(place, lines[-1]["domains"], names[domain.fingerprint]) for domain in domains}


def _run_of(place: Path) -> tuple[Path, int | None]:
    """The run, and the step if the place is a checkpoint."""
    if (place / "config.yaml").is_file():
        return place, None
    if (place / "state.json").is_file():
        place = place.resolve()
        return place.parent.parent, int(read_state(place)["step"])
    raise UserError(
        f"{SETTING}={place} is neither a run, nor a checkpoint, nor a file",
        fix="name the folder of a run that trained the reference model, or give the losses by domain",
    )


def _check_same_windows(run: Path, config: RunConfig, domains: Sequence[Domain]) -> None:
    for section, key in (("batch", "sequence_length"), ("evaluation", "windows_per_domain")):
        theirs, ours = saved_setting(run, f"{section}.{key}"), getattr(getattr(config, section), key)
        if theirs != ours:
            raise UserError(
                f"{SETTING}={run} was evaluated with {section}.{key}={theirs}, this stage has {ours}: the losses are "
                "of other windows",
                fix=f"set {section}.{key}={theirs}, or measure the reference again: rewarm evaluate {run} --json",
            )
    known = {domain.fingerprint: domain for domain in Lineage.load(run).domains()}
    for domain in domains:
        theirs = known.get(domain.fingerprint)
        if theirs is None:
            raise UserError(
                f"{SETTING}={run} did not train on the content of domain {domain.name!r}",
                fix=f"name the output of: rewarm evaluate {run} --data {domain.name}={domain.path} ... --json",
            )
        ours = domain.settings.held_out
        if theirs.held_out != (None if ours is None else str(Path(ours).resolve())):
            raise UserError(f"{SETTING}={run} held out {theirs.held_out} for domain {domain.name!r}, this stage {ours}")


def _from_file(place: Path, config: RunConfig, domains: Sequence[Domain]) -> dict[str, float]:
    try:
        measured = dict(parse_json(place.read_text(encoding="utf-8-sig"))["domains"])
        tokens = {name: int(row["tokens"]) for name, row in measured.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{SETTING}={place} is not the output of rewarm evaluate --json: {error}",
            fix="write it with: rewarm evaluate MODEL --data NAME=PATH --json",
        ) from error
    losses = {}
    for domain in domains:
        losses[domain.name] = _loss(place, measured, domain.name)
        length = config.batch.sequence_length
        expected = min(config.evaluation.windows_per_domain, len(domain.held_out)) * length
        if tokens[domain.name] != expected:
            raise UserError(
                f"{SETTING}={place} is of {tokens[domain.name]} held-out tokens of {domain.name!r}, this stage "
                f"evaluates {expected}",
                fix=f"measure it with --windows {config.evaluation.windows_per_domain} and windows of {length} tokens",
            )
    return losses


def _loss(place: Path, measured: dict[str, Any], name: str) -> float:
    loss = measured.get(name, {}).get("loss")
    if not isinstance(loss, int | float):
        raise UserError(
            f"{SETTING}={place} has no loss for domain {name!r}", fix="evaluate the reference on every new domain"
        )
    return float(loss)
