"""Which windows a stage replays, and how often a lineage drew each: against lists of what real samplers drew."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.errors import UserError
from rewarm.mixing.audit import audit, use_of
from rewarm.mixing.draws import sample_hash
from rewarm.mixing.order import DomainOrder, Part
from rewarm.mixing.repetition import HALF_LIFE_REPEATS, effective_tokens
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import TOTAL, quantise
from rewarm.replay.lineage import ConsumedDomain, Lineage, Stage, order_identity
from rewarm.replay.windows import ReplayOrder, drawn_before, replay_order

CONTENT, LENGTH = "content", 16


@dataclass
class History:
    """Stages on one domain, drawn by real samplers, with all that they drew."""

    size: int
    lineage: Lineage = field(default_factory=Lineage)
    new: list[int] = field(default_factory=list)
    """Windows that were not replays, in the order they were drawn."""
    all: list[int] = field(default_factory=list)

    def order(self, mode: str, seed: int) -> ReplayOrder:
        """How a stage would draw the domain: as new data, or replayed in one of the three ways."""
        own = order_identity(CONTENT, self.size, seed)
        if mode == "new":
            return ReplayOrder(own, self.lineage.drawn(own))
        return replay_order(self.lineage, mode, self.lineage.domains()[0], self.size, seed)  # type: ignore[arg-type]

    def train(self, mode: str, seed: int, count: int) -> list[int]:
        """Add a stage; gives what it drew of the domain, half of whose samples come from another one."""
        order = self.order(mode, seed)
        domain = SampledDomain("d", self.size, CONTENT, None, order.start, order.parts, order.once)
        sampler = Sampler([domain, SampledDomain("other", 7, "other")], seed, quantise([1, 1]))
        draw = sampler.draw(2 * count)
        drawn: list[int] = draw.windows[draw.domains == 0].tolist()
        record = ConsumedDomain(
            "d", "/d", None, CONTENT, count * LENGTH, count, "", order=order.order, replayed=order.replayed
        )
        number = str(len(self.lineage.stages))
        self.lineage = self.lineage.extended(Stage(number, "run", f"/runs/{number}", domains=(record,)))
        self.all += drawn
        self.new += [] if order.replayed else drawn
        return drawn


stages = st.lists(
    st.tuples(st.sampled_from(["new", "seen", "all"]), st.integers(1, 2), st.integers(1, 40)), min_size=1, max_size=6
)


@given(st.integers(1, 23), st.integers(1, 2), st.integers(1, 40), stages)
@settings(max_examples=150)
def test_replay_repeats_what_was_trained_on_in_that_order_and_everything_is_counted(
    size: int, first_seed: int, first: int, plan: list[tuple[str, int, int]]
) -> None:
    history, replayed = History(size), 0
    history.train("new", first_seed, first)
    for mode, seed, count in plan:
        before, consumed = Counter(history.all), list(history.new)
        np.testing.assert_array_equal(
            drawn_before(history.lineage, CONTENT, size), [before[window] for window in range(size)]
        )
        drawn = history.train(mode, seed, count)
        if mode == "seen":
            assert drawn == [consumed[(replayed + place) % len(consumed)] for place in range(count)]
            replayed += count
        use = use_of(np.bincount(drawn, minlength=size), np.array([before[window] for window in range(size)]))
        assert (use.drawn, use.seen, use.most_repeated) == (count, len(set(drawn)), max(Counter(drawn).values()))
        assert use.fresh == len(set(drawn) - set(before)) and use.drawn_before == sum(before.values())
        assert (use.fresh == 0) if mode == "seen" else True
        unique, epochs = len(set(history.all)), len(history.all) / len(set(history.all))
        earlier = effective_tokens(len(before), sum(before.values()) / len(before))
        assert use.effective == pytest.approx(effective_tokens(unique, epochs) - earlier)


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(1, 3), st.integers(0, 50), st.integers(1, 70)), max_size=3),
       st.integers(0, 200), st.integers(0, 300))  # fmt: skip
def test_counts_are_those_of_the_windows(size: int, spec: list[tuple[int, int, int]], cursor: int, n: int) -> None:
    order = DomainOrder(size, CONTENT, 5, [Part(seed, start, start + length) for seed, start, length in spec])
    np.testing.assert_array_equal(order.counts(cursor, n), np.bincount(order.windows(cursor, n), minlength=size))


def test_the_unseen_rest_is_drawn_once_and_no_more() -> None:
    history = History(50)
    seen = history.train("new", 3, 20) + history.train("new", 3, 10)
    order = history.order("unseen", 9)  # the seed of this stage has no part in it
    domain = SampledDomain("d", 50, CONTENT, None, order.start, order.parts, order.once)
    sampler = Sampler([domain], 9, quantise([1]))
    with pytest.raises(UserError, match="'d' has 20 windows that the lineage has not trained on, but 21 samples") as no:
        sampler.plan(21)
    assert "replay.windows=all" in str(no.value.fix)
    sampler.plan(20)
    rest = sampler.draw(20).windows.tolist()
    assert sorted(seen + rest) == list(range(50))
    with pytest.raises(UserError, match="used up"):
        sampler.draw(2)
    # What was drawn of it is consumed: a stage that goes on in the order goes on after it.
    history.train("unseen", 9, 20)
    assert history.lineage.drawn(order_identity(CONTENT, 50, 3)) == 50
    with pytest.raises(UserError, match="trained on all 50 windows of domain 'd'"):
        history.order("unseen", 9)


def test_the_unseen_rest_of_two_orders_is_refused_and_all_goes_on_in_its_own() -> None:
    history = History(50)
    history.train("new", 1, 20)
    history.train("new", 2, 20)
    with pytest.raises(UserError, match=r"orders of 2 seeds \(1, 2\)"):
        history.order("unseen", 1)
    assert history.order("all", 2) == ReplayOrder(order_identity(CONTENT, 50, 2), 20)
    assert history.order("all", 3) == ReplayOrder(order_identity(CONTENT, 50, 3), 0)
    assert history.order("seen", 3).parts == (Part(1, 0, 20), Part(2, 0, 20))


def test_new_data_goes_on_after_what_was_consumed_and_not_after_what_was_fed_back() -> None:
    history = History(50)
    first = history.train("new", 1, 20)
    assert history.train("seen", 1, 15) == first[:15]
    second = history.train("new", 1, 30)
    assert sorted(first + second) == list(range(50))
    # The later replay goes on where the earlier one stopped, into what was consumed since.
    assert history.train("seen", 1, 10) == [*first[15:], *second[:5]]


def test_windows_of_another_length_are_refused_unless_all_was_trained_on() -> None:
    history = History(50)
    history.train("new", 1, 20)
    domain = history.lineage.domains()[0]
    for windows in ("seen", "unseen"):
        with pytest.raises(UserError, match="part of domain 'd', in windows of 16 tokens and not in the 12") as no:
            replay_order(history.lineage, windows, domain, 12, 1)  # type: ignore[arg-type]
        assert "replay.windows=all, or batch.sequence_length=16" in str(no.value.fix)
    assert replay_order(history.lineage, "all", domain, 12, 1) == ReplayOrder(order_identity(CONTENT, 12, 1), 0)
    history.train("new", 1, 30)
    whole = replay_order(history.lineage, "seen", history.lineage.domains()[0], 12, 4)
    assert whole.parts == (Part(4, 0, 12),) and whole.replayed
    with pytest.raises(UserError, match="trained on all 12 windows"):
        replay_order(history.lineage, "unseen", domain, 12, 1)
    assert drawn_before(history.lineage, CONTENT, 12).sum() == 0  # it counts windows of one length


def test_a_lineage_that_does_not_say_its_order_is_refused() -> None:
    old = ConsumedDomain("d", "/d", None, CONTENT, 320, 20, "")
    lineage = Lineage((Stage("0", "run", "/0", domains=(old,)),))
    with pytest.raises(UserError, match="set replay.windows=all"):
        replay_order(lineage, "seen", old, 50, 1)


def audited(domain: SampledDomain, count: int, seed: int) -> tuple[Sampler, list[int], dict[int, str]]:
    """A sampler that has drawn a domain alone, its windows, and the hashes of its steps of one sample."""
    sampler = Sampler([domain], seed, quantise([1]))
    draws = [sampler.draw(1) for _ in range(count)]
    windows = [int(draw.windows[0]) for draw in draws]
    return sampler, windows, {step: sample_hash(["d"], draw) for step, draw in enumerate(draws, start=1)}


@pytest.mark.parametrize("domain", [
    SampledDomain("d", 1000, CONTENT, start=900),
    SampledDomain("d", 100, CONTENT, start=30, parts=(Part(8, 50, 170), Part(9, 0, 13))),
    SampledDomain("d", 400, CONTENT, parts=(Part(8, 70, 400),), once=True),
])  # fmt: skip
def test_an_audit_counts_from_where_the_run_began(domain: SampledDomain) -> None:
    sampler, windows, hashes = audited(domain, 320, seed=8)
    state = json.loads(json.dumps(sampler.state_dict()))
    found = audit(state, [WeightEntry(0, {"d": TOTAL}, "start")], hashes, 1)
    assert not found.different
    use = found.domains["d"]
    assert (use.drawn, use.seen) == (320, len(set(windows)))
    assert use.most_repeated == max(Counter(windows).values())
    if not domain.parts:  # 100 windows of the first epoch and 220 of the second, and those in both
        earlier = DomainOrder(1000, CONTENT, 8).windows(0, 900).tolist()
        assert (use.fresh, use.drawn_before, use.seen_before) == (100, 900, 900) and 220 <= use.seen < 320
        assert use.effective == pytest.approx(effective_tokens(1000, 1.22) - 900)
    elif domain.once:
        earlier = DomainOrder(400, CONTENT, 8).windows(0, 70).tolist()
        assert use.fresh == use.effective == 320
    else:
        order = DomainOrder(100, CONTENT, 8, domain.parts)
        earlier = [*order.windows(0, 133), *order.windows(0, 30)]
        assert use.fresh == 0
    assert (use.drawn_before, use.seen_before) == (len(earlier), len(set(earlier)))


def test_replayed_windows_are_worth_what_a_repeat_is_worth() -> None:
    use = use_of(np.array([2, 1, 0, 1]), np.array([1, 1, 1, 0]))
    assert (use.drawn, use.seen, use.fresh, use.most_repeated) == (4, 3, 1, 2)
    # 4 windows drawn 7 times, less 3 windows drawn once each.
    repeats = 7 / 4 - 1
    expected = 4 + 4 * HALF_LIFE_REPEATS * (1 - np.exp(-repeats / HALF_LIFE_REPEATS)) - 3
    assert use.effective == pytest.approx(expected)
    assert use_of(np.zeros(3, int), np.zeros(3, int)).effective == 0


def test_another_choice_of_replayed_windows_is_refused_at_a_resume() -> None:
    parts = (Part(1, 0, 20),)
    state = Sampler([SampledDomain("d", 50, CONTENT, parts=parts)], 1, quantise([1])).state_dict()
    Sampler([SampledDomain("d", 50, CONTENT, parts=parts)], 1, quantise([1])).load_state_dict(state)
    for other in ((), (Part(1, 0, 21),), (Part(2, 0, 20),)):
        changed = Sampler([SampledDomain("d", 50, CONTENT, parts=other)], 1, quantise([1]))
        assert (
            changed.fingerprint()
            != Sampler([SampledDomain("d", 50, CONTENT, parts=parts)], 1, quantise([1])).fingerprint()
        )
        with pytest.raises(UserError, match="windows of domain 'd' that are replayed are others"):
            changed.load_state_dict(state)
