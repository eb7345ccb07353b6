"""A workplace with tiny domains and configurations, and the command line as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patience import PATIENCE
from rewarm.data.indexed import IndexedWriter, token_dtype

VOCAB = 300
BASE = """
name: base
data: {counting: counting}
model: {num_layers: 4, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2,
        vocab_size: 300}
duration: 12 steps
batch: {sequence_length: 16, global_batch_size: 8, micro_batch_size: 2}
schedule: {peak: 3e-3, warmup: 2 steps}
evaluation: {interval: 4 steps, windows_per_domain: 6, micro_batch_size: 4}
checkpoint: {interval: 3 steps, keep: 2}
tracking: {wandb: {mode: disabled}}
"""
CONTINUE = """
name: continue
parent: runs/base
data: {threes: threes, sevens: sevens}
replay: {fraction: 0.25}
duration: 12 steps
batch: {sequence_length: 16, global_batch_size: 8, micro_batch_size: 2}
schedule: {start: 1e-3, peak: 3e-3, warmup: 2 steps}
evaluation: {interval: 4 steps, windows_per_domain: 6, micro_batch_size: 4}
checkpoint: {interval: 3 steps, keep: 2}
tracking: {wandb: {mode: disabled}}
"""


def write_domain(prefix: Path, stride: int, num_documents: int = 40) -> None:
    """Documents that count in strides with some noise: learnable, and different per stride."""
    generator = np.random.default_rng(stride)
    writer = IndexedWriter(prefix, token_dtype(VOCAB))
    for _ in range(num_documents):
        length = int(generator.integers(40, 90))
        steps = stride * np.arange(length) + np.cumsum(generator.integers(0, 2, length))
        tokens = (generator.integers(0, VOCAB) + steps) % VOCAB
        writer.add(tokens.astype(token_dtype(VOCAB)), [length])
    writer.close()


@dataclass(frozen=True)
class Workplace:
    """A folder in which ``rewarm`` is run."""

    folder: Path

    def environment(self) -> dict[str, str]:
        """The caller's, without ranks of another launcher, one thread a process."""
        kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        source = Path(__file__).parents[2] / "framework"
        return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source), "COLUMNS": "200"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start ``rewarm`` in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "rewarm", *arguments],
            cwd=self.folder, env=self.environment(), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str, expect: int = 0, timeout: float = PATIENCE) -> str:
        """Run ``rewarm`` to its end and return what it printed; the exit status must be as expected."""
        process = self.start(*arguments)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            pytest.fail(f"rewarm {' '.join(arguments)} hung:\n{output}")
        assert process.returncode == expect, f"rewarm {' '.join(arguments)}: status {process.returncode}\n{output}"
        return output

    def lines(self, run: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The lines of one of a run's files."""
        return [json.loads(line) for line in (self.folder / "runs" / run / file).read_text().splitlines()]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace with domains, configurations and a base run; do not change what is in it."""
    place = Workplace(tmp_path_factory.mktemp("trained"))
    for name, stride in (("counting", 1), ("threes", 3), ("sevens", 7)):
        write_domain(place.folder / name, stride)
    (place.folder / "base.yaml").write_text(BASE)
    (place.folder / "continue.yaml").write_text(CONTINUE)
    place.run("train", "base.yaml")
    return place


@pytest.fixture(scope="session")
def unbroken(trained: Workplace) -> Workplace:
    """The same with a continued run that nothing interrupted."""
    trained.run("train", "continue.yaml")
    return trained


@pytest.fixture
def workplace(trained: Workplace, tmp_path: Path) -> Workplace:
    """A copy of the trained workplace to break things in."""
    import shutil

    shutil.copytree(trained.folder, tmp_path / "place", ignore=shutil.ignore_patterns("continue*", "parts*"))
    (tmp_path / "place" / "continue.yaml").write_text(CONTINUE)
    return Workplace(tmp_path / "place")


@pytest.fixture
def without_timing() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Metrics lines without the fields that differ between two identical runs."""
    from rewarm.tracking.metrics import TIMING_FIELDS

    return lambda lines: [{k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in lines]
