"""What a stage would do, told without doing it: everything is looked up and checked, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rewarm.config.run import RunConfig
from rewarm.engine.layout import check_layout
from rewarm.errors import UserError
from rewarm.mixing.mixers.build import with_targets
from rewarm.model.architecture import Architecture, parameter_count
from rewarm.planner.memory import GIB, plan_memory
from rewarm.planner.zero import count_parameters, state_bytes
from rewarm.schedule.learning_rate import LearningRate
from rewarm.tracking.console import short, weights_line
from rewarm.tracking.tracker import check_trackers
from rewarm.train.folder import check_start
from rewarm.train.stage import Stage, resolve_stage


def dry_run(config: RunConfig, num_ranks: int) -> list[str]:
    """Check all that can be checked without ranks.

    Args:
        config: the stage.
        num_ranks: ranks it would run on.

    Returns:
        What would be done, in lines.

    Raises:
        UserError: for what training would refuse.
    """
    config = config.model_copy(update={"mixture": with_targets(config.mixture, list(config.data))})
    stage = resolve_stage(config, num_ranks)
    config = stage.config
    messages = check_start(config)
    check_trackers(config.tracking)
    _check_writable(config.folder)
    return [
        _line("run", f"{config.folder}, {_beginning(stage)}"),
        _line("model", _model(stage)),
        _line("tokenizer", str(stage.tokenizer or "none: token files without one")),
        _line("layout", _layout(stage, num_ranks)),
        _line("memory", _memory(stage, num_ranks)),
        _line("length", f"{config.total_steps:,} steps of {config.tokens_per_step:,} tokens, {config.total_tokens:,}"),
        _line("rate", LearningRate(config.schedule, config.total_tokens, config.tokens_per_step).describe()),
        *_data(stage),
        *(_line("", weights_line(entry)) for entry in stage.planned[1:]),
        _line("evaluates", _times(config, config.evaluation.interval, "at step 0, at the end")),
        _line("saves", f"{_times(config, config.checkpoint.interval, 'at the end')}; keeps {config.checkpoint.keep}"),
        *(_line("note", message) for message in messages + stage.messages),
        "nothing was written or trained; the same command without --dry-run does it",
    ]


def _line(title: str, text: str) -> str:
    return f"{title:<10} {text}".rstrip()


def _check_writable(folder: Path) -> None:
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"the run folder {folder} cannot be written: {place} is "
            + ("not writable" if place.is_dir() else "no folder"),
            fix="make it writable, or set runs_folder to a place that is",
        )


def _beginning(stage: Stage) -> str:
    parent, own = stage.origin.parent, stage.origin.checkpoint
    if own is not None:
        return f"goes on from {own}"
    if parent is None:
        return "starts from random weights"
    whence = parent.checkpoint or parent.folder
    state = f", optimizer state {stage.config.optimizer_state}" if parent.checkpoint is not None else ""
    return f"starts from {whence}{state}"


def _model(stage: Stage) -> str:
    model = stage.architecture
    if isinstance(model, Architecture):
        shape = f"{model.num_layers} layers of width {model.hidden_size}, vocabulary {model.vocab_size:,}"
        return f"{model.family}, {parameter_count(model):,} parameters, {shape}"
    count = count_parameters(model)
    return f"{model.model_type}, {'parameters not known here' if count is None else f'{count:,} parameters'}"


def _layout(stage: Stage, num_ranks: int) -> str:
    config, layout = stage.config, check_layout(stage.config, stage.architecture, num_ranks)
    parallel = config.parallel
    axes = {"data": layout.data, "tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    shown = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "alone"
    batches = f"{layout.num_microbatches} micro-batches of {config.batch.micro_batch_size} windows"
    return f"engine {config.engine}, {num_ranks} rank{'s' * (num_ranks > 1)} ({shown}), {batches} a step and rank"


def _memory(stage: Stage, num_ranks: int) -> str:
    config, model = stage.config, stage.architecture
    layout = check_layout(config, model, num_ranks)
    if isinstance(model, Architecture):
        fullest = max(plan_memory(config, model, layout), key=lambda memory: memory.total)
        return f"planned for the fullest rank: {fullest}"
    count = count_parameters(model)
    if count is None:
        return f"not planned: transformers does not know {model.model_type} models"
    parts = state_bytes(config, count, layout)
    shown = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items())
    return f"at least {sum(parts.values()) / GIB:.1f} GiB a rank ({shown}), without activations"


def _data(stage: Stage) -> Iterator[str]:
    """A table of the domains: what each gives to the stage, as far as its weights are known now.

    A replayed domain's windows are those that are fed back. Epochs are counted over these windows, from where the
    ancestors stopped.
    """
    config = stage.config
    total = config.total_steps * config.batch.global_batch_size
    sampler = stage.sampler(None, stage.planned)
    taken = sampler.projected(total)
    names = [domain.name for domain in stage.evaluated]
    width = max(6, *map(len, names))
    yield _line(
        "data", f"{'domain':<{width}}  {'kind':<8} {'windows':>11} {'share':>7} {'tokens':>8} {'epochs':>12}  from"
    )
    sampled = {domain.name: domain for domain in sampler.domains}
    for domain in stage.evaluated:
        if domain.name not in sampled:
            row = f"{'watched':<8} {len(domain.train):>11,} {'-':>7} {'-':>8} {'-':>12}"
        else:
            drawn = taken[domain.name]
            kind = "new" if domain.name in config.data else "replayed"
            tokens = short(drawn * config.batch.sequence_length)
            start, pool = sampled[domain.name].start, sampled[domain.name].pool
            epochs = f"{start / pool:.3g} to {(start + drawn) / pool:.3g}" if start else f"{drawn / pool:.3g}"
            row = f"{kind:<8} {pool:>11,} {drawn / total:>7.2%} {tokens:>8} {epochs:>12}"
        yield _line("", f"{domain.name:<{width}}  {row}  {domain.path}")
    if config.mixture.is_updated:
        yield _line("", f"mixture.mixer={config.mixture.mixer} changes these weights as it trains")


def _times(config: RunConfig, interval: str | None, always: str) -> str:
    steps = config.steps(interval)
    if steps is None or steps >= config.total_steps:
        return always
    return f"{always}, and every {steps:,} steps: {-(-config.total_steps // steps) - 1:,} times between"
