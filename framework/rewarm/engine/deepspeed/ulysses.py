"""Ulysses sequence parallelism (Jacobs et al. 2023, arXiv 2309.14509) through transformers' attention interface.

The ranks of a context group hold a part of every sequence each. Around attention, and only there, an all-to-all turns
parts of the sequence with all heads into the whole sequence with a part of the heads. Everything else in the model must
treat positions one by one; :meth:`Ulysses.check` proves that on the model at hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rewarm.engine import device, ranks
from rewarm.errors import UserError, ensure

NAME = "rewarm_ulysses"
"""What transformers knows this attention by."""
_CHECKED_POSITIONS = 64
"""Positions of each rank in :meth:`Ulysses.check`."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative difference of the logits, by the type of the activations."""


class Ulysses:
    """This rank's place in its context group.

    Args:
        size: ranks of a group, neighbours in rank.

    Attributes:
        size: the same.
        rank: this rank within its group.
    """

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, dist.get_rank() % size
        for first in range(0, dist.get_world_size(), size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= dist.get_rank() < first + size:
                self._group = group
        self._config: Any = None

    def attach(self, module: nn.Module) -> None:
        """Let a model's attention run over the group.

        Raises:
            UserError: if its attention cannot be replaced or does not divide.
        """
        self._config = module.config
        kind = getattr(self._config, "model_type", type(module).__name__)
        replaceable = getattr(module, "_supports_attention_backend", False) and getattr(module, "_supports_sdpa", False)
        if not replaceable or "position_ids" not in inspect.signature(module.forward).parameters:
            raise UserError(
                f"parallel.context={self.size} is not possible for {kind} models: their attention does not go through "
                "transformers' attention interface with positions of its own",
                fix="set parallel.context=1",
            )
        for name in ("num_attention_heads", "num_key_value_heads"):
            value = getattr(self._config, name, None)
            if value is not None and value % self.size:
                raise UserError(
                    f"parallel.context={self.size} does not divide the model's {name}={value}",
                    fix=f"set parallel.context to a divisor of {value}",
                )
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, self._attention)
        self._config._attn_implementation = NAME

    def part(self, length: int) -> slice:
        """The positions of a sequence that this rank holds."""
        share = length // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Inside it every rank runs its sequences alone and whole, with the model's own masks."""
        self._config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            self._config._attn_implementation = NAME

    def check(self, forward: Callable[..., Tensor], tokens: Tensor) -> None:
        """Compare logits of split sequences with those of whole ones. Collective.

        A layer that mixes positions outside of attention (a convolution, a recurrence) would see only its own part of
        the sequence and train on silently.

        Args:
            forward: logits [B, S', V] of ``input_ids`` and ``position_ids`` [B, S'], without dropout or gradients.
            tokens: int64 [1, S], the same on every rank of the group.

        Raises:
            UserError: on every rank, if they differ.
        """
        length = min(tokens.shape[1] // self.size, _CHECKED_POSITIONS) * self.size
        tokens, part = tokens[:, :length], self.part(length)
        positions = torch.arange(length, device=tokens.device)[None]
        with self.whole_sequences():
            whole = forward(tokens, positions)[:, part]
        split = forward(tokens[:, part].contiguous(), positions[:, part])
        difference = (split.float() - whole.float()).norm() / whole.float().norm()
        wrong = not bool(difference <= _TOLERANCE[whole.dtype])
        if ranks.any_rank(wrong):
            raise UserError(
                f"parallel.context={self.size} changes what this {self._config.model_type} model computes: it mixes "
                "positions outside of attention",
                fix="set parallel.context=1",
            )

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, None]:
        """Causal attention. Args: query [B, H, S/n, E], key and value [B, G, S/n, E]. Returns: [B, S/n, H, E], None."""
        from deepspeed.sequence.layer import DistributedAttention
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        ensure(attention_mask is None, "transformers makes no mask for an attention that it does not know")

        def attend(*whole: Tensor) -> Tensor:
            heads_first = (tensor.transpose(1, 2) for tensor in whole)
            output: Tensor = sdpa_attention_forward(module, *heads_first, None, **more)[0]
            return output

        over_ranks = DistributedAttention(attend, self._group, scatter_idx=2, gather_idx=1)
        parts = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
        return over_ranks(*parts, 0), None

    def positions(self, length: int) -> Tensor:
        """int64 [1, S/n]; positions of this rank's part."""
        return torch.arange(length, device=device.local_device())[None, self.part(length)]

    def close(self) -> None:
        """Give the group up."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)
