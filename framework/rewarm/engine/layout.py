"""What a parallel layout demands of the model, the batch and the number of ranks.

No torch here: it is also checked before the ranks are started.
"""

from __future__ import annotations

from rewarm.config.run import RunConfig
from rewarm.errors import UserError
from rewarm.model.architecture import Architecture
from rewarm.model.description import HuggingFaceModel, ModelDescription
from rewarm.model.layout import Layout


def check_layout(config: RunConfig, model: ModelDescription, world_size: int) -> Layout:
    """Check that the ranks, the model and the batch divide as ``config.parallel`` wants.

    Args:
        config: the resolved configuration.
        model: what the engine runs, which a parent brings when ``config.model`` is None.
        world_size: number of ranks.

    Raises:
        rewarm.errors.UserError: naming the two numbers that do not fit and the setting to change.
    """
    if isinstance(model, HuggingFaceModel):
        from rewarm.engine.deepspeed.layout import check_model

        check_model(config, model)
    else:
        _check_model(config, model)
    data = _data_parallel_size(config, world_size)
    num_microbatches = _check_batch(config, data)
    if isinstance(model, HuggingFaceModel):
        from rewarm.engine.deepspeed.layout import check_file

        check_file(config, data)
    return Layout(
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        virtual_pipeline=config.parallel.virtual_pipeline,
        data=data,
        num_microbatches=num_microbatches,
    )


def _check_model(config: RunConfig, architecture: Architecture) -> None:
    parallel = config.parallel
    for name in ("num_attention_heads", "num_key_value_heads", "ffn_hidden_size"):
        value = getattr(architecture, name)
        if value % parallel.tensor:
            raise UserError(
                f"parallel.tensor={parallel.tensor} does not divide the model's {name}={value}",
                fix=f"set parallel.tensor to a divisor of {value}",
            )
    stages = parallel.pipeline * parallel.virtual_pipeline
    if architecture.num_layers % stages:
        setting = f"parallel.pipeline={parallel.pipeline}"
        if parallel.virtual_pipeline > 1:
            setting += f" times parallel.virtual_pipeline={parallel.virtual_pipeline}"
        raise UserError(
            f"{setting} does not divide the model's num_layers={architecture.num_layers}",
            fix=f"choose stages whose number divides {architecture.num_layers}",
        )
    if architecture.head_dim % 2:
        raise UserError(
            f"head_dim={architecture.head_dim} is odd; rotary positions turn pairs of channels",
            fix="set an even model.head_dim",
        )
    if config.batch.sequence_length > architecture.max_position_embeddings:
        raise UserError(
            f"batch.sequence_length={config.batch.sequence_length} is above the model's "
            f"max_position_embeddings={architecture.max_position_embeddings}",
            fix=f"set batch.sequence_length to at most {architecture.max_position_embeddings}",
        )


def _data_parallel_size(config: RunConfig, world_size: int) -> int:
    parallel = config.parallel
    model_ranks = parallel.model_ranks
    product = f"parallel.tensor={parallel.tensor} times parallel.pipeline={parallel.pipeline}"
    if parallel.context > 1:
        product += f" times parallel.context={parallel.context}"
    if world_size % model_ranks:
        raise UserError(
            f"{world_size} ranks cannot be shared by {product} = {model_ranks} ranks per model copy",
            fix=f"start a multiple of {model_ranks} ranks, or change parallel.tensor or parallel.pipeline",
        )
    data = world_size // model_ranks
    if parallel.data not in ("auto", data):
        raise UserError(
            f"{product} times parallel.data={parallel.data} needs {model_ranks * int(parallel.data)} ranks, "
            f"but {world_size} were started",
            fix=f"start {model_ranks * int(parallel.data)} ranks or set parallel.data=auto",
        )
    return data


def _check_batch(config: RunConfig, data: int) -> int:
    batch, parallel = config.batch, config.parallel
    share = data * batch.micro_batch_size
    if batch.global_batch_size % share:
        raise UserError(
            f"batch.global_batch_size={batch.global_batch_size} is not a multiple of "
            f"{data} data-parallel ranks times batch.micro_batch_size={batch.micro_batch_size} = {share}",
            fix=f"set batch.global_batch_size to a multiple of {share}, or a smaller batch.micro_batch_size",
        )
    num_microbatches = batch.global_batch_size // share
    if parallel.virtual_pipeline > 1 and num_microbatches % parallel.pipeline:
        raise UserError(
            f"the interleaved schedule needs the {num_microbatches} micro-batches of a rank to be a multiple of "
            f"parallel.pipeline={parallel.pipeline}",
            fix=f"set batch.global_batch_size to a multiple of {share * parallel.pipeline}, "
            "or parallel.virtual_pipeline=1",
        )
    return num_microbatches
