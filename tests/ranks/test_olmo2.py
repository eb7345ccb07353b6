"""OLMo 2, whose norms of queries and keys go over all heads: one step of every layout is the step of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from ranks.harness import run_ranks
from ranks.huggingface_workers import one_step
from unit.model.families import save_model, stored_tensors, windows

RATE = 0.5
TOKENS = windows(4, 33)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
}


def _step(model: Any) -> dict[str, torch.Tensor]:
    """The weights after one step of plain gradient descent."""
    logits = model(TOKENS[:, :-1]).logits
    functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    return {name: (p - RATE * p.grad).detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_transformers(layout: str, tmp_path: Path) -> None:
    model = save_model("olmo2", tmp_path / "olmo2")
    before, expected = stored_tensors(tmp_path / "olmo2"), _step(model)
    num_ranks, parallel = LAYOUTS[layout]
    settings = {
        "optimizer": {"name": "sgd", "weight_decay": 0.0, "gradient_clipping": 0.0},
        "parallel": parallel,
        "activation_recomputation": "full" if num_ranks == 2 else "none",
    }
    norms = run_ranks(one_step, num_ranks, tmp_path / "olmo2", tmp_path / "out", settings, TOKENS.numpy(), RATE)
    after = stored_tensors(tmp_path / "out")
    assert after.keys() == expected.keys()
    for name, theirs in expected.items():
        change = (theirs - before[name]).abs().max()
        assert change > 1e-4, name
        assert (after[name] - theirs).abs().max() < 1e-4 * change + 1e-7, name
    norm = torch.stack([(expected[name] - before[name]).norm() for name in expected]).norm() / RATE
    assert norms == pytest.approx([float(norm)] * num_ranks, rel=1e-4)
