"""Offloaded runs under Megatron have the bits of plain ones, on every layout, whatever the placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import offload_workers
from ranks.harness import run_ranks

TIED = {"model": {"tie_embeddings": True, "num_layers": 2}, "batch": {"micro_batch_size": 2}}
HALF = {**TIED, "model": {"num_layers": 2}, "precision": "bfloat16"}
EIGHT_BIT = {"name": "adamw_8bit", "gradient_clipping": 0.5}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 1, tied": (1, TIED),
    "data 1, bfloat16": (1, HALF),
    "data 2, bfloat16": (2, HALF),
    "data 2, bfloat16, 8 bits": (2, {**HALF, "optimizer": EIGHT_BIT}),
    "tensor 2, pipeline 2, tied": (4, {**TIED, "parallel": {"tensor": 2, "pipeline": 2}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_steps_have_the_bits_of_the_plain_run(layout: str, disk: Path) -> None:
    num_ranks, settings = LAYOUTS[layout]
    for outcome in run_ranks(offload_workers.compare, num_ranks, settings, disk):
        assert all(outcome["losses"]) and all(outcome["norms"]) and all(outcome["state"]), outcome
        assert outcome["clipped"] > 10 and outcome["groups"] == 2
        assert outcome["subgroups"] >= 5 and outcome["trailing"], outcome
        assert outcome["learned"] > 0.5


STREAMED = {**HALF, "offload": {"mode": "streamed", "subgroup_size": 8192, "slots": 2}}
# Parameters are gathered within the step, so that the update ends there.
APART = {"megatron": {"overlap_communication": False}}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((HALF, 2), (STREAMED, 2)),
        ((STREAMED | APART, 2), (HALF | APART, 2)),
        ((STREAMED, 1), ({**STREAMED, "parallel": {"tensor": 2}}, 2)),
    ],
    ids=["on", "off", "another layout"],
)
def test_a_checkpoint_is_that_of_the_plain_optimizer(
    before: tuple[dict[str, Any], int], after: tuple[dict[str, Any], int], tmp_path: Path
) -> None:
    (tmp_path / "saved").mkdir()
    expected = run_ranks(offload_workers.save, before[1], before[0], tmp_path / "saved", 3, 3)[0]
    found = run_ranks(offload_workers.load, after[1], after[0], tmp_path / "saved", 3, 3)[0]
    if before[1] == after[1]:
        assert found == expected
        return
    plain = {**after[0], "offload": {}}
    assert found == run_ranks(offload_workers.load, after[1], plain, tmp_path / "saved", 3, 3)[0]


def test_moments_left_behind_begin_at_zero(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    run_ranks(offload_workers.save, 1, HALF, tmp_path / "saved", 3, 0)
    plain, streamed = (
        run_ranks(offload_workers.load, 1, settings, tmp_path / "saved", 3, 3, False)[0]
        for settings in (HALF, STREAMED)
    )
    assert plain == streamed


@pytest.mark.parametrize(
    ("num_ranks", "parent", "child"),
    [
        (1, HALF, HALF),
        (2, HALF, STREAMED),
        (1, STREAMED, {**HALF, "precision": "float32"}),
        (1, {**HALF, "precision": "float32"}, HALF),
        (4, *[{**TIED, "precision": "bfloat16", "parallel": {"tensor": 2, "pipeline": 2}}] * 2),
    ],
    ids=["plain", "streamed", "in fp32", "from fp32", "tensor 2, pipeline 2, tied"],
)
def test_a_child_starts_from_the_fp32_main_parameters(
    num_ranks: int, parent: dict[str, Any], child: dict[str, Any], tmp_path: Path
) -> None:
    """A bfloat16 parent's weights are rounded: a child of them alone would not start where the parent ended."""
    for outcome in run_ranks(offload_workers.reset, num_ranks, parent, child, tmp_path / "saved"):
        assert outcome["main"] and outcome["weights"] and outcome["finer"] > 1000, outcome
        assert outcome["moments"] == 0 and outcome["step"] == 0, outcome
    if num_ranks == 4:
        assert run_ranks(offload_workers.main_parameters_of, 1, {**child, "parallel": {}}, tmp_path / "saved") == [True]


def test_a_prediction_that_does_not_hold_is_replaced_and_changes_no_bit(tmp_path: Path) -> None:
    """The profile says that the CPU is slow, so the state is streamed; it is not, which the measured steps tell."""
    for outcome in run_ranks(offload_workers.auto, 2, TIED, tmp_path / "profile.json", 1e5, 0.002):
        assert all(outcome["equal"])
        assert any("updates" in message for message in outcome["messages"]), outcome


def test_without_a_gpu_there_is_room_beside_the_model(tmp_path: Path) -> None:
    (outcome,) = run_ranks(offload_workers.auto, 1, TIED, tmp_path / "profile.json", 1e9, None)
    assert all(outcome["equal"])
    assert outcome["places"][1] == "100% resident"
    assert outcome["hidden"]["passes"] == 4 and outcome["hidden"]["forward"] > 1e-4
    assert outcome["hidden"]["of the step"] == pytest.approx(1)


def test_what_does_not_serve_is_refused_by_name(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.json"
    offload_workers.write_profile(foreign, None, 1e9, "of another machine")
    tight = {"mode": "auto", "device_memory": 0, "host_memory": 1e-5, "profile": str(tmp_path / "this.json")}
    offload_workers.write_profile(tmp_path / "this.json", None, 1e9)
    cases = [
        ({"mode": "auto", "cpu_threads": 1, "profile": str(foreign)}, ["measured elsewhere", "rewarm offload profile"]),
        ({**tight, "cpu_threads": 1}, ["fit neither into", "offload.nvme_paths"]),
        ({"mode": "cpu", "host_memory": 1e-5}, ["of host memory per rank", "mode=auto or nvme"]),
        ({"mode": "nvme", "nvme_paths": ["/dev/shm"]}, ["/dev/shm lies in memory", "local drive"]),
        ({"mode": "nvme", "nvme_paths": [str(tmp_path / "absent")]}, ["absent is not a folder"]),
    ]
    found = run_ranks(offload_workers.refusals, 1, [{**TIED, "offload": section} for section, _ in cases])[0]
    for message, (_, parts) in zip(found, cases, strict=True):
        assert all(part in message for part in parts), message


def test_a_full_drive_is_refused_on_every_rank(tmp_path: Path) -> None:
    settings = {**TIED, "offload": {"mode": "nvme", "nvme_paths": [str(tmp_path)], "subgroup_size": 8192}}
    for message in run_ranks(offload_workers.without_space, 2, settings):
        assert "of NVMe space per rank" in message and "offload.nvme_paths" in message
