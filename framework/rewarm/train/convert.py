"""A run of one engine as a run of the other."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rewarm.checkpoint import store
from rewarm.checkpoint.distributed import read_state, save_checkpoint
from rewarm.config.load import build, dump
from rewarm.config.run import RunConfig
from rewarm.config.saved import FILE_NAME, read_saved
from rewarm.engine.base import Engine
from rewarm.engine.environment import find_ranks
from rewarm.errors import UserError
from rewarm.files import write_whole
from rewarm.model.description import for_other_engine
from rewarm.replay.lineage import Lineage
from rewarm.train.companions import copy_companions
from rewarm.train.open import OpenModel, open_model, with_fp32_state
from rewarm.train.state import MODEL, RANDOM

_OF_AN_ENGINE = ("parallel", "megatron", "deepspeed", "distributed", "offload")
_KEPT = ("lineage.json", "mixture.jsonl", "metrics.jsonl", "evaluation.jsonl")


def convert_run(run: Path, engine: str, output: Path) -> Path:
    """Write a run folder with one checkpoint, at the same step.

    The fp32 parameters, the optimizer's moments and their count of updates go through files that both engines read
    and write, so that the new run's next step is the old run's, to the rounding of another order of sums.

    Args:
        run: a run folder or a checkpoint of one.
        engine: of the new run.
        output: its folder.

    Returns:
        The new checkpoint.

    Raises:
        UserError: if there is nothing to convert, the output is taken, or the other engine does not know the model.
    """
    from rewarm.engine.build import build_engine

    model = open_model(run)
    _check(model, engine, output)
    description = for_other_engine(model.architecture, model.config.precision)
    config = _settings(model, engine, output)
    output.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rewarm-convert-", dir=output.resolve().parent) as scratch:
        source = model.engine(optimizer=True)
        source.save_portable(Path(scratch))
        source.close()
        # With a parent no weights are drawn, which would be replaced at once.
        plain = with_fp32_state(config).model_copy(update={"parent": str(model.folder), "model": None})
        target = build_engine(plain, description, [])
        try:
            target.load_portable(Path(scratch))
            state = {**read_state(model.checkpoint), "architecture": description.to_dict(), "engine": engine}
            state["layout"] = None  # random state belongs to an engine's ranks; none is carried over
            checkpoint = _save(model, target, state, output)
        finally:
            target.close()
    _write_run_files(model, config, output)
    return checkpoint


def _check(model: OpenModel, engine: str, output: Path) -> None:
    if find_ranks().world_size > 1:
        raise UserError("rewarm convert runs in one process", fix="call it without torchrun or srun")
    if model.config.engine == engine:
        raise UserError(f"{model.folder} has engine={engine} already", fix="train it as it is")
    if output.exists():
        raise UserError(f"{output} exists already", fix="choose another --output or remove it")
    if not (model.folder / "config.yaml").is_file():
        raise UserError(
            f"{model.folder} is an imported model and not a run",
            fix=f"import it again: rewarm import FOLDER --output {output} engine={engine}",
        )


def _settings(model: OpenModel, engine: str, output: Path) -> RunConfig:
    values: dict[str, Any] = read_saved(model.folder)
    for section in (*_OF_AN_ENGINE, "stop_at"):  # where this invocation stopped is no wish for the next
        values.pop(section, None)
    if read_state(model.checkpoint).get("replay") is None and values.get("replay", {}).get("fraction"):
        values["replay"].setdefault("windows", "all")  # how the run began, before this was a setting
    place = {"name": output.resolve().name, "runs_folder": str(output.resolve().parent), "engine": engine}
    return build(values | place, source=str(model.folder / "config.yaml"))


def _save(model: OpenModel, target: Engine, state: dict[str, Any], output: Path) -> Path:
    def prepare(folder: Path) -> None:
        (folder / MODEL).mkdir()
        (folder / RANDOM).mkdir()
        Lineage.load(model.checkpoint).save(folder)

    def write(folder: Path) -> None:
        target.save(folder / MODEL, optimizer=True)

    (output / "checkpoints").mkdir(parents=True)
    step = store.step_of(model.checkpoint)
    assert step is not None, f"{model.checkpoint} is not named after a step"
    return save_checkpoint(target, output / "checkpoints", step, prepare, write, state, keep=1)


def _write_run_files(model: OpenModel, config: RunConfig, output: Path) -> None:
    (output / "logs").mkdir(exist_ok=True)
    for name in _KEPT:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, output / name)
    if model.companions is not None:
        copy_companions(model.companions, output)
    write_whole(output / FILE_NAME, dump(config))
    converted = {"from": str(model.checkpoint), "engine": model.config.engine}
    write_whole(output / "converted.json", json.dumps(converted, indent=1) + "\n")
