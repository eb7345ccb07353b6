"""Losses of mixtures that nobody trained: two probes of one parent, their weights merged in every proportion.

After OP-Mix (2026, arXiv:2605.15220): two short probes of the live model on two blends, one with little and one with
much of the new data, stand for all blends between them; their merged models are evaluated instead of trained, the
log-linear mixing law is fitted to the losses, and the best blend near a prior is proposed. There the probes are LoRA
adapters; here they are short runs, whose full weights are interpolated (Wortsman et al., 2022, arXiv:2203.05482).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewarm.data.domain import Domain
from rewarm.engine.base import Engine
from rewarm.engine.environment import find_ranks
from rewarm.errors import UserError
from rewarm.evaluation.held_out import evaluate_domain
from rewarm.mixing.average import average_shares
from rewarm.mixing.weight_log import WeightLog
from rewarm.replay.lineage import Lineage
from rewarm.train.open import OpenModel, open_model
from rewarm.train.state import read_run_state

_MUST_AGREE = (
    "engine", "precision", "parent", "data", "batch.sequence_length", "batch.global_batch_size", "duration",
    "optimizer", "schedule", "evaluation.windows_per_domain",
)  # fmt: skip
"""Settings in which two probes may not differ: what is left is the mixture."""


@dataclass(frozen=True, slots=True)
class Merged:
    """One merged model."""

    share: float
    """Of the second probe; the first has the rest."""
    weights: dict[str, float]
    """The mixture that it stands for, by domain."""
    losses: dict[str, float]
    """Held-out loss of every evaluated domain, nats per token."""


def merge_probes(first: Path, second: Path, num_mixes: int) -> list[Merged]:
    """Evaluate the models between two probes, both ends included, in this process.

    Both models' weights are held on disk in fp32, beside the folder of the first, and one merged model at a time.

    Args:
        first: a run folder or a checkpoint.
        second: another, which differs in its mixture or replay alone.
        num_mixes: models, at least 2.

    Raises:
        UserError: if the runs differ in more than their mixture, or have the same one.
    """
    if find_ranks().world_size > 1:
        raise UserError("rewarm mixture merge runs in one process", fix="call it without torchrun or srun")
    probes = [open_model(first), open_model(second)]
    shares = [_mixture(probe) for probe in probes]
    _check(probes, shares)
    domains = probes[0].stage(1).evaluated
    with tempfile.TemporaryDirectory(prefix=".rewarm-merge-", dir=probes[0].folder.parent) as scratch:
        place = Path(scratch)
        _export(probes[1], place / "second").close()
        engine = _export(probes[0], place / "first")
        try:
            return [
                Merged(share, _blend(shares, share), _evaluate(engine, probes[0], domains, place, share))
                for share in np.linspace(0, 1, num_mixes).tolist()
            ]
        finally:
            engine.close()


def blend_shares(merged: Sequence[Merged], share: float) -> dict[str, float]:
    """The mixture, by domain, that stands at a share of the second probe."""
    return _blend([merged[0].weights, merged[-1].weights], share)


def _mixture(probe: OpenModel) -> dict[str, float]:
    """Mean shares of the domains in what was trained on, replayed ones included."""
    entries = WeightLog(probe.folder / "mixture.jsonl").entries()
    names = list(entries[0].weights) if entries else []
    trained = int(read_run_state(probe.checkpoint)["sampler"]["sample_index"])
    return average_shares(entries, trained, names, objective=False)


def _blend(shares: Sequence[dict[str, float]], share: float) -> dict[str, float]:
    names = list(dict.fromkeys(name for mixture in shares for name in mixture))
    one, other = shares
    return {name: (1 - share) * one.get(name, 0.0) + share * other.get(name, 0.0) for name in names}


def _check(probes: Sequence[OpenModel], shares: Sequence[dict[str, float]]) -> None:
    one, other = probes
    for setting in _MUST_AGREE:
        values = [_setting(probe.config, setting) for probe in probes]
        if values[0] != values[1]:
            raise UserError(
                f"the probes differ in {setting}: {values[0]} in {one.folder}, {values[1]} in {other.folder}",
                fix="train both with the same settings but mixture and replay",
            )
    steps = [read_run_state(probe.checkpoint)["step"] for probe in probes]
    if steps[0] != steps[1]:
        raise UserError(
            f"the probes are {steps[0]} and {steps[1]} steps long", fix="name checkpoints of the same step of both"
        )
    if Lineage.load(one.checkpoint).stages[:-1] != Lineage.load(other.checkpoint).stages[:-1]:
        raise UserError(f"{one.folder} and {other.folder} have different ancestors", fix="start both from one parent")
    if max(abs(shares[0].get(name, 0.0) - share) for name, share in shares[1].items()) < 0.01:
        raise UserError(
            f"the probes {one.folder} and {other.folder} trained on the same mixture",
            fix="give one of them little and the other much of what the mixture is to be chosen between",
        )


def _setting(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _export(probe: OpenModel, folder: Path) -> Engine:
    engine = probe.engine()
    engine.export_huggingface(folder, tokenizer=None)
    return engine


def _evaluate(
    engine: Engine, probe: OpenModel, domains: Sequence[Domain], place: Path, share: float
) -> dict[str, float]:
    merged = place / "merged"
    interpolate(place / "first", place / "second", merged, share)
    engine.import_huggingface(merged)
    shutil.rmtree(merged)
    windows, size = probe.config.evaluation.windows_per_domain, probe.config.evaluation_micro_batch_size
    rows = probe.architecture.vocab_size
    return {domain.name: evaluate_domain(engine, domain, windows, size, rows).loss for domain in domains}


def interpolate(first: Path, second: Path, output: Path, share: float) -> None:
    """Write ``(1 - share) * first + share * second`` of two Hugging Face folders of one model, a tensor at a time.

    Args:
        first: its files beside the weights go along.
        second: has the same tensors.
        output: must not exist.
        share: of the second.
    """
    import torch

    from rewarm.model.safetensors_io import TensorFolder, TensorWriter

    shutil.copytree(first, output, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    with TensorFolder(first) as one, TensorFolder(second) as other:
        shapes = one.shapes()
        assert shapes == other.shapes(), "the probes are of one architecture"
        # Buffers of whole numbers are the same in both.
        whole = [name for name, kind in one.types().items() if kind.startswith(("I", "U", "BOOL"))]
        counts = {name: one.whole(name).dtype for name in whole}
        writer = TensorWriter(output, shapes, torch.float32, exact=counts)
        for name in shapes:
            mine = one.whole(name)
            mixed = mine if name in counts else torch.lerp(mine.float(), other.whole(name).float(), share)
            writer.write(name, mixed)
        writer.close()
