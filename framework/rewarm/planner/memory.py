"""Predicted memory of one rank, by what holds it. No torch.

What a rank keeps from step to step is counted exactly. Activations are the tensors that the backward pass reads
(method: Korthikanti et al., 2022, arXiv:2205.05198, section 4, counted anew for the modules here: no dropout, a gated
feed-forward, attention without stored scores). What only kernels see for a moment is left to ``Cluster.reserved``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import assert_never

from rewarm.config.run import RunConfig
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.families.base import family_of
from rewarm.model.layout import Layout
from rewarm.offload.planning.routes import Job
from rewarm.planner.cluster import Cluster

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a parameter in each precision."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes that one rank holds at the fullest moment of a step."""

    parameters: int
    gradients: int
    optimizer: int
    """fp32 main parameters, where they are not the model's own, and moments."""
    activations: int
    """What the backward passes of the micro-batches in flight will read."""
    output: int
    """The final norm, and the logits of one micro-batch with what the loss keeps beside them."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = (f"{field.name} {getattr(self, field.name) / GIB:.1f}" for field in fields(self))
        return f"{self.total / GIB:.1f} GiB ({', '.join(parts)})"


def plan_memory(config: RunConfig, architecture: Architecture, layout: Layout) -> list[RankMemory]:
    """Memory of a rank of each pipeline stage under the megatron engine.

    Args:
        config: the resolved configuration.
        architecture: the model.
        layout: how the ranks share it.
    """
    return [_stage_memory(config, architecture, layout, stage) for stage in range(layout.pipeline)]


def check_memory(config: RunConfig, architecture: Architecture, layout: Layout, cluster: Cluster) -> str:
    """Compare the fullest rank with a cluster's GPUs.

    Returns:
        One line for the user.

    Raises:
        UserError: if it does not fit, with the settings that would save most.
    """
    stages = plan_memory(config, architecture, layout)
    fullest = max(stages, key=lambda memory: memory.total)
    usable = cluster.gpu_memory * (1 - cluster.reserved)
    where = f" on pipeline stage {stages.index(fullest)}" if layout.pipeline > 1 else ""
    if fullest.total > usable * GIB:
        raise UserError(
            f"planned memory{where} is {fullest}, but a GPU of {cluster.name} has {cluster.gpu_memory:g} GiB, of "
            f"which {cluster.reserved:.0%} are left free: {usable:.1f} GiB",
            fix=_remedy(config, fullest),
        )
    return f"planned memory{where}: {fullest} of {usable:.1f} GiB usable on {cluster.name}"


def _stage_memory(config: RunConfig, a: Architecture, layout: Layout, stage: int) -> RankMemory:
    size = BYTES[config.precision]
    parameters = stage_parameters(config, a, layout, stage)
    # fp32 parameters are their own main parameters. The distributed optimizer shares its state over the model copies.
    share = -(-parameters // layout.data)
    state = state_on_device(config, share, size)
    tokens = config.batch.micro_batch_size * config.batch.sequence_length
    output = tokens * _output_bytes(config, a, layout) if stage == layout.pipeline - 1 else 0
    if config.recomputes_activations:
        # Gone when the first layer is computed again.
        output = max(0, output - tokens * _layer_bytes(config, a, layout))
    return RankMemory(
        parameters=size * parameters,
        gradients=4 * parameters,
        optimizer=state,
        activations=tokens * _activation_bytes(config, a, layout, stage),
        output=output,
    )


def state_on_device(config: RunConfig, share: int, param_bytes: int) -> int:
    """Least bytes of optimizer state on the device of a rank, beside what holds its parameters.

    Args:
        config: the resolved configuration.
        share: parameters that the rank updates.
        param_bytes: of each where it is updated; one of 4 is its own fp32 main parameter.
    """
    offload = config.offload
    job = Job(share, 0.0, 0.0, param_bytes=param_bytes, eight_bit=config.optimizer.eight_bit)
    match offload.mode:
        case "none":
            return round(job.resident_bytes * share)
        case "twinflow":
            return round((offload.resident_fraction or 0) * job.resident_bytes * share)
        case "streamed" | "deep_optimizer_states":
            return round(job.state_bytes() * min(offload.slots * offload.subgroup_size, share))
        case "auto" | "cpu" | "nvme":
            return 0
    assert_never(offload.mode)


def stage_parameters(config: RunConfig, a: Architecture, layout: Layout, stage: int) -> int:
    """Parameters on a rank of a pipeline stage, rows that pad the vocabulary included."""
    h, t = a.hidden_size, layout.tensor
    count = a.num_layers // layout.pipeline * family_of(a).layer_parameters(a, t)
    table = a.padded_vocab_size(config.megatron.vocab_divisor, t) // t * h
    first, last = stage == 0, stage == layout.pipeline - 1
    # A tied embedding is one tensor only where the first stage is the last.
    tables = 1 if first and last and a.tie_embeddings else int(first) + int(last)
    return count + tables * table + h * last


def _activation_bytes(config: RunConfig, a: Architecture, layout: Layout, stage: int) -> int:
    """Bytes per token of a micro-batch, over all that are in flight on this stage at once."""
    size, h = BYTES[config.precision], a.hidden_size
    shared = layout.tensor if config.parallel.sequence else 1
    layers = a.num_layers // (layout.pipeline * layout.virtual_pipeline)
    chunks = _chunks_in_flight(layout, stage)
    layer = _layer_bytes(config, a, layout)
    if config.recomputes_activations:
        return chunks * layers * size * h // shared + layer
    return chunks * layers * layer


def _output_bytes(config: RunConfig, a: Architecture, layout: Layout) -> int:
    """Bytes per token that the last stage keeps beside its layers."""
    size, t = BYTES[config.precision], layout.tensor
    shared = t if config.parallel.sequence else 1
    # One rank's logits become their gradient in place. Across tensor ranks Megatron-Core's loss keeps the shifted
    # logits beside the softmax.
    per_column = size if t == 1 else 4 + size
    columns = a.padded_vocab_size(config.megatron.vocab_divisor, t) // t
    return 2 * size * a.hidden_size // shared + per_column * columns


def _layer_bytes(config: RunConfig, a: Architecture, layout: Layout) -> int:
    """Bytes per token that one layer keeps for its backward pass."""
    size, t = BYTES[config.precision], layout.tensor
    shared = t if config.parallel.sequence else 1
    query, group = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    # Twice a norm's input and the input of the matrix behind it; bfloat16 norms keep an fp32 copy on a GPU.
    norms = 4 * size * a.hidden_size + (8 * a.hidden_size if size == 2 else 0)
    # The fused projection, which the values are a view of; turned queries and keys; the result; its log-sum-exp.
    attention = size * (3 * query + 3 * group) + 4 * a.num_attention_heads
    if config.megatron.attention == "local":
        scores = a.num_attention_heads * config.batch.sequence_length
        attention += scores * (4 + (size if size == 2 else 0))
    feed_forward = size * 3 * a.ffn_hidden_size
    return norms // shared + (attention + feed_forward) // t


def _chunks_in_flight(layout: Layout, stage: int) -> int:
    """Forward passes of a model chunk that wait for their backward pass at once (Narayanan et al., 2021,
    arXiv:2104.04473): 1F1B, or interleaved with several chunks a stage."""
    p, v = layout.pipeline, layout.virtual_pipeline
    warm_up = p - stage - 1 if v == 1 else 2 * (p - stage - 1) + (v - 1) * p
    return min(layout.num_microbatches * v, warm_up + 1)


def _remedy(config: RunConfig, memory: RankMemory) -> str:
    """The setting that takes most off the largest part."""
    if memory.activations >= memory.parameters + memory.gradients + memory.optimizer:
        if not config.recomputes_activations:
            return "set activation_recomputation=full, or a smaller batch.micro_batch_size"
        return "a smaller batch.micro_batch_size, or more parallel.tensor with parallel.sequence=true"
    if memory.output > memory.total // 2:
        return "a smaller batch.micro_batch_size, or more parallel.tensor, which splits the vocabulary"
    if memory.optimizer > memory.parameters + memory.gradients:
        smaller = "" if config.optimizer.eight_bit else "optimizer.name=adamw_8bit (approximate), "
        return (
            f"offload.mode=cpu, {smaller}more nodes, which share the optimizer's state, or more parallel.tensor or "
            "pipeline"
        )
    return "more parallel.tensor or parallel.pipeline, which split the model"
