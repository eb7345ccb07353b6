"""Jobs on a real SLURM: whatever ends them, no step is lost and none is trained twice with another result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from patience import PATIENCE
from rewarm.launch.records import attempts
from system.conftest import write_domain
from system.slurm_cluster import ROOT, STAGE, STEPS, Cluster, needs_slurm
from system.slurm_cluster import cluster as cluster
from wandb_files import read_history

pytestmark = needs_slurm

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def reference(cluster: Cluster) -> Lines:
    """The metrics of a run on two ranks that nothing interrupts, without SLURM."""
    cluster.run("train", "stage.yaml", "name=reference", "parallel.data=2")
    return cluster.lines("reference")


@pytest.fixture
def short_limit(cluster: Cluster) -> str:
    """Minutes in which a run surely takes its first steps, and which a test can wait for."""
    began = time.monotonic()
    cluster.run("train", "stage.yaml", "name=pace", "parallel.data=2", "stop_at=5 steps")
    return str(1 + int(2 * (time.monotonic() - began) / 60))


@pytest.fixture
def check_same(cluster: Cluster, reference: Lines, without_timing: Callable[[Lines], Lines]) -> Callable[[str], None]:
    """Compare a run with the unbroken one, number for number."""

    def check(name: str) -> None:
        lines = cluster.lines(name)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), cluster.report()
        assert without_timing(lines) == without_timing(reference)
        assert cluster.lines(name, "evaluation.jsonl") == cluster.lines("reference", "evaluation.jsonl")

    return check


def outcomes(cluster: Cluster, name: str) -> list[str]:
    return [attempt.outcome for attempt in attempts(cluster.folder / "runs" / name)]


def test_time_limit_saves_requeues_and_finishes(
    cluster: Cluster, check_same: Callable[[str], None], short_limit: str
) -> None:
    wandb = "tracking.wandb.mode=offline"
    (job,) = cluster.submit("limit", wandb, "--until-done", time=short_limit)
    with cluster.frozen("limit", 5):
        cluster.wait("SLURM's warning", lambda: cluster.log_says(f"warning signal 12 to JobId={job}\n"))
    cluster.wait("the requeue", lambda: int(cluster.field(job, "Restarts")) >= 1)
    cluster.wait_for_end(job)
    *limited, last = outcomes(cluster, "limit")
    # A slow machine may reach the limit more than once.
    assert set(limited) == {"limit"} and last == "finished"
    check_same("limit")
    first, second, *_ = attempts(cluster.folder / "runs" / "limit")
    assert first.last_step == second.first_step and 5 <= second.first_step < STEPS
    assert "limit  finished" in cluster.run("status", "runs/limit")
    # One wandb run over all attempts without a gap, even where an attempt's time ran out before wandb was ready.
    run = cluster.folder / "runs" / "limit"
    parts = {path.name.rsplit("-", 1)[1] for path in run.glob("wandb/offline-run-*")}
    assert parts == {json.loads((run / "wandb.json").read_text())["id"]}
    assert sorted({row["_step"] for row in read_history(run)}) == list(range(STEPS + 1))


def test_preempted_by_a_higher_priority(cluster: Cluster, check_same: Callable[[str], None]) -> None:
    (job,) = cluster.submit("preempted", "--partition", "low")
    with cluster.frozen("preempted", 5):
        wrap = ["sbatch", "--parsable", "--partition=batch", "--nodes=4", "--exclusive", "--wrap=sleep 1"]
        other = cluster.command(*wrap, "--output=/dev/null")
        cluster.wait("the preemption", lambda: cluster.log_says(f"grace time for JobId={job} "))
    cluster.wait_for_end(other, job)
    assert outcomes(cluster, "preempted") == ["stopped", "finished"]
    check_same("preempted")


def test_a_lost_node_is_replaced(cluster: Cluster, check_same: Callable[[str], None]) -> None:
    (job,) = cluster.submit("lost")
    with cluster.frozen("lost", 15):
        nodes = cluster.hosts(job, "NodeList")
        daemon = int((cluster.state / "pid" / f"slurmd-{nodes[1]}").read_text())
        os.kill(daemon, signal.SIGKILL)
        cluster.wait("the requeue", lambda: int(cluster.field(job, "Restarts")) >= 1)
    cluster.wait("the second attempt", lambda: cluster.field(job, "JobState") == "RUNNING")
    assert nodes[1] not in cluster.hosts(job, "NodeList")
    cluster.wait_for_end(job)
    subprocess.run(["slurmd", "-N", nodes[1]], env=cluster.environment(), check=True, timeout=PATIENCE)
    assert outcomes(cluster, "lost")[-1] == "finished"
    check_same("lost")


def test_scancel_saves_and_is_final_until_the_next_submission(
    cluster: Cluster, check_same: Callable[[str], None]
) -> None:
    (job,) = cluster.submit("cancelled", "--until-done")
    with cluster.frozen("cancelled", 5):
        cluster.command("scancel", job)
    cluster.wait_for_end(job)
    assert "CANCELLED" in cluster.state_of(job) and cluster.field(job, "Restarts") == "0"
    assert outcomes(cluster, "cancelled") == ["stopped"]
    second = cluster.submit("cancelled")[-1]
    assert second != job
    cluster.wait_for_end(second)
    check_same("cancelled")


def test_cancel_saves_and_empties_the_chain(cluster: Cluster) -> None:
    jobs = cluster.submit("chain-off", "--chain", "3")
    with cluster.frozen("chain-off", 5):
        output = cluster.run("cancel", "runs/chain-off")
    assert all(job in output for job in jobs)
    cluster.wait_for_end(*jobs)
    assert outcomes(cluster, "chain-off") == ["limit"]
    stopped = attempts(cluster.folder / "runs" / "chain-off")[0].last_step
    assert stopped == cluster.steps("chain-off") < STEPS


def test_a_chain_of_three(cluster: Cluster, check_same: Callable[[str], None]) -> None:
    jobs = cluster.submit("chain", "--chain", "3")
    assert len(jobs) == 3
    for job, step in ((jobs[0], 5), (jobs[1], 25)):
        with cluster.frozen("chain", step):
            # What SLURM sends ahead of the limit, without waiting for it.
            cluster.command("scancel", "--signal=USR2", job)
    cluster.wait_for_end(*jobs)
    assert outcomes(cluster, "chain") == ["limit", "limit", "finished"]
    assert [attempt.name for attempt in attempts(cluster.folder / "runs" / "chain")] == [f"{job}.0" for job in jobs]
    check_same("chain")


def test_a_sweep_of_four(cluster: Cluster, reference: Lines) -> None:
    names = [f"sweep-{number}" for number in range(4)]
    for number, name in enumerate(names):
        text = STAGE.replace("name: stage", f"name: {name}").replace("peak: 3e-3", f"peak: {number + 1}e-3")
        (cluster.folder / f"{name}.yaml").write_text(text)
    os.symlink(ROOT / "framework", cluster.folder / "framework")
    job = cluster.command(
        "sbatch", "--parsable", "--array=0-3%2", "--nodes=1", "--ntasks-per-node=1", "--time=120",
        str(ROOT / "launch" / "slurm" / "sweep.sbatch"), *[f"{name}.yaml" for name in names], "stop_at=10 steps",
    )  # fmt: skip
    cluster.wait("the sweep", lambda: all(outcomes(cluster, name) == ["paused"] for name in names), pause=0.5)
    cluster.wait("its end", lambda: not cluster.command("squeue", "--noheader", "--jobs", job, check=False))
    runs = {name: cluster.lines(name) for name in names}
    assert [len(lines) for lines in runs.values()] == [10] * 4
    assert len({lines[-1]["loss"] for lines in runs.values()}) == 4
    # The third has the reference's peak, on one rank instead of two.
    for line, expected in zip(runs["sweep-2"], reference, strict=False):
        assert line["sample_hash"] == expected["sample_hash"]
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-4)


def test_two_jobs_on_one_node_do_not_meet(cluster: Cluster, check_same: Callable[[str], None]) -> None:
    names = ("left", "right")
    jobs = [cluster.submit(name, "--option", "nodelist=node4", nodes=1, ranks=2)[0] for name in names]
    with cluster.frozen("left", 5), cluster.frozen("right", 5):
        assert [cluster.field(job, "JobState") for job in jobs] == ["RUNNING", "RUNNING"]
        assert {cluster.field(job, "NodeList") for job in jobs} == {"node4"}
    cluster.wait_for_end(*jobs)
    for name in names:
        check_same(name)


def test_an_unfit_node_is_named_and_avoided(cluster: Cluster, check_same: Callable[[str], None]) -> None:
    odd = cluster.state / "nodes" / "node1"
    odd.write_text("export SLURM_GPUS_ON_NODE=8\n")
    try:
        (job,) = cluster.submit("unfit", "--exclude", "node4")
        cluster.wait("the exclusion", lambda: cluster.hosts(job, "ExcNodeList") == ["node1", "node4"])
        cluster.wait_for_end(job)
    finally:
        odd.unlink()
    assert "node node1: SLURM gave 8 GPUs, but torch finds none" in cluster.output("unfit")
    assert outcomes(cluster, "unfit") == ["node", "finished"]
    check_same("unfit")


def test_what_would_fail_again_is_not_requeued(cluster: Cluster) -> None:
    write_domain(cluster.folder / "gone", 2)
    jobs = cluster.submit("hopeless", "data={gone: gone}", "--chain", "3", "--option", "hold")
    for suffix in ("bin", "idx"):
        (cluster.folder / f"gone.{suffix}").unlink()
    cluster.command("scontrol", "release", *jobs)
    cluster.wait_for_end(*jobs)
    assert outcomes(cluster, "hopeless") == ["refused"]
    assert "not queued again" in cluster.output("hopeless") and "gone" in cluster.output("hopeless")
    assert cluster.field(jobs[0], "ExitCode") == "2:0"
    assert [cluster.state_of(job).split()[0] for job in jobs[1:]] == ["CANCELLED", "CANCELLED"]


def test_crashes_are_retried_only_while_they_bear_fruit(cluster: Cluster) -> None:
    (job,) = cluster.submit("crashing", "checkpoint.interval=null")
    for attempt in range(3):
        cluster.wait(f"attempt {attempt}", lambda: len(cluster.rank_processes("crashing")) == 2)
        time.sleep(0.3)
        os.kill(cluster.rank_processes("crashing")[0], signal.SIGKILL)
        cluster.wait("its end", lambda n=attempt + 1: outcomes(cluster, "crashing") == ["crashed"] * n)
    cluster.wait_for_end(job)
    assert "giving up: 3 attempts in a row left no newer checkpoint" in cluster.output("crashing")
    assert cluster.field(job, "JobState") == "FAILED"
