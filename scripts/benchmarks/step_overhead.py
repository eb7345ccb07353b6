"""Tokens per CPU-second of ``rewarm train``, of a bare Megatron-Core loop and of a bare transformers loop.

    python scripts/benchmarks/step_overhead.py [--rounds 15] [--json FILE]

One thread, one process, fp32, the same ~10M-parameter Llama-style model, the same batch sizes, AdamW and clipping in
all three. Each round times one step of each, one after the other, in CPU time of the process (its reading threads
included), so that a busy machine slows all three alike; the ratios are medians over rounds. The rewarm step is the
loop's own: sampling, reading, the engine, per-domain sums, metrics lines. The bare loops get ready-made tensors and
keep only the loss. The bare Megatron loop has the same attention kernel (torch's scaled-dot-product attention): with
Megatron's own unfused attention it would be slower still.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

VOCAB, LENGTH, BATCH = 8192, 256, 8
SHAPE = {"num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 8}
KEY_VALUE_HEADS = 4


def write_domain(folder: Path) -> None:
    """Random tokens: what a step costs does not depend on them."""
    from rewarm.data.indexed import IndexedWriter, token_dtype

    writer = IndexedWriter(folder / "noise", token_dtype(VOCAB))
    generator = np.random.default_rng(0)
    for _ in range(200):
        writer.add(generator.integers(0, VOCAB, 4000).astype(token_dtype(VOCAB)), [4000])
    writer.close()


def rewarm_arm(folder: Path, micro_batch_size: int, total_steps: int) -> Callable[[], None]:
    """One step of a real run, hooks included; evaluation and checkpoints lie outside the measured steps."""
    from rewarm.config.load import build
    from rewarm.engine.build import build_engine
    from rewarm.train.folder import prepare_folder
    from rewarm.train.loop import train_one_step
    from rewarm.train.session import begin, prepare
    from rewarm.train.stage import resolve_stage

    config = build(
        {
            "name": "step-overhead",
            "runs_folder": str(folder / "runs"),
            "data": {"noise": str(folder / "noise")},
            "model": {**SHAPE, "num_key_value_heads": KEY_VALUE_HEADS, "vocab_size": VOCAB},
            "duration": f"{total_steps} steps",
            "batch": {"sequence_length": LENGTH, "global_batch_size": BATCH, "micro_batch_size": micro_batch_size},
            "schedule": {"peak": 1e-4},
            "evaluation": {"interval": None, "windows_per_domain": 1},
            "checkpoint": {"interval": None},
            "tracking": {"wandb": {"mode": "disabled"}},
        }
    )
    prepare_folder(config.folder)
    stage = resolve_stage(config, 1)
    run = begin(prepare(config, stage, build_engine(config, stage.architecture, stage.names)))
    for hook in run.hooks:
        hook.start(run)
    return lambda: train_one_step(run)


def transformers_arm(tokens: torch.Tensor, micro_batch_size: int) -> Callable[[], None]:
    """What one would write by hand around ``LlamaForCausalLM``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=SHAPE["hidden_size"], intermediate_size=SHAPE["ffn_hidden_size"],
        num_hidden_layers=SHAPE["num_layers"], num_attention_heads=SHAPE["num_attention_heads"],
        num_key_value_heads=KEY_VALUE_HEADS, rms_norm_eps=1e-5, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        for windows in tokens.split(micro_batch_size):
            inputs = windows[:, :-1].contiguous()
            loss = model(input_ids=inputs, labels=inputs).loss * (micro_batch_size / BATCH)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


class _SdpaCore(torch.nn.Module):
    """Attention core for the bare loop: the kernel and nothing else."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """[S, B, heads, width] each, to [S, B, heads * width]."""
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def _bare_megatron_model() -> tuple[Any, Any]:
    """A GPTModel of Megatron's local layers in its data-parallel wrapper, and its distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        **SHAPE, num_query_groups=KEY_VALUE_HEADS, kv_channels=32, use_cpu_initialization=True,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, bias_activation_fusion=False,
        masked_softmax_fusion=False, persist_layer_norm=False, bias_dropout_fusion=False,
        gradient_accumulation_fusion=False, apply_rope_fusion=False,
        params_dtype=torch.float32, pipeline_dtype=torch.float32,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = _SdpaCore
    config.finalize_model_grads_func = finalize_model_grads
    model = GPTModel(config, spec, VOCAB, LENGTH, position_embedding_type="rope")
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(config, settings, model)
    options = OptimizerConfig(lr=1e-4, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0, use_distributed_optimizer=True)
    return wrapped, get_megatron_optimizer(options, [wrapped])


def megatron_arm(tokens: torch.Tensor, micro_batch_size: int) -> Callable[[], None]:
    """Megatron-Core's own layers, schedule and distributed optimizer, in its shortest loop."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from rewarm.engine.megatron.compat import cuda_type_names

    model, optimizer = _bare_megatron_model()
    forward_backward = get_forward_backward_func()

    def forward_step(batches: Iterator[torch.Tensor], part: Any) -> tuple[Any, Callable[[torch.Tensor], Any]]:
        windows = next(batches)
        losses = part(windows[:, :-1], None, None, labels=windows[:, 1:])
        return losses, lambda output: (output.float().mean(), {"loss": output.detach().float().mean()})

    def step() -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=forward_step, data_iterator=iter(tokens.split(micro_batch_size)), model=model,
            num_microbatches=BATCH // micro_batch_size, seq_length=LENGTH, micro_batch_size=micro_batch_size,
            forward_only=False,
        )  # fmt: skip
        with cuda_type_names():  # the clipping of Megatron-Core refuses CPU tensors without it
            optimizer.step()
        losses[-1]["loss"].item()

    return step


def measure(arms: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU-seconds of each step, the arms interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for step in arms.values():
        step()
    for _ in range(rounds):
        for name, step in arms.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each arm [15]")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="windows per forward pass, of 8 a step [8]")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        write_domain(Path(place))
        tokens = torch.from_numpy(np.random.default_rng(1).integers(0, VOCAB, (BATCH, LENGTH + 1)))
        arms = {
            "rewarm": rewarm_arm(Path(place), options.micro_batch_size, options.rounds + 100),
            "megatron": megatron_arm(tokens, options.micro_batch_size),
            "transformers": transformers_arm(tokens, options.micro_batch_size),
        }
        seconds = measure(arms, options.rounds)
    figures: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    for name, values in seconds.items():
        figures[name] = BATCH * LENGTH / statistics.median(values)
        print(f"{name:>14}: {figures[name]:8.0f} tokens per CPU-second (median of {options.rounds})")
    for name in ("megatron", "transformers"):
        ratios = [other / own for own, other in zip(seconds["rewarm"], seconds[name], strict=True)]
        figures[f"rewarm / {name}"] = statistics.median(ratios)
        print(f"rewarm / {name}: {figures[f'rewarm / {name}']:.3f} (median of paired rounds)")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "framework"))
    main()
