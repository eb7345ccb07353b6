"""Which ranks a process belongs to."""

from __future__ import annotations

import pytest

from rewarm.engine.environment import (
    Ranks,
    check_not_batch_script,
    export_slurm_rendezvous,
    find_ranks,
    first_host,
    slurm_port,
)
from rewarm.errors import UserError


def test_alone() -> None:
    assert find_ranks({}) == Ranks(0, 1, 0, "single")
    assert find_ranks({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).launcher == "single"


def test_torchrun() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert find_ranks(environment) == Ranks(5, 8, 1, "torchrun")


def test_half_set_variables_are_named() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        find_ranks({"RANK": "0", "WORLD_SIZE": "2"})


def test_slurm_rendezvous_is_the_same_on_all_ranks_and_differs_between_jobs() -> None:
    def of(job: int, rank: int) -> dict[str, str]:
        environment = {
            "SLURM_NTASKS": "4", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2),
            "SLURM_JOB_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0",
        }  # fmt: skip
        export_slurm_rendezvous(environment)
        return environment

    first, last = of(7, 0), of(7, 3)
    assert (first["MASTER_ADDR"], first["MASTER_PORT"]) == (last["MASTER_ADDR"], last["MASTER_PORT"])
    assert first["MASTER_ADDR"] == "gpu003"
    assert first["MASTER_PORT"] != of(8, 0)["MASTER_PORT"]
    assert (last["RANK"], last["WORLD_SIZE"], last["LOCAL_RANK"]) == ("3", "4", "1")


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("node1", "node1"), ("a,b", "a"), ("gpu[003-007,012],login1", "gpu003"), ("r[1-2]n,x", "r1n"), ("n[7]", "n7")],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_a_batch_script_is_not_one_of_the_tasks() -> None:
    batch = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "3"}
    assert find_ranks(batch).launcher == "single"
    with pytest.raises(UserError, match="4 tasks, but the command runs once"):
        check_not_batch_script(batch)
    check_not_batch_script({**batch, "SLURM_STEP_ID": "0"})


def test_a_step_counts_its_own_tasks_and_not_those_of_the_job() -> None:
    step = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    assert find_ranks({**step, "SLURM_STEP_ID": "0"}) == Ranks(1, 2, 1, "slurm")


def test_a_free_port_of_the_batch_script_is_obeyed_and_attempts_differ() -> None:
    step = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "9",
            "SLURM_JOB_NODELIST": "localhost"}  # fmt: skip
    export_slurm_rendezvous(given := {**step, "MASTER_PORT": "12345"})
    assert given["MASTER_PORT"] == "12345"
    ports = {slurm_port({**step, "SLURM_RESTART_COUNT": str(count)}) for count in range(4)}
    assert len(ports) == 4 and all(1024 < port < 32768 for port in ports)
