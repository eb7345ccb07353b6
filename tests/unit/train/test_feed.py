"""The feed reads what the sampler picked, for its rank only, and its state never runs ahead of the step."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rewarm.config.data import DomainConfig
from rewarm.data.conditioning import Conditioning
from rewarm.data.domain import Domain, open_domain
from rewarm.data.indexed import IndexedWriter, token_dtype
from rewarm.errors import UserError
from rewarm.mixing.objective import Objective, objective_weights
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import TOTAL, quantise
from rewarm.train.feed import PREFETCH_STEPS, Feed

LENGTH, BATCH = 8, 12


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[Domain]:
    """Three domains in which every token tells its domain and its place."""
    folder = tmp_path_factory.mktemp("domains")
    opened = []
    for number in range(3):
        writer = IndexedWriter(folder / str(number), token_dtype(60000))
        for document in range(20):
            tokens = number * 20000 + document * 100 + np.arange(100)
            writer.add(tokens.astype(token_dtype(60000)), [100])
        writer.close()
        opened.append(open_domain(f"d{number}", DomainConfig(path=str(folder / str(number))), LENGTH))
    return opened


def sampler(domains: list[Domain]) -> Sampler:
    """Weights that no batch divides evenly."""
    sampled = [SampledDomain(domain.name, len(domain.train), domain.fingerprint) for domain in domains]
    return Sampler(sampled, 5, quantise([0.5, 0.3, 0.2]))


def feed(
    domains: list[Domain], rank: int = 0, num_ranks: int = 1, vocab_size: int = 60000, batch_size: int = BATCH
) -> Feed:
    """A feed at the first step."""
    return Feed(
        sampler(domains), domains, global_batch_size=batch_size, total_samples=10**6,
        rank=rank, num_ranks=num_ranks, vocab_size=vocab_size,
    )  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 16])
def test_ranks_read_disjoint_parts_of_the_single_process_batch(domains: list[Domain], num_ranks: int) -> None:
    """Also while weights change inside a batch, which every rank is told at the same step."""
    alone = feed(domains, batch_size=48)
    ranks = [feed(domains, rank, num_ranks, batch_size=48) for rank in range(num_ranks)]
    for step in range(7):
        whole = alone.next()
        parts = [one.next() for one in ranks]
        assert all(part.sample_hash == whole.sample_hash for part in parts)
        assert all(len(part.batch.tokens) == 48 // num_ranks for part in parts)
        np.testing.assert_array_equal(np.concatenate([part.batch.tokens for part in parts]), whole.batch.tokens)
        np.testing.assert_array_equal(np.concatenate([part.batch.domains for part in parts]), whole.batch.domains)
        assert len({tuple(row) for row in whole.batch.tokens.tolist()}) == 48
        change = entry(alone.first_free_sample + 5, [step + 1.0, 2.0, 0.5])
        for one in (alone, *ranks):
            one.schedule(change)


def entry(at_sample: int, weights: list[float]) -> WeightEntry:
    """A line of the weight log for the three domains."""
    return WeightEntry(at_sample, dict(zip(("d0", "d1", "d2"), quantise(weights).tolist(), strict=True)), "")


PHASES = [(3 * BATCH, [0.0, 1.0, 3.0]), (5 * BATCH + 7, [1.0, 0.0, 0.0]), (8 * BATCH, [1.0, 1.0, 1.0])]
"""Two begin with a batch, one inside of it."""


def phased(domains: list[Domain]) -> Feed:
    """A feed that knows its phases from the start, as a run reads them from its weight log."""
    picks = sampler(domains)
    for at_sample, weights in PHASES:
        picks.schedule_weights(quantise(weights), at_sample)
    return Feed(picks, domains, global_batch_size=BATCH, total_samples=10**6, rank=0, num_ranks=1, vocab_size=60000)


def test_killed_at_any_step_around_the_phase_boundaries_the_samples_are_the_same(domains: list[Domain]) -> None:
    """With phases begun, about to begin and pending, and a decision pending that was made since the last phase."""
    steps, decided = 12, {2: [5.0, 1.0, 1.0], 6: [0.1, 1.0, 0.1]}

    def go(one: Feed, first: int, states: list[str]) -> list[str]:
        hashes = []
        for step in range(first, steps):
            if step in decided:
                one.schedule(entry(one.first_free_sample, decided[step]))
            states.append(json.dumps(one.state_dict()))
            hashes.append(one.next().sample_hash)
        return hashes

    states: list[str] = []
    expected = go(phased(domains), 0, states)
    assert sum(bool(json.loads(state)["pending"]) for state in states) > steps // 2
    for killed, state in enumerate(states):
        picks = sampler(domains)
        picks.load_state_dict(json.loads(state))
        again = Feed(
            picks, domains, global_batch_size=BATCH, total_samples=10**6, rank=0, num_ranks=1, vocab_size=60000
        )
        # What was decided at this very step is in its state.
        held = [again.next().sample_hash]
        assert held + go(again, killed + 1, []) == expected[killed:], f"killed before step {killed}"


def test_windows_come_from_the_domain_and_place_that_were_drawn(domains: list[Domain]) -> None:
    fed = feed(domains).next()
    for row, domain, window in zip(fed.batch.tokens, fed.draw.domains, fed.draw.windows, strict=True):
        assert row[0] == domain * 20000 + window * LENGTH // 100 * 100 + window * LENGTH % 100
        np.testing.assert_array_equal(row[: LENGTH + 1], domains[domain].train.read(np.array([window]))[0])


def test_state_is_of_the_step_that_was_returned_however_far_reading_is(domains: list[Domain]) -> None:
    one = feed(domains)
    for _ in range(4):
        one.next()
    restored = sampler(domains)
    restored.load_state_dict(one.state_dict())
    assert restored.sample_index == 4 * BATCH
    expected = [one.next().sample_hash for _ in range(3)]
    again = Feed(restored, domains, global_batch_size=BATCH, total_samples=10**6, rank=0, num_ranks=1, vocab_size=60000)
    assert [again.next().sample_hash for _ in range(3)] == expected


def test_new_weights_take_effect_after_every_prefetch_and_survive_a_restore(domains: list[Domain]) -> None:
    one = feed(domains)
    one.next()
    at_sample = one.first_free_sample
    assert at_sample == BATCH * (1 + PREFETCH_STEPS + 1)
    one.schedule(WeightEntry(at_sample, {"d0": 0, "d1": 0, "d2": TOTAL}, ""))
    restored = sampler(domains)
    restored.load_state_dict(one.state_dict())
    again = Feed(restored, domains, global_batch_size=BATCH, total_samples=10**6, rank=0, num_ranks=1, vocab_size=60000)
    for step in range(1, 8):
        fed, other = one.next(), again.next()
        assert fed.sample_hash == other.sample_hash
        assert (set(fed.batch.domains.tolist()) == {2}) == (step * BATCH >= at_sample)


def test_factors_reach_the_right_windows_on_every_rank_and_survive_a_restore(domains: list[Domain]) -> None:
    """An objective that begins and one that ends inside batches."""
    names = [domain.name for domain in domains]
    weights = dict(zip(names, sampler(domains).weights.tolist(), strict=True))

    def schedule(one: Feed) -> Feed:
        one.schedule(WeightEntry(5, weights, "", objective_weights({"d0": 1, "d2": 1}, weights)))
        one.schedule(WeightEntry(3 * BATCH + 7, weights, ""))
        return one

    alone = schedule(feed(domains))
    ranks = [schedule(feed(domains, rank, 3)) for rank in range(3)]
    expected = np.array([0.35 / 0.5, 1.0, 0.35 / 0.2])
    for step in range(5):
        fed, parts = alone.next(), [one.next().batch.loss_weights for one in ranks]
        if step == 4:
            assert fed.batch.loss_weights is None and fed.objective is None and parts == [None] * 3
            break
        place = step * BATCH + np.arange(BATCH)
        held = np.where((place >= 5) & (place < 3 * BATCH + 7), expected[fed.draw.domains], 1.0)
        np.testing.assert_allclose(fed.batch.loss_weights, held, rtol=1e-8)
        pieces = [np.ones(4) if part is None else part for part in parts]
        np.testing.assert_array_equal(np.concatenate(pieces), fed.batch.loss_weights)
        if step == 1:
            state = json.loads(json.dumps(alone.state_dict()))
            restored = sampler(domains)
            restored.load_state_dict(state)
            objective = Objective(names)
            objective.load_state_dict(state["objective"])
            again = Feed(
                restored, domains, global_batch_size=BATCH, total_samples=10**6, rank=0, num_ranks=1,
                vocab_size=60000, objective=objective,
            )  # fmt: skip
        if step > 1:
            np.testing.assert_array_equal(again.next().batch.loss_weights, fed.batch.loss_weights)


def test_conditioning_ends_with_a_step_and_leaves_the_order_alone(domains: list[Domain]) -> None:
    """Every rank has a mask while it lasts, also one without a window of the domain that has a prefix."""
    prefixed = Conditioning({"d2": np.array([7, 8])}, 2 * BATCH)

    def conditioned(rank: int = 0, num_ranks: int = 1) -> Feed:
        return Feed(
            sampler(domains), domains, global_batch_size=BATCH, total_samples=10**6,
            rank=rank, num_ranks=num_ranks, vocab_size=60000, conditioning=prefixed,
        )  # fmt: skip

    alone, plain = conditioned(), feed(domains)
    ranks = [conditioned(rank, 12) for rank in range(12)]
    for step in range(4):
        fed, other, parts = alone.next(), plain.next(), [one.next().batch for one in ranks]
        assert fed.sample_hash == other.sample_hash
        if step >= 2:
            assert fed.batch.loss_mask is None and all(part.loss_mask is None for part in parts)
            np.testing.assert_array_equal(fed.batch.tokens, other.batch.tokens)
            continue
        masks = [part.loss_mask for part in parts if part.loss_mask is not None]
        np.testing.assert_array_equal(np.concatenate(masks), fed.batch.loss_mask)
        named = fed.batch.domains == 2
        assert 0 < named.sum() < BATCH and fed.batch.loss_mask is not None
        np.testing.assert_array_equal(fed.batch.tokens[named, :2], np.tile([7, 8], (named.sum(), 1)))
        np.testing.assert_array_equal(fed.batch.tokens[~named], other.batch.tokens[~named])
        np.testing.assert_array_equal(fed.batch.tokens[named, 2], other.batch.tokens[named, 0])
        assert fed.batch.loss_mask[~named].all() and not fed.batch.loss_mask[named, 0].any()


def test_peek_leaves_the_batch_in_place(domains: list[Domain]) -> None:
    one = feed(domains)
    np.testing.assert_array_equal(one.peek().tokens, one.next().batch.tokens)


def test_token_ids_beyond_the_model_are_refused_with_the_domain_named(domains: list[Domain]) -> None:
    with pytest.raises(UserError, match="'d2'.*40000 rows"):
        feed(domains, vocab_size=40000).next()


def test_a_stage_may_use_a_domain_up_to_its_last_window(domains: list[Domain]) -> None:
    """Reading ahead must not ask for windows that no step will train on."""
    only, steps = domains[:1], 4
    limit = (steps * BATCH) / len(only[0].train)
    sampled = [SampledDomain(only[0].name, len(only[0].train), only[0].fingerprint, max_epochs=limit)]
    one = Feed(
        Sampler(sampled, 5, quantise([1.0])), only, global_batch_size=BATCH, total_samples=steps * BATCH,
        rank=0, num_ranks=1, vocab_size=60000,
    )  # fmt: skip
    assert len({one.next().sample_hash for _ in range(steps)}) == steps
    assert one.cursors() == {"d0": steps * BATCH}
