"""The engine on Megatron-Core."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from rewarm.config.run import RunConfig
from rewarm.engine import device, layout, ranks
from rewarm.engine.base import Batch, Engine, GradientStatistics, StepResult
from rewarm.engine.gradients import gradient_statistics
from rewarm.engine.megatron import checkpoint, schedule
from rewarm.engine.megatron.initialize import clear_padding, initialize
from rewarm.engine.megatron.optimizer import Optimizer
from rewarm.engine.megatron.overlap import Replica, forward_seconds
from rewarm.engine.megatron.state import lend
from rewarm.engine.megatron.transformer import Decoder, DecoderConfig, build_chunks, decoder_config
from rewarm.engine.state import WEIGHT, StateTensor, lending
from rewarm.model.architecture import Architecture
from rewarm.model.tensors import tensor_shapes


class MegatronEngine(Engine):
    """One model over all ranks; see :class:`~rewarm.engine.base.Engine` for the contract.

    Attributes:
        chunks: this rank's parts of the model, one per virtual pipeline stage, with Megatron-Core's parameter names.
        architecture: the model's shape.
    """

    def __init__(self, config: RunConfig, architecture: Architecture, domain_names: Sequence[str]) -> None:
        ranks.join(config.distributed.timeout)
        self.layout = layout.check_layout(config, architecture, dist.get_world_size())
        self.config, self.architecture = config, architecture
        self._num_domains = len(domain_names)
        self._device = device.activate()
        self._join_parallel_groups()
        self._decoder = decoder_config(config, architecture)
        self.chunks: list[Decoder] = build_chunks(config, architecture, self._decoder)
        clear_padding(self.chunks, architecture)
        self._wrapped = self._wrap(self.chunks)
        self._optimizer = Optimizer(config.optimizer, self._wrapped, self._decoder, config.offload)
        if config.parent is None:
            initialize(self.chunks, architecture, config.seed, self._optimizer.set_main)

    def _join_parallel_groups(self) -> None:
        parallel = self.config.parallel
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=self.layout.virtual_pipeline if self._interleaved else None,
            distributed_timeout_minutes=self.config.distributed.timeout,
        )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_size = self.layout.data
        # The rank of each model copy that knows its losses and speaks for it in sums over all ranks.
        self._reports = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        torch.manual_seed(self.config.seed)
        tensor_parallel.model_parallel_cuda_manual_seed(self.config.seed % 2**31)

    @property
    def _interleaved(self) -> bool:
        return self.layout.virtual_pipeline > 1

    def _wrap(self, chunks: Sequence[Decoder]) -> list[Replica]:
        overlap = self.config.megatron.overlap_communication and self.layout.data > 1
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        )
        wrapped = [
            Replica(self._decoder, settings, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
        ]
        self._decoder.finalize_model_grads_func = _finalize
        if overlap:
            _hook_overlap(self._decoder, wrapped)
        return wrapped

    def train_step(self, batch: Batch, learning_rate: float) -> StepResult:
        """See :meth:`Engine.train_step`."""
        sums, counts = self._forward_backward(batch, learning_rate)
        norm, updated = self._optimizer.step(learning_rate)
        return StepResult(sums, counts, norm, skipped=not updated)

    def dry_run(self, batch: Batch) -> None:
        """See :meth:`Engine.dry_run`."""
        state = self.rng_state()
        device.forget_peak_memory()  # building took more, for a moment, than a step does
        if self.config.offload.mode == "auto":
            self._forward_backward(batch)  # the first pass takes longer than those that a placement is made for
            device.synchronize()
        with forward_seconds(self.chunks) as forward:
            started = time.perf_counter()
            self._forward_backward(batch)
            device.synchronize()
        seconds, passes = time.perf_counter() - started, self.layout.num_microbatches
        filled = passes + (self.layout.pipeline - 1) / self.layout.virtual_pipeline  # a pipeline fills and drains
        each = sum(forward) / passes
        self._optimizer.profiled(seconds, each, max(0.0, seconds / filled - each), passes)
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.set_rng_state(state)

    def _forward_backward(self, batch: Batch, learning_rate: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Loss sums and token counts per domain over all ranks; gradients lie reduced in the buffers.

        Args:
            batch: this rank's windows.
            learning_rate: of the update that follows, None if none does.
        """
        if learning_rate is None:
            self._optimizer.finish()
        length = batch.tokens.shape[1] - 1
        counts = np.full(len(batch.tokens), length) if batch.loss_mask is None else batch.loss_mask.sum(axis=1)
        total = counts.sum() * self.layout.data
        if batch.loss_mask is not None:
            total = self._sum(counts.sum() * np.float64(self._reports))
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        # A dozen windows for a mixer may be less than a micro-batch of training.
        stages = self.layout.pipeline if self._interleaved else 1
        size = min(self.config.batch.micro_batch_size, len(batch.tokens) // stages)
        batches = schedule.split(batch.tokens, batch.loss_mask, size, batch.loss_weights)
        with self._optimizer.passes(len(batches), learning_rate):
            losses = schedule.train(self._wrapped, batches, max(1, int(total)))
        measured: np.ndarray = np.zeros((2, self._num_domains))
        if self._reports:
            per_window = torch.cat(losses).cpu().numpy(), counts
            measured = np.stack([np.bincount(batch.domains, values, self._num_domains) for values in per_window])
        sums, tokens = self._sum(measured)
        return sums, tokens.astype(np.int64)

    def _sum(self, values: Any) -> Any:
        """Sum of float64 values over all ranks."""
        if self.world_size == 1:
            return values
        return ranks.sum_over_ranks(torch.as_tensor(values).to(self._device, torch.float64)).cpu().numpy()

    def evaluate(self, tokens: np.ndarray, micro_batch_size: int) -> np.ndarray:
        """See :meth:`Engine.evaluate`."""
        starts = range(self.data_parallel_rank * micro_batch_size, len(tokens), micro_batch_size * self.layout.data)
        spans = [np.arange(start, min(start + micro_batch_size, len(tokens))) for start in starts]
        sums = np.zeros(len(tokens))
        if not spans:
            with self._evaluation():
                return self._sum(sums)
        # Every pass has the same shape and, interleaved, their number is a multiple of the stages: the last window
        # and the last micro-batch are repeated, their results dropped.
        padded = [np.resize(span, micro_batch_size) for span in spans]
        if self._interleaved:
            padded += [padded[-1]] * (-len(padded) % self.layout.pipeline)
        batches = [schedule.split(tokens[span], None, micro_batch_size)[0] for span in padded]
        with self._evaluation():
            outputs = schedule.forward(self.chunks, batches)
        if self._reports:
            for span, losses in zip(spans, outputs, strict=False):
                sums[span] = schedule.window_losses(losses, None)[: len(span)].cpu().numpy()
        return self._sum(sums)

    def domain_gradients(self, tokens: Sequence[np.ndarray], chunk_size: int) -> GradientStatistics:
        """See :meth:`Engine.domain_gradients`."""
        state = self.rng_state()

        def gradient(batch: Batch) -> Tensor:
            self._forward_backward(batch)
            return self._optimizer.gradient()

        found = gradient_statistics(
            gradient,
            tokens,
            chunk_size,
            micro_batch_size=self.config.batch.micro_batch_size,
            share=self.data_parallel_rank,
            num_shares=self.layout.data,
            stages=self.layout.pipeline if self._interleaved else 1,
        )
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.set_rng_state(state)
        return found

    def next_token_logits(self, tokens: np.ndarray) -> np.ndarray:
        """See :meth:`Engine.next_token_logits`."""
        last = len(tokens) - 1
        # Sequence parallelism splits the sequence evenly; what follows the last token cannot be seen from it.
        fill = -len(tokens) % self.layout.tensor if self.config.parallel.sequence else 0
        inputs = torch.from_numpy(np.pad(tokens, (0, fill))[None]).to(self._device)
        passes = self.layout.pipeline if self._interleaved else 1
        with self._evaluation():
            outputs = schedule.forward(self.chunks, [schedule.MicroBatch(inputs, None, None)] * passes)
        padded = self.architecture.padded_vocab_size(self.config.megatron.vocab_divisor, self.layout.tensor)
        logits = torch.zeros(padded, device=self._device)
        if outputs and self.data_parallel_rank == 0:
            width = outputs[0].shape[-1]
            start = parallel_state.get_tensor_model_parallel_rank() * width
            logits[start : start + width] = outputs[0][0, last].float()
        return ranks.sum_over_ranks(logits)[: self.architecture.vocab_size].cpu().numpy()

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        self._gather_parameters()
        for chunk in self.chunks:
            chunk.eval()
        try:
            yield
        finally:
            for chunk in self.chunks:
                chunk.train()

    def _gather_parameters(self) -> None:
        """Finish the update and the gathering of parameters that an overlapped step leaves to the next forward pass."""
        self._optimizer.finish()
        for chunk in self._wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        """See :meth:`Engine.save`."""
        self._gather_parameters()
        checkpoint.save(folder, self.architecture, self.chunks, self._optimizer if optimizer else None)

    def load(self, folder: Path, *, optimizer: bool = True) -> None:
        """See :meth:`Engine.load`."""
        self._optimizer.finish()
        checkpoint.load(folder, self.architecture, self.chunks, self._optimizer, moments=optimizer)

    def import_huggingface(self, folder: Path) -> None:
        """See :meth:`Engine.import_huggingface`."""
        from rewarm.engine.megatron.weights import import_weights

        self._optimizer.finish()
        error: Exception | None = None
        try:
            import_weights(self.chunks, self.architecture, folder, self._optimizer.set_main)
        except Exception as caught:
            error = caught
        ranks.raise_on_every_rank(error)  # each rank reads another part

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
        from rewarm.engine.megatron.weights import export_model

        self._gather_parameters()
        export_model(
            self.chunks,
            self.architecture,
            folder,
            device.dtype_of(dtype),
            tokenizer=tokenizer,
            lineage=lineage,
            replace=replace,
        )

    def save_portable(self, folder: Path) -> None:
        """See :meth:`Engine.save_portable`."""
        from rewarm.engine.megatron.portable import save_portable

        save_portable(folder, self, self._optimizer)

    def load_portable(self, folder: Path) -> None:
        """See :meth:`Engine.load_portable`."""
        from rewarm.engine.megatron.portable import load_portable

        load_portable(folder, self, self._optimizer)

    @contextmanager
    def state(self, kinds: Sequence[str] = (WEIGHT,), *, write: bool = False) -> Iterator[Iterator[StateTensor]]:
        """See :meth:`Engine.state`."""
        if write:
            self._gather_parameters()  # a gathering that still runs would bring old values
        else:
            self._optimizer.finish()

        def publish() -> None:
            self._optimizer.main_changed()
            for chunk in self._wrapped:
                chunk.start_param_sync(force_sync=True)

        tensors = lend(self.chunks, self.architecture, self._optimizer, kinds, write=write)
        with lending(tensors, publish if write else None) as lent:
            yield lent

    def rng_state(self) -> Any:
        """See :meth:`Engine.rng_state`."""
        return {"device": device.rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}

    def set_rng_state(self, state: Any) -> None:
        """See :meth:`Engine.set_rng_state`."""
        device.set_rng_state(state["device"])
        tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`Engine.parameter_shapes`."""
        return tensor_shapes(self.architecture)

    def any_rank(self, flag: bool) -> bool:
        """See :meth:`Engine.any_rank`."""
        return ranks.any_rank(flag)

    def barrier(self) -> None:
        """See :meth:`Engine.barrier`."""
        dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """See :meth:`Engine.broadcast`."""
        return ranks.broadcast(value)

    def gather(self, value: Any) -> list[Any]:
        """See :meth:`Engine.gather`."""
        return ranks.gather(value)

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self._optimizer.close()
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()


def _finalize(chunks: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    """Reduce the gradients. The loss was divided by the tokens of the global batch: no scaling is left to do."""
    finalize_model_grads(chunks, None, **kwargs)


def _hook_overlap(decoder: DecoderConfig, wrapped: Sequence[Replica]) -> None:
    """Tell the schedules when gradients may be reduced and parameters gathered."""
    if len(wrapped) == 1:
        decoder.no_sync_func = wrapped[0].no_sync
        return
    decoder.no_sync_func = [chunk.no_sync for chunk in wrapped]
    decoder.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
    decoder.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
