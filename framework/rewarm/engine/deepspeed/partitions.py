"""Where a rank keeps its part of the fp32 parameters and moments, the same view of it for every ZeRO stage.

A fragment is a contiguous range of one parameter, flattened in row-major order: of the tensor rank's shard where
AutoTP cut the parameter, else of the parameter itself. Over the data-parallel ranks the fragments that
:meth:`Partitions.spans` lists cover every parameter once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewarm.config.offload import OffloadConfig
from rewarm.engine.deepspeed.update import OffloadedStep, RuleOptimizer
from rewarm.engine.state import MOMENTS, WEIGHT


@dataclass(frozen=True, slots=True)
class Fragment:
    """A rank's range of one parameter; the tensors are views, and writing into them changes the state."""

    name: str
    start: int
    tensors: dict[str, Tensor]
    """fp32 [length] each: ``weight``, and the moments where they were asked for."""


class Partitions(ABC):
    """This rank's part of the optimizer's state.

    Args:
        engine: what ``deepspeed.initialize`` returned.
        has_moments: True under Adam.
        num_shares: data-parallel ranks.
        share: which of them this is.
    """

    def __init__(self, engine: Any, *, has_moments: bool, num_shares: int, share: int) -> None:
        self.module: nn.Module = engine.module
        self.wrapper = engine.optimizer
        self.inner = getattr(self.wrapper, "optimizer", self.wrapper)
        self.has_moments = has_moments
        self.num_shares, self.share = num_shares, share
        self.names = {id(parameter): name for name, parameter in self.module.named_parameters()}

    @abstractmethod
    def spans(self) -> dict[str, tuple[int, int]]:
        """Start and length of the fragment that this rank answers for, by parameter name; nothing is moved."""

    @abstractmethod
    def fragments(self, *, moments: bool, write: bool = False, change: bool = False) -> Iterator[Fragment]:
        """All that this rank holds, one fragment after the other, brought in from offload for as long as each is looked
        at. Other ranks may hold the same; :meth:`spans` says who answers for it.

        Args:
            moments: also give the moments, made of zeros where there are none yet.
            write: all that is given will be replaced.
            change: what is given may be changed in part.
        """

    @abstractmethod
    def weights_changed(self) -> None:
        """Take the fp32 parameters over into the model. Collective."""

    def offload(self, settings: OffloadConfig, *, eight_bit: bool) -> None:
        """Hand the optimizer's state to the run's offload section. Collective."""
        assert isinstance(self.inner, OffloadedStep)
        self.inner.attach(settings, self._flats, self._take_over, eight_bit=eight_bit)

    @abstractmethod
    def _take_over(self) -> None:
        """Copy this rank's fp32 parameters into the model's, as DeepSpeed does after each piece of the update."""

    @property
    @abstractmethod
    def _flats(self) -> list[Tensor]:
        """The tensors that the inner optimizer holds its state for."""

    def steps(self) -> int:
        """Updates that the moments stand for."""
        for flat in self._flats:
            step = self._updater(flat).state.get(flat, {}).get("step")
            if step is not None:
                return int(step)
        return 0

    def set_steps(self, steps: int) -> None:
        """Set what :meth:`steps` returns, on every rank alike."""
        if not self.has_moments:
            return
        for flat in self._flats:
            state = self.inner.state[flat] if isinstance(self.inner, OffloadedStep) else self._state(flat)
            state["step"] = self._count(flat, steps)

    def _updater(self, flat: Tensor) -> torch.optim.Optimizer:
        """The optimizer that updates a flat tensor and holds its state."""
        updater: torch.optim.Optimizer = self.inner
        return updater

    def _count(self, flat: Tensor, steps: int) -> Any:
        """A number of updates as the optimizer of a flat tensor keeps it, and where it reads it.

        DeepSpeed's CPU Adam counts in Python, torch's in a tensor: the fused and the capturable one on the device of
        the parameter, the others on the host, where our kernels read it too.
        """
        updater = self._updater(flat)
        if not isinstance(updater, torch.optim.AdamW):
            return steps
        on_device = bool(updater.defaults.get("fused") or updater.defaults.get("capturable"))
        if isinstance(updater, RuleOptimizer):
            on_device = on_device and not updater.uses_kernels(flat)
        return torch.tensor(float(steps), dtype=torch.float32, device=flat.device if on_device else "cpu")

    def _state(self, flat: Tensor) -> dict[str, Any]:
        state = self._updater(flat).state[flat]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat)
        if "step" not in state:
            state["step"] = self._count(flat, 0)
        return state

    def _lend(
        self, name: str, start: int, flat: Tensor, offset: int, length: int, *, moments: bool, write: bool, change: bool
    ) -> Iterator[Fragment]:
        """A fragment that lies in a flat tensor from an offset on; offloaded state is put back after it was used."""
        views = {WEIGHT: flat.detach().view(-1).narrow(0, offset, length)}
        if not isinstance(self.inner, OffloadedStep):
            if moments and self.has_moments:
                state = self._state(flat)
                views |= {key: state[key].view(-1).narrow(0, offset, length) for key in MOMENTS}
            yield Fragment(name, start, views)
            return
        assert self.inner.offload is not None
        offloaded, place = self.inner.offload.inner, self.inner.place_of(flat)
        if moments and write:
            # They will be replaced: parts of 8-bit moments are written one after the other, without a look at others.
            values = tuple(torch.zeros(length) for _ in MOMENTS)
        else:
            values = offloaded.read(place, offset, offset + length)[1:]
        if moments:
            views |= dict(zip(MOMENTS, values, strict=True))
        yield Fragment(name, start, views)
        if write or change:
            offloaded.write(place, views[WEIGHT], values[0], values[1], start=offset)


class Replicated(Partitions):
    """Stage 0: every data-parallel rank holds everything."""

    def _take_over(self) -> None:
        """See :meth:`Partitions._take_over`: they are the model's."""

    @property
    def _flats(self) -> list[Tensor]:
        return list(self.module.parameters())

    def spans(self) -> dict[str, tuple[int, int]]:
        """See :meth:`Partitions.spans`: an even share of each parameter."""
        bounds = {name: p.numel() for name, p in self.module.named_parameters()}
        found = {}
        for name, size in bounds.items():
            start, stop = (size * share // self.num_shares for share in (self.share, self.share + 1))
            if stop > start:
                found[name] = (start, stop - start)
        return found

    def fragments(self, *, moments: bool, write: bool = False, change: bool = False) -> Iterator[Fragment]:
        """See :meth:`Partitions.fragments`."""
        for name, parameter in self.module.named_parameters():
            size = parameter.numel()
            yield from self._lend(name, 0, parameter, 0, size, moments=moments, write=write, change=change)

    def weights_changed(self) -> None:
        """See :meth:`Partitions.weights_changed`: the fp32 parameters are the model's."""


class Flat(Partitions):
    """Stages 1 and 2: each parameter group is one flat tensor, of which a rank holds one piece."""

    @property
    def _flats(self) -> list[Tensor]:
        found = getattr(self.wrapper, "single_partition_of_fp32_groups", None)
        return list(self.wrapper.fp32_groups_flat_partition if found is None else found)

    def _take_over(self) -> None:
        """See :meth:`Partitions._take_over`; DeepSpeed's own optimizer for bfloat16 does it after all pieces."""
        for i, parts in enumerate(getattr(self.wrapper, "parallel_partitioned_bit16_groups", [])):
            rank = torch.distributed.get_rank(group=self.wrapper.real_dp_process_group[i])
            parts[rank].data.copy_(self._flats[i].data)

    def _owned(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self.module.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                yield name, mapping

    def spans(self) -> dict[str, tuple[int, int]]:
        """See :meth:`Partitions.spans`."""
        return {name: (m.lp_fragment_address.start, m.lp_fragment_address.numel) for name, m in self._owned()}

    def fragments(self, *, moments: bool, write: bool = False, change: bool = False) -> Iterator[Fragment]:
        """See :meth:`Partitions.fragments`."""
        flats = self._flats
        # In the order of the flat tensors, so that what is offloaded is brought in, and put back, once.
        owned = sorted(self._owned(), key=lambda each: _place_in_flats(each[1]))
        for name, mapping in owned:
            place = mapping.hp_fragment_address
            flat, start = flats[mapping.param_group_index], mapping.lp_fragment_address.start
            yield from self._lend(
                name, start, flat, place.start, place.numel, moments=moments, write=write, change=change
            )

    def weights_changed(self) -> None:
        """See :meth:`Partitions.weights_changed`."""
        self.wrapper.update_lp_params()


def _place_in_flats(mapping: Any) -> tuple[int, int]:
    return mapping.param_group_index, mapping.hp_fragment_address.start


class Sharded(Partitions):
    """Stage 3: each parameter is cut by itself; sub-groups of them are updated, and moved, together."""

    @property
    def _flats(self) -> list[Tensor]:
        return list(self.wrapper.fp32_partitioned_groups_flat)

    def _updater(self, flat: Tensor) -> torch.optim.Optimizer:
        """What TwinFlow leaves on the device has an optimizer of its own."""
        beside = getattr(self.wrapper, "backup_optimizer", None)
        return super()._updater(flat) if beside is None or flat.device.type == "cpu" else beside

    def _take_over(self) -> None:
        """See :meth:`Partitions._take_over`."""
        for ours, theirs in zip(self.wrapper.fp16_partitioned_groups_flat, self._flats, strict=True):
            ours.data.copy_(theirs.data)

    def _span(self, parameter: Any) -> tuple[int, int]:
        share = parameter.partition_numel()
        start = share * self.wrapper._get_param_partition_rank(parameter)
        return start, max(0, min(share, parameter.ds_numel - start))

    def spans(self) -> dict[str, tuple[int, int]]:
        """See :meth:`Partitions.spans`."""
        spans = {name: self._span(parameter) for name, parameter in self.module.named_parameters()}
        return {name: span for name, span in spans.items() if span[1]}

    def fragments(self, *, moments: bool, write: bool = False, change: bool = False) -> Iterator[Fragment]:
        """See :meth:`Partitions.fragments`."""
        wrapper = self.wrapper
        for index, group in enumerate(wrapper.fp16_groups):
            swapped = wrapper._swappable_optimizer_subgroup(index)
            if swapped:
                wrapper._optimizer_states_and_gradient_swap_in(index)
            for parameter in group:
                start, length = self._span(parameter)
                if not length:
                    continue
                _, offset, _ = wrapper.grad_position[wrapper.get_param_id(parameter)]
                flat = wrapper.fp32_partitioned_groups_flat[index]
                name = self.names[id(parameter)]
                yield from self._lend(name, start, flat, offset, length, moments=moments, write=write, change=change)
            if swapped and (write or change):
                wrapper._optimizer_states_and_gradient_swap_out(index)
            elif swapped:
                wrapper._release_swap_buffers(index)

    def weights_changed(self) -> None:
        """See :meth:`Partitions.weights_changed`."""
        wrapper = self.wrapper
        wrapper._partition_all_parameters()
        for index in range(len(wrapper.fp16_groups)):
            swapped = wrapper._swappable_optimizer_subgroup(index)
            if swapped:
                wrapper._optimizer_states_and_gradient_swap_in(index)
            wrapper._reassign_or_swap_out_partitioned_parameters(index)
            if swapped:
                wrapper._release_swap_buffers(index)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)


def open_partitions(engine: Any, stage: int, *, has_moments: bool, num_shares: int, share: int) -> Partitions:
    """The view that fits a ZeRO stage."""
    kinds: dict[int, Callable[..., Partitions]] = {0: Replicated, 1: Flat, 2: Flat, 3: Sharded}
    return kinds[stage](engine, has_moments=has_moments, num_shares=num_shares, share=share)
