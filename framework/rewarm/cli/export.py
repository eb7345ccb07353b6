"""``rewarm export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rewarm.engine.base import Engine
    from rewarm.train.open import OpenRun

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest difference in nats per token between the engine and the export, by the coarser type of the two."""


def export(
    run: Annotated[Path, typer.Argument(help="A run, or a checkpoint of one.")],
    output: Annotated[Path, typer.Option(help="Hugging Face folder to write; an earlier export there is replaced.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of the run to change, a.b.c=value.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Type of the weights; the run's precision if left out.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Load it with transformers and compare held-out losses with the engine's.")
    ] = False,
    sample: Annotated[str | None, typer.Option(help="Text that the exported model continues, as a sample.")] = None,
) -> None:
    """Write a run's model as a Hugging Face folder that AutoModelForCausalLM loads.

    It holds config.json, safetensors, the tokenizer and the files that came with it, and the lineage, so that it can
    be the parent of another stage. A bfloat16 run exports the parameters its forward pass uses.

    [bold]Examples[/bold]

        rewarm export runs/quickstart-continue --output my-model

        rewarm export runs/large/checkpoints/step-4000 --output my-model --dtype bfloat16 --check

        torchrun --nproc-per-node 8 -m rewarm export runs/large --output my-model parallel.tensor=8
    """
    from rewarm.launch.environment import find_ranks
    from rewarm.train.open import open_run

    opened = open_run(run, overrides or [])
    stage = opened.stage(find_ranks().world_size)
    replace = _may_replace(output)
    engine = opened.engine(stage)
    try:
        engine.export_huggingface(
            output,
            tokenizer=stage.tokenizer,
            lineage=opened.checkpoint / "lineage.json",
            dtype=dtype,
            replace=replace,
        )
        if engine.is_main:
            typer.echo(f"exported {opened.checkpoint} to {output}")
        if check:
            _check(engine, opened, output, dtype)
        if sample is not None and engine.is_main:
            _print_sample(output, sample, opened.config.seed)
    finally:
        engine.close()


def _may_replace(output: Path) -> bool:
    """Whether what lies at the target is an earlier export, which both files together tell.

    Raises:
        UserError: if something else is in the way.
    """
    from rewarm.model.files import check_free

    replace = (output / "config.json").is_file() and (output / "lineage.json").is_file()
    check_free(output, replace=replace)
    return replace


def _check(engine: Engine, opened: OpenRun, output: Path, dtype: str | None) -> None:
    """Compare the losses of the engine with those of transformers on every evaluated domain. Collective.

    Raises:
        UserError: on every rank, naming the first domain that differs by more than the tolerance.
    """
    from rewarm.errors import UserError
    from rewarm.evaluation.held_out import evaluate_domain, held_out_windows, summarise
    from rewarm.model.reference import window_losses

    settings, precision = opened.config.evaluation, opened.config.precision
    compared = "bfloat16" if "bfloat16" in (precision, dtype) else "float32"
    problem: str | None = None
    for domain in opened.stage(engine.world_size).evaluated:
        ours = evaluate_domain(engine, domain, settings.windows_per_domain, settings.micro_batch_size).loss
        if not engine.is_main:
            continue
        tokens = held_out_windows(domain.held_out, settings.windows_per_domain)
        sums = window_losses(output, tokens, settings.micro_batch_size, precision, _device())
        theirs = summarise(domain, sums, tokens.shape[1] - 1).loss
        typer.echo(f"checked {domain.name}: engine {ours:.6f}, transformers {theirs:.6f} nats per token")
        if not abs(ours - theirs) <= TOLERANCE[compared] and problem is None:
            problem = (
                f"the export {output} has a held-out loss of {theirs:.6f} on {domain.name}, the engine {ours:.6f}: "
                f"more than {TOLERANCE[compared]} apart"
            )
    problem = engine.broadcast(problem)
    if problem is not None:
        raise UserError(problem, fix="do not use the export; report this with the versions that rewarm doctor prints")


def _print_sample(output: Path, prompt: str, seed: int) -> None:
    from rewarm.model.reference import generate_text

    text = generate_text(output, prompt, num_tokens=60, seed=seed, device=_device())
    typer.echo(f"sample   {' '.join(text.split())}")


def _device() -> str:
    from rewarm.engine.device import local_device

    return str(local_device())
