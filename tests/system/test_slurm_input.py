"""What users get wrong about a cluster is said before anything is queued."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rewarm.resilience.lock import RunLock
from system.slurm_cluster import Cluster, needs_slurm
from system.slurm_cluster import cluster as cluster

pytestmark = needs_slurm

GOOD = {"--nodes": "2", "--ranks-per-node": "1", "--time": "10"}


def arguments(**changes: str | None) -> list[str]:
    given = {**GOOD, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    return [word for name, value in given.items() if value is not None for word in (name, value)]


def refused(cluster: Cluster, *words: str) -> str:
    """What submit says, once it is sure that nothing was queued."""
    before = cluster.command("squeue", "--noheader", "--states=all", "--format=%i")
    output = cluster.run("submit", "stage.yaml", *words, expect=2)
    assert cluster.command("squeue", "--noheader", "--states=all", "--format=%i") == before
    assert "fix:" in output and "Traceback" not in output
    return output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": "bach"}, "did you mean batch?"),
        ({"nodes": "5"}, "--nodes 5 is more than the 4 nodes of partition 'batch'"),
        ({"time": "8h"}, "time '8h' is not one that SLURM knows"),
        ({"partition": "short", "time": "3"}, "--time 3 is above the 2 minutes of partition 'short'"),
        ({"ranks_per_node": "3"}, "batch.global_batch_size"),
        ({"ranks_per_node": None, "gpus_per_node": "1"}, "has no GPUs"),
        ({"ranks_per_node": None}, "neither --gpus-per-node nor --ranks-per-node"),
        ({"cluster": "nowhere.yaml"}, "cannot read the cluster file nowhere.yaml"),
        ({"cluster": "small.yaml"}, "--nodes 2 is more than the 1 nodes of small"),
        ({"container": "missing.sif"}, "there is no container image missing.sif"),
        ({"container": "nvcr.io#nvidia/pytorch:25.06-py3"}, "needs Enroot's Pyxis plugin"),
    ],
)
def test_what_cannot_work_is_not_queued(cluster: Cluster, changes: dict[str, str | None], message: str) -> None:
    small = "name: small\nnodes: 1\ngpus_per_node: 1\ngpu_memory: 1\n"
    (cluster.folder / "small.yaml").write_text(small)
    assert message in refused(cluster, "name=bad", *arguments(**changes))


def test_a_missing_domain_is_found_on_the_login_node(cluster: Cluster) -> None:
    assert "nowhere" in refused(cluster, "name=bad", "data.counting=nowhere", *arguments())


def test_an_unwritable_run_folder(cluster: Cluster) -> None:
    # Root may write anywhere, but not make a folder inside a file.
    (cluster.folder / "occupied").write_text("")
    assert "cannot be written" in refused(cluster, "name=bad", "runs_folder=occupied", *arguments())


def test_a_run_that_is_queued_already(cluster: Cluster) -> None:
    (job,) = cluster.submit("twice", "--option", "hold")
    assert f"already has SLURM job {job} (pending)" in refused(cluster, "name=twice", *arguments())
    assert f"out of the queue: {job}" in cluster.run("cancel", "runs/twice")
    assert "no SLURM job that waits or runs" in cluster.run("cancel", "runs/twice", expect=2)


def test_a_run_that_somebody_trains(cluster: Cluster) -> None:
    folder = cluster.folder / "runs" / "mine"
    folder.mkdir(parents=True)
    lock = RunLock(folder)
    try:
        assert f"is being trained by process {os.getpid()}" in refused(cluster, "name=mine", *arguments())
    finally:
        lock.release()


def test_slurm_itself_has_the_last_word(cluster: Cluster) -> None:
    words = ["name=bad", *arguments(), "--option", "licenses=nosuch:1"]
    output = cluster.run("submit", "stage.yaml", *words, expect=2)
    assert "sbatch refused" in output and "icense" in output


def test_no_slurm_on_this_host(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Laptop(Cluster):
        def environment(self) -> dict[str, str]:
            return {**super().environment(), "PATH": str(tmp_path)}

    laptop = Laptop(cluster.folder, cluster.state)
    assert "no SLURM on this host" in laptop.run("submit", "stage.yaml", "name=bad", *arguments(), expect=2)


def test_a_dry_run_queues_nothing_and_leaves_a_script_that_runs(cluster: Cluster) -> None:
    output = cluster.run("submit", "stage.yaml", "name=dry", "stop_at=2 steps", *arguments(), "--dry-run")
    assert "nothing is queued" in output
    assert "never trained" in cluster.run("status", "runs/dry")
    job = cluster.command("sbatch", "--parsable", "runs/dry/slurm/001/job.sbatch")
    cluster.wait_for_end(job)
    assert cluster.steps("dry") == 2
    assert "paused" in cluster.run("status", "runs/dry")
    assert "2 ranks on 2 nodes" in cluster.run("logs", "runs/dry")
    assert "started:" in cluster.run("logs", "runs/dry", "--rank", "1")
    assert "its ranks are 0 to 1" in cluster.run("logs", "runs/dry", "--rank", "7", expect=2)
