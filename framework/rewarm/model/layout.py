"""How the ranks share a model and a batch. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """A checked layout."""

    tensor: int
    pipeline: int
    virtual_pipeline: int
    data: int
    num_microbatches: int
    """Forward passes of one data-parallel rank in one step."""
