"""A Hugging Face folder as a sharded checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rewarm.checkpoint import store
from rewarm.checkpoint.distributed import save_checkpoint
from rewarm.config.load import apply_override, build
from rewarm.errors import UserError
from rewarm.model.description import describe
from rewarm.replay.lineage import Lineage
from rewarm.train.companions import keep_companions
from rewarm.train.imported import check_import
from rewarm.train.parent import Parent
from rewarm.train.state import MODEL


def import_model(source: Path, output: Path, precision: str, overrides: Iterable[str]) -> tuple[Path, str]:
    """Write ``output/checkpoints/step-0`` with the weights of a Hugging Face folder. Collective.

    Args:
        source: the Hugging Face folder.
        output: the run folder to make.
        precision: type of the parameters.
        overrides: ``a.b.c=value`` settings of the layout.

    Returns:
        The checkpoint, and what its weights were compared with.

    Raises:
        UserError: if the model is not supported or the output is taken.
    """
    from rewarm.engine.build import build_engine

    if store.list_checkpoints(output / "checkpoints"):
        raise UserError(f"{output} already has checkpoints", fix="choose another --output")
    values: dict[str, Any] = {
        "name": output.resolve().name,
        "runs_folder": str(output.resolve().parent),
        "parent": str(source),
        "precision": precision,
        "data": {},
    }
    for override in overrides:
        apply_override(values, override)
    architecture = describe(source, str(values.get("engine", "megatron")))
    lineage = Lineage.load(source)
    parent = Parent(source, architecture, lineage)
    values.setdefault("batch", {}).setdefault("sequence_length", min(256, architecture.max_position_embeddings or 256))
    config = build(values, source=f"import of {source}")
    engine = build_engine(config, architecture, [])
    try:
        engine.import_huggingface(source)
        compared = check_import(engine, source, config, architecture)

        def prepare(folder: Path) -> None:
            (folder / MODEL).mkdir()
            lineage.save(folder)

        def write(folder: Path) -> None:
            engine.save(folder / MODEL, optimizer=False)

        if engine.is_main:
            keep_companions(output, parent.tokenizer, parent, [])
        state = {"architecture": architecture.to_dict(), "precision": precision, "engine": config.engine}
        return save_checkpoint(engine, output / "checkpoints", 0, prepare, write, state, keep=1), compared
    finally:
        engine.close()
