"""AdamW with moments of one byte each."""

from __future__ import annotations

from rewarm.config.registry import OPTIMIZERS
from rewarm.optimizers.adamw import AdamW


@OPTIMIZERS.register("adamw_8bit")
class AdamW8Bit(AdamW):
    """AdamW with block-wise 8-bit moments (Dettmers et al. 2022), an approximation that keeps 6 bytes per parameter
    instead of 12. The offload package holds the moments, on the device too; checkpoints have them in fp32."""

    eight_bit = True
