"""``rewarm import``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rewarm.config.run import RunConfig
    from rewarm.engine.base import Engine


def import_(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder: config.json and *.safetensors.")],
    output: Annotated[Path, typer.Option(help="Folder to make; it can be named as the parent of a stage.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="precision=bfloat16, parallel.tensor=N, ...")] = None,
) -> None:
    """Turn a Hugging Face folder into a sharded checkpoint that stages can continue.

    A stage can also name the Hugging Face folder itself as its parent; converting it first pays off when many
    ranks or many stages start from the same large model.

    [bold]Examples[/bold]

        rewarm import models/Llama-3.2-1B --output runs/llama-1b

        torchrun --nproc-per-node 8 -m rewarm import models/Qwen3-8B --output runs/qwen3 parallel.tensor=8
    """
    from rewarm.model.files import check_free
    from rewarm.model.huggingface import architecture_from_huggingface

    architecture = architecture_from_huggingface(model)
    check_free(output)
    config = _config(model, output, architecture.max_position_embeddings, overrides or [])

    from rewarm.engine.build import build_engine

    engine = build_engine(config, architecture, list(config.data))
    try:
        engine.barrier()
        engine.import_huggingface(model)
        checkpoint = _save(engine, config, model, output)
        if engine.is_main:
            count = f"{engine.parameter_count():,} parameters"
            typer.echo(f"imported {model} ({count}) to {checkpoint}\nnext: a stage with parent: {output}")
    finally:
        engine.close()


def _config(model: Path, output: Path, longest: int, overrides: list[str]) -> RunConfig:
    """Settings of an engine that only holds the model: no data is opened."""
    from typing import Any

    from rewarm.config.load import apply_override, build

    values: dict[str, Any] = {
        "name": output.name,
        "runs_folder": str(output.parent),
        "parent": str(model),
        "data": {"none": str(model)},
        "batch": {"sequence_length": min(longest, 256)},
    }
    for override in overrides:
        section = override.partition("=")[0].strip().partition(".")[0]
        if section not in ("precision", "parallel", "distributed", "megatron"):
            from rewarm.errors import UserError

            raise UserError(
                f"{override}: an import has no such setting",
                fix="set precision, parallel, distributed or megatron here, the rest in the stage that continues it",
            )
        apply_override(values, override)
    return build(values, source="rewarm import")


def _save(engine: Engine, config: RunConfig, model: Path, output: Path) -> Path:
    """Write the folder of a run that has not trained: a checkpoint of step 0, the lineage, the tokenizer. Collective."""
    from rewarm.checkpoint.distributed import save_checkpoint
    from rewarm.model.files import carry_files
    from rewarm.model.huggingface import architecture_from_huggingface
    from rewarm.replay.lineage import Lineage
    from rewarm.train.parent import TOKENIZER
    from rewarm.train.state import MODEL

    def write(folder: Path) -> None:
        if engine.is_main:
            Lineage.load(model).save(folder)
            Lineage.load(model).save(output)
            (output / TOKENIZER).mkdir(exist_ok=True)
            carry_files(model, output / TOKENIZER)
            (folder / MODEL).mkdir()
        engine.barrier()
        engine.save(folder / MODEL, optimizer=False)

    state = {
        "step": 0,
        "tokens": 0,
        "learning_rate": None,
        "architecture": architecture_from_huggingface(model).to_dict(),
        "layout": {"ranks": engine.world_size, **config.parallel.model_dump(mode="json")},
        "engine": config.engine,
    }
    return save_checkpoint(engine, output / "checkpoints", 0, write, state, keep=1)
