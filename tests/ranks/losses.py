"""Small runs whose losses are committed in ``tests/losses``, so that a refactoring can show that it changed nothing.

They guard change, not truth: that the losses are right is the work of the parity tests.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from ranks import losses_workers as workers
from ranks.harness import run_ranks

FOLDER = Path(__file__).parent.parent / "losses"
STEPS = 6
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "megatron-single": (1, {}),
    "megatron-tensor2-sequence": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "megatron-pipeline2-interleaved": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    "megatron-data2": (2, {}),
    "deepspeed-single": (1, {"engine": "deepspeed"}),
    "deepspeed-data2-zero3": (2, {"engine": "deepspeed", "deepspeed": {"zero_stage": 3}}),
}
"""Ranks and settings of each run."""

Steps = list[dict[str, str]]
"""Per step the loss and the gradient norm before clipping, as hexadecimal floats: all their bits."""


def this_platform() -> dict[str, str]:
    """What may change the last bits of a loss without any change in the code."""
    packages = ("torch", "megatron-core", "deepspeed", "transformers", "numpy")
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _processor() -> str:
    """The model of the CPU with its numbers, since virtual machines share names: math libraries choose by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    known = [fields[name] for name in ("model name", "cpu family", "model") if name in fields]
    return " ".join(known) or platform.machine()


def measure(case: str) -> Steps:
    """Run a case.

    Args:
        case: a key of :data:`CASES`.
    """
    num_ranks, settings = CASES[case]
    results = run_ranks(workers.train_from_scratch, num_ranks, settings, STEPS)[0]
    return [{"loss": result.loss.hex(), "grad_norm": result.grad_norm.hex()} for result in results]


def read(case: str) -> tuple[dict[str, str], Steps]:
    """The committed platform and steps of a case."""
    content = json.loads((FOLDER / f"{case}.json").read_text(encoding="utf-8"))
    return content["platform"], content["steps"]


def write(case: str, steps: Steps) -> None:
    """Make these the committed steps of a case, on this platform."""
    FOLDER.mkdir(exist_ok=True)
    content = {"platform": this_platform(), "steps": steps}
    (FOLDER / f"{case}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def largest_change(before: Steps, after: Steps) -> float:
    """The largest relative difference of a loss or gradient norm; infinite if the number of steps differs."""
    if len(before) != len(after):
        return float("inf")
    pairs = [(float.fromhex(a[key]), float.fromhex(b[key])) for a, b in zip(before, after, strict=True) for key in a]
    return max(abs(a - b) / max(abs(a), abs(b), 1e-30) for a, b in pairs)
