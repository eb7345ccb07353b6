"""The mixers, one small file each. :mod:`rewarm.mixing.mixers.build` makes one from the configuration."""

from __future__ import annotations

from rewarm.mixing.mixers.ado import ADOMixer
from rewarm.mixing.mixers.aioli import AioliMixer
from rewarm.mixing.mixers.base import Mixer, Observation
from rewarm.mixing.mixers.doge import DoGEMixer
from rewarm.mixing.mixers.doremi import DoReMiMixer
from rewarm.mixing.mixers.dynamic_batch_loading import DynamicBatchLoadingMixer
from rewarm.mixing.mixers.fixed import StaticMixer
from rewarm.mixing.mixers.odm import ODMMixer
from rewarm.mixing.mixers.pike import PiKEMixer
from rewarm.mixing.mixers.skill_it import SkillItMixer
from rewarm.mixing.mixers.velocitune import VelocituneMixer

MIXERS: dict[str, type[Mixer]] = {
    mixer.name: mixer
    for mixer in (
        StaticMixer,
        VelocituneMixer,
        DynamicBatchLoadingMixer,
        DoReMiMixer,
        ODMMixer,
        ADOMixer,
        SkillItMixer,
        PiKEMixer,
        DoGEMixer,
        AioliMixer,
    )
}
"""Every mixer that is updated, and static, by name."""

__all__ = ["MIXERS", "Mixer", "Observation"]
