"""Manners of the engine on one and on a few ranks."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from patience import PATIENCE
from ranks import single_workers
from ranks.harness import RanksFailed, run_ranks
from ranks.tiny import VOCAB_SIZE, tiny_config
from rewarm.model.architecture import Architecture, parameter_count


def test_losses_are_those_of_the_logits() -> None:
    """Evaluation against the definition: minus the log of the softmax, one prefix at a time."""
    ((losses, sums),) = run_ranks(single_workers.unmasked_losses, 1)
    np.testing.assert_allclose(sums, losses.sum(axis=1), rtol=1e-5)


def test_evaluation_does_not_depend_on_its_micro_batches() -> None:
    (found,) = run_ranks(single_workers.evaluated_by, 1, [1, 3, 8, 13])
    for losses in found[1:]:
        np.testing.assert_allclose(losses, found[0], rtol=1e-6)


def test_masked_targets_do_not_count() -> None:
    ((loss, norm, counts),) = run_ranks(single_workers.masked_step, 1, {})
    ((losses, _),) = run_ranks(single_workers.unmasked_losses, 1)
    np.testing.assert_array_equal(counts, [4 * 11, 4 * 11, 0])  # every third of 32 targets is 11
    for data_loss, data_norm, data_counts in run_ranks(single_workers.masked_step, 2, {}):
        assert data_loss == pytest.approx(loss, abs=1e-5)
        assert data_norm == pytest.approx(norm, rel=1e-5)
        np.testing.assert_array_equal(data_counts, counts)
    # The first two windows are part of the batch: the masked mean is near theirs, as random weights know nothing.
    assert loss == pytest.approx(losses[:, ::3].mean(), abs=0.1)


def test_initial_weights() -> None:
    (weights,) = run_ranks(single_workers.initial_weights, 1, {"model": {"initializer_range": 0.05}})
    (other_seed,) = run_ranks(single_workers.initial_weights, 1, {"model": {"initializer_range": 0.05}, "seed": 7})
    config = tiny_config()
    assert config.model is not None
    expected = parameter_count(Architecture.from_config(config.model, VOCAB_SIZE))
    padded_rows = weights["embedding.word_embeddings.weight"].shape[0] - VOCAB_SIZE
    assert sum(value.size for value in weights.values()) == expected + 2 * padded_rows * 64
    for name, value in weights.items():
        if "norm" in name:
            assert np.all(value == 1)
            continue
        assert not np.array_equal(value, other_seed[name])
        rows = value[:VOCAB_SIZE] if name in ("embedding.word_embeddings.weight", "output_layer.weight") else value
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        assert rows.std() == pytest.approx(0.05 / np.sqrt(8) if residual else 0.05, rel=0.05), name
        assert np.all(value[len(rows) :] == 0)
    layers = [weights[f"decoder.layers.{layer}.mlp.linear_fc2.weight"] for layer in range(4)]
    assert not any(np.array_equal(layers[0], layer) for layer in layers[1:])


def test_a_dry_run_leaves_no_trace() -> None:
    for same_weights, same_state, loss_with, loss_without in run_ranks(single_workers.dry_run, 1, {}):
        assert same_weights
        assert same_state
        assert loss_with == loss_without


def test_collectives_of_small_values() -> None:
    for outcome in run_ranks(single_workers.messages, 2, {}):
        assert outcome["gather"] == [{"rank": 0}, {"rank": 1}]
        assert outcome["broadcast"] == "from 0"
        assert outcome["any"] == (True, False)


def test_a_failing_rank_is_shown_with_its_traceback() -> None:
    """The harness reports that the layout does not fit; a rank that comes late may find the others gone already."""
    with pytest.raises(RanksFailed) as caught:
        run_ranks(single_workers.messages, 3, {"parallel": {"tensor": 2}})
    assert str(caught.value).count("3 ranks cannot be shared by parallel.tensor=2") >= 1
    assert "Traceback" in str(caught.value)


def test_transformer_engine_is_refused_where_it_is_missing() -> None:
    with pytest.raises(RanksFailed, match="transformer_engine, but Transformer Engine is not installed"):
        run_ranks(single_workers.messages, 1, {"megatron": {"attention": "transformer_engine"}})


def test_starting_loads_neither_transformers_nor_a_compiler() -> None:
    """Both take seconds to import; the first step does not need them."""
    code = (
        "import sys, warnings; warnings.simplefilter('error', UserWarning)\n"
        "import rewarm.engine.megatron.engine\n"
        "print([name for name in ('transformers', 'torch._inductor', 'torch._dynamo.convert_frame') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
