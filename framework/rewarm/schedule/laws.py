"""The annealing law: what a schedule will do to the training loss, from the curves of schedules already run.

Tissue, Wang & Wang 2024, "Scaling Law with Learning Rate Annealing": after step s

    L(s) = L0 + A * S1(s)^-alpha - C * S2(s)
    S1(s) = sum of the rates of steps 1..s
    S2(s) = sum of m_i over i = 1..s,   m_i = decay * m_{i-1} + (rate_{i-1} - rate_i)

S1 is how far training has gone, S2 how much it has annealed, with a momentum because a lower rate pays off only
after a while. A warm-up counts as if it had been at the peak from the start. Where the rate rises again, S2 falls and
the law predicts a rise of the loss.

It describes the training of one model on one mixture. After a switch of data it needs a term for the shift
(Wang et al. 2025), which is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HUBER_DELTA = 1e-3
"""Residuals of log loss above this count linearly: a spike must not bend the fit."""
EXPONENTS = np.array([0.2, 0.5, 0.8, 1.2])
"""Where the search for alpha starts; given alpha, the other three come from non-negative least squares."""


@dataclass(frozen=True, slots=True)
class AnnealingLaw:
    """A fitted law for one model, one mixture and one batch size."""

    floor: float
    """L0: loss in nats per token that no amount of training at this size passes."""
    amplitude: float
    """A, in nats per token."""
    exponent: float
    """alpha."""
    annealing: float
    """C, in nats per token for a unit of S2."""
    decay: float = 0.999
    """Decay of the momentum per step."""

    def predict(self, rates: np.ndarray) -> np.ndarray:
        """Loss after every step.

        Args:
            rates: float [S], the learning rate of each step, for example of :class:`LearningRate`.

        Returns:
            float64 [S], nats per token.
        """
        progress, annealed = _sums(np.asarray(rates, dtype=np.float64), self.decay)
        return self.floor + self.amplitude * progress**-self.exponent - self.annealing * annealed


@dataclass(frozen=True, slots=True)
class LossCurve:
    """The record of one run that a law is fitted to."""

    rates: np.ndarray
    """float [S], the learning rate of each step from the first."""
    steps: np.ndarray
    """int [E], steps finished (1 to S) at which the loss was read; leave the warm-up out."""
    losses: np.ndarray
    """float [E], nats per token, above 0."""


def fit_annealing_law(curves: Sequence[LossCurve], *, decay: float = 0.999) -> AnnealingLaw:
    """Fit the law to one run or several of the same model, mixture and batch size.

    As in the paper: Huber loss of the log residuals, L-BFGS-B, no coefficient below 0. At least one curve should
    change its rate after the warm-up; under a constant rate the annealing term cannot be seen.

    Raises:
        ValueError: with fewer than four readings, or a reading outside its run.
    """
    from scipy.optimize import minimize

    design, losses = _readings(curves, decay)
    starts = [_start(exponent, design, losses) for exponent in EXPONENTS]
    found = [minimize(_distance, start, (design, losses), "L-BFGS-B", bounds=[(0, None)] * 4) for start in starts]
    best = min(found, key=lambda result: result.fun)
    floor, amplitude, exponent, annealing = (float(value) for value in best.x)
    return AnnealingLaw(floor, amplitude, exponent, annealing, decay)


def _distance(law: np.ndarray, design: tuple[np.ndarray, np.ndarray], losses: np.ndarray) -> float:
    """Mean Huber loss of the log residuals, in units of HUBER_DELTA squared."""
    floor, amplitude, exponent, annealing = law
    predicted = floor + amplitude * design[0] ** -exponent - annealing * design[1]
    residuals = np.abs(np.log(np.maximum(predicted, 1e-9)) - np.log(losses))
    near = residuals <= HUBER_DELTA
    huber = np.where(near, residuals**2 / 2, HUBER_DELTA * (residuals - HUBER_DELTA / 2))
    return float(huber.mean() / HUBER_DELTA**2)


def _readings(curves: Sequence[LossCurve], decay: float) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """S1 and S2 at every reading of all curves, and the losses read."""
    progress, annealed, losses = [], [], []
    for curve in curves:
        steps = np.asarray(curve.steps, dtype=np.int64)
        if len(steps) and not (steps.min() >= 1 and steps.max() <= len(curve.rates)):
            raise ValueError(f"readings at steps {steps.min()} to {steps.max()} of a run of {len(curve.rates)} steps")
        first, second = _sums(np.asarray(curve.rates, dtype=np.float64), decay)
        progress.append(first[steps - 1])
        annealed.append(second[steps - 1])
        losses.append(np.asarray(curve.losses, dtype=np.float64))
    count = sum(len(part) for part in losses)
    if count < 4:
        raise ValueError(f"{count} readings; the four coefficients need at least four")
    return (np.concatenate(progress), np.concatenate(annealed)), np.concatenate(losses)


def _start(exponent: float, design: tuple[np.ndarray, np.ndarray], losses: np.ndarray) -> np.ndarray:
    """Best coefficients in least squares for a given exponent, for which the law is linear in them."""
    from scipy.optimize import nnls

    progress, annealed = design
    columns = np.stack([np.ones_like(progress), progress**-exponent, -annealed], axis=1)
    floor, amplitude, annealing = nnls(columns, losses)[0]
    return np.array([floor, amplitude, exponent, annealing])


def _sums(rates: np.ndarray, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """S1 and S2 after every step, float64 [S] each."""
    held = rates.copy()
    peak = int(np.argmax(held))
    held[:peak] = held[peak]
    falls = -np.diff(held, prepend=held[0])
    momentum = np.empty_like(falls)
    last = 0.0
    for index, fall in enumerate(falls):
        last = decay * last + fall
        momentum[index] = last
    return np.cumsum(held), np.cumsum(momentum)
