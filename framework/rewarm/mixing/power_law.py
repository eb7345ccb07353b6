"""Loss against data: the power law behind Velocitune's targets and ADO's learning speeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rewarm.errors import UserError

_EXPONENTS = (0.1, 0.3, 0.6, 1.0)
_LIMIT_SHARES = (0.2, 0.6, 0.9)


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
    """Fit three numbers to a loss curve, by Huber's loss on log residuals from a fixed grid of starts.

    Points along one decaying learning rate bend the fit: take them from a constant rate.

    Args:
        amounts: float64 [T], tokens or steps, positive; T at least 4.
        losses: float64 [T], nats per token.
        robustness: log residual from which on a point counts linearly; 1e-3 as in Hoffmann et al. 2022.

    Returns:
        The law; limit and scale are not negative, the exponent is between 0.01 and 3.

    Raises:
        UserError: if there are fewer than 4 different amounts, or a value is not positive and finite.
    """
    from scipy.optimize import least_squares

    amounts, losses = np.asarray(amounts, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(np.unique(amounts)) < 4:
        raise UserError(
            f"a loss curve of {len(np.unique(amounts))} points does not determine a power law",
            fix="evaluate the pilot at 4 places or more",
        )
    if not (np.isfinite(losses).all() and (losses > 0).all() and (amounts > 0).all()):
        raise UserError("a loss curve holds a value that is not positive and finite")
    unit = float(np.exp(np.log(amounts).mean()))
    relative = amounts / unit

    def residuals(parameters: np.ndarray) -> np.ndarray:
        limit, log_scale, exponent = parameters
        return np.log(limit + np.exp(log_scale) * relative**-exponent) - np.log(losses)

    lowest = float(losses.min())
    fits = []
    for exponent in _EXPONENTS:
        for share in _LIMIT_SHARES:
            start = [share * lowest, np.log(max(float(losses.mean()) - share * lowest, 1e-6)), exponent]
            fits.append(
                least_squares(
                    residuals,
                    start,
                    bounds=([0.0, -30.0, 0.01], [lowest, 30.0, 3.0]),
                    loss="huber",
                    f_scale=robustness,
                    x_scale=[lowest, 1.0, 1.0],
                    xtol=1e-12,
                    ftol=1e-12,
                    gtol=1e-12,
                )
            )
    limit, log_scale, exponent = min(fits, key=lambda fit: float(fit.cost)).x
    predicted = limit + np.exp(log_scale) * relative**-exponent
    scale = float(np.exp(log_scale) * unit**exponent)
    return PowerLaw(float(limit), scale, float(exponent), tuple((predicted - losses).tolist()))
