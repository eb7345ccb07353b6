"""Runs with 8-bit moments stay beside those with fp32 moments, take a quarter of their memory and share checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ranks import eight_bit_workers as workers
from ranks.harness import run_ranks

FP32: dict[str, Any] = {"model": {"num_layers": 2}, "batch": {"micro_batch_size": 4}}
EIGHT_BIT: dict[str, Any] = {**FP32, "optimizer": {"name": "adamw_8bit", "gradient_clipping": 0.5}}
STEPS = 30


def gap(found: list[float], expected: list[float]) -> float:
    """Largest difference of two loss curves, as a part of the loss."""
    return float(np.max(np.abs(np.subtract(found, expected)) / expected))


def test_the_loss_stays_beside_that_of_fp32_moments_in_a_quarter_of_their_memory() -> None:
    """Moments set to zero on the way, a loss of state that training survives, show as 5%: see the test below."""
    (expected, plain), (found, eight) = (run_ranks(workers.curve, 1, each, 100)[0] for each in (FP32, EIGHT_BIT))
    assert expected[-1] < 0.5 * expected[0]
    assert 0 < gap(found, expected) < 0.012
    assert np.mean(found[-20:]) == pytest.approx(np.mean(expected[-20:]), rel=0.005)
    assert 8 <= plain["torch"] < 8.1 and plain["placed"] == 0  # rows that pad the vocabulary have moments too
    # Two bytes, two scales per 2048 of them, and for each of the small tensors of this model a block of its own.
    assert eight["torch"] == 0 and 2 < eight["placed"] < 2.3


def test_a_checkpoint_goes_from_one_kind_of_moments_to_the_other(tmp_path: Path) -> None:
    """What is resumed with the same kind on the same layout has the same bits, the rest nearly the same losses."""
    streamed = {**EIGHT_BIT, "offload": {"mode": "streamed", "subgroup_size": 8192, "slots": 2}}
    others = {"same": EIGHT_BIT, "streamed": streamed, "other kind": FP32, "reset": EIGHT_BIT}
    two = {**EIGHT_BIT, "parallel": {"tensor": 2}}
    for name, before, after in (("8 bits", EIGHT_BIT, others), ("fp32", FP32, {"other kind": EIGHT_BIT})):
        (tmp_path / name).mkdir()
        expected, found = run_ranks(workers.hand_over, 1, before, after, tmp_path / name, STEPS)[0]
        assert found["other kind"][0] == pytest.approx(expected[0], rel=1e-6)  # the weights are in fp32
        assert 0 < gap(found["other kind"], expected) < 0.004
        if before is EIGHT_BIT:
            assert found["same"] == found["streamed"] == expected
            assert gap(found["reset"], expected) > 0.03
            assert gap(run_ranks(workers.resumed, 2, two, tmp_path / name, STEPS)[0], expected) < 5e-4
