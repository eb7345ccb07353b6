"""The loop's side of a mixer: what happens at an evaluation, and what is remembered between them.

At an evaluation the main rank asks :meth:`MixtureController.propose` for a change and broadcasts it; every rank then
calls :meth:`MixtureController.commit` and schedules the weights. The weight log is written before they can take effect.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewarm.config.mixture import MixtureConfig, PhaseConfig
from rewarm.errors import UserError
from rewarm.mixing.mixers.base import Mixer, Observation
from rewarm.mixing.mixture import blend
from rewarm.mixing.objective import is_estimable, objective_weights
from rewarm.mixing.repetition import cap_weights
from rewarm.mixing.sampler import Sampler
from rewarm.mixing.weight_log import WeightEntry, WeightLog, decided_at
from rewarm.mixing.weights import TOTAL, align

Gradients = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of the K new domains' held-out gradients: inner products, float64 [K, K]; squared norms and variances, [K] each."""


@dataclass(frozen=True, slots=True)
class Change:
    """A decision about the weights, for all ranks."""

    entry: WeightEntry
    """What the weight log holds about it."""
    state: dict[str, Any]
    """State of the controller after it."""
    is_logged: bool
    """True if the log held the entry already, from before an interruption."""


class MixtureController:
    """Turns held-out and training losses into scheduled weights.

    Replayed domains keep their shares: the mixer divides what replay leaves among the new domains, of the samples or,
    if it steers the objective, of the loss.

    Args:
        mixture: the configuration section.
        mixer: of the new domains, see :func:`rewarm.mixing.mixers.build.build_mixer`.
        replayed: proportion of each replayed domain; they follow the new domains in every per-domain array.
        replay_fraction: their share of all samples.
        total_samples: of the stage; epoch caps are kept over what is left of them.
        held_out: content of each domain's held-out slice. It is part of the state, because other text has other losses.
    """

    def __init__(
        self,
        mixture: MixtureConfig,
        mixer: Mixer,
        *,
        replayed: Mapping[str, float],
        replay_fraction: float,
        total_samples: int,
        held_out: Mapping[str, str],
    ) -> None:
        self.mixer = mixer
        self.is_active = mixture.is_updated
        """False if no evaluation can change the weights."""
        self._objective = mixture.objective
        self._phases = {number: phase for number, phase in enumerate(mixture.phases) if phase.loss_below is not None}
        self._replayed, self._replay_fraction = dict(replayed), replay_fraction
        self._total_samples = total_samples
        watched = {name for phase in self._phases.values() for name in phase.loss_below or {}}
        self._held_out = {name: held_out[name] for name in held_out if name in {*mixer.names, *watched}}
        self._loss_sums = np.zeros(len(mixer.names))
        self._counts = np.zeros(len(mixer.names), dtype=np.int64)
        self._begun: list[int] = []
        self.last_step = -1
        """Step of the last evaluation that was used; -1 before the first."""
        for number, phase in self._phases.items():
            unknown = sorted(set(phase.loss_below or {}) - {*mixer.names, *replayed})
            if unknown:
                raise UserError(f"mixture.phased.phases[{number}].loss_below names {unknown[0]!r}, which is no domain")

    def observe(self, loss_sums: np.ndarray, token_counts: np.ndarray) -> None:
        """Add a training step. New domains come first; what follows them is not the mixer's.

        Args:
            loss_sums: float64 [D], nats.
            token_counts: int64 [D].
        """
        count = len(self._counts)
        self._loss_sums += loss_sums[:count]
        self._counts += token_counts[:count]

    def propose(
        self,
        step: int,
        losses: Mapping[str, float],
        at_sample: int,
        sampler: Sampler,
        log: WeightLog,
        gradients: Gradients | None = None,
    ) -> Change:
        """Decide at an evaluation. On the main rank only; nothing but this controller changes; :meth:`commit` tells
        the others.

        A loss that is not finite leaves the weights as they are, and the log says so; the training since the last
        update is then part of the next one. What the log holds of this evaluation, from before an interruption, is
        followed whatever would be computed now. A planned change at the same sample is another entry: a decision is
        written after it, and so holds.

        Args:
            step: steps trained so far.
            losses: held-out loss of every domain, nats per token; domains beyond those of the stage are ignored.
            at_sample: first global sample index that no rank can have drawn yet; a function of the step alone.
            sampler: drawing the stage's samples.
            log: of the run.
            gradients: where the mixer reads them.
        """
        assert self.is_active, "no evaluation changes these weights"
        names, begun = self.mixer.names, set(self._begun)
        bad = [name for name in names if not np.isfinite(losses[name])]
        if bad:
            shares, reason = None, f"weights kept, the evaluation gave {losses[bad[0]]} for {bad[0]}"
        elif gradients is not None and not all(np.isfinite(part).all() for part in gradients):
            shares, reason = None, "weights kept, a gradient is not finite"
        else:
            shares, reason = self._decide(step, losses, gradients)
            if not self.mixer.steers_objective:
                shares, reason = self._capped(shares, reason, at_sample, sampler)
            self._loss_sums[:], self._counts[:] = 0.0, 0
        logged = log.at(at_sample, step)
        entry = logged if logged is not None else self._entry(step, at_sample, shares, reason, sampler)
        self._begun = sorted(begun | self._begun_by(entry, losses))
        self._adopt(entry, sampler)
        self.last_step = step
        return Change(entry, self.state_dict(), logged is not None)

    def _entry(
        self, step: int, at_sample: int, shares: np.ndarray | None, reason: str, sampler: Sampler
    ) -> WeightEntry:
        """The line for the log; shares None means that what is in force stays."""
        new = dict(zip(self.mixer.names, (self.mixer.weights if shares is None else shares).tolist(), strict=True))
        objective = new if self.mixer.steers_objective else self._objective
        if shares is None or self.mixer.steers_objective:
            weights = self._effective(at_sample, sampler)
        else:
            blended = blend(new, self._replayed, self._replay_fraction)[1]
            weights = dict(zip(sampler.names, blended.tolist(), strict=True))
        reason = decided_at(step) + reason
        if not objective:
            return WeightEntry(at_sample, weights, reason)
        if not is_estimable(objective, weights):
            reason += "; no domain with a weight in the objective is sampled, so every window counts once"
        return WeightEntry(at_sample, weights, reason, objective_weights(objective, weights))

    def commit(self, change: Change, log: WeightLog | None) -> WeightEntry:
        """Take over a change on every rank.

        Args:
            change: what the main rank proposed.
            log: on the main rank; None elsewhere.

        Returns:
            What to schedule.
        """
        entry = change.entry
        if log is not None and not change.is_logged:
            log.append(entry.sample, entry.weights, entry.reason, entry.objective)
        self.load_state_dict(change.state)
        return entry

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later changes, as plain JSON values."""
        return {
            "mixer": self.mixer.state_dict(),
            "loss_sums": self._loss_sums.tolist(),
            "token_counts": self._counts.tolist(),
            "begun": self._begun,
            "last_step": self.last_step,
            "held_out": self._held_out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises:
            UserError: if the held-out text of a domain that steers the weights is not what it was.
        """
        for name, content in state["held_out"].items():
            if self._held_out.get(name) != content:
                raise UserError(
                    f"the held-out text of domain {name!r} changed since the checkpoint, and the weights follow its "
                    "loss",
                    fix="restore the held-out files, or start a new stage with this run as parent",
                )
        self.mixer.load_state_dict(state["mixer"])
        self._loss_sums = np.array(state["loss_sums"], dtype=np.float64)
        self._counts = np.array(state["token_counts"], dtype=np.int64)
        self._begun, self.last_step = list(state["begun"]), int(state["last_step"])

    def _decide(
        self, step: int, losses: Mapping[str, float], gradients: Gradients | None
    ) -> tuple[np.ndarray | None, str]:
        if self._phases:
            return self._phase(losses)
        with np.errstate(invalid="ignore", divide="ignore"):
            training = self._loss_sums / self._counts
        held_out = np.array([losses[name] for name in self.mixer.names], dtype=np.float64)
        products, norms, variances = gradients if gradients is not None else (None, None, None)
        shares = self.mixer.update(
            Observation(
                step,
                losses=held_out,
                training_losses=training,
                training_counts=self._counts.copy(),
                squared_gradient_norms=norms,
                gradient_variances=variances,
                gradient_products=products,
            )
        )
        note = f" ({self.mixer.note})" if self.mixer.note else ""
        return shares, f"{self.mixer.name}{note}"

    def _phase(self, losses: Mapping[str, float]) -> tuple[np.ndarray | None, str]:
        """The last phase that begins now, if any; a phase begins once."""
        begins = [n for n, phase in self._phases.items() if n not in self._begun and _reached(phase, losses)]
        if not begins:
            return None, "no phase begins"
        weights = self._phases[begins[-1]].weights
        shares = np.array([weights[name] for name in self.mixer.names], dtype=np.float64)
        return shares / shares.sum(), "; ".join(f"phase {number}, losses reached" for number in begins)

    def _begun_by(self, entry: WeightEntry, losses: Mapping[str, float]) -> set[int]:
        """The phases that an entry says begin: what was logged before an interruption counts, not what the losses of
        another layout, which differ in their last digits, would say now."""
        begun = {int(number) for number in re.findall(r"phase (\d+), losses reached", entry.reason)}
        # Earlier versions logged only the last of several phases that began together.
        last = max(begun, default=-1)
        return begun | {n for n, phase in self._phases.items() if n < last and _reached(phase, losses)}

    def _capped(
        self, shares: np.ndarray | None, reason: str, at_sample: int, sampler: Sampler
    ) -> tuple[np.ndarray | None, str]:
        """Lower the shares that would exceed a domain's ``max_epochs`` in what is left of the stage, or, where a
        planned change follows, up to it: what is planned from there on is kept free."""
        until = min((at for at, _ in sampler.pending if at > at_sample), default=self._total_samples)
        length = until - at_sample
        if shares is None or length <= 0:
            return shares, reason
        taken, reserved = sampler.projected(at_sample), sampler.projected(self._total_samples)
        for name, amount in sampler.projected(until).items():
            reserved[name] -= amount
        limits = [
            float("inf") if d.limit is None else max(0.0, d.limit - taken[d.name] - reserved[d.name])
            for d in sampler.domains
        ]
        caps = np.array(limits[: len(shares)]) / length / (1 - self._replay_fraction)
        try:
            capped = cap_weights(shares, caps)
        except UserError as error:
            return None, f"{reason}; weights kept: {error.message}"
        lowered = [name for name, before, after in zip(self.mixer.names, shares, capped, strict=True) if after < before]
        exceeded = [name for name, share, cap in zip(self.mixer.names, shares, caps, strict=True) if share > cap]
        return capped, f"{reason}; max_epochs caps {', '.join(exceeded)}" if exceeded and lowered else reason

    def _effective(self, at_sample: int, sampler: Sampler) -> dict[str, int]:
        weights = sampler.weights
        for sample, pending in sampler.pending:
            weights = pending if sample <= at_sample else weights
        return {name: int(weight) for name, weight in zip(sampler.names, weights, strict=True)}

    def _adopt(self, entry: WeightEntry, sampler: Sampler) -> None:
        in_force = entry.weights
        if self.mixer.steers_objective and entry.objective is not None:
            in_force = entry.objective
        self.mixer.adopt(align(in_force, sampler.names)[: len(self.mixer.names)] / TOTAL)


def _reached(phase: PhaseConfig, losses: Mapping[str, float]) -> bool:
    return all(losses[name] < bound for name, bound in (phase.loss_below or {}).items())
