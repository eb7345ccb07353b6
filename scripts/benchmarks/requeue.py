"""Seconds from the start of a requeued job to its first new step.

    python scripts/benchmarks/requeue.py [--rounds 3] [--nodes 2] [--json FILE]

Starts a SLURM on this machine (as root, with Debian's slurm-wlm and munge), submits a small stage with
``--until-done``, and sends what SLURM sends ahead of a time limit. The clock starts at the restarted job's
``StartTime``, which SLURM gives in whole seconds, so the figure may be up to one second too high; it ends when the
first new line is in metrics.jsonl. Between them: the batch script, the ranks' start-up, the health check, loading the
checkpoint, the step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np

from rewarm.launch.records import all_jobs

ROOT = Path(__file__).parents[2]
STAGE = """
name: stage
data: {noise: noise}
model: {num_layers: 4, hidden_size: 128, ffn_hidden_size: 344, num_attention_heads: 4, vocab_size: 2048}
duration: 100000 steps
batch: {sequence_length: 128, global_batch_size: 8, micro_batch_size: 4}
evaluation: {interval: null, windows_per_domain: 8}
checkpoint: {interval: null}
tracking: {wandb: {mode: disabled}}
"""


def write_domain(prefix: Path) -> None:
    """Random tokens: a restart does not depend on them."""
    from rewarm.data.indexed import IndexedWriter, token_dtype

    writer = IndexedWriter(prefix, token_dtype(2048))
    generator = np.random.default_rng(0)
    for _ in range(500):
        writer.add(generator.integers(0, 2048, 2000).astype(token_dtype(2048)), [2000])
    writer.close()


def wait(what: str, condition: Callable[[], bool], seconds: float = 300) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)


def field(job: str, name: str, environment: dict[str, str]) -> str:
    """A field of ``scontrol show job``."""
    command = ["scontrol", "show", "job", "--oneliner", job]
    words = subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout.split()
    return next(word.split("=", 1)[1] for word in words if word.startswith(name + "="))


def measure(folder: Path, environment: dict[str, str], nodes: int, rounds: int) -> list[float]:
    """Interrupt a run again and again; seconds from each restart to the next step."""
    rewarm = [sys.executable, "-m", "rewarm"]
    shape = ["--nodes", str(nodes), "--ranks-per-node", "1", "--time", "60", "--warning", "5", "--until-done"]
    subprocess.run([*rewarm, "submit", "stage.yaml", *shape], cwd=folder, env=environment, check=True)
    run = folder / "runs" / "stage"
    metrics = run / "metrics.jsonl"
    (job,) = all_jobs(run)
    wait("the first step", metrics.exists)
    found = []
    for turn in range(1, rounds + 1):
        size = metrics.stat().st_size
        wait("a step", lambda before=size: metrics.stat().st_size > before)
        subprocess.run(["scancel", "--signal=USR2", job], env=environment, check=True)
        wait("the requeue", lambda number=str(turn): field(job, "Restarts", environment) == number)
        size = metrics.stat().st_size
        wait("the restart", lambda: field(job, "JobState", environment) == "RUNNING")
        started = datetime.fromisoformat(field(job, "StartTime", environment)).timestamp()
        wait("a new step", lambda before=size: metrics.stat().st_size > before)
        found.append(metrics.stat().st_mtime - started)
        print(f"restart {turn}: {found[-1]:.1f} s to the first new step", flush=True)
    subprocess.run([*rewarm, "cancel", "runs/stage", "--now"], cwd=folder, env=environment, check=True)
    return found


def main() -> None:
    """Start the cluster, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    # A socket's path must be short, and munged wants its folder below none that others may write to.
    folder = Path(tempfile.mkdtemp(prefix="rewarm-requeue-", dir="/tmp"))
    cluster = folder / "c"
    environment = {**os.environ, "REWARM_LOCAL_SLURM": str(cluster), "SLURM_CONF": str(cluster / "slurm.conf"),
                   "PATH": os.environ["PATH"] + ":/usr/sbin", "OMP_NUM_THREADS": "1"}  # fmt: skip
    scripts = ROOT / "launch" / "local_slurm"
    try:
        folder.chmod(0o755)
        write_domain(folder / "noise")
        (folder / "stage.yaml").write_text(STAGE)
        subprocess.run(["bash", str(scripts / "start.sh"), str(given.nodes)], env=environment, check=True)
        seconds = measure(folder, environment, given.nodes, given.rounds)
    finally:
        subprocess.run(["bash", str(scripts / "stop.sh")], env=environment, check=False)
        shutil.rmtree(folder, ignore_errors=True)
    result = {"machine": platform.platform(), "cores": os.cpu_count(), "nodes": given.nodes, "seconds": seconds}
    print(json.dumps(result))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
