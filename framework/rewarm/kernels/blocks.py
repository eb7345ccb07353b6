"""Sizes that the compiled kernels fix."""

from __future__ import annotations

QUANTIZED_BLOCK = 2048
"""Elements that share a scale where moments have 8 bits."""
