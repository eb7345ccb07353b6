"""Offloaded updates run beside the backward pass before them and the forward pass after them, and change no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import overlap_workers
from ranks.harness import run_ranks

TIED = {"model": {"tie_embeddings": True, "num_layers": 2}, "batch": {"micro_batch_size": 2}}
HALF = {**TIED, "model": {"num_layers": 2}, "precision": "bfloat16"}
# 20 MB/s: a step's state takes longer to move than a forward pass takes to run.
SLOW = {"subgroup_size": 8192, "stand_in": 0.02}
EARLY = {"mode": "cpu", "subgroup_size": 8192}


MODES: dict[str, dict[str, Any]] = {
    "cpu": {"mode": "cpu"},
    "streamed": {"mode": "streamed", "slots": 2},
    "k=1": {"mode": "deep_optimizer_states", "stride": 1, "slots": 2},
    "k=2": {"mode": "deep_optimizer_states", "stride": 2},
    "nvme": {"mode": "nvme"},
}


@pytest.mark.parametrize(
    ("settings", "names"),
    [(TIED, ("cpu", "k=2", "nvme")), (HALF, ("cpu", "streamed", "k=1"))],
    ids=["fp32, tied", "bfloat16"],
)
def test_the_next_forward_pass_begins_before_the_update_has_ended(
    settings: dict[str, Any], names: tuple[str, ...], disk: Path
) -> None:
    modes = {name: MODES[name] | SLOW for name in names}
    if "nvme" in modes:
        modes["nvme"]["nvme_paths"] = [str(disk)]
    (outcome,) = run_ranks(overlap_workers.beside_compute, 1, settings, modes)
    for name, found in outcome.items():
        assert found["equal"] == overlap_workers.STEPS and found["state"], (name, found)
        # A machine that stands still in between may let an update end first, but not every time; an update that has
        # ended when its step returns never ends later.
        assert found["timelines"] == overlap_workers.STEPS - 1
        assert found["forward"] > 0 and found["backward"] > 0, (name, found)


@pytest.mark.parametrize("mode", ["cpu", "streamed"])
def test_a_forward_pass_that_does_not_wait_is_found_out(mode: str) -> None:
    (equal,) = run_ranks(overlap_workers.without_gate, 1, TIED, {"mode": mode, **SLOW})
    assert equal <= 2


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 1": (1, HALF),
    "data 2": (2, HALF),
    "tensor 2, pipeline 2, tied": (4, {**TIED, "parallel": {"tensor": 2, "pipeline": 2}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_comes_after_a_step_sees_the_whole_of_it(layout: str, tmp_path: Path) -> None:
    num_ranks, settings = LAYOUTS[layout]
    section = {"mode": "deep_optimizer_states", **SLOW}
    for outcome in run_ranks(overlap_workers.eventful, num_ranks, settings, section, tmp_path):
        assert all(outcome.values()), outcome


NORMED = {
    **TIED,
    "model": {"num_layers": 2, "family": "qwen3", "qk_norm": True},
    "parallel": {"tensor": 2, "sequence": True},
}
INTERLEAVED = {
    "model": {"tie_embeddings": True, "num_layers": 4},
    "batch": {"micro_batch_size": 1},
    "parallel": {"pipeline": 2, "virtual_pipeline": 2},
}
COPIED = {
    "data 1, recomputed": (1, {**TIED, "activation_recomputation": "full"}),
    "data 2": (2, TIED),
    "data 2, communication apart": (2, {**TIED, "megatron": {"overlap_communication": False}}),
    "tensor 2, sequence": (2, NORMED),
    "pipeline 2, interleaved, tied": (2, INTERLEAVED),
    "data 2, pipeline 2, interleaved, tied": (4, INTERLEAVED),
}


@pytest.mark.parametrize("layout", COPIED)
def test_no_gradient_is_copied_before_it_is_final(layout: str) -> None:
    num_ranks, settings = COPIED[layout]
    for outcome in run_ranks(overlap_workers.gradient_copies, num_ranks, settings, EARLY):
        assert outcome["copies"] and not outcome["wrong"] and outcome["early"], outcome


def test_a_gradient_that_is_copied_too_early_is_found_out() -> None:
    for outcome in run_ranks(overlap_workers.gradient_copies, 2, NORMED, EARLY, False):
        assert outcome["wrong"], outcome


def test_an_update_that_fails_after_its_step_is_told_and_never_saved(tmp_path: Path) -> None:
    section = {"mode": "streamed", **SLOW}
    (messages,) = run_ranks(overlap_workers.failing_link, 1, TIED, section, tmp_path)
    assert set(messages.values()) == {"the link is down"}, messages
    assert not list(tmp_path.iterdir())


def test_passes_that_end_in_an_error_leave_nothing_begun() -> None:
    (outcome,) = run_ranks(overlap_workers.interrupted, 1, HALF, {"mode": "streamed", **SLOW})
    assert all(outcome), outcome
