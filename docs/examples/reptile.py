"""Reptile-style retention: every k steps the weights go back a part of the way that they came.

Every ``every`` steps ``θ ← θ' + rate * (θ - θ')``, where θ' are the weights that the last such move left. The fp32 main
parameters are moved and the moments are kept. Formula: Nichol et al. 2018, arXiv 1803.02999.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rewarm.engine.base import Engine
from rewarm.engine.state import interpolate, snapshot


class Reptile:
    """Interpolates the weights of an engine.

    Args:
        engine: with the weights that training starts from.
        every: steps between two moves.
        rate: part of the way that is kept, in (0, 1].
    """

    def __init__(self, engine: Engine, every: int, rate: float) -> None:
        self._engine, self._every, self._rate = engine, every, rate
        self._slow = snapshot(engine)

    def after_step(self, step: int) -> None:
        """Move the weights if it is time. Collective.

        Args:
            step: steps made so far, the same on every rank.
        """
        if step % self._every == 0:
            interpolate(self._engine, self._slow, self._rate, save=True)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of the slow weights, fp32, by the key of the tensors that they stand for."""
        return self._slow

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict` of the same layout."""
        for key, value in self._slow.items():
            value.copy_(state[key])
