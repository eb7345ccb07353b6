"""Every layout follows the single process: the same losses, gradient norms and weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from ranks import workers
from ranks.harness import run_ranks
from ranks.tiny import DOMAINS, GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH
from rewarm.engine.base import StepResult

STEPS = 6
TOLERANCE = 1e-5
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 2, interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pipeline 4": (4, {"pipeline": 4}),
    "data 2": (2, {}),
    "tensor 2, pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor 2, pipeline 2, data 2": (8, {"tensor": 2, "pipeline": 2}),
    "sequence, interleaved, data 2": (8, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}),
}


def _freeze(settings: dict[str, Any]) -> tuple[Any, ...]:
    return tuple((k, _freeze(v) if isinstance(v, dict) else v) for k, v in sorted(settings.items()))


def _thaw(frozen: tuple[Any, ...]) -> dict[str, Any]:
    return {key: _thaw(value) if isinstance(value, tuple) else value for key, value in frozen}


@cache
def _single(frozen: tuple[Any, ...]) -> list[StepResult]:
    return run_ranks(workers.train, 1, _thaw(frozen), STEPS)[0]


def single(settings: dict[str, Any]) -> list[StepResult]:
    """The single process's steps."""
    return _single(_freeze(settings))


def difference(results: list[StepResult], expected: list[StepResult]) -> float:
    """Largest difference of a loss (absolute) or a gradient norm (relative)."""
    pairs = list(zip(results, expected, strict=True))
    losses = [abs(ours.loss - theirs.loss) for ours, theirs in pairs]
    norms = [abs(ours.grad_norm / theirs.grad_norm - 1) for ours, theirs in pairs]
    return max(losses + norms)


def check(num_ranks: int, parallel: dict[str, Any], settings: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Train on the layout and hold it against the single process, on every rank."""
    expected = single(settings)
    for results in run_ranks(workers.train, num_ranks, {**settings, "parallel": parallel}, STEPS):
        assert difference(results, expected) < tolerance
        for ours, theirs in zip(results, expected, strict=True):
            np.testing.assert_array_equal(ours.token_counts, theirs.token_counts)
            np.testing.assert_allclose(ours.loss_sums, theirs.loss_sums, rtol=tolerance)


def test_single_process_learns_and_counts_tokens_per_domain() -> None:
    results = single({})
    assert results[0].loss == pytest.approx(np.log(500), abs=0.1)  # random weights know nothing yet
    assert results[-1].loss < results[0].loss - 0.05
    half = GLOBAL_BATCH_SIZE * SEQUENCE_LENGTH // 2
    assert len(DOMAINS) == 3
    for result in results:
        np.testing.assert_array_equal(result.token_counts, [half, half, 0])
        assert result.loss_sums[2] == 0
        assert not result.skipped


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_follows_single_process(layout: str, tied: bool) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    check(num_ranks, parallel, {"model": {"tie_embeddings": tied}})


@pytest.mark.parametrize("layout", ["tensor 2", "pipeline 2", "data 2", "tensor 2, pipeline 2"])
def test_bfloat16_follows_single_process(layout: str) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    check(num_ranks, parallel, {"precision": "bfloat16"}, tolerance=1e-2)


@pytest.mark.parametrize("layout", ["tensor 2", "tensor 2, sequence"])
@pytest.mark.parametrize(
    "model", [{"family": "qwen2", "qkv_bias": True}, {"family": "qwen3", "qk_norm": True, "head_dim": 24}]
)
def test_query_key_norm_and_bias_follow_single_process(layout: str, model: dict[str, Any]) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    check(num_ranks, parallel, {"model": model})


@pytest.mark.parametrize("layout", ["tensor 2, sequence", "pipeline 2"])
def test_recomputation_changes_nothing(layout: str) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    plain = {"model": {"family": "qwen3", "qk_norm": True}}
    expected = single(plain)
    assert difference(single({**plain, "activation_recomputation": "full"}), expected) == 0
    results = run_ranks(
        workers.train, num_ranks, {**plain, "activation_recomputation": "full", "parallel": parallel}, STEPS
    )
    assert difference(results[0], expected) < TOLERANCE


def test_local_attention_follows_sdpa() -> None:
    local = {"megatron": {"attention": "local"}}
    assert difference(single(local), single({})) < TOLERANCE


def test_without_overlap_data_parallel_still_follows() -> None:
    check(2, {}, {"megatron": {"overlap_communication": False}})


def test_padding_does_not_touch_the_loss() -> None:
    """Another padding is another number of padded columns; if any took part in a softmax, losses would differ."""
    assert difference(single({"megatron": {"vocab_divisor": 1}}), single({})) < TOLERANCE
    check(2, {"tensor": 2}, {"megatron": {"vocab_divisor": 512}})


def test_a_broken_reduction_is_noticed() -> None:
    """The comparison can fail: without the sum over data-parallel ranks it does, from the first gradient on."""
    results = run_ranks(workers.train_without_reduction, 2, {"megatron": {"overlap_communication": False}}, STEPS)
    expected = single({})
    assert abs(results[0][0].loss - expected[0].loss) < TOLERANCE  # nothing was updated before the first loss
    assert difference(results[0], expected) > 100 * TOLERANCE


def _assemble(shards: list[dict[str, tuple[np.ndarray, int | None]]]) -> dict[str, np.ndarray]:
    """Whole tensors from what the tensor ranks hold, in rank order; gate and up halves are split each by itself."""
    whole: dict[str, np.ndarray] = {}
    for name in {name for shard in shards for name in shard}:
        parts = [shard[name][0] for shard in shards if name in shard]
        axis = next(shard[name][1] for shard in shards if name in shard)
        if axis is None:
            whole[name] = parts[0]
        elif name.endswith("linear_fc1.weight"):
            halves = [np.split(part, 2) for part in parts]
            whole[name] = np.concatenate([half[0] for half in halves] + [half[1] for half in halves])
        else:
            whole[name] = np.concatenate(parts, axis)
    return whole


@pytest.mark.parametrize("layout", ["tensor 2, pipeline 2, data 2", "pipeline 2, interleaved"])
def test_one_gradient_step_gives_the_same_weights(layout: str) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    # Plain descent moves a weight by its gradient: Adam would hide a wrong scale.
    settings = {"optimizer": {"name": "sgd", "weight_decay": 0.01}, "megatron": {"vocab_divisor": 1}}
    before = run_ranks(workers.weights_after, 1, settings, 0)
    after = run_ranks(workers.weights_after, 1, settings, 1)
    start, expected = _assemble(before), _assemble(after)
    ours = _assemble(run_ranks(workers.weights_after, num_ranks, {**settings, "parallel": parallel}, 1))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-7, err_msg=name)
        assert not np.array_equal(value, start[name]), f"{name} did not move"


@pytest.mark.parametrize("layout", ["data 2", "tensor 2, sequence", "pipeline 2, interleaved"])
@pytest.mark.parametrize("windows", [7, 1])
def test_evaluation_and_logits_are_the_same(layout: str, windows: int) -> None:
    """Seven windows in micro-batches of two: the last is short, and the data ranks get unequal shares."""
    num_ranks, parallel = LAYOUTS[layout]
    (expected,) = run_ranks(workers.measure, 1, {}, 2, windows)
    assert expected["losses"].shape == (windows,)
    for measured in run_ranks(workers.measure, num_ranks, {"parallel": parallel}, 2, windows):
        np.testing.assert_allclose(measured["losses"], expected["losses"], rtol=TOLERANCE)
        np.testing.assert_allclose(measured["logits"], expected["logits"], atol=TOLERANCE)
        assert measured["loss after"] == pytest.approx(expected["loss after"], abs=TOLERANCE)
