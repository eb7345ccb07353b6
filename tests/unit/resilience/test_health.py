"""What is said of nodes before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rewarm.errors import NodeFault, UserError
from rewarm.resilience.health import NodeReport, check_device, compare


def report(node: str, **changes: float) -> NodeReport:
    values = {"clock": 1000.0, "work_seconds": 0.01, "reduce_seconds": 0.02, "free_disk": 1 << 40}
    return NodeReport(node, **{**values, **changes})  # type: ignore[arg-type]


def test_healthy_nodes_are_summed_up_in_a_line() -> None:
    assert compare([report("a"), report("a"), report("b", reduce_seconds=0.03)], Path("r"), 1 << 20) == [
        "3 ranks on 2 nodes, all-reduce of 16 MiB: 30.0 ms"
    ]


def test_one_machine_needs_no_line() -> None:
    assert compare([report("a"), report("a")], Path("r"), 1 << 20) == []


def test_a_wrong_clock_names_its_node() -> None:
    with pytest.raises(NodeFault, match="node b: its clock is -120 s off") as error:
        compare([report("a"), report("b", clock=880.0), report("c")], Path("r"), 1 << 20)
    assert error.value.node == "b"


def test_a_full_disk_is_for_the_user_to_mend() -> None:
    with pytest.raises(UserError, match="node b finds only 10 MiB.*runs/x.* takes 64 MiB"):
        compare([report("a"), report("b", free_disk=10 << 20)], Path("runs/x"), 64 << 20)


def test_slow_and_skewed_nodes_are_mentioned() -> None:
    odd = compare([report("a"), report("b", clock=1005.0), report("c", work_seconds=0.05)], Path("r"), 1 << 20)
    assert odd[:2] == [
        "node b: its clock is +5.0 s off that of the others",
        "node c: computes 5.0 times slower than the median",
    ]


def test_missing_gpus_name_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(NodeFault, match="node gpu07: SLURM gave 8 GPUs, but torch finds none"):
        check_device()


@pytest.fixture
def node_of_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes this process see some GPUs, with a launcher's variables."""

    def see(count: int, **environment: str) -> None:
        import torch

        for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", *(n for n in os.environ if n.startswith("SLURM"))):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

        def free_and_total(index: int) -> tuple[int, int]:
            if not 0 <= index < count:
                raise RuntimeError("CUDA error: invalid device ordinal")
            return 79 << 30, 80 << 30

        monkeypatch.setattr(torch.cuda, "mem_get_info", free_and_total)

    return see


JOB = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}


@pytest.mark.parametrize(
    ("count", "environment", "index"),
    [
        (8, {**JOB, "LOCAL_RANK": "5", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 5),
        (8, {**JOB, "LOCAL_RANK": "5"}, 5),
        # srun --gpus-per-task=1, with cgroups and without, and on Slurms that count the task's GPUs only.
        (1, {**JOB, "LOCAL_RANK": "5", "CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1"}, 0),
        (1, {**JOB, "LOCAL_RANK": "5", "CUDA_VISIBLE_DEVICES": "5", "SLURM_GPUS_PER_TASK": "1"}, 0),
        (1, {**JOB, "LOCAL_RANK": "5", "SLURM_GPUS_PER_TASK": "1"}, 0),
        (1, {**JOB, "LOCAL_RANK": "5", "SLURM_GPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "1"}, 0),
        (1, {**JOB, "LOCAL_RANK": "5", "CUDA_VISIBLE_DEVICES": "5"}, 0),
        # --gpus-per-task=2, --tres-per-task=gpu:2 and --gpu-bind=closest
        (2, {**JOB, "LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "6,7", "SLURM_TRES_PER_TASK": "gres/gpu:2"}, 1),
        (4, {**JOB, "LOCAL_RANK": "6", "CUDA_VISIBLE_DEVICES": "4,5,6,7", "SLURM_GPU_BIND": "closest"}, 2),
        # A wrapper that gives each of torchrun's ranks its own, by UUID.
        (1, {"LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "GPU-5a1b"}, 0),
    ],
)
def test_a_rank_that_sees_only_its_own_gpus_takes_one(
    node_of_gpus: Callable[..., None], count: int, environment: dict[str, str], index: int
) -> None:
    from rewarm.engine import device

    node_of_gpus(count, **environment)
    check_device()
    assert device.local_device().index == index


@pytest.mark.parametrize(
    ("count", "environment", "message"),
    [
        (7, {**JOB, "LOCAL_RANK": "7"}, "SLURM gave 8 GPUs, but torch finds 7, none for local rank 7"),
        (
            7,
            {**JOB, "LOCAL_RANK": "7", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
            "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 names 8 GPUs, but torch finds 7",
        ),
        (0, {**JOB, "SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": "h100:8"}, "SLURM gave 8 GPUs, but"),
    ],
)
def test_gpus_that_are_gone_name_the_node(
    node_of_gpus: Callable[..., None], count: int, environment: dict[str, str], message: str
) -> None:
    node_of_gpus(count, **environment)
    with pytest.raises(NodeFault, match=f"node gpu07: {message}"):
        check_device()


@pytest.mark.parametrize(
    ("count", "environment", "message"),
    [
        (4, {"LOCAL_RANK": "4"}, "local rank 4 on gpu07, where there are only 4 GPUs"),
        (2, {"LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, "local rank 2 on gpu07"),
        (
            8,
            {**JOB, "LOCAL_RANK": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
            "local rank 8 on gpu07, where there are only 8 GPUs",
        ),
        (1, {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "0,9"}, "CUDA_VISIBLE_DEVICES=0,9 names 2 GPUs"),
        (0, {**JOB, "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "SLURM gave this step none"),
    ],
)
def test_what_the_user_started_wrongly_blames_no_node(
    node_of_gpus: Callable[..., None], count: int, environment: dict[str, str], message: str
) -> None:
    node_of_gpus(count, **environment)
    with pytest.raises(UserError, match=message) as error:
        check_device()
    assert not isinstance(error.value, NodeFault)


def test_a_wish_for_the_cpu_is_obeyed(node_of_gpus: Callable[..., None]) -> None:
    node_of_gpus(0, **JOB, CUDA_VISIBLE_DEVICES="")
    check_device()
