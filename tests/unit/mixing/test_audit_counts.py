"""What an audit says the ancestors drew, where nobody can ask them."""

from __future__ import annotations

import numpy as np
import pytest

from rewarm.mixing.audit import _before, audit, use_of
from rewarm.mixing.draws import sample_hash
from rewarm.mixing.order import DomainOrder, Part
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weight_log import WeightEntry
from rewarm.mixing.weights import TOTAL

SIZE, SEED = 10, 7


def drawn(seed: int, parts: tuple[Part, ...], first: int, number: int) -> np.ndarray:
    return np.bincount(DomainOrder(SIZE, "content", seed, parts).windows(first, number), minlength=SIZE)


@pytest.mark.parametrize(
    ("parts", "once", "start", "expected"),
    [
        ((), False, 0, np.zeros(SIZE)),
        ((), False, 13, drawn(SEED, (), 0, 13)),
        # Replayed: the stretches are what the ancestors drew, and this run's place is of its own replay.
        ((Part(3, 0, 6), Part(4, 8, 9)), False, 0, drawn(3, (), 0, 6) + drawn(4, (), 8, 1)),
        ((Part(3, 0, 6),), False, 2, drawn(3, (), 0, 6) + drawn(3, (), 0, 2)),
        # What the ancestors left: they drew what lies before it.
        ((Part(3, 4, 10),), True, 0, drawn(3, (), 0, 4)),
        ((Part(3, 4, 10),), True, 2, drawn(3, (), 0, 6)),
    ],
)
def test_what_was_drawn_before(parts: tuple[Part, ...], once: bool, start: int, expected: np.ndarray) -> None:
    domain = SampledDomain("a", SIZE, "content", start=start, parts=parts, once=once)
    assert _before(DomainOrder(SIZE, "content", SEED, parts), domain).tolist() == expected.tolist()


def test_a_run_s_use_of_a_domain_beside_its_ancestors() -> None:
    use = use_of(np.array([0, 1, 3, 1]), np.array([2, 0, 1, 0]))
    assert (use.windows, use.drawn, use.seen, use.most_repeated) == (4, 5, 3, 3)
    assert (use.drawn_before, use.seen_before, use.known, use.fresh) == (3, 2, 1, 2)


@pytest.mark.parametrize("steps", [4, 5])
def test_every_step_that_was_logged_is_drawn_again(steps: int) -> None:
    sampler = Sampler([SampledDomain("a", SIZE, "content")], SEED, np.array([TOTAL]))
    hashes = {step: sample_hash(["a"], sampler.draw(3)) for step in range(1, steps + 1)}
    entries = [WeightEntry(0, {"a": TOTAL}, "start")]
    found = audit(sampler.state_dict(), entries, hashes, 3)
    assert (found.different, found.domains["a"].drawn) == ([], 3 * steps)
    assert audit(sampler.state_dict(), entries, {**hashes, steps: "other"}, 3).different == [steps]
