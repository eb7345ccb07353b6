"""Both engines and a bare transformers.Trainer on the same tiny model: tokens per CPU-second, memory, start-up.

    python scripts/benchmarks/engines.py [--steps 20]

Each contender runs in a process of its own on one CPU thread. CPU-seconds and not wall-clock seconds are counted, so
that other work on the machine disturbs less; start-up is everything before the first step, imports included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 704,
    "num_attention_heads": 8,
    "vocab_size": 4096,
}
SEQUENCE_LENGTH, BATCH, MICRO_BATCH = 256, 8, 4
CONTENDERS = ("megatron", "deepspeed stage 1", "deepspeed stage 3", "transformers.Trainer")


def batch_of(step: int) -> np.ndarray:
    """int64 [BATCH, SEQUENCE_LENGTH + 1]; the same for every contender."""
    return np.random.default_rng(step).integers(0, SHAPE["vocab_size"], (BATCH, SEQUENCE_LENGTH + 1))


def run_engine(name: str, steps: int) -> dict[str, float]:
    """Train under one of our engines."""
    from rewarm.config.load import build
    from rewarm.engine.base import Batch
    from rewarm.engine.build import build_engine
    from rewarm.model.architecture import Architecture
    from rewarm.model.description import from_scratch

    engine_name, _, stage = name.partition(" stage ")
    values: dict[str, Any] = {
        "name": "benchmark",
        "engine": engine_name,
        "model": SHAPE,
        "data": {"noise": "noise"},
        "batch": {"sequence_length": SEQUENCE_LENGTH, "global_batch_size": BATCH, "micro_batch_size": MICRO_BATCH},
    }
    if stage:
        values["deepspeed"] = {"zero_stage": int(stage)}
    config = build(values)
    assert config.model is not None
    architecture = Architecture.from_config(config.model, SHAPE["vocab_size"])
    engine = build_engine(config, from_scratch(architecture, engine_name, config.precision), ["noise"])

    def step(number: int) -> None:
        engine.train_step(Batch(batch_of(number), np.zeros(BATCH, dtype=np.int64)), 1e-4)

    return measure(step, steps)


def run_trainer(steps: int) -> dict[str, float]:
    """Train with transformers' own loop."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SHAPE["vocab_size"],
            hidden_size=SHAPE["hidden_size"],
            intermediate_size=SHAPE["ffn_hidden_size"],
            num_hidden_layers=SHAPE["num_layers"],
            num_attention_heads=SHAPE["num_attention_heads"],
            num_key_value_heads=SHAPE["num_attention_heads"],
        )
    )
    rows = np.concatenate([batch_of(step)[:, :-1] for step in range(steps + 1)])
    data = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in rows]
    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        """Notes the clocks after every step."""

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            marks.append((time.process_time(), time.time()))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=BATCH // MICRO_BATCH,
            max_steps=steps + 1,
            learning_rate=1e-4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        )
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    return summary(marks[0], marks[-1], steps)


def measure(step: Any, steps: int) -> dict[str, float]:
    """One step to warm up, then ``steps`` that count."""
    step(0)
    first = (time.process_time(), time.time())
    for number in range(1, steps + 1):
        step(number)
    return summary(first, (time.process_time(), time.time()), steps)


def summary(first: tuple[float, float], last: tuple[float, float], steps: int) -> dict[str, float]:
    """Figures between two readings of the CPU's and the wall's clock."""
    return {
        "tokens_per_cpu_second": steps * BATCH * SEQUENCE_LENGTH / (last[0] - first[0]),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "start_cpu_seconds": first[0],
    }


def main() -> None:
    """Run every contender in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps that count [20]")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        import torch

        torch.set_num_threads(1)
        trainer = options.only == CONTENDERS[-1]
        print(json.dumps(run_trainer(options.steps) if trainer else run_engine(options.only, options.steps)))
        return
    print("| | tokens per CPU-second | peak memory, MB | start-up and first step, CPU-seconds |\n|---|---|---|---|")
    for name in CONTENDERS:
        command = [sys.executable, str(Path(__file__)), "--steps", str(options.steps), "--only", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        figures = (found["tokens_per_cpu_second"], found["peak_memory_mb"], found["start_cpu_seconds"])
        print(f"| {name} | {figures[0]:.0f} | {figures[1]:.0f} | {figures[2]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
