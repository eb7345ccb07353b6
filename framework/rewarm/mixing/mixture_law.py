"""The log-linear mixing law: predict each domain's loss from the mixture, and propose a better one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewarm.errors import UserError

_OFFSET_SHARES = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98)


@dataclass(frozen=True, slots=True)
class MixtureLaw:
    """``loss_i(x) = offset_i + exp(slopes_i . x)`` for a mixture x (Ye et al., "Data Mixing Laws", 2024)."""

    offsets: np.ndarray
    """float64 [D]; nats per token, one for each evaluated domain."""
    slopes: np.ndarray
    """float64 [D, K]; one for each evaluated domain and each domain of the mixture."""
    residuals: np.ndarray
    """float64 [N, D]; predicted minus observed loss."""

    def __call__(self, mixture: np.ndarray) -> np.ndarray:
        """Losses of a mixture, [K] to [D], or of several, [N, K] to [N, D]."""
        return self.offsets + np.exp(np.asarray(mixture, dtype=np.float64) @ self.slopes.T)


def fit_mixture_law(mixtures: np.ndarray, losses: np.ndarray, robustness: float = 0.02) -> MixtureLaw:
    """Fit the law to runs of the same length on different mixtures.

    Args:
        mixtures: float64 [N, K], each row summing to 1.
        losses: float64 [N, D], nats per token.
        robustness: residual in nats from which on a run counts linearly (Huber).

    Raises:
        UserError: if there are fewer runs than the K + 1 numbers of each domain's law, or their mixtures do not vary in
            every direction.
    """
    mixtures, losses = np.asarray(mixtures, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    runs, domains = mixtures.shape
    if runs < domains + 1:
        raise UserError(
            f"{runs} runs do not determine a mixing law of {domains} domains", fix=f"give at least {domains + 1} runs"
        )
    if np.linalg.matrix_rank(mixtures) < domains:
        raise UserError(f"the mixtures of the {runs} runs do not tell the {domains} domains apart")
    fits = [_fit_one(mixtures, losses[:, index], robustness) for index in range(losses.shape[1])]
    law = MixtureLaw(np.array([f[0] for f in fits]), np.stack([f[1] for f in fits]), np.zeros_like(losses))
    return MixtureLaw(law.offsets, law.slopes, law(mixtures) - losses)


def _fit_one(mixtures: np.ndarray, losses: np.ndarray, robustness: float) -> tuple[float, np.ndarray]:
    """One domain's law; for a fixed offset the start is a linear regression of the log of the rest."""
    from scipy.optimize import least_squares

    lowest = float(losses.min())

    def residuals(parameters: np.ndarray) -> np.ndarray:
        return parameters[0] + np.exp(np.clip(mixtures @ parameters[1:], -50, 50)) - losses

    fits = []
    for share in _OFFSET_SHARES:
        slopes = np.linalg.lstsq(mixtures, np.log(losses - share * lowest), rcond=None)[0]
        bounds = ([0.0, *[-np.inf] * len(slopes)], [lowest, *[np.inf] * len(slopes)])
        start = np.array([share * lowest, *slopes])
        fits.append(
            least_squares(
                residuals, start, bounds=bounds, loss="huber", f_scale=robustness, xtol=1e-12, ftol=1e-12, gtol=1e-12
            )
        )
    best = min(fits, key=lambda fit: float(fit.cost)).x
    return float(best[0]), best[1:]


def propose_mixture(
    law: MixtureLaw,
    prior: Sequence[float] | np.ndarray,
    *,
    importance: Sequence[float] | np.ndarray | None = None,
    divergence: float = 0.05,
    caps: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """The mixture with the lowest predicted loss near a prior.

    Minimises ``sum_i importance_i * loss_i(x) + divergence * KL(x || prior)`` under ``x_i <= caps_i``, a convex
    problem; the form and the default divergence are those of Olmix (Chen et al. 2026, published code).

    Args:
        law: of D evaluated and K mixed domains.
        prior: float64 [K], positive; usually the natural weights.
        importance: float64 [D] summing to 1; None means equal.
        divergence: nats of loss per nat of divergence.
        caps: float64 [K], largest shares, from a limit on repetition; None means 1.

    Returns:
        float64 [K] summing to 1.

    Raises:
        UserError: if the caps sum to less than 1.
    """
    from scipy.optimize import minimize

    prior = np.asarray(prior, dtype=np.float64) / np.sum(prior)
    limits = np.ones(len(prior)) if caps is None else np.minimum(np.asarray(caps, dtype=np.float64), 1.0)
    if limits.sum() < 1:
        raise UserError(
            f"the caps on the domains sum to {limits.sum():.4g}: no mixture meets them",
            fix="allow more repetition, or train on fewer tokens",
        )
    weights = np.full(len(law.offsets), 1 / len(law.offsets)) if importance is None else np.asarray(importance)

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        x = np.maximum(x, 1e-12)
        powers = weights * np.exp(x @ law.slopes.T)
        ratio = np.log(x / prior)
        value = float(weights @ law.offsets + powers.sum() + divergence * (x @ ratio))
        return value, powers @ law.slopes + divergence * (ratio + 1)

    start = np.minimum(prior, limits)
    start = start + (limits - start) * (1 - start.sum()) / max(float((limits - start).sum()), 1e-30)
    solution = minimize(
        objective,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0.0, limit) for limit in limits],
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        options={"maxiter": 1000, "ftol": 1e-14},
    ).x
    solution = np.clip(solution, 0.0, limits)
    return solution / solution.sum()
