"""A loss whose windows have factors: every layout of either engine takes the step that plain torch takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from ranks import objective_workers as workers
from ranks.deepspeed_models import write_model
from ranks.harness import run_ranks

SGD: dict[str, Any] = {"optimizer": {"name": "sgd", "weight_decay": 0.0, "gradient_clipping": 0.0}}
MEGATRON: dict[str, Any] = {**SGD, "engine": "megatron"}
ONE_BY_ONE = {"batch": {"micro_batch_size": 1}}
CASES: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "megatron, accumulation": (1, [{**MEGATRON, **ONE_BY_ONE}, {**MEGATRON, "batch": {"micro_batch_size": 8}}]),
    "megatron, data 2": (2, [{**MEGATRON, **ONE_BY_ONE}]),
    "megatron, tensor 2, pipeline 2": (4, [{**MEGATRON, "parallel": {"tensor": 2, "pipeline": 2}}]),
    "deepspeed, data 2 or context 2": (
        2,
        [
            *({**SGD, "deepspeed": {"zero_stage": stage}} for stage in (0, 2, 3)),
            {**SGD, "parallel": {"context": 2}},
        ],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("model"))


def plain(folder: Path, masked: bool) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """Gradient norm, unweighted loss sums by domain, and the weights after one step at rate 1, by torch alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = workers.weighted_batch(0, masked)
    tokens = torch.from_numpy(batch.tokens)
    losses = cross_entropy(model(input_ids=tokens[:, :-1]).logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    counted = torch.ones_like(losses) if batch.loss_mask is None else torch.from_numpy(batch.loss_mask).float()
    factors = torch.tensor(workers.FACTORS, dtype=torch.float32)[:, None]
    ((factors * counted * losses).sum() / counted.sum()).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    sums = np.bincount(batch.domains, (losses * counted).sum(1).detach().numpy(), 3)
    return norm, sums, {name: (p - p.grad).detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_weighted_step_is_that_of_torch(case: str, masked: bool, folder: Path, tmp_path: Path) -> None:
    norm, sums, after = plain(folder, masked)
    num_ranks, settings = CASES[case]
    for results in run_ranks(workers.weighted_steps, num_ranks, folder, settings, masked, tmp_path / "export"):
        for result, weights in results:
            assert result.grad_norm == pytest.approx(norm, rel=1e-5)
            np.testing.assert_allclose(result.loss_sums, sums, rtol=1e-5)
            for name, expected in after.items():
                np.testing.assert_allclose(weights[name], expected, rtol=0, atol=2e-6, err_msg=name)


def plain_statistics(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of the domains' gradients, and the spread over chunks of 2 or 3 windows, by torch alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def gradient(windows: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(windows)
        model.zero_grad()
        logits = model(input_ids=tokens[:, :-1]).logits
        cross_entropy(logits.transpose(1, 2), tokens[:, 1:]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy()

    whole = np.stack([gradient(windows) for windows in workers.held_out()])
    variances = []
    for windows, mean, sizes in zip(workers.held_out(), whole, ((3, 2), (2, 1), (2, 2, 2, 2)), strict=True):
        chunks = np.split(windows, np.cumsum(sizes)[:-1])
        spread = [len(chunk) * ((gradient(chunk) - mean) ** 2).sum() for chunk in chunks]
        variances.append(sum(spread) / (len(chunks) - 1))
    return whole @ whole.T, np.array(variances)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_domains_are_those_of_torch_and_leave_no_trace(case: str, folder: Path, tmp_path: Path) -> None:
    products, variances = plain_statistics(folder)
    _, _, after = plain(folder, True)
    num_ranks, settings = CASES[case]
    for results in run_ranks(workers.compared_gradients, num_ranks, folder, settings, tmp_path / "export"):
        for statistics, same_random_state, weights in results:
            np.testing.assert_allclose(statistics.products, products, rtol=2e-5, atol=1e-6 * products.max())
            np.testing.assert_allclose(statistics.variances, variances, rtol=1e-4)
            counts = [len(windows) for windows in workers.held_out()]
            np.testing.assert_allclose(
                statistics.squared_norms, np.diag(products) - variances / counts, rtol=1e-3, atol=1e-5 * products.max()
            )
            assert same_random_state
            for name, expected in after.items():
                np.testing.assert_allclose(weights[name], expected, rtol=0, atol=2e-6, err_msg=name)
