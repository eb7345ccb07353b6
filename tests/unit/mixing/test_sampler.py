"""The global order of samples."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.errors import UserError
from rewarm.mixing.draws import Draw, rank_slice, sample_hash
from rewarm.mixing.order import WindowOrder
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weights import TOTAL, quantise


def domains(*sizes: int, max_epochs: float | None = None) -> list[SampledDomain]:
    return [SampledDomain(f"d{i}", size, f"content{i}", max_epochs) for i, size in enumerate(sizes)]


def picks_by_hand(changes: list[tuple[int, Sequence[int]]], n: int) -> list[int]:
    """The published rule, one sample at a time on plain integers."""
    credit = [0] * len(changes[0][1])
    picks = []
    for sample in range(n):
        weights = [w for at, w in changes if at <= sample][-1]
        credit = [c + int(w) for c, w in zip(credit, weights, strict=True)]
        best = credit.index(max(credit))
        credit[best] -= TOTAL
        picks.append(best)
    return picks


simplex = st.lists(st.floats(0.001, 1), min_size=5, max_size=5)


@given(st.lists(simplex, min_size=1, max_size=6), st.lists(st.integers(1, 90), min_size=1, max_size=8))
@settings(max_examples=60)
def test_picks_follow_the_rule_whatever_the_batches(mixtures: list[list[float]], batches: list[int]) -> None:
    changes = [(37 * i, quantise(w)) for i, w in enumerate(mixtures)]
    sampler = Sampler(domains(3, 10, 100, 7, 2**40), 5, changes[0][1])
    for at, weights in changes[1:]:
        sampler.schedule_weights(weights, at)
    drawn = np.concatenate([sampler.draw(n).domains for n in batches])
    assert drawn.tolist() == picks_by_hand([(at, w.tolist()) for at, w in changes], sum(batches))
    assert sampler.sample_index == sum(batches)


def integers(mixtures: np.ndarray) -> np.ndarray:
    """Rows as integers that sum to 2^32, what is left over going to the largest."""
    shares = mixtures / mixtures.sum(axis=1, keepdims=True)
    rows: np.ndarray = np.floor(shares * TOTAL).astype(np.int64)
    rows[np.arange(len(rows)), rows.argmax(axis=1)] += TOTAL - rows.sum(axis=1)
    return rows


def quota_errors(mixtures: np.ndarray, every: int) -> np.ndarray:
    """Count minus share of every domain after every sample, float64 [samples, K], the weights changing so often."""
    sampler = Sampler(domains(*[50] * len(mixtures[0])), 0, mixtures[0])
    for i, weights in enumerate(mixtures):
        sampler.schedule_weights(weights, i * every)
    draw = sampler.draw(every * len(mixtures))
    owed = np.cumsum(np.repeat(mixtures, every, axis=0), axis=0) / TOTAL
    return np.cumsum(draw.domains[:, None] == np.arange(owed.shape[1]), axis=0) - owed


def most_behind(num_domains: int) -> float:
    """1/2 + 1/3 + ... + 1/K, which 10 domains keep below 2 samples."""
    return sum(1 / place for place in range(2, num_domains + 1))


@given(
    st.integers(2, 40).flatmap(
        lambda k: st.lists(st.lists(st.floats(0, 1), min_size=k, max_size=k).filter(any), min_size=1, max_size=20)
    ),
    st.integers(1, 40),
)
@settings(max_examples=100)
def test_quota_error_keeps_its_bound_for_any_weights(mixtures: list[list[float]], every: int) -> None:
    errors = quota_errors(integers(np.array(mixtures) + 1e-300), every)
    assert errors.max() < 1
    assert errors.min() >= -most_behind(len(mixtures[0])) - 1e-9
    assert len(mixtures[0]) > 10 or np.abs(errors).max() <= 2


@given(
    st.integers(0, 2**32), st.integers(2, 64), st.floats(-2, 2), st.sampled_from([1, 2, 7, 64]), st.sampled_from([0, 1])
)
@settings(max_examples=40)
def test_quota_error_is_at_most_two_samples_for_random_weights(
    seed: int, num_domains: int, concentration: float, every: int, sparse: int
) -> None:
    rng = np.random.default_rng(seed)
    mixtures = rng.dirichlet(np.full(num_domains, 10**concentration), 384 // every) + 1e-12
    if sparse:
        mixtures *= rng.random(mixtures.shape) < 0.5
        mixtures[:, 0] += 1e-3
    assert np.abs(quota_errors(integers(mixtures), every)).max() <= 2


@pytest.mark.parametrize("num_domains", [2, 10, 11, 60])
def test_the_bound_is_met_by_weights_that_follow_the_picks(num_domains: int) -> None:
    """All the weight on the domains that were not picked yet: whatever the rule, the last one waits this long."""
    sampler = Sampler(domains(*[50] * num_domains), 0, quantise(np.ones(num_domains)))
    owed, waiting = np.zeros(num_domains), np.ones(num_domains, dtype=bool)
    while waiting.sum() > 1:
        weights = quantise(waiting.astype(float))
        sampler.schedule_weights(weights, sampler.sample_index)
        owed += weights / TOTAL
        waiting[sampler.draw(1).domains] = False
    behind = (owed - sampler.cursors).max()
    assert behind == pytest.approx(most_behind(num_domains), abs=1e-6)
    assert (behind > 2) == (num_domains > 10)


def test_weights_of_zero_are_never_drawn() -> None:
    assert set(Sampler(domains(5, 5, 5), 0, quantise([1, 0, 1])).draw(1000).domains) == {0, 2}


@given(st.lists(st.tuples(simplex, st.integers(1, 60)), min_size=1, max_size=12))
@settings(max_examples=60)
def test_no_window_comes_twice_before_its_epoch_ends(plan: list[tuple[list[float], int]]) -> None:
    sizes = (3, 10, 40, 7, 64)
    sampler = Sampler(domains(*sizes), 3, quantise(plan[0][0]))
    seen: list[list[int]] = [[] for _ in sizes]
    for weights, n in plan:
        sampler.schedule_weights(quantise(weights), sampler.sample_index + n // 2)
        draw = sampler.draw(n)
        for domain, window in zip(draw.domains, draw.windows, strict=True):
            seen[domain].append(int(window))
    for windows, size in zip(seen, sizes, strict=True):
        epochs = [windows[first : first + size] for first in range(0, len(windows), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    for length, size, epochs_made in zip(map(len, seen), sizes, sampler.epochs().values(), strict=True):
        assert epochs_made == pytest.approx(length / size)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16])
def test_rank_slices_are_disjoint_and_make_up_the_batch(ranks: int) -> None:
    for n in (48, 50):
        batch = Sampler(domains(100, 200), 0, quantise([1, 2])).draw(n)
        slices = [rank_slice(batch, rank, ranks) for rank in range(ranks)]
        assert np.concatenate([s.domains for s in slices]).tolist() == batch.domains.tolist()
        assert np.concatenate([s.windows for s in slices]).tolist() == batch.windows.tolist()
        assert [s.start for s in slices] == np.cumsum([0, *map(len, slices)])[:-1].tolist()
        assert max(map(len, slices)) - min(map(len, slices)) <= (n % ranks > 0)


@given(st.integers(0, 120), st.integers(0, 200))
@settings(max_examples=40)
def test_killed_and_restored_anywhere_with_a_change_pending(killed_at: int, change_at: int) -> None:
    def fresh() -> Sampler:
        return Sampler(domains(7, 30, 11), 9, quantise([1, 1, 1]))

    whole, first = fresh(), fresh()
    for sampler in (whole, first):
        sampler.schedule_weights(quantise([5, 1, 0]), change_at)
    expected = whole.draw(killed_at), whole.draw(200)
    first.draw(killed_at)
    second = fresh()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got = second.draw(200)
    assert sample_hash(second.names, got) == sample_hash(whole.names, expected[1])
    assert got.start == killed_at
    assert second.state_dict() == whole.state_dict()


def test_hash_is_of_names_windows_and_order() -> None:
    draw = Draw(0, np.array([0, 1]), np.array([4, 5]))
    swapped = Draw(0, np.array([1, 0]), np.array([5, 4]))
    assert sample_hash(["a", "b"], draw) == sample_hash(["b", "a"], Draw(9, np.array([1, 0]), np.array([4, 5])))
    assert len({sample_hash(n, d) for n in (["a", "b"], ["a", "c"]) for d in (draw, swapped)}) == 4


def test_adding_and_dropping_domains_leaves_the_other_cursors_alone() -> None:
    before = Sampler(domains(20, 30, 40), 1, quantise([1, 2, 3]))
    before.draw(100)
    keep = before.domains[1]
    added = SampledDomain("new", 25, "new content")
    after = Sampler([added, keep, before.domains[0]], 1, quantise([1, 1, 1]))
    after.load_state_dict(before.state_dict())
    cursors = dict(zip(before.names, before.cursors.tolist(), strict=True))
    assert dict(zip(after.names, after.cursors.tolist(), strict=True)) == {
        "new": 0, "d1": cursors["d1"], "d0": cursors["d0"]
    }  # fmt: skip
    unbroken = before.draw(300)
    continued = after.draw(300)
    for name, then, now in (("d1", 1, 1), ("d0", 0, 2)):
        expected = unbroken.windows[unbroken.domains == then]
        got = continued.windows[continued.domains == now]
        shared = min(len(expected), len(got))
        assert shared > 20 and got[:shared].tolist() == expected[:shared].tolist(), name


def test_a_change_in_the_past_is_refused() -> None:
    sampler = Sampler(domains(20, 30), 1, quantise([1, 2]))
    sampler.draw(10)
    with pytest.raises(UserError, match="sample 9: 10 samples were drawn"):
        sampler.schedule_weights(quantise([1, 1]), 9)
    sampler.schedule_weights(quantise([1, 1]), 10)
    assert sampler.weights.tolist() == [TOTAL // 2] * 2 and not sampler.pending


def test_what_would_reorder_samples_is_refused_by_name() -> None:
    sampler = Sampler(domains(20, 30), 1, quantise([1, 1]))
    state = sampler.state_dict()
    for changed, seed, message in (
        ([SampledDomain("d0", 20, "other"), domains(20, 30)[1]], 1, "'d0' changed: its fingerprint was content0"),
        (domains(20, 31), 1, "'d1' changed: its num_windows was 30"),
        (domains(20, 30)[::-1], 1, "listed as"),
        (domains(20, 30), 2, "seed 1"),
    ):
        with pytest.raises(UserError, match=message):
            Sampler(changed, seed, quantise([1, 1])).load_state_dict(state)
    with pytest.raises(UserError, match="algorithm version 0"):
        sampler.load_state_dict({**state, "order_version": 0})


def test_fingerprint_follows_content_seed_and_size_but_not_names() -> None:
    def of(sizes: Sequence[int], seed: int, prefix: str = "d") -> str:
        named = [SampledDomain(f"{prefix}{i}", size, f"c{i}") for i, size in enumerate(sizes)]
        return Sampler(named, seed, quantise([1] * len(sizes))).fingerprint()

    assert of([5, 6], 0) == of([5, 6], 0, "renamed")
    assert len({of([5, 6], 0), of([5, 7], 0), of([5, 6], 1), of([5], 0)}) == 4


def test_epoch_caps_are_foreseen_or_end_the_draw() -> None:
    sampler = Sampler(domains(100, 900, max_epochs=2.0), 0, quantise([1, 1]))
    assert sampler.plan(400) == pytest.approx({"d0": 2.0, "d1": 200 / 900})
    with pytest.raises(UserError, match=r"'d0' has 100 windows and max_epochs=2.0, but 402 samples would take 201"):
        sampler.plan(402)
    sampler.draw(400)
    state = sampler.state_dict()
    with pytest.raises(UserError, match="'d0' is used up"):
        sampler.draw(10)
    assert sampler.state_dict() == state
    sampler.schedule_weights(quantise([0, 1]), 400)
    sampler.draw(100)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.integers(1, 500))
@settings(max_examples=60)
def test_a_plan_that_is_accepted_never_fails_in_drawing(weights: list[float], total: int) -> None:
    sampler = Sampler(domains(*[20] * len(weights), max_epochs=3.0), 0, quantise(weights))
    try:
        sampler.plan(total)
    except UserError:
        expected = np.array(weights) / sum(weights) * total
        assert expected.max() > 60 - 1e-3
    else:
        sampler.draw(total)


def test_bad_domains_are_refused() -> None:
    weights = quantise([1, 1])
    with pytest.raises(UserError, match="'d1' has 0 windows"):
        Sampler(domains(3, 0), 0, weights)
    with pytest.raises(UserError, match="two domains are called 'a'"):
        Sampler([SampledDomain("a", 1, "x"), SampledDomain("a", 1, "y")], 0, weights)
    with pytest.raises(UserError, match="'a' and 'b' have the same content"):
        Sampler([SampledDomain("a", 1, "x"), SampledDomain("b", 1, "x")], 0, weights)
    with pytest.raises(UserError, match="no domain"):
        Sampler([], 0, weights[:0])


@given(
    st.lists(st.tuples(st.one_of(st.integers(1, 20), st.integers(1, 2**62)), st.floats(0, 1)), min_size=1, max_size=60),
    st.lists(st.integers(0, 300), min_size=1, max_size=4),
    st.integers(0, 2**60),
)
@settings(max_examples=60)
def test_native_path_draws_the_same(
    native: ctypes.CDLL, spec: list[tuple[int, float]], batches: list[int], seed: int
) -> None:
    sizes, weights = [s for s, _ in spec], quantise([w + 1e-9 for _, w in spec])
    names = [f"c{i}" for i in range(len(sizes))]
    results = []
    for library in (None, native):
        order = WindowOrder(sizes, names, seed, library=library)
        credits, cursors = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
        cursors[0] = sizes[0] - 1
        drawn = [order.draw(weights, credits, cursors, n) for n in batches]
        results.append(
            [np.concatenate(part).tolist() for part in zip(*drawn, strict=True)] + [credits.tolist(), cursors.tolist()]
        )
    assert results[0] == results[1]


@pytest.mark.parametrize("native", [False, True])
def test_a_stage_goes_on_after_the_windows_that_its_lineage_drew(native: bool) -> None:
    """Cut in two stages, a domain's order is the one of a single run; the limit counts the new stage alone."""
    alone = Sampler([SampledDomain("a", 50, "content a")], 3, quantise([1.0]), native=native)
    expected = alone.draw(120).windows
    second = SampledDomain("a", 50, "content a", max_epochs=1.0, start=70)
    stage = Sampler([second], 3, quantise([1.0]), native=native)
    np.testing.assert_array_equal(stage.draw(50).windows, expected[70:])
    assert stage.cursors.tolist() == [50] and stage.epochs() == {"a": 1.0}
    with pytest.raises(UserError, match="max_epochs"):
        stage.draw(5)
    restored = Sampler([second], 3, quantise([1.0]), native=native)
    state = Sampler([SampledDomain("a", 50, "content a")], 3, quantise([1.0]), native=native).state_dict()
    with pytest.raises(UserError, match="start"):
        restored.load_state_dict(state)


def test_a_weight_below_zero_is_no_weight() -> None:
    domains = [SampledDomain("a", 5, "a"), SampledDomain("b", 5, "b")]
    with pytest.raises(AssertionError):
        Sampler(domains, 1, np.array([-1, TOTAL + 1]))
