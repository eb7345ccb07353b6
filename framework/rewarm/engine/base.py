"""The interface between the training loop and whatever runs the model.

The loop knows no parallelism. An engine owns the process group, the model, the optimizer and their sharded state.
Every method named *collective* must be called by all ranks in the same order.

Shape suffixes: B windows, S ``sequence_length``, D domains.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rewarm.engine.state import Lent


@dataclass(frozen=True, slots=True)
class Batch:
    """The windows that one data-parallel rank trains on in one step."""

    tokens: np.ndarray
    """int64 [B, S + 1]; position t predicts t + 1."""
    domains: np.ndarray
    """int64 [B]; index of each window's domain in the order given at construction."""
    loss_mask: np.ndarray | None = None
    """bool [B, S], True where the target counts; None means everywhere."""
    loss_weights: np.ndarray | None = None
    """float64 [B], factor of each window's loss in the objective; None means 1. What a step minimises is the sum of
    ``loss_weights * token loss`` over the targets of the global batch that count, divided by their *number*. It is not
    divided by the sum of the factors: with factors ``w / q`` of domains sampled at shares q, the expectation is then
    the mean loss under the mixture w, whatever the batch happens to hold."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step measured, equal on every rank and summed over the whole global batch."""

    loss_sums: np.ndarray
    """float64 [D]; sum of the token losses in nats, per domain, without ``loss_weights``."""
    token_counts: np.ndarray
    """int64 [D]; target tokens, per domain."""
    grad_norm: float
    """Global L2 norm of the gradient of the objective, before clipping: of the mean token loss, or with
    ``loss_weights`` of the weighted one."""
    skipped: bool = False
    """True if the update was not applied because the gradient was not finite."""

    @property
    def loss(self) -> float:
        """Mean token loss in nats, without ``loss_weights``, so that it can be compared over runs."""
        return float(self.loss_sums.sum() / max(1, int(self.token_counts.sum())))


@dataclass(frozen=True, slots=True)
class GradientStatistics:
    """Gradients of the mean token losses of D domains, at the same weights; equal on every rank."""

    products: np.ndarray
    """float64 [D, D]; inner products of the domains' gradients, as they are on these windows. On the diagonal the noise
    of a gradient over B windows adds ``variances / B`` in expectation; off it nothing."""
    squared_norms: np.ndarray
    """float64 [D]; the diagonal without that noise. Unbiased over the choice of windows, and so below 0 at times."""
    variances: np.ndarray
    """float64 [D]; trace of the covariance of the gradients of single windows, from the spread of small batches."""


class Engine(ABC):
    """A model on many ranks. Built with the resolved configuration by :func:`rewarm.engine.build.build_engine`."""

    rank: int
    world_size: int
    data_parallel_rank: int
    """Which slice of the global batch this rank trains on; ranks of one model copy share it."""
    data_parallel_size: int

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes the run's files."""
        return self.rank == 0

    @abstractmethod
    def train_step(self, batch: Batch, learning_rate: float) -> StepResult:
        """Forward, backward, clip and update on this rank's slice. Collective."""

    @abstractmethod
    def dry_run(self, batch: Batch) -> None:
        """Forward and backward without an update, so that a layout that does not fit in memory fails before step 1
        and not after the first long wait. Leaves no trace: gradients and random state are put back. Collective."""

    @abstractmethod
    def evaluate(self, tokens: np.ndarray, micro_batch_size: int) -> np.ndarray:
        """Token losses of the same windows on every layout. Collective.

        Args:
            tokens: int64 [B, S + 1], the same on every rank.
            micro_batch_size: windows per forward pass. Micro-batch i is windows ``[i*m, (i+1)*m)`` on every layout
                and is run by data-parallel rank ``i % data_parallel_size``.

        Returns:
            float64 [B]; sum of each window's token losses in nats, in the order given, equal on every rank.
        """

    @abstractmethod
    def domain_gradients(self, tokens: Sequence[np.ndarray], chunk_size: int) -> GradientStatistics:
        """Compare the domains' gradients, without a step. Leaves no trace, as :meth:`dry_run`. Collective.

        It costs a forward and a backward pass over all windows, one reduction of the gradient for each chunk, and
        memory of the host for one fp32 gradient a domain, cut over the ranks as the engine cuts its own. On the device
        there are two of them at once; forward passes take ``batch.micro_batch_size`` windows at most, as in training.

        Args:
            tokens: int64 [B, S + 1] of each domain, B at least 2, the same on every rank. The windows of a domain are
                taken in ``max(2, B // chunk_size)`` chunks on every layout.
            chunk_size: windows of a chunk.
        """

    @abstractmethod
    def next_token_logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits after the last token of one sequence. Collective.

        Args:
            tokens: int64 [S'], any length up to ``sequence_length``.

        Returns:
            float32 [vocab_size] without padded rows, equal on every rank.
        """

    @abstractmethod
    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        """Write the sharded model (and optimizer) state into an existing empty folder. Collective."""

    @abstractmethod
    def load(self, folder: Path, *, optimizer: bool = True) -> None:
        """Read what :meth:`save` wrote, on this or another layout. Collective.

        Args:
            folder: the checkpoint.
            optimizer: go on with the moments; else they stay as they are. The fp32 main parameters are read either
                way, where the checkpoint has them.

        Raises:
            rewarm.errors.UserError: if the folder holds another model.
        """

    @abstractmethod
    def import_huggingface(self, folder: Path) -> None:
        """Fill the model from a Hugging Face folder; each rank reads only its own shard. Collective."""

    @abstractmethod
    def export_huggingface(
        self,
        folder: Path,
        *,
        tokenizer: Path | None,
        lineage: Path | None = None,
        dtype: str = "float32",
        replace: bool = False,
    ) -> None:
        """Write config, safetensors, tokenizer and generation files that ``AutoModelForCausalLM`` loads. Collective.

        Args:
            folder: takes its name only when it is whole.
            tokenizer: folder whose tokenizer, generation and licence files go along; None means none.
            lineage: lineage.json that goes along, so that a stage which continues the export knows its ancestors.
            dtype: ``"float32"`` or ``"bfloat16"``, of the tensors written. A bfloat16 run exports the rounded
                parameters that its forward pass uses.
            replace: take the place of what is there.

        Raises:
            rewarm.errors.UserError: on every rank, if the name is taken or cannot be written.
        """

    @abstractmethod
    def save_portable(self, folder: Path) -> None:
        """Write what :meth:`load_portable` of either engine reads: fp32 parameters, moments and the count of updates,
        into an existing empty folder. In one process only."""

    @abstractmethod
    def load_portable(self, folder: Path) -> None:
        """Go on from what :meth:`save_portable` of either engine wrote. In one process only."""

    @abstractmethod
    def state(self, kinds: Sequence[str] = ("weight",), *, write: bool = False) -> Lent:
        """Lend this rank's fp32 parameters and moments, one after the other; :mod:`rewarm.engine.state` has the rules.

        Entering waits for an update that still runs, and leaving takes what was written over into the model. Both are
        collective; in between nothing may be.

        Args:
            kinds: ``weight``, ``exp_avg`` and ``exp_avg_sq``, in the order in which each parameter's are lent.
            write: keep the changes that are made in place.
        """

    @abstractmethod
    def rng_state(self) -> Any:
        """This rank's random state: byte tensors in nested dictionaries; what :meth:`set_rng_state` restores."""

    @abstractmethod
    def set_rng_state(self, state: Any) -> None:
        """Restore what :meth:`rng_state` returned."""

    @abstractmethod
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the whole model by its Hugging Face name, without padded rows and copies."""

    def parameter_count(self) -> int:
        """Parameters of the whole model, padded rows and copies excluded."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    @abstractmethod
    def any_rank(self, flag: bool) -> bool:
        """True on every rank if the flag is true on one of them. Collective."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for every rank. Collective."""

    @abstractmethod
    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank. Collective."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order, on every rank. Collective."""

    @abstractmethod
    def close(self) -> None:
        """Leave the process group. Not collective: it is also called after an error on this rank alone."""
