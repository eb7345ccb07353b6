"""AdamW over any list of parameter shards, with its state under a placement: what an engine talks to.

Megatron's distributed optimizer and DeepSpeed's ZeRO 1 to 3 both end in "these pieces of these parameters are yours,
and here are their reduced gradients". That list, in the order of the forward pass, is all that is needed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rewarm.offload.device import Device
from rewarm.offload.execute import Executor, GroupStep
from rewarm.offload.routes import Job, Placement
from rewarm.offload.simulate import Timeline
from rewarm.offload.slabs import HostPool, Layout, Shard
from rewarm.offload.states import States


class OffloadedAdamW:
    """Updates an engine's shards in place; the fp32 state lives where the placement says."""

    def __init__(
        self,
        names: Sequence[str],
        shards: Sequence[Tensor],
        groups: Sequence[int],
        placement: Placement,
        job: Job,
        device: Device,
        *,
        subgroup_size: int,
        gradient_type: torch.dtype,
        pool: HostPool,
        nvme_paths: Sequence[Path] = (),
        nvme_shares: Sequence[float] | None = None,
        cpu_threads: int = 1,
        cores: Sequence[int] | None = None,
        masters: Sequence[Tensor] | None = None,
    ) -> None:
        """Take over the shards, with moments of zero.

        Args:
            names: of the shards' parameters.
            shards: flat views of this rank's pieces of the model's parameters, of one type, on the device, in the
                order of their first use.
            groups: parameter group of each shard.
            placement: made for ``Layout.of(shards, subgroup_size)``.
            job: widths, and whether updates wait for the norm.
            device: where the shards are.
            subgroup_size: elements per subgroup.
            gradient_type: of the gradients that :meth:`step` is given.
            pool: host memory for state.
            nvme_paths, nvme_shares: for state on NVMe.
            cpu_threads, cores: for the CPU's update.
            masters: fp32 values of the shards; None to take the shards' own.
        """
        pieces = [Shard(*item) for item in zip(names, (x.numel() for x in shards), groups, strict=True)]
        self.layout = Layout.of(pieces, subgroup_size)
        self.shards = list(shards)
        kind, where = shards[0].dtype, shards[0].device
        self.parameters = torch.zeros(self.layout.numel, dtype=kind, device=where)
        self.gradients = torch.zeros(self.layout.numel, dtype=gradient_type, device=where)
        self._open = lambda chosen: self._build(chosen, job, device, pool, nvme_paths, nvme_shares, cpu_threads, cores)
        self._open(placement)
        zeros = [torch.zeros(x.numel()) for x in shards]
        self.load(masters if masters is not None else shards, zeros, zeros)

    def step(
        self, number: int, gradients: Sequence[Tensor], groups: Sequence[GroupStep], grad_scale: float = 1.0
    ) -> Timeline:
        """Update every shard from its reduced gradient.

        Args:
            number: the step, from 1.
            gradients: flat, in the order of the shards, of the type announced.
            groups: settings of each parameter group.
            grad_scale: unscale factor times clip factor.

        Returns:
            When each task ran.
        """
        for i, gradient in enumerate(gradients):
            target = self.layout.view(self.gradients, i)
            assert gradient.dtype == target.dtype, f"gradients are {gradient.dtype}, not {target.dtype} as announced"
            target.copy_(gradient)
        timeline = self.executor.run_step(number, groups, grad_scale)
        for i, shard in enumerate(self.shards):
            shard.copy_(self.layout.view(self.parameters, i))
        return timeline

    def state(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Master and moments of each shard as fp32 host tensors: what a plain optimizer would checkpoint."""
        flat = self.states.export(self.parameters)
        count = len(self.layout.shards)
        return [tuple(self.layout.view(each, i).clone() for each in flat) for i in range(count)]  # type: ignore[misc]

    def load(self, masters: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Take over state from a checkpoint, whatever placement or plain optimizer wrote it.

        Args:
            masters, first, second: fp32 parameters and moments of each shard.
        """
        flat = [torch.zeros(self.layout.numel) for _ in range(3)]
        for target, source in zip(flat, (masters, first, second), strict=True):
            for i, values in enumerate(source):
                self.layout.view(target, i).copy_(values.reshape(-1))
        self.states.load(flat[0], flat[1], flat[2], self.parameters)
        for i, shard in enumerate(self.shards):
            shard.copy_(self.layout.view(self.parameters, i))

    def place(self, placement: Placement) -> None:
        """Move to another placement between two steps; nothing but the place changes."""
        state = self.states.export(self.parameters)
        self.close()
        self._open(placement)
        self.states.load(*state, self.parameters)

    def close(self) -> None:
        """End the threads and give memory and files back."""
        self.executor.close()
        self.states.close()

    def _build(
        self,
        placement: Placement,
        job: Job,
        device: Device,
        pool: HostPool,
        nvme_paths: Sequence[Path],
        nvme_shares: Sequence[float] | None,
        cpu_threads: int,
        cores: Sequence[int] | None,
    ) -> None:
        self.states = States(
            self.layout,
            placement,
            device,
            parameter_type=self.parameters.dtype,
            gradient_type=self.gradients.dtype,
            pool=pool,
            nvme_paths=nvme_paths,
            nvme_shares=nvme_shares,
        )
        widths = {"grad_bytes": self.gradients.element_size(), "param_bytes": self.parameters.element_size()}
        self.executor = Executor(
            self.layout,
            placement,
            replace(job, parameters=self.layout.numel, **widths),
            device,
            self.states,
            parameters=self.parameters,
            gradients=self.gradients,
            cpu_threads=cpu_threads,
            cores=cores,
        )
