"""A real SLURM on this machine for the tests, and a workplace whose jobs it runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from patience import PATIENCE, slowness
from system.conftest import Workplace, write_domain

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")


def why_not() -> str | None:
    """What is missing for a SLURM of one's own on this machine, None if nothing is."""
    if os.geteuid() != 0:
        return "a SLURM of one's own needs root"
    search = os.environ["PATH"] + ":/usr/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=search) is None]
    return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)" if missing else None


needs_slurm = [
    pytest.mark.slurm,
    pytest.mark.skipif(why_not() is not None, reason=f"no SLURM: {why_not()}"),
]

STEPS = 40
STAGE = f"""
name: stage
data: {{counting: counting}}
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, vocab_size: 300}}
duration: {STEPS} steps
batch: {{sequence_length: 32, global_batch_size: 16, micro_batch_size: 4}}
schedule: {{peak: 3e-3, warmup: 2 steps}}
evaluation: {{interval: 20 steps, windows_per_domain: 4, micro_batch_size: 4}}
checkpoint: {{interval: 10 steps, keep: 2}}
tracking: {{wandb: {{mode: disabled}}}}
"""


@dataclass(frozen=True)
class Cluster(Workplace):
    """A workplace on a login node of a local SLURM."""

    state: Path

    def environment(self) -> dict[str, str]:
        """With the way to this SLURM, and not to another."""
        kept = {key: value for key, value in super().environment().items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return {
            **kept,
            "PATH": kept["PATH"] + ":/usr/sbin",
            "SLURM_CONF": str(self.state / "slurm.conf"),
            "REWARM_PYTHON": sys.executable,
            "WANDB_MODE": "disabled",
        }

    def command(self, *command: str, check: bool = True) -> str:
        """Standard output of a command."""
        result = subprocess.run(
            command, cwd=self.folder, env=self.environment(), text=True, capture_output=True, timeout=PATIENCE
        )
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def submit(self, name: str, *arguments: str, nodes: int = 2, ranks: int = 1, time: str = "120") -> list[str]:
        """Submit the tiny stage under a name; returns the ids of its jobs."""
        shape = ["--nodes", str(nodes), "--ranks-per-node", str(ranks), "--time", time, "--warning", "5"]
        self.run("submit", "stage.yaml", f"name={name}", *shape, *arguments)
        from rewarm.launch.records import all_jobs

        return all_jobs(self.folder / "runs" / name)

    def state_of(self, job: str) -> str:
        """SLURM's state of a job, with the reason; empty when it has been forgotten."""
        return self.command("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T %r", check=False)

    def field(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``."""
        words = self.command("scontrol", "show", "job", "--oneliner", job).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(name + "="))

    def hosts(self, job: str, name: str) -> list[str]:
        """The hosts in a node list of a job."""
        return sorted(self.command("scontrol", "show", "hostnames", self.field(job, name)).split())

    def wait(self, what: str, condition: Callable[[], bool], *, pause: float = 0.1) -> None:
        """Wait for something, and show the cluster's state if it does not come."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"waited {PATIENCE:.0f} s for {what}\n{self.report()}")
            time.sleep(pause)

    def wait_for_end(self, *jobs: str) -> None:
        """Wait until jobs have left the queue."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "")
        self.wait(
            f"the end of {jobs}",
            lambda: all(self.state_of(job).split(" ")[0] in ended for job in jobs),
            pause=0.5,
        )

    def report(self) -> str:
        """What one would look at when a test fails."""
        outputs = [f"--- {path}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("runs/*/logs/*.out"))]
        log = (self.state / "log" / "slurmctld").read_text().splitlines()[-25:]
        return "\n".join([self.command("squeue", check=False), self.command("sinfo", check=False), *outputs, *log])

    def steps(self, name: str) -> int:
        """Lines in the metrics of a run."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def output(self, name: str) -> str:
        """The job's output of a run."""
        return (self.folder / "runs" / name / "logs" / "slurm.out").read_text()

    def rank_processes(self, name: str) -> list[int]:
        """Process ids of the ranks that train a run."""
        mark = f"/runs/{name}/".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                arguments = (path / "cmdline").read_bytes()
                if b"rewarm\0train\0" in arguments and mark in arguments and b"srun" not in arguments:
                    found.append(int(path.name))
        return found

    @contextlib.contextmanager
    def frozen(self, name: str, after: int) -> Iterator[list[int]]:
        """Hold the ranks of a run still once it has trained some steps, so that what happens next hits it mid-run."""
        self.wait(f"step {after} of {name}", lambda: self.steps(name) >= after, pause=0.002)
        ranks = self.rank_processes(name)
        assert ranks, self.report()
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGSTOP)
        try:
            yield ranks
        finally:
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGCONT)

    def log_says(self, text: str) -> bool:
        """Whether SLURM's controller has written a text into its log."""
        return text in (self.state / "log" / "slurmctld").read_text()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A SLURM of four nodes for the tests of a module, which import this fixture."""
    folder = tmp_path_factory.mktemp("slurm")
    write_domain(folder / "counting", 1)
    (folder / "stage.yaml").write_text(STAGE)
    # A socket's path must be short.
    state = Path(tempfile.mkdtemp(prefix="rewarm-slurm-", dir="/tmp")) / "c"
    scripts = ROOT / "launch" / "local_slurm"
    # Daemons that get little time answer late, and must not count as dead.
    patience = max(1, round(1.5 * slowness() - 0.5))
    environment = {**os.environ, "REWARM_LOCAL_SLURM": str(state), "REWARM_LOCAL_SLURM_PATIENCE": str(patience)}
    try:
        subprocess.run(["bash", str(scripts / "start.sh"), "4"], env=environment, check=True, timeout=PATIENCE)
        yield Cluster(folder, state)
    finally:
        subprocess.run(["bash", str(scripts / "stop.sh")], env=environment, check=True, timeout=PATIENCE)
        shutil.rmtree(state.parent)
