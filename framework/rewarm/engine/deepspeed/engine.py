"""The engine on DeepSpeed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from rewarm.config.offload import places_state
from rewarm.config.run import RunConfig
from rewarm.engine import device, layout, ranks
from rewarm.engine.base import Batch, Engine, GradientStatistics, StepResult
from rewarm.engine.collectives import (
    Collectives,
    evaluation_spans,
    sum_array,
    sum_by_domain,
    tokens_per_window,
)
from rewarm.engine.deepspeed import compat, export
from rewarm.engine.deepspeed.buffers import fill_buffers, persistent_buffers, read_buffers, write_buffers
from rewarm.engine.deepspeed.checkpoint import Checkpoint, save
from rewarm.engine.deepspeed.extensions import needed_extensions, prepare_extensions
from rewarm.engine.deepspeed.json import deepspeed_json
from rewarm.engine.deepspeed.model import build_model
from rewarm.engine.deepspeed.optimizer import build_optimizer, set_learning_rate
from rewarm.engine.deepspeed.partitions import open_partitions
from rewarm.engine.deepspeed.shards import Shards
from rewarm.engine.deepspeed.sources import ImportedWeights, RandomWeights, Source, open_huggingface
from rewarm.engine.deepspeed.state import lend, named
from rewarm.engine.deepspeed.swap import SwapFolder
from rewarm.engine.deepspeed.ulysses import Ulysses
from rewarm.engine.deepspeed.update import OffloadedStep
from rewarm.engine.gradients import gradient_statistics
from rewarm.engine.portable import PortableState, write_portable
from rewarm.engine.state import MOMENTS, WEIGHT, Lent, lending
from rewarm.errors import UserError, ensure
from rewarm.model.description import HuggingFaceModel
from rewarm.model.initial import RandomTensors
from rewarm.model.safetensors_io import BROKEN_FOLDER, BROKEN_MODEL, check_finite


class DeepSpeedEngine(Collectives, Engine):
    """A transformers model under ZeRO; see :class:`~rewarm.engine.base.Engine` for the contract.

    Attributes:
        model: what transformers knows of the model.
        deepspeed: the wrapped model, as ``deepspeed.initialize`` returned it.
    """

    def __init__(self, config: RunConfig, model: HuggingFaceModel, domain_names: Sequence[str]) -> None:
        ranks.join(config.distributed.timeout)
        self.layout = layout.check_layout(config, model, dist.get_world_size())
        self.config, self.model = config, model
        self._num_domains = len(domain_names)
        self._device = device.activate()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # Tensor ranks, or context ranks, are neighbours that work on the same windows.
        together_ranks = config.parallel.model_ranks
        self._tensor_rank = self.rank % self.layout.tensor
        self.data_parallel_rank, self.data_parallel_size = self.rank // together_ranks, self.layout.data
        self._counts, self._sums = self.rank % together_ranks == 0, self._tensor_rank == 0
        # ZeRO shares the model among the context ranks too: a gradient from a part of a sequence is one of a sum.
        self._num_shares = self.world_size // self.layout.tensor
        self._swap: SwapFolder | None = None
        self._context: Ulysses | None = None
        if needed_extensions(config.deepspeed):
            ranks.on_every_rank(lambda: prepare_extensions(config.deepspeed))
        self._initialize()

    def _initialize(self) -> None:
        config, stage = self.config, self.config.deepspeed.zero_stage
        deepspeed = compat.load_deepspeed()
        with compat.quiet():
            compat.adopt_process_group(deepspeed)
        values = deepspeed_json(config, self.layout.data)
        if config.deepspeed.nvme_path is not None:
            self._swap = SwapFolder(config.deepspeed.nvme_path)
            values = self._swap.use(values)
        # Dropout differs between the shares of a batch and agrees between tensor ranks.
        torch.manual_seed(config.seed + self.rank // self.layout.tensor)
        with compat.quiet():
            module = build_model(config, self.model, deepspeed, values)
            if config.parallel.context > 1:
                self._context = Ulysses(config.parallel.context)
                self._context.attach(module)
            optimizer = build_optimizer(config, module)
            self.deepspeed = compat.initialize(deepspeed, module, optimizer, values, config.deepspeed.json_file)
        self._partitions = open_partitions(
            self.deepspeed,
            stage,
            has_moments=config.optimizer.has_moments,
            num_shares=self._num_shares,
            share=self.rank // self.layout.tensor,
        )
        if places_state(config):
            self._partitions.offload(config.offload, eight_bit=config.optimizer.eight_bit)
        self._shards = Shards(self.deepspeed.module, self._tensor_rank, self.layout.tensor)
        if config.parent is None:
            self._fill(self._random_weights(), "the random weights")

    def _random_weights(self) -> Source:
        values = self.model.config
        return RandomWeights(
            RandomTensors(
                self._shards.shapes,
                seed=self.config.seed,
                initializer_range=values["initializer_range"],
                num_layers=values["num_hidden_layers"],
            )
        )

    def _fill(self, source: Source, name: str, *, moments: bool = False, fix: str = BROKEN_MODEL) -> None:
        """Set the fp32 parameters, and the moments, and take them over into the model. Collective.

        Args:
            source: has all of them.
            name: of the source, for messages.
            moments: set them too.
            fix: what to do if one of them is not finite.
        """
        kinds = (WEIGHT, *MOMENTS) if moments else (WEIGHT,)

        def fill() -> None:
            for fragment in self._partitions.fragments(moments=moments, write=True):
                for kind in kinds:
                    self._shards.fill(fragment, source, kind)
                    label = fragment.name if kind == WEIGHT else f"{fragment.name} ({kind})"
                    check_finite(fragment.tensors[kind], label, name, fix)

        with torch.no_grad():
            ranks.on_every_rank(fill)
            self._partitions.weights_changed()

    def train_step(self, batch: Batch, learning_rate: float) -> StepResult:
        """See :meth:`Engine.train_step`."""
        set_learning_rate(self.deepspeed.optimizer, learning_rate)
        sums, counts = self._forward_backward(batch)
        norm, updated = self._update()
        return StepResult(sums, counts, norm, skipped=not updated)

    def dry_run(self, batch: Batch) -> None:
        """See :meth:`Engine.dry_run`."""
        state = self.rng_state()
        device.forget_peak_memory()  # building took more, for a moment, than a step does
        if self._context is not None:
            self._check_context(self._context, batch)
        # A gradient that is not finite is dropped by the one path that knows where stage and offload have put it.
        started = time.perf_counter()
        self._forward_backward(batch, factor=math.nan)
        device.synchronize()
        seconds = time.perf_counter() - started
        _, updated = self._update()
        ensure(not updated, "DeepSpeed took a step on a gradient that is not a number")
        if isinstance(self._partitions.inner, OffloadedStep) and self._partitions.inner.offload is not None:
            self._partitions.inner.offload.profiled(seconds, device.peak_memory())
        self.set_rng_state(state)

    def _forward_backward(self, batch: Batch, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Loss sums and token counts per domain over all ranks; gradients are reduced where the stage wants them."""
        counts = sum_by_domain(tokens_per_window(batch), batch.domains, self._num_domains, reports=self._counts)
        # DeepSpeed averages over its ranks, whose share of the tokens may differ.
        scale = factor * self._num_shares / max(1.0, float(counts.sum()))
        size = self.config.batch.micro_batch_size
        starts = range(0, len(batch.tokens), size)
        losses = []
        for start in starts:
            rows = slice(start, start + size)
            windows = self._window_losses(
                batch.tokens[rows], None if batch.loss_mask is None else batch.loss_mask[rows]
            )
            losses.append(windows.detach().double())
            self.deepspeed.set_gradient_accumulation_boundary(start == starts[-1])
            if batch.loss_weights is not None:
                windows = windows * torch.from_numpy(batch.loss_weights[rows]).to(windows)
            self.deepspeed.backward(windows.sum() * scale, scale_wrt_gas=False)
        windows = torch.cat(losses).cpu().numpy()
        sums = sum_by_domain(windows, batch.domains, self._num_domains, reports=self._sums)
        return sums, counts.astype(np.int64)

    def _window_losses(self, tokens: np.ndarray, mask: np.ndarray | None) -> Tensor:
        """Sums of token losses per window, over this rank's part of it.

        Args: tokens [B, S + 1], mask [B, S] or None. Returns: fp32 [B].
        """
        windows = torch.from_numpy(tokens).to(self._device)
        length = windows.shape[1] - 1
        part, positions = slice(length), {}
        if self._context is not None:
            part, positions = self._context.part(length), {"position_ids": self._context.positions(length)}
        logits = self.deepspeed(input_ids=windows[:, :-1][:, part].contiguous(), use_cache=False, **positions).logits
        targets = windows[:, 1:][:, part]
        # Flat, because torch is six times slower over a vocabulary that is not the last dimension.
        losses = cross_entropy(logits.float().flatten(0, 1), targets.reshape(-1), reduction="none").view(targets.shape)
        if mask is not None:
            losses = losses * torch.from_numpy(mask).to(self._device)[:, part]
        return losses.sum(dim=1)

    def _check_context(self, context: Ulysses, batch: Batch) -> None:
        """See :meth:`Ulysses.check`. Collective."""

        def forward(tokens: Tensor, positions: Tensor) -> Tensor:
            logits: Tensor = self.deepspeed(input_ids=tokens, position_ids=positions, use_cache=False).logits
            return logits

        self.deepspeed.eval()
        with torch.no_grad():
            context.check(forward, torch.from_numpy(batch.tokens[:1, :-1]).to(self._device))
        self.deepspeed.train()

    def _update(self) -> tuple[float, bool]:
        """Apply the reduced gradients. Returns their norm before clipping, and whether they were. Collective."""
        if self.config.deepspeed.zero_stage == 0:
            norm = compat.norm_of_gradients(self.deepspeed)
            if not math.isfinite(norm):
                self.deepspeed.zero_grad()
                return norm, False
            self.deepspeed.step()
            return norm, True
        self.deepspeed.step()
        norm, updated = float(self.deepspeed.get_global_grad_norm()), self.deepspeed.was_step_applied()
        if not updated:
            compat.forget_gradients(self.deepspeed)
        return norm, updated

    def evaluate(self, tokens: np.ndarray, micro_batch_size: int) -> np.ndarray:
        """See :meth:`Engine.evaluate`."""
        spans = evaluation_spans(len(tokens), micro_batch_size, self.data_parallel_rank, self.layout.data)
        # Under stage 3 every pass gathers parameters, so all ranks make the same number of them; every pass has the
        # same shape. The repeated windows are dropped.
        passes = -(-len(tokens) // (micro_batch_size * self.layout.data))
        sums = np.zeros(len(tokens))
        self.deepspeed.eval()
        with torch.no_grad():
            for index in range(passes):
                span = spans[index] if index < len(spans) else np.arange(min(micro_batch_size, len(tokens)))
                windows = self._window_losses(tokens[np.resize(span, micro_batch_size)], None)
                if index < len(spans) and self._sums:
                    sums[span] = windows[: len(span)].double().cpu().numpy()
        self.deepspeed.train()
        return sum_array(sums)

    def domain_gradients(self, tokens: Sequence[np.ndarray], chunk_size: int) -> GradientStatistics:
        """See :meth:`Engine.domain_gradients`."""
        state = self.rng_state()

        def gradient(batch: Batch) -> Tensor:
            self._forward_backward(batch)
            found = self._gradient()
            # As in a dry run: a gradient that is not finite takes what is there along. Few tokens are enough.
            length = 2 * self.config.parallel.context + 1
            self._forward_backward(Batch(batch.tokens[:1, :length], batch.domains[:1]), factor=math.nan)
            _, updated = self._update()
            ensure(not updated, "DeepSpeed took a step on a gradient that is not a number")
            return found

        found = gradient_statistics(
            gradient,
            tokens,
            chunk_size,
            micro_batch_size=self.config.batch.micro_batch_size,
            share=self.data_parallel_rank,
            num_shares=self.data_parallel_size,
        )
        self.set_rng_state(state)
        return found

    def _gradient(self) -> Tensor:
        """A copy of this rank's own part of the reduced gradient, fp32 [n]: an even share of each parameter, which
        ZeRO hands out whole. Collective."""
        parts = [torch.zeros(0, device=self._device)]
        for name, parameter in self.deepspeed.module.named_parameters():
            whole = compat.full_gradient(parameter)
            if whole is None or not self._shards.answers_for(name):
                continue
            share, size = self._partitions.share, whole.numel()
            bounds = [size * place // self._num_shares for place in (share, share + 1)]
            parts.append(whole.flatten()[slice(*bounds)].float())
        return torch.cat(parts)

    def next_token_logits(self, tokens: np.ndarray) -> np.ndarray:
        """See :meth:`Engine.next_token_logits`."""
        inputs = torch.from_numpy(tokens[None]).to(self._device)
        self.deepspeed.eval()
        with torch.no_grad(), self._context.whole_sequences() if self._context else nullcontext():
            logits = self.deepspeed(input_ids=inputs, use_cache=False).logits[0, -1].float()
        self.deepspeed.train()
        if self.rank:
            logits = torch.zeros_like(logits)
        return ranks.sum_over_ranks(logits)[: self.model.vocab_size].cpu().numpy()

    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        """See :meth:`Engine.save`."""
        save(folder, self._partitions, self._shards, self.model.to_dict(), self.rank, optimizer=optimizer)

    def load(self, folder: Path, *, optimizer: bool = True) -> None:
        """See :meth:`Engine.load`."""
        found: list[Checkpoint] = []

        def open_checkpoint() -> None:
            found.append(Checkpoint(folder))
            found[0].check(self._shards.shapes)
            if optimizer and (not found[0].has_optimizer or self._partitions.has_moments > found[0].has_moments):
                raise UserError(
                    f"the checkpoint {folder} was saved without the optimizer's state",
                    fix="set optimizer_state=reset, or name a checkpoint that has it",
                )

        ranks.on_every_rank(open_checkpoint)
        source = f"the checkpoint {folder}"
        self._fill(found[0], source, moments=optimizer and self._partitions.has_moments)
        if optimizer:
            self._partitions.set_steps(found[0].steps)
        ranks.on_every_rank(lambda: read_buffers(self.deepspeed.module, folder))

    def import_huggingface(self, folder: Path) -> None:
        """See :meth:`Engine.import_huggingface`."""
        found: list[ImportedWeights] = []
        module, trust = self.deepspeed.module, self.config.deepspeed.trust_remote_code

        def open_folder() -> None:
            found.append(open_huggingface(folder, self._shards.shapes, module, trust_remote_code=trust))
            fill_buffers(module, found[0].tensors(persistent_buffers(module)), str(folder), BROKEN_FOLDER)

        ranks.on_every_rank(open_folder)
        self._fill(found[0], str(folder), fix=BROKEN_FOLDER)

    def export_huggingface(
        self,
        folder: Path,
        *,
        tokenizer: Path | None,
        lineage: Path | None = None,
        dtype: str = "float32",
        replace: bool = False,
    ) -> None:
        """See :meth:`Engine.export_huggingface`."""
        files = export.Companions(tokenizer, lineage)
        export.export_model(
            self.deepspeed.module, self._shards, self.model, folder, dtype, files=files, replace=replace
        )

    def save_portable(self, folder: Path) -> None:
        """See :meth:`Engine.save_portable`."""
        held = self._partitions
        write_portable(folder, self, named, moments=held.has_moments, steps=held.steps())
        write_buffers(self.deepspeed.module, folder)

    def load_portable(self, folder: Path) -> None:
        """See :meth:`Engine.load_portable`."""
        ensure(self.world_size == 1, "in more processes each would hold a part")
        state = PortableState(folder)
        self._fill(state, str(folder), moments=self._partitions.has_moments)
        self._partitions.set_steps(state.steps)
        read_buffers(self.deepspeed.module, folder)

    def state(self, kinds: Sequence[str] = (WEIGHT,), *, write: bool = False) -> Lent:
        """See :meth:`Engine.state`."""
        tensors = lend(self._partitions, self._shards, kinds, write=write)
        return lending(tensors, self._partitions.weights_changed if write else None)

    def rng_state(self) -> Any:
        """See :meth:`Engine.rng_state`."""
        return device.rng_state()

    def set_rng_state(self, state: Any) -> None:
        """See :meth:`Engine.set_rng_state`."""
        device.set_rng_state(state)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`Engine.parameter_shapes`."""
        return self._shards.shapes

    def release(self) -> None:
        """Free the model and what DeepSpeed keeps beside it, and stay in the process group."""
        if isinstance(self._partitions.inner, OffloadedStep) and self._partitions.inner.offload is not None:
            self._partitions.inner.offload.close()
        self.deepspeed.destroy()
        if self._context is not None:
            self._context.close()
        if self._swap is not None:
            self._swap.close()
        compat.forget_groups()

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self.release()
        compat.leave_process_group()
        if dist.is_initialized():
            dist.destroy_process_group()
