"""A mixer in the loop: logged before it takes effect, followed after a crash, safe when an evaluation fails."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewarm.config.mixture import MixtureConfig, ReplayConfig
from rewarm.errors import UserError
from rewarm.mixing.controller import MixtureController
from rewarm.mixing.draws import sample_hash
from rewarm.mixing.mixers.build import build_mixer
from rewarm.mixing.mixture import Clock, check_phases_by_loss, initial_weights, planned_changes, planned_entry
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weight_log import WeightLog
from rewarm.mixing.weights import TOTAL, align

TOKENS = {"a": 900, "b": 600, "c": 300}
REPLAYED = {"old": 1.0}
BATCH, AHEAD, TOTAL_STEPS, EVERY = 8, 3, 40, 4
TARGETS = {"a": 1.5, "b": 1.9, "c": 2.7}

MIXTURES: dict[str, dict[str, Any]] = {
    "velocitune": {"mixer": "velocitune", "velocitune": {"targets": TARGETS}},
    "dynamic_batch_loading": {"mixer": "dynamic_batch_loading", "dynamic_batch_loading": {"targets": TARGETS}},
    "doremi": {"mixer": "doremi", "doremi": {"reference": {"a": 2.0, "b": 2.2, "c": 2.4}}},
    "odm": {"mixer": "odm", "odm": {"warmup": "4 steps"}},
    "ado": {"mixer": "ado", "ado": {"warmup": "4 steps"}},
    "skill_it": {"mixer": "skill_it", "skill_it": {"graph": {"a": {"a": 1}, "b": {"b": 1, "c": 0.5}}}},
    "aioli": {"mixer": "aioli", "aioli": {"probes_per_domain": 1, "hold": 2}},
    "phased": {
        "mixer": "phased",
        "phased": {"phases": [{"weights": {"a": 0, "b": 1, "c": 1}, "loss_below": {"a": 2.1}}]},
    },
}


def losses_at(step: int, jitter: float = 0.0) -> dict[str, float]:
    """Made-up held-out losses, which another topology would measure with a little jitter."""
    speed = {"a": 0.03, "b": 0.01, "c": 0.02, "old": 0.0, "watched": 0.0}
    return {name: 2.0 + 0.5 * math.exp(-rate * step * 3) - jitter * rate for name, rate in speed.items()}


class Loop:
    """The few lines by which a training loop drives the controller, with a sampler that runs ahead."""

    def __init__(
        self, mixture: dict[str, Any], folder: Path, max_epochs: float | None = None, capped: str = "a"
    ) -> None:
        config, replay = MixtureConfig.model_validate(mixture), ReplayConfig(fraction=0.25)
        names, weights = initial_weights(config, replay, TOKENS, REPLAYED)
        sizes = {**TOKENS, "old": 500}
        domains = [SampledDomain(n, sizes[n] // 10, f"content {n}", max_epochs if n in capped else None) for n in names]
        self.sampler = Sampler(domains, 1, weights)
        steps = {"4 steps": 4, "0 steps": 0}
        mixer = build_mixer(config, list(TOKENS), weights[:3] / TOTAL, steps.__getitem__)
        self.controller = MixtureController(
            config, mixer, replayed=REPLAYED, replay_fraction=0.25, total_samples=TOTAL_STEPS * BATCH,
            held_out=dict.fromkeys(names, "held out"),
        )  # fmt: skip
        self.log, self.hashes, self.step = WeightLog(folder / "mixture.jsonl"), {}, 0
        if not self.log.entries():
            clock = Clock(TOTAL_STEPS, BATCH, lambda text: int(text.split()[0]), lambda step: 1.0)
            start = planned_entry(config, 0, names, weights, "start")
            for entry in [start, *planned_changes(config, replay, TOKENS, REPLAYED, clock)]:
                self.log.append(entry.sample, entry.weights, entry.reason, entry.objective)
        for entry in self.log.entries()[1:]:
            self.sampler.schedule_weights(align(entry.weights, names), entry.sample)

    def resume(self, checkpoint: str) -> None:
        state = json.loads(checkpoint)
        self.step = state["step"]
        self.sampler.load_state_dict(state["sampler"])
        self.controller.load_state_dict(state["controller"])
        for entry in self.log.entries():
            if entry.sample > self.sampler.sample_index:
                self.sampler.schedule_weights(align(entry.weights, self.sampler.names), entry.sample)

    def checkpoint(self) -> str:
        state = {"step": self.step, "sampler": self.sampler.state_dict(), "controller": self.controller.state_dict()}
        return json.dumps(state)

    def train(self, until: int, jitter: float = 0.0, broken: frozenset[int] = frozenset()) -> None:
        while self.step < until:
            draw = self.sampler.draw(BATCH)
            self.hashes[self.step] = sample_hash(self.sampler.names, draw)
            self.step += 1
            counts = np.bincount(draw.domains, minlength=4) * 64
            self.controller.observe(counts * np.array([*losses_at(self.step, jitter).values()][:4]), counts)
            if self.step % EVERY == 0:
                losses = losses_at(self.step, jitter)
                if self.step in broken:
                    losses["b"] = math.nan
                at = (self.step + AHEAD) * BATCH
                change = self.controller.propose(self.step, losses, at, self.sampler, self.log)
                entry = self.controller.commit(change, self.log)
                self.sampler.schedule_weights(align(entry.weights, self.sampler.names), entry.sample)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("saved", "killed"), [(4, 5), (6, 17), (12, 12), (19, 33)])
@pytest.mark.parametrize("jitter", [0.0, 1e-9])
def test_killed_and_resumed_it_follows_the_log(
    name: str, saved: int, killed: int, jitter: float, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    whole = Loop(MIXTURES[name], tmp_path / "whole")
    whole.train(TOTAL_STEPS)

    broken = Loop(MIXTURES[name], tmp_path)
    broken.train(saved)
    checkpoint = broken.checkpoint()
    broken.train(killed)
    resumed = Loop(MIXTURES[name], tmp_path)
    resumed.resume(checkpoint)
    # On another rank count the losses differ in their last digits; what is in the log is followed all the same.
    resumed.train(killed, jitter)
    assert resumed.log.entries() == broken.log.entries()
    resumed.train(TOTAL_STEPS)
    assert broken.hashes | resumed.hashes == whole.hashes
    found, expected = WeightLog(tmp_path / "mixture.jsonl").entries(), whole.log.entries()
    assert [(e.sample, e.reason) for e in found] == [(e.sample, e.reason) for e in expected]
    slack = 0 if jitter == 0 else 1000
    for mine, theirs in zip(found, expected, strict=True):
        for ours, others in ((mine.weights, theirs.weights), (mine.objective or {}, theirs.objective or {})):
            assert ours.keys() == others.keys()
            assert all(abs(ours[name] - others[name]) <= slack for name in ours)


@pytest.mark.parametrize("name", sorted(MIXTURES.keys() - {"doremi"}))
def test_weights_change_sum_up_and_leave_replay_alone(name: str, tmp_path: Path) -> None:
    loop = Loop(MIXTURES[name], tmp_path)
    loop.train(TOTAL_STEPS)
    entries = loop.log.entries()
    assert [e.sample for e in entries[1:]] == [(s + AHEAD) * BATCH for s in range(EVERY, TOTAL_STEPS + 1, EVERY)]
    assert len({tuple(e.weights.values()) for e in entries}) > 1
    assert all(abs(e.weights["old"] - TOTAL // 4) <= 1 for e in entries)


def test_weights_follow_the_rule_within_the_part_that_replay_leaves(tmp_path: Path) -> None:
    loop = Loop(MIXTURES["velocitune"], tmp_path)
    loop.train(8)
    before, after = (losses_at(step) for step in (4, 8))
    velocity = {
        n: min(1.0, max(0.0, (after[n] - t) / (before[n] - t))) if before[n] > t else 0.0 for n, t in TARGETS.items()
    }
    powers = np.exp(list(velocity.values()))
    expected = 0.75 * powers / powers.sum()
    assert np.array(list(loop.log.entries()[-1].weights.values()))[:3] / TOTAL == pytest.approx(expected, abs=1e-8)


def test_doremi_moves_the_objective_by_the_excess_and_leaves_the_samples(tmp_path: Path) -> None:
    loop = Loop({**MIXTURES["doremi"], "weights": {"a": 3, "b": 2, "c": 1}}, tmp_path)
    loop.train(8)
    first, *updates = loop.log.entries()
    assert [entry.weights for entry in updates] == [first.weights] * 2
    assert first.objective is None
    expected = np.array([3, 2, 1]) / 6
    for step, entry in zip((4, 8), updates, strict=True):
        losses = losses_at(step)
        excess = [max(losses["a"] - 2.0, 0), max(losses["b"] - 2.2, 0), max(losses["c"] - 2.4, 0)]
        expected = expected * np.exp(excess)
        expected = 0.999 * expected / expected.sum() + 0.001 / 3
        assert entry.objective is not None
        shares = np.array(list(entry.objective.values())) / TOTAL
        # Replay has a quarter of the samples and keeps it in the loss.
        assert shares == pytest.approx([*(0.75 * expected), 0.25], abs=1e-8)


def test_a_fixed_objective_goes_along_with_every_change_of_the_samples(tmp_path: Path) -> None:
    loop = Loop({**MIXTURES["velocitune"], "objective": {"a": 1, "b": 1, "c": 2}}, tmp_path)
    loop.train(16, broken=frozenset({12}))
    for entry in loop.log.entries()[1:]:
        assert entry.objective is not None
        assert np.array(list(entry.objective.values())) / TOTAL == pytest.approx([0.1875, 0.1875, 0.375, 0.25])


def test_a_failed_evaluation_keeps_the_weights_and_is_logged(tmp_path: Path) -> None:
    loop = Loop(MIXTURES["velocitune"], tmp_path)
    loop.train(16, broken=frozenset({12}))
    third, fourth = loop.log.entries()[2:4]
    assert fourth.weights == third.weights
    assert fourth.reason == "step 12: weights kept, the evaluation gave nan for b"
    assert loop.log.entries()[4].weights != third.weights


def test_what_was_trained_on_before_a_failed_evaluation_is_part_of_the_next_update(tmp_path: Path) -> None:
    mixture = {"mixer": "ado", "ado": {"warmup": "4 steps"}}
    whole = Loop(mixture, tmp_path)
    whole.train(16)
    (tmp_path / "broken").mkdir()
    broken = Loop(mixture, tmp_path / "broken")
    broken.train(16, broken=frozenset({12}))
    # The laws are fitted against the tokens of all domains so far.
    assert broken.controller.mixer.tokens == whole.controller.mixer.tokens > 0


def test_changed_held_out_text_is_refused_at_a_resume(tmp_path: Path) -> None:
    loop = Loop(MIXTURES["velocitune"], tmp_path)
    loop.train(8)
    state = json.loads(loop.checkpoint())
    for name, refused in (("b", True), ("old", False)):
        changed = MixtureController(
            MixtureConfig.model_validate(MIXTURES["velocitune"]), loop.controller.mixer, replayed=REPLAYED,
            replay_fraction=0.25, total_samples=320,
            held_out=dict.fromkeys([*TOKENS, "old"], "held out") | {name: "other text"},
        )  # fmt: skip
        if refused:
            with pytest.raises(UserError, match=f"held-out text of domain '{name}' changed"):
                changed.load_state_dict(state["controller"])
        else:
            changed.load_state_dict(state["controller"])


def test_aioli_probes_each_domain_in_turn_and_says_so(tmp_path: Path) -> None:
    loop = Loop(MIXTURES["aioli"], tmp_path)
    loop.train(TOTAL_STEPS)
    reasons = [entry.reason.partition(": ")[2] for entry in loop.log.entries()[1:]]
    assert sorted(reasons[:3]) == [f"aioli (probe of {name})" for name in "abc"]
    assert "aioli (mixture from 3 probes)" in reasons or "aioli (mixture from 4 probes)" in reasons
    assert "aioli (mixture held)" in reasons
    for entry in loop.log.entries()[1:4]:
        new = sorted(weight / TOTAL / 0.75 for name, weight in entry.weights.items() if name != "old")
        assert new == pytest.approx([0.1875, 0.1875, 0.625])


def test_a_target_above_the_initial_loss_is_logged(tmp_path: Path) -> None:
    loop = Loop({"mixer": "velocitune", "velocitune": {"targets": {**TARGETS, "c": 9.0}}}, tmp_path)
    loop.train(8)
    assert loop.log.entries()[-1].reason == "step 8: velocitune (already at the target when the stage began: c)"


def test_caps_on_passes_are_kept_and_logged(tmp_path: Path) -> None:
    # a would get far more than its 90 windows times 0.9 in 320 samples.
    rising = {"mixer": "dynamic_batch_loading", "dynamic_batch_loading": {"targets": {"a": 0.1, "b": 3.0, "c": 3.0}}}
    loop = Loop(rising, tmp_path, max_epochs=0.9)
    loop.train(TOTAL_STEPS)
    assert 79 <= loop.sampler.cursors[0] <= 82
    assert any(entry.reason.endswith("max_epochs caps a") for entry in loop.log.entries())


def test_a_phase_begins_once_when_its_loss_is_reached(tmp_path: Path) -> None:
    loop = Loop(MIXTURES["phased"], tmp_path)
    loop.train(TOTAL_STEPS)
    begun = [entry for entry in loop.log.entries() if "losses reached" in entry.reason]
    # 2 + 0.5 exp(-0.09 step) < 2.1 from step 17.9 on.
    assert [entry.reason for entry in begun] == ["step 20: phase 0, losses reached"]
    assert begun[0].weights == loop.log.entries()[-1].weights
    assert [round(w / TOTAL, 6) for w in begun[0].weights.values()] == [0, 0.375, 0.375, 0.25]


BY_LOSS = {"weights": {"a": 0, "b": 1, "c": 1}, "loss_below": {"a": 2.1}}  # reached at step 20: from sample 184 on
PLANNED = {"weights": {"a": 1, "b": 0, "c": 1}, "at": "23 steps"}


def phased(*phases: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"mixer": "phased", "phased": {"phases": list(phases)}, **more}


def new_shares(loop: Loop, sample: int) -> list[float]:
    """Shares of a, b and c among themselves that the log has in force for a sample."""
    entry = loop.log.effective(sample)
    assert entry is not None
    return [round(weight / TOTAL / 0.75, 6) for name, weight in entry.weights.items() if name != "old"]


@pytest.mark.parametrize("phases", [[BY_LOSS, PLANNED], [PLANNED, BY_LOSS]])
@pytest.mark.parametrize(("saved", "killed"), [(18, 18), (18, 21), (21, 22), (22, 30)])
def test_a_phase_by_loss_holds_where_it_coincides_with_a_planned_one(
    phases: list[dict[str, Any]], saved: int, killed: int, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    whole = Loop(phased(*phases), tmp_path / "whole")
    whole.train(TOTAL_STEPS)
    both = [entry.reason for entry in whole.log.entries() if entry.sample == 184]
    assert both == [f"phase {phases.index(PLANNED)}", f"step 20: phase {phases.index(BY_LOSS)}, losses reached"]
    assert new_shares(whole, 184) == new_shares(whole, 319) == [0, 0.5, 0.5]

    first = Loop(phased(*phases), tmp_path)
    first.train(saved)
    checkpoint = first.checkpoint()
    first.train(killed)
    resumed = Loop(phased(*phases), tmp_path)
    resumed.resume(checkpoint)
    resumed.train(TOTAL_STEPS, jitter=1e-9)
    assert first.hashes | resumed.hashes == whole.hashes
    assert resumed.log.entries() == whole.log.entries()


def test_a_planned_phase_holds_where_no_phase_by_loss_begins(tmp_path: Path) -> None:
    """The evaluation that decides for the same sample leaves the planned weights; they are not overwritten."""
    late = {**BY_LOSS, "loss_below": {"a": 2.02}}  # 2 + 0.5 exp(-0.09 step) from step 35.8 on
    loop = Loop(phased(PLANNED, late), tmp_path)
    loop.train(TOTAL_STEPS)
    assert [e.reason for e in loop.log.entries() if e.sample == 184] == ["phase 0", "step 20: no phase begins"]
    assert new_shares(loop, 183) == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert new_shares(loop, 184) == [0.5, 0, 0.5]
    assert new_shares(loop, (36 + AHEAD) * BATCH) == [0, 0.5, 0.5]


def test_of_phases_that_begin_together_the_last_holds_and_none_begins_again(tmp_path: Path) -> None:
    third = {"weights": {"a": 1, "b": 1, "c": 2}, "loss_below": {"b": 2.4, "old": 9.0}}
    loop = Loop(phased(BY_LOSS, {**third, "loss_below": {"a": 2.1}}, third), tmp_path)
    loop.train(TOTAL_STEPS)
    begun = [entry.reason for entry in loop.log.entries() if "reached" in entry.reason]
    # 2 + 0.5 exp(-0.03 step) < 2.4 from step 7.4 on.
    assert begun == ["step 8: phase 2, losses reached", "step 20: phase 0, losses reached; phase 1, losses reached"]
    assert new_shares(loop, 184) == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("begins", [True, False])
def test_whether_a_phase_has_begun_is_read_from_the_log_and_not_decided_again(begins: bool, tmp_path: Path) -> None:
    """On another layout a loss just at its bound may fall on the other side of it."""
    loop = Loop(phased(BY_LOSS, PLANNED), tmp_path)
    loop.train(18)
    checkpoint = loop.checkpoint()
    weights = loop.sampler.weights if not begins else np.array([0, 3, 3, 2]) * (TOTAL // 8)
    what = "phase 0, losses reached" if begins else "no phase begins"
    loop.log.append(184, dict(zip(loop.sampler.names, weights.tolist(), strict=True)), f"step 20: {what}")
    resumed = Loop(phased(BY_LOSS, PLANNED), tmp_path)
    resumed.resume(checkpoint)
    resumed.train(20, jitter=0.0 if not begins else -5.0)  # -5 keeps the loss of a above its bound
    assert resumed.controller.state_dict()["begun"] == ([0] if begins else [])
    resumed.train(TOTAL_STEPS)
    again = [entry.reason for entry in resumed.log.entries() if "reached" in entry.reason]
    assert again == ["step 20: phase 0, losses reached" if begins else "step 24: phase 0, losses reached"]


def test_a_log_of_an_earlier_version_names_only_the_last_phase_that_began(tmp_path: Path) -> None:
    second = {"weights": {"a": 1, "b": 1, "c": 2}, "loss_below": {"a": 2.1}}
    loop = Loop(phased(BY_LOSS, second), tmp_path)
    loop.train(18)
    checkpoint = loop.checkpoint()
    weights = dict(zip(loop.sampler.names, loop.sampler.weights.tolist(), strict=True))
    loop.log.append(184, weights, "step 20: phase 1, losses reached")
    resumed = Loop(phased(BY_LOSS, second), tmp_path)
    resumed.resume(checkpoint)
    resumed.train(TOTAL_STEPS)
    assert [e.reason for e in resumed.log.entries() if "reached" in e.reason] == ["step 20: phase 1, losses reached"]


def test_a_cap_leaves_what_a_later_planned_phase_will_take(tmp_path: Path) -> None:
    """b may be drawn 60 times. The plan takes 40 up to step 20 and 20 in the last steps of the stage; without a cap
    that knows of them, the phase by loss would use b up in between, and the last phase would end the run."""
    only_b = {"weights": {"a": 0, "b": 1, "c": 1}, "loss_below": {"a": 2.1}}
    planned = {"weights": {"a": 2, "b": 1, "c": 0}, "at": "30 steps"}
    loop = Loop(phased(only_b, planned), tmp_path, max_epochs=75 / 60, capped="b")
    loop.train(TOTAL_STEPS)
    begun = next(entry for entry in loop.log.entries() if "reached" in entry.reason)
    assert begun.reason == "step 20: phase 0, losses reached; max_epochs caps b"
    # 184 samples at 1/4 are 46 of b, the last 80 at 1/4 take 20: 9 are left for 56 samples.
    assert begun.weights["b"] / TOTAL == pytest.approx(9 / 56, abs=1e-6)
    assert loop.sampler.cursors[1] == pytest.approx(75, abs=1)


@pytest.mark.parametrize(("planned", "left"), [(23, 29), (22, 31)])
def test_a_cap_looks_past_planned_changes_that_a_phase_by_loss_replaces(
    planned: int, left: int, tmp_path: Path
) -> None:
    """A change planned for the same sample, or for one before it, is not where the new weights end."""
    loop = Loop(phased(BY_LOSS, {**PLANNED, "at": f"{planned} steps"}), tmp_path, max_epochs=75 / 60, capped="b")
    loop.train(TOTAL_STEPS)
    begun = next(entry for entry in loop.log.entries() if "reached" in entry.reason)
    assert (begun.sample, begun.reason) == (184, "step 20: phase 0, losses reached; max_epochs caps b")
    # b is a quarter of the samples up to the planned change, none from there up to 184, and may be drawn 75 times.
    assert begun.weights["b"] / TOTAL == pytest.approx(left / 136, abs=1e-6)


def test_a_phase_by_loss_that_takes_the_objectives_samples_is_refused_before_the_run() -> None:
    for objective, message in (
        ({"a": 1}, r"'a' the weight 1, but nothing is sampled from it \(phase 1\)"),
        ({"a": 1, "b": 1}, r"'a' the weight 1, but nothing is sampled"),
        ({"b": 1, "x": 1}, "objective names 'x'"),
    ):
        config = MixtureConfig.model_validate(phased({**PLANNED, "weights": {"a": 1, "b": 1, "c": 1}}, BY_LOSS))
        config = config.model_copy(update={"objective": objective})
        with pytest.raises(UserError, match=message):
            check_phases_by_loss(config, REPLAYED, 0.25)
    for objective in ({"b": 1, "a": 0}, {"c": 1, "old": 1}, None):
        check_phases_by_loss(config.model_copy(update={"objective": objective}), REPLAYED, 0.25)


@pytest.mark.parametrize("objective", [{"a": 3.0}, {"a": 1.0, "b": 0.0}, {"a": 2.0, "c": 1.0}])
def test_an_objective_whose_domain_is_used_up_goes_on_with_what_is_left(
    objective: dict[str, float], tmp_path: Path
) -> None:
    """a has 90 windows and may be passed over 0.15 times: when the first decision takes effect, its 13 are gone."""
    mixture = {
        "mixer": "dynamic_batch_loading", "objective": objective,
        "dynamic_batch_loading": {"targets": {"a": 0.1, "b": 3.0, "c": 3.0}},
    }  # fmt: skip
    whole = Loop(mixture, tmp_path, max_epochs=0.15)
    whole.train(3)
    checkpoint = whole.checkpoint()
    whole.train(TOTAL_STEPS)
    for entry in whole.log.entries()[1:8]:  # the last ones would take effect after the stage
        assert entry.objective is not None and entry.weights["a"] == entry.objective["a"] == 0
        assert entry.reason.partition("; ")[2].startswith("max_epochs caps a")
        if "c" in objective:
            assert entry.objective["b"] == entry.weights["b"] and "every window" not in entry.reason
        else:
            assert entry.objective == entry.weights
            assert "no domain with a weight in the objective is sampled, so every window counts once" in entry.reason
    resumed = Loop(mixture, tmp_path, max_epochs=0.15)
    resumed.resume(checkpoint)
    resumed.train(TOTAL_STEPS, jitter=1e-9)
    assert whole.hashes.items() >= resumed.hashes.items()
    assert resumed.log.entries() == whole.log.entries()


def test_a_phase_on_an_unknown_domain_is_refused(tmp_path: Path) -> None:
    phases = [{"weights": {"a": 1, "b": 1, "c": 1}, "loss_below": {"x": 1.0}}]
    with pytest.raises(UserError, match=r"phases\[0\].loss_below names 'x'"):
        Loop({"mixer": "phased", "phased": {"phases": phases}}, tmp_path)


def test_caps_that_cannot_be_met_keep_the_weights_and_are_logged(tmp_path: Path) -> None:
    """All domains together have fewer windows left than the stage: what would have been decided is not."""
    loop = Loop(MIXTURES["odm"], tmp_path, max_epochs=0.5)
    loop.sampler.domains = tuple(replace(domain, max_epochs=0.5) for domain in loop.sampler.domains)
    loop.train(8)
    start, *decided = loop.log.entries()
    assert len(decided) == 2 and all(entry.weights == start.weights for entry in decided)
    # 320 samples, 56 of them before the first change; (90 + 60 + 30) / 2 windows less what was drawn by then.
    left = (90 - 0.75 * 56) / (320 - 56) / 0.75
    assert decided[0].reason == (
        f"step 4: odm; weights kept: the domains with a weight may take {left:.4g} of the samples that are left"
    )


def test_targets_come_from_a_file(tmp_path: Path) -> None:
    place = tmp_path / "targets.json"
    place.write_text(json.dumps({"targets": TARGETS}))
    loop = Loop({"mixer": "velocitune", "velocitune": {"targets": str(place)}}, tmp_path)
    assert loop.controller.mixer.targets.tolist() == list(TARGETS.values())
    place.write_text("[]")
    with pytest.raises(UserError, match="holds no targets"):
        Loop({"mixer": "velocitune", "velocitune": {"targets": str(place)}}, tmp_path)
    with pytest.raises(UserError, match="cannot read the targets"):
        Loop({"mixer": "velocitune", "velocitune": {"targets": str(tmp_path / "none.json")}}, tmp_path)


def test_gradients_reach_the_mixer_and_broken_ones_keep_the_weights(tmp_path: Path) -> None:
    loop = Loop({"mixer": "pike", "pike": {"norm_factor": 0.5, "variance_factor": 2.0}}, tmp_path)

    def decide(step: int, products: np.ndarray) -> list[float]:
        at, norms, variances = (step + AHEAD) * BATCH, np.array([1.0, 0.5, -0.25]), np.array([2.0, 8.0, 4.0])
        change = loop.controller.propose(
            step, losses_at(step), at, loop.sampler, loop.log, gradients=(products, norms, variances)
        )
        loop.sampler.schedule_weights(align(loop.controller.commit(change, loop.log).weights, loop.sampler.names), at)
        return [weight / TOTAL for weight in change.entry.weights.values()]

    # The squared norms are not the diagonal, which has the noise in it; b is 64 by default.
    powers = np.exp(0.5 * np.array([1.0, 0.5, -0.25]) - 2.0 * np.array([2.0, 8.0, 4.0]) / 128)
    expected = [*(0.75 * powers / powers.sum()), 0.25]
    products = np.diag([1.25, 1.0, 0.25]) + 0.125
    assert decide(4, products) == pytest.approx(expected, abs=1e-8)
    products[0, 1] = math.nan
    assert decide(8, products) == pytest.approx(expected, abs=1e-8)
    assert loop.log.entries()[-1].reason == "step 8: weights kept, a gradient is not finite"
