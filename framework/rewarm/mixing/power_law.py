"""Loss against data: the power law behind Velocitune's targets and ADO's learning speeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rewarm.errors import UserError

_GRID = 33
_REFINEMENTS = 6
_REWEIGHTINGS = 40


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """``loss(n) = limit + scale * n ** -exponent``; the model-size term of Hoffmann et al. 2022 is in the limit."""

    limit: float
    """Loss with endless data, nats per token."""
    scale: float
    exponent: float
    residuals: tuple[float, ...]
    """Predicted minus observed loss of each point of the fit, nats per token."""

    def __call__(self, amount: float | np.ndarray) -> float | np.ndarray:
        """Predicted loss after ``amount`` of data, in the unit of the fit."""
        return self.limit + self.scale * np.asarray(amount, dtype=np.float64) ** -self.exponent

    @property
    def worst_residual(self) -> float:
        """Largest absolute residual, nats per token."""
        return max(map(abs, self.residuals))


def fit_power_law(amounts: np.ndarray, losses: np.ndarray, robustness: float = 1e-3) -> PowerLaw:
    """Fit three numbers to a loss curve, by Huber's loss on relative residuals.

    For a given exponent limit and scale are a robust linear regression; the exponent is found on a grid that is refined
    around its best point, so the result does not depend on a start. Points along one decaying learning rate bend the
    fit: take them from a constant rate.

    Args:
        amounts: float64 [T], tokens or steps, positive; T at least 4.
        losses: float64 [T], nats per token.
        robustness: relative residual from which on a point counts linearly; 1e-3 as in Hoffmann et al. 2022.

    Returns:
        The law; limit and scale are not negative, the exponent is between 0.01 and 3.

    Raises:
        UserError: if there are fewer than 4 different amounts, or a value is not positive and finite.
    """
    amounts, losses = np.asarray(amounts, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(np.unique(amounts)) < 4:
        raise UserError(
            f"a loss curve of {len(np.unique(amounts))} points does not determine a power law",
            fix="evaluate the pilot at 4 places or more",
        )
    if not (np.isfinite(losses).all() and (losses > 0).all() and (amounts > 0).all()):
        raise UserError("a loss curve holds a value that is not positive and finite")
    unit = float(np.exp(np.log(amounts).mean()))
    low, high = 0.01, 3.0
    for _ in range(_REFINEMENTS):
        exponents = np.geomspace(low, high, _GRID)
        costs, limits, scales = _regress((amounts / unit) ** -exponents[:, None], losses, robustness)
        best = int(np.argmin(costs))
        low, high = exponents[max(0, best - 1)], exponents[min(_GRID - 1, best + 1)]
    limit, scale, exponent = float(limits[best]), float(scales[best]), float(exponents[best])
    predicted = limit + scale * (amounts / unit) ** -exponent
    return PowerLaw(limit, scale * unit**exponent, exponent, tuple((predicted - losses).tolist()))


def _regress(falls: np.ndarray, losses: np.ndarray, robustness: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Robust ``losses = limit + scale * falls`` for many candidates at once, by reweighted least squares.

    Args:
        falls: float64 [G, T].
        losses: float64 [T].
        robustness: as in :func:`fit_power_law`.

    Returns:
        Costs, limits and scales, each float64 [G].
    """
    constant, slope = 1 / losses, falls / losses
    trust = np.ones_like(falls)
    for _ in range(_REWEIGHTINGS):
        cc, cs, ss = (trust * constant**2).sum(1), (trust * constant * slope).sum(1), (trust * slope**2).sum(1)
        c, s = (trust * constant).sum(1), (trust * slope).sum(1)
        determinant = np.maximum(cc * ss - cs**2, 1e-300)
        limits, scales = (c * ss - s * cs) / determinant, (s * cc - c * cs) / determinant
        limits, scales = np.where(scales < 0, c / cc, limits), np.maximum(scales, 0.0)
        scales, limits = np.where(limits < 0, s / ss, scales), np.maximum(limits, 0.0)
        residuals = np.abs(limits[:, None] * constant + scales[:, None] * slope - 1)
        trust = robustness / np.maximum(residuals, robustness)
    huber = np.where(residuals <= robustness, residuals**2 / 2, robustness * (residuals - robustness / 2))
    return huber.sum(1), limits, scales
