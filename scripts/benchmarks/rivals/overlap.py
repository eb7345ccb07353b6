"""How much of the time in which anything is copied both directions are copied (standard library only)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Spans = Sequence[tuple[float, float]]
WAYS = {"fetch": "h2d", "upload": "h2d", "gradient": "d2h", "flush": "d2h"}
"""Copies over the link, by the kind of the task."""


def merged(spans: Spans) -> list[tuple[float, float]]:
    """The same moments as spans that do not touch."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(span for span in spans if span[1] > span[0]):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def length(spans: Spans) -> float:
    """Time that is covered."""
    return sum(end - start for start, end in merged(spans))


def both(up: Spans, down: Spans) -> float:
    """Time that both cover."""
    return length(up) + length(down) - length([*up, *down])


def shares(up: Spans, down: Spans) -> dict[str, float]:
    """Busy time of each direction and of both, in the spans' unit, and the share of both in that of either."""
    either = length([*up, *down])
    together = both(up, down)
    return {
        "h2d_busy": length(up),
        "d2h_busy": length(down),
        "both_busy": together,
        "either_busy": either,
        "share_both": together / either if either else 0.0,
    }


def of_profiler(path: Path) -> dict[str, float]:
    """From a Chrome trace of torch's profiler; seconds.

    Returns:
        :func:`shares` over the copies between the GPU and locked host memory, and ``pageable``, how many copies went
        through host memory that was not locked.
    """
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    spans: dict[str, list[tuple[float, float]]] = {"HtoD": [], "DtoH": []}
    pageable = 0
    for event in copies:
        for way, found in spans.items():
            if way in event["name"]:
                start = float(event["ts"]) * 1e-6
                found.append((start, start + float(event["dur"]) * 1e-6))
                pageable += "Pageable" in event["name"]
    return {**shares(spans["HtoD"], spans["DtoH"]), "pageable": float(pageable)}


def of_timeline(timeline: Any) -> dict[str, float]:
    """From the executor's own times of its copies; seconds."""
    spans: dict[str, list[tuple[float, float]]] = {"h2d": [], "d2h": []}
    for task, start, end in zip(timeline.tasks, timeline.start, timeline.end, strict=True):
        if task.kind in WAYS:
            spans[WAYS[task.kind]].append((start, end))
    return shares(spans["h2d"], spans["d2h"])
