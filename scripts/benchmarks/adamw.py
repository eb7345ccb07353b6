"""AdamW on the CPU against torch's fused AdamW and DeepSpeedCPUAdam, interleaved, with the machine's limit beside them.

    python scripts/benchmarks/adamw.py --elements 20000000 200000000 --threads 2 --rounds 15

Every round times each contender once, so that a busy moment hits all alike; the fastest round counts. All work on the
same arrays, which lie in the memory that offload gives its state (huge pages where Linux grants them). The limit is the
faster of two probes, with software prefetch and without, that read four fp32 arrays and write three of them in place,
as AdamW does, with next to no arithmetic. DeepSpeed's kernel is compiled on first use, into a folder of its own unless
--extensions names one; where that fails it is left out and said so.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

FP32_BYTES = 28  # read gradient, master, two moments; write master, two moments
MIXED_BYTES = 28  # the gradient is 2 bytes less, the 16-bit copy 2 bytes more
SPLIT_BYTES = 26  # read gradient, two halves of the master, two moments; write the halves and moments
EIGHT_BIT_BYTES = 16  # read gradient, master, two moments; write master, two moments, 16-bit copy
LIMIT = "limit: 4 reads, 3 writes in place"


def build_deepspeed(timeout: int, folder: str | None) -> tuple[Any | None, str]:
    """DeepSpeed's CPU Adam, compiled into a folder, by default a private one, or None and why not."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"did not build within {timeout} s")

    os.environ["TORCH_EXTENSIONS_DIR"] = folder or tempfile.mkdtemp(prefix="rewarm-extensions-")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(timeout)
    try:
        import torch
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        DeepSpeedCPUAdam([torch.zeros(16, requires_grad=True)])
        return DeepSpeedCPUAdam, "built"
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def arrays(elements: int) -> dict[str, Any]:
    """One state for all contenders."""
    import torch

    from rewarm.offload.runtime.slabs import HostPool

    pool = HostPool(pin=False)
    found = {name: pool.take(elements, torch.float32) for name in ("master", "moment1", "moment2", "grad")}
    found |= {name: pool.take(elements, torch.bfloat16).zero_() for name in ("grad_half", "half")}
    found["low"] = pool.take(elements, torch.int16).zero_()
    found["master"].uniform_(-1, 1)
    found["grad_half"].copy_(found["grad"].uniform_(-1e-3, 1e-3))
    for name in ("moment1", "moment2"):
        found[name].zero_()
    return found


def contenders(state: dict[str, Any], threads: int, deepspeed: Any | None) -> dict[str, tuple[Callable[[], None], int]]:
    """Name -> (one update, useful bytes per element). All share one state: only the time matters here."""
    import torch

    from rewarm.kernels import adamw

    master, moment1, moment2, grad = (state[name] for name in ("master", "moment1", "moment2", "grad"))
    grad_half, half, low = (state[name] for name in ("grad_half", "half", "low"))
    moments = adamw.Moments8bit.zeros(master.numel())
    step = adamw.AdamWStep.prepare(step=10, learning_rate=1e-4, weight_decay=0.1)
    parameter = torch.nn.Parameter(master)
    parameter.grad = grad
    fused = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    fused.state[parameter] = {"step": torch.tensor(9.0), "exp_avg": moment1, "exp_avg_sq": moment2}

    def with_copies(update: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            grad.copy_(grad_half)
            update()
            half.copy_(parameter.data)

        return run

    found: dict[str, tuple[Callable[[], Any], int]] = {
        "fp32: rewarm": (lambda: adamw.update(step, master, moment1, moment2, grad, threads=threads), FP32_BYTES),
        "fp32: torch fused": (fused.step, FP32_BYTES),
        "mixed: rewarm, one pass": (
            lambda: adamw.update(step, master, moment1, moment2, grad_half, half, threads=threads),
            MIXED_BYTES,
        ),
        "mixed: rewarm, split master": (
            lambda: adamw.update_split(step, half, low, moment1, moment2, grad_half, threads=threads),
            SPLIT_BYTES,
        ),
        "mixed: rewarm, 8-bit moments": (
            lambda: adamw.update_8bit(step, master, moments, grad_half, half, threads=threads),
            EIGHT_BIT_BYTES,
        ),
        "mixed: torch fused + 2 copies": (with_copies(fused.step), MIXED_BYTES),
    }
    if deepspeed is not None:
        rival = deepspeed([parameter], lr=1e-4)
        rival.state[parameter] = {"step": 9, "exp_avg": moment1, "exp_avg_sq": moment2}
        found["fp32: DeepSpeedCPUAdam"] = (rival.step, FP32_BYTES)
        found["mixed: DeepSpeedCPUAdam + 2 copies"] = (with_copies(rival.step), MIXED_BYTES)
    return found


def probes(state: dict[str, Any], threads: int) -> dict[str, tuple[Callable[[], None], int]]:
    """The bandwidth probe without and with software prefetch."""
    from rewarm.kernels import native

    library = native.load()
    assert library is not None, "the compiled library is missing"
    pointers = [ctypes.c_void_p(state[name].data_ptr()) for name in ("grad", "master", "moment1", "moment2")]
    count = ctypes.c_int64(state["grad"].numel())
    return {
        f"{LIMIT}{', prefetched' * prefetch}": (
            functools.partial(library.rewarm_probe_in_place, count, *pointers, int(prefetch), threads),
            FP32_BYTES,
        )
        for prefetch in (False, True)
    }


def measure(elements: int, threads: int, rounds: int, deepspeed: Any | None) -> dict[str, tuple[float, int]]:
    """Name -> (fastest round in seconds, useful bytes per element)."""
    state = arrays(elements)
    runs = probes(state, threads) | contenders(state, threads, deepspeed)
    best = dict.fromkeys(runs, float("inf"))
    for round_number in range(rounds + 1):
        for name, (update, _) in runs.items():
            start = time.perf_counter()
            update()
            if round_number:  # the first round touches the pages
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: (best[name], runs[name][1]) for name in runs}


def report(elements: int, found: dict[str, tuple[float, int]]) -> None:
    """Print the table and the ratios of the goals."""
    print(f"\n{elements / 1e6:.0f}M parameters\n{'':46}{'ms':>9}{'Gparam/s':>10}{'GB/s':>8}")
    for name, (seconds, size) in found.items():
        print(f"{name:46}{seconds * 1e3:9.1f}{elements / seconds / 1e9:10.2f}{size * elements / seconds / 1e9:8.1f}")
    times = {name: value[0] for name, value in found.items()}
    rivals = [name for name in times if name.startswith("fp32") and "rewarm" not in name]
    best_fp32 = min(times[name] for name in rivals)
    for name in (name for name in times if name.startswith("mixed") and "rewarm" not in name):
        print(f"one pass over {name[7:]}: {times[name] / times['mixed: rewarm, one pass']:.2f}x (goal 1.8)")
    print(f"fp32 against the better rival: {best_fp32 / times['fp32: rewarm']:.2f}x (goal 0.97)")
    limit = max(size / best for name, (best, size) in found.items() if name.startswith(LIMIT))
    for name in (name for name in found if "rewarm" in name and found[name][1] != EIGHT_BIT_BYTES):
        share = found[name][1] / found[name][0] / limit
        print(f"{name}: {share:.0%} of the in-place limit (goal 90%)")


def main() -> None:
    """Parse the command line and print one table per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, nargs="+", default=[20_000_000, 200_000_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--deepspeed-timeout", type=int, default=300, help="seconds to compile its kernel; 0 skips it")
    parser.add_argument("--extensions", help="folder for its compiled kernel, to be used again")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    deepspeed, state = (None, "skipped")
    if options.deepspeed_timeout:
        deepspeed, state = build_deepspeed(options.deepspeed_timeout, options.extensions)
    print(f"torch {torch.__version__}, {options.threads} threads, DeepSpeedCPUAdam: {state}", file=sys.stderr)
    for elements in options.elements:
        report(elements, measure(elements, options.threads, options.rounds, deepspeed))


if __name__ == "__main__":
    main()
