"""Settings of every test."""

from __future__ import annotations

from hypothesis import settings

# A loaded machine must not fail a property; pytest-timeout ends what hangs.
settings.register_profile("rewarm", deadline=None)
settings.load_profile("rewarm")
