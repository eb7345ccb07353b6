"""Seconds of a whole training step with the optimizer's state in different places, interleaved.

    python scripts/benchmarks/offload_step.py --layers 4 --hidden 512 --modes none cpu streamed deep_optimizer_states

Every mode is one engine in one process, trained on the same windows; rounds go through the modes in turn, so that a
machine that slows down slows them all. A turn is several steps, at whose end the update must have ended: it may run
beside the next step, not beside the next mode. The losses must be equal to the bit. Without a GPU the state moves
between two pools of host memory, over a link of the bandwidth given with --link, or as fast as memory. With --apart
every mode is also there with updates that begin after the backward pass and end before the next forward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np


def main() -> None:
    """Parse the command line, train every mode, and print one line per mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["none", "cpu", "streamed", "deep_optimizer_states"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--apart", action="store_true", help="also without overlap with the forward and backward pass")
    parser.add_argument("--subgroup", type=int, default=2_000_000)
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--link", type=float, help="without a GPU: GB/s each way of a link that stands in for one")
    options = parser.parse_args()

    modes = list(options.modes)
    if options.apart:
        modes += [f"{mode}, apart" for mode in options.modes if mode != "none"]
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    losses: dict[str, list[float]] = {mode: [] for mode in modes}
    engines = {mode: build(mode.removesuffix(", apart"), options) for mode in modes}
    for mode in modes:
        if mode.endswith(", apart"):
            keep_apart(engines[mode])
    for number in range(options.rounds + 1):
        batches = [windows(number * options.steps + step, options) for step in range(options.steps)]
        for mode, engine in engines.items():
            start = time.perf_counter()
            losses[mode] += [engine.train_step(batch, 1e-4).loss for batch in batches]
            engine._optimizer.finish()
            times[mode].append((time.perf_counter() - start) / options.steps)
    count = engines[modes[0]].parameter_count()
    print(f"{count / 1e6:.1f} million parameters, {options.micro_batches} micro-batches, {options.precision}")
    reference = statistics.median(times[modes[0]][1:])
    for mode in modes:
        seconds = statistics.median(times[mode][1:])
        equal = "equal losses" if losses[mode] == losses[modes[0]] else "OTHER LOSSES"
        print(f"{mode:30}{seconds:9.3f} s a step{seconds / reference:8.2f} x   {equal}")


def keep_apart(engine: Any) -> None:
    """Begin each update after the backward pass and end it before the next forward pass: not a setting of runs."""
    inner = engine._optimizer._inner
    engine._optimizer._overlap = None
    for chunk in engine._wrapped:
        chunk.update = None
    inner.whole, step = True, inner.step

    def whole_step() -> None:
        inner.begin(inner.param_groups[0]["lr"])
        step()

    inner.step = whole_step


def build(mode: str, options: argparse.Namespace) -> Any:
    """An engine whose optimizer state rests where the mode says."""
    from megatron.core import parallel_state

    from rewarm.config.load import build as load
    from rewarm.engine.build import build_engine
    from rewarm.model.architecture import Architecture

    offload: dict[str, Any] = {"mode": mode}
    if mode != "none":
        offload |= {"subgroup_size": options.subgroup, "stand_in": options.link}
    config = load(
        {
            "name": "benchmark",
            "data": {"noise": "noise"},
            "precision": options.precision,
            "model": {
                "num_layers": options.layers,
                "hidden_size": options.hidden,
                "ffn_hidden_size": 4 * options.hidden,
                "num_attention_heads": max(1, options.hidden // 64),
                "vocab_size": 8192,
            },
            "batch": {
                "sequence_length": options.sequence,
                "global_batch_size": options.micro_batches,
                "micro_batch_size": 1,
            },
            "offload": offload,
        }
    )
    assert config.model is not None
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()  # several engines share the one process group
    return build_engine(config, Architecture.from_config(config.model, 8192), ["noise"])


def windows(number: int, options: argparse.Namespace) -> Any:
    """A batch of noise."""
    from rewarm.engine.base import Batch

    rng = np.random.default_rng(number)
    tokens = rng.integers(0, 8192, (options.micro_batches, options.sequence + 1))
    return Batch(tokens, np.zeros(options.micro_batches, dtype=np.int64))


if __name__ == "__main__":
    # Megatron-Core is imported by the engine first, which prepares it for a machine without a GPU.
    import rewarm.engine.megatron.engine  # noqa: F401

    main()
