"""This project's offload against DeepSpeed's and Megatron-Core's: seconds of a whole step, in one interleaved run.

    python scripts/benchmarks/offload_rivals.py                    # on a GPU machine: everything by default
    python scripts/benchmarks/offload_rivals.py --device-memory 24 --layers 32 --hidden 2560 --ffn 6912 --heads 20
    python scripts/benchmarks/offload_rivals.py --rounds 2         # without a GPU: tiny, to try the benchmark itself

Contestants: none (no offload, on the whole GPU), cpu, streamed, dos (Deep Optimizer States' stride of 2) and auto of
this project; deepspeed-2 and deepspeed-3 (ZeRO-Offload under those stages), twinflow (DeepSpeed's, stage 3) and hybrid
(Megatron-Core's HybridDeviceOptimizer, everything offloaded, copies overlapped). All train the same weights on the same
tokens in bfloat16; first losses are compared.

The model is the largest of a few whose state fits into host memory. Where that state would fit beside the activations,
a process that does nothing else holds GPU memory back, so that every contestant finds a smaller GPU (none does not).
One contestant is alive at a time and is built anew in each round, since several do not fit at once: a turn is two steps
to warm up and some that are timed, and each round begins with another contestant. --keep leaves all of them alive.

What fails is reported with its reason and does not stop the others. report.md, report.json and the trace of one
streamed step are written into --output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rivals import sizes
from rivals.contestant import NAMES, Order, measure_machine, serve
from rivals.report import Result, machine_line, write
from rivals.turns import Ballast, Turns


def main() -> None:
    """Measure and write the report; 1 if contestants computed something else."""
    options = parse()
    if options.contestant:
        serve(Order.parse(options.contestant))
        return
    gpu, host = memory(options)
    shape = shape_of(options, gpu, host)
    left = 0.0 if not gpu else (options.device_memory or 0) * 1e9 or sizes.cap(shape, gpu)
    ballast = Ballast(max(0.0, gpu - left))
    orders = [
        Order(name, shape, count, options.subgroup, options.ratio, options.fraction, options.link)
        for count in options.micro_batches
        for name in options.contestants
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"{shape.parameters / 1e6:.0f} million parameters; GPU memory {left / 1e9:.1f} of {gpu / 1e9:.1f} GB")
    turns = Turns(orders, options, ballast)
    records = turns.run()
    result = Result(options, shape, gpu, left, records, machine_line(options.gpu), turns.overlap)
    if gpu:
        result.machine = measure_machine(options.threads, 20.0)
    write(result, options.output)
    print((options.output / "report.md").read_text())
    if result.strangers():
        sys.exit(f"other losses: {', '.join(result.strangers())}")


def parse() -> argparse.Namespace:
    """The command line, with what depends on the machine filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", choices=NAMES, help="[all]")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed in a turn [4]")
    parser.add_argument("--warm", type=int, default=2, help="steps before them [2]")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="cpu: do as without a GPU")
    parser.add_argument("--device-memory", type=float, help="GB of GPU memory to train with [computed]")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--ffn", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--sequence", type=int)
    parser.add_argument("--subgroup", type=int, default=50_000_000, help="parameters that move together [50 million]")
    parser.add_argument("--ratio", type=float, default=0.8, help="share that TwinFlow offloads [0.8]")
    parser.add_argument("--fraction", type=float, default=1.0, help="share that hybrid offloads [1.0]")
    parser.add_argument("--link", type=float, help="without a GPU: GB/s each way of what stands in for a link")
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, help="leave all alive [only without a GPU]")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one answer may take [900]")
    parser.add_argument("--output", type=Path, default=Path("offload-rivals"), help="folder [offload-rivals]")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        return options
    options.gpu = find_gpu(options.device)
    options.contestants = options.contestants or list(NAMES)
    options.keep = not options.gpu if options.keep is None else options.keep
    options.threads = threads()
    if options.device == "cuda" and not options.gpu:
        parser.error("no CUDA device is visible")
    return options


def find_gpu(device: str) -> bool:
    """True if contestants will use a GPU; hides it from them where it is not wanted."""
    import os

    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    return torch.cuda.is_available()


def threads() -> int:
    """Of this project's update on the CPU, as ``offload.cpu_threads`` has it by default."""
    import os

    return max(1, len(os.sched_getaffinity(0)) - 1)


def memory(options: argparse.Namespace) -> tuple[float, float]:
    """Bytes of GPU memory, 0 without one, and of host memory that is free."""
    from rewarm.offload.runtime.profile import available_memory

    if not options.gpu:
        return 0.0, available_memory()
    import torch

    return float(torch.cuda.mem_get_info()[0]), available_memory()


def shape_of(options: argparse.Namespace, gpu: float, host: float) -> sizes.Shape:
    """The model that the machine suggests, with what the command line says in its place."""
    base = sizes.choose((options.device_memory or 0) * 1e9 or gpu, host) if gpu else sizes.TINY
    names = {
        "layers": "num_layers",
        "hidden": "hidden_size",
        "ffn": "ffn_hidden_size",
        "heads": "num_attention_heads",
        "vocabulary": "vocab_size",
        "sequence": "sequence_length",
    }
    given: dict[str, Any] = {name: getattr(options, key) for key, name in names.items()}
    values = {name: value for name, value in given.items() if value is not None}
    return sizes.Shape(**{**{name: getattr(base, name) for name in names.values()}, **values})


if __name__ == "__main__":
    main()
