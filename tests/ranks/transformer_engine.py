"""The megatron engine over the stand-in for Transformer Engine against its own layers, in a process of its own.

Megatron-Core decides at its import whether there is a Transformer Engine: run with ``tests/stand_ins`` on the path.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ranks.tiny import global_batch, tiny_engine
from rewarm.engine.megatron.engine import MegatronEngine

SETTINGS: dict[str, Any] = {"model": {"family": "qwen3", "qk_norm": True}}
"""A model with every norm that there is."""
RATE = 1e-3
OURS, THEIRS = "sdpa", "transformer_engine"


def train(
    attention: str, first: int, *, start: Path | None = None, save: Path | None = None, export: Path | None = None
) -> list[float]:
    """Losses of two steps, then their gradient norms."""
    engine = tiny_engine({**SETTINGS, "megatron": {"attention": attention}})
    assert isinstance(engine, MegatronEngine)
    if start is not None:
        engine.load(start)
    if attention == THEIRS:
        check_modules(engine)
    results = [engine.train_step(global_batch(step), RATE) for step in (first, first + 1)]
    if save is not None:
        save.mkdir()
        engine.save(save)
    if export is not None:
        engine.export_huggingface(export, tokenizer=None)
    engine.close()
    return [result.loss for result in results] + [result.grad_norm for result in results]


def check_modules(engine: MegatronEngine) -> None:
    """Its linear layers and attention, and a weight for every norm."""
    import transformer_engine

    names = {name for name, _ in engine.chunks[0].named_parameters()}
    for layer in range(4):
        within = f"decoder.layers.{layer}"
        parts = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        parts += ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")  # type: ignore[assignment]
        if not {f"{within}.{part}" for part in parts} <= names:
            raise AssertionError(f"layer {layer} lacks a norm: {sorted(names)}")
    block = engine.chunks[0].decoder
    if "decoder.final_layernorm.weight" not in names or isinstance(block.final_layernorm, torch.nn.Identity):
        raise AssertionError("the final norm is an identity")
    attention = block.layers[0].self_attention
    if not isinstance(attention.core_attention, transformer_engine.pytorch.DotProductAttention):
        raise AssertionError("the attention is not Transformer Engine's")


def main(scratch: Path) -> None:
    """Compare training, exports and checkpoints in both directions."""
    runs = {kind: train(kind, 0, save=scratch / kind, export=scratch / f"{kind}.export") for kind in (OURS, THEIRS)}
    if runs[THEIRS] != pytest.approx(runs[OURS], rel=1e-6):
        raise AssertionError(runs)
    ours, theirs = (load_file(scratch / f"{kind}.export" / "model.safetensors") for kind in (OURS, THEIRS))
    if ours.keys() != theirs.keys() or not all(torch.allclose(ours[n], theirs[n], atol=1e-4) for n in ours):
        raise AssertionError("the exports differ")
    expected = train(OURS, 2, start=scratch / OURS)
    for before, after in ((OURS, THEIRS), (THEIRS, OURS), (THEIRS, THEIRS)):
        found = train(after, 2, start=scratch / before)
        if found != pytest.approx(expected, rel=1e-6):
            raise AssertionError((before, after, found, expected))
    print("same")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
