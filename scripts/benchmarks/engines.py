"""Both engines and a bare transformers.Trainer on the same tiny model: tokens per CPU-second, memory, start-up.

    pip install accelerate      # which the Trainer needs
    python scripts/benchmarks/engines.py [--rounds 7] [--steps 4]

Every contender is a process of its own on one CPU thread. Each is started once; then they take turns, a round being a
few steps of each, so that what else the machine does meets all of them. CPU-seconds are counted and not the clock's.
The work of a step is the same: fp32, AdamW with decay, gradients clipped, the same number of windows and of targets,
two forward passes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIPPING = 1e-4, 0.1, (0.9, 0.95), 1.0
CONTENDERS = ("transformers.Trainer", "megatron", "deepspeed stage 1", "deepspeed stage 3")


def batch_of(step: int) -> np.ndarray:
    """int64 [BATCH, SEQUENCE_LENGTH + 1]; the same for every contender."""
    return np.random.default_rng(step).integers(0, SHAPE["vocab_size"], (BATCH, SEQUENCE_LENGTH + 1))


def settings(engine: str, stage: str) -> Any:
    """The configuration of one of our engines."""
    from rewarm.config.load import build

    values: dict[str, Any] = {
        "name": "benchmark",
        "engine": engine,
        "model": SHAPE,
        "data": {"noise": "noise"},
        "batch": {"sequence_length": SEQUENCE_LENGTH, "global_batch_size": BATCH, "micro_batch_size": MICRO_BATCH},
        "optimizer": {
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "weight_decay": WEIGHT_DECAY,
            "gradient_clipping": CLIPPING,
        },
    }
    if stage:
        values["deepspeed"] = {"zero_stage": int(stage)}
    return build(values)


def run_engine(name: str, done: Callable[[int], bool]) -> None:
    """Train under one of our engines until ``done`` says so after a step."""
    from rewarm.engine.base import Batch
    from rewarm.engine.build import build_engine
    from rewarm.model.architecture import Architecture
    from rewarm.model.description import from_scratch

    engine_name, _, stage = name.partition(" stage ")
    config = settings(engine_name, stage)
    architecture = Architecture.from_config(config.model, SHAPE["vocab_size"])
    engine = build_engine(config, from_scratch(architecture, engine_name, config.precision), ["noise"])
    step = 0
    while True:
        engine.train_step(Batch(batch_of(step), np.zeros(BATCH, dtype=np.int64)), LEARNING_RATE)
        step += 1
        if done(step):
            return


def run_trainer(done: Callable[[int], bool]) -> None:
    """Train with transformers' own loop until ``done`` says so after a step."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from rewarm.model.architecture import Architecture
    from rewarm.model.description import HuggingFaceModel, from_scratch

    architecture = Architecture.from_config(settings("megatron", "").model, SHAPE["vocab_size"])
    description = from_scratch(architecture, "deepspeed", "float32")
    assert isinstance(description, HuggingFaceModel)
    values = description.config
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[values["model_type"]].from_dict(values))
    model.config.use_cache = False

    class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        """The windows of the batches, in order; targets are given shifted, as the engines have them."""

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = torch.from_numpy(batch_of(index // BATCH)[index % BATCH])
            return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}

    class Turns(TrainerCallback):
        """Asks after every step."""

        def on_step_end(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_training_stop = done(state.global_step)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=BATCH // MICRO_BATCH,
            max_steps=1_000_000,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIPPING,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        )
        Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Turns()]).train()


def contend(name: str, steps: int) -> None:
    """The child's part: after the first step, and then whenever ``steps`` more are done, say so and wait to go on."""
    import torch

    torch.set_num_threads(1)
    started = time.process_time()

    def done(step: int) -> bool:
        nonlocal started
        if (step - 1) % steps:
            return False
        # The imports before main() belong to the start-up, which is what the first answer is.
        seconds = time.process_time() - (started if step > 1 else 0.0)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"cpu_seconds": seconds, "memory": memory}), file=sys.__stdout__, flush=True)
        go_on = sys.stdin.readline().strip() == "go"
        started = time.process_time()
        return not go_on

    if name == CONTENDERS[0]:
        run_trainer(done)
    else:
        run_engine(name, done)


class Contender:
    """A child process."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        command = [sys.executable, str(Path(__file__)), "--steps", str(steps), "--only", name]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the child)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.start = self._answer()["cpu_seconds"]
        self.rates: list[float] = []
        self.memory = 0.0

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"cpu_seconds"'):
                found: dict[str, float] = json.loads(line)
                return found
        self._errors.seek(0)
        sys.exit(f"{self.name} failed:\n{self._errors.read()[-3000:]}")

    def round(self) -> None:
        """A few steps."""
        self._say("go")
        found = self._answer()
        self.rates.append(self.steps * BATCH * SEQUENCE_LENGTH / found["cpu_seconds"])
        self.memory = found["memory"]

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End it."""
        self._say("stop")
        self._process.wait(60)


def main() -> None:
    """Start every contender, let them take turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender [7]")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn [4]")
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        contend(options.only, options.steps)
        return
    contenders = [Contender(name, options.steps) for name in CONTENDERS]
    for _ in range(options.rounds):
        for contender in contenders:
            contender.round()
    print("| | tokens per CPU-second | peak memory, MB | start-up and first step, CPU-seconds |\n|---|---|---|---|")
    for contender in contenders:
        rate = statistics.median(contender.rates)
        print(f"| {contender.name} | {rate:.0f} | {contender.memory:.0f} | {contender.start:.1f} |")
        contender.close()


if __name__ == "__main__":
    main()
