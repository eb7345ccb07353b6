"""What the ranks run to hold 8-bit moments against fp32 ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ranks.offload_workers import build, train
from rewarm.engine.base import StepResult

Losses = list[float]


def _losses(results: list[StepResult]) -> Losses:
    return [result.loss for result in results]


def curve(settings: dict[str, Any], steps: int) -> tuple[Losses, dict[str, float]]:
    """Losses of a run, and what its state takes: bytes per parameter on the device and in torch's hands."""
    engine = build(settings)
    losses = _losses(train(engine, 0, steps))
    optimizer = engine._optimizer._inner
    held = sum(tensor.numel() * 4 for values in optimizer.state.values() for tensor in values.values())
    offload = getattr(optimizer, "offload", None)
    placed = 0 if offload is None else offload.inner.states.device_bytes()
    count = engine.parameter_count()
    engine.close()
    return losses, {"torch": held / count, "placed": placed / count}


def hand_over(
    before: dict[str, Any], after: dict[str, dict[str, Any]], folder: Path, steps: int
) -> tuple[Losses, dict[str, Losses]]:
    """Train, save, train on; and the later steps again from the checkpoint under other settings, by name."""
    engine = build(before)
    train(engine, 0, steps)
    engine.save(folder)
    expected = _losses(train(engine, steps, 2 * steps))
    engine._optimizer.close()
    return expected, {name: resumed(settings, folder, steps, name != "reset") for name, settings in after.items()}


def resumed(settings: dict[str, Any], folder: Path, steps: int, optimizer: bool = True) -> Losses:
    """The later steps from a checkpoint."""
    engine = build(settings)
    engine.load(folder, optimizer=optimizer)
    losses = _losses(train(engine, steps, 2 * steps))
    engine._optimizer.close()
    return losses
