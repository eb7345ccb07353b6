"""How long tests wait. A slow machine makes a test slow and not red: these are limits for what never comes."""

from __future__ import annotations

import time

PATIENCE = 3600.0
"""Seconds until something counts as hanging that takes seconds on an idle machine: fifty times more, and some."""


def slowness() -> float:
    """Wall time over CPU time of a short calculation: 1 on an idle machine, 10 where twenty processes share two cores.
    For what cannot wait longer without harm, such as the time-outs of a cluster under test."""
    began, used = time.monotonic(), time.process_time()
    while time.process_time() - used < 0.2:
        sum(range(1000))
    return (time.monotonic() - began) / (time.process_time() - used)
