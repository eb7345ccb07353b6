"""A mixer that is built without settings is the one that a configuration without settings builds."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from rewarm.config.registry import MIXERS
from rewarm.errors import UserError
from rewarm.mixing.mixers.ado import ADOMixer
from rewarm.mixing.mixers.aioli import AioliRounds
from rewarm.mixing.mixers.base import Observation

PAIRS = [(method.target, method.settings) for method in MIXERS.methods() if method.target.needs]


@pytest.mark.parametrize(("mixer", "section"), PAIRS, ids=lambda value: value.__name__)
def test_defaults_are_those_of_the_configuration(mixer: Any, section: Any) -> None:
    found = {
        name: (parameter.default, section.model_fields[name].default)
        for name, parameter in inspect.signature(mixer).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name in section.model_fields
    }
    durations = [name for name, (_, configured) in found.items() if isinstance(configured, str)]
    assert {name: ours for name, (ours, _) in found.items() if name not in durations} == {
        name: configured for name, (_, configured) in found.items() if name not in durations
    }


def test_ado_notes_each_loss_at_the_tokens_so_far() -> None:
    mixer = ADOMixer(["a", "b"], np.array([0.5, 0.5]), warmup=0)
    for step in (1, 2):
        mixer.update(Observation(step=step, training_losses=np.array([2.0, np.nan if step == 1 else 3.0]),
                                 training_counts=np.array([30, 12])))  # fmt: skip
    assert mixer.history == [[[42.0, 2.0], [84.0, 2.0]], [[84.0, 3.0]]]


def test_aioli_keeps_its_mixture_while_it_probes() -> None:
    """What is adopted outside a round of probes is the mixture; a probe's weights are not."""
    mixer = AioliRounds(["a", "b"], np.array([0.25, 0.75]), probe_share=0.6)
    mixer.adopt(np.array([0.6, 0.4]))
    assert mixer.held == -1 and mixer.mixture.tolist() == [0.25, 0.75] and mixer.weights.tolist() == [0.6, 0.4]
    mixer.held = 0
    mixer.adopt(np.array([0.5, 0.5]))
    assert mixer.mixture.tolist() == [0.5, 0.5]
    with pytest.raises(UserError) as caught:
        AioliRounds(["a", "b", "c", "d"], np.full(4, 0.25), probe_share=0.25)
    assert caught.value.fix == "set it above 0.25"
