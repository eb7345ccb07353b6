"""Evaluating a model outside of training: a run, a checkpoint, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from rewarm.config.data import domain_of_option
from rewarm.data.domain import Domain, open_domain
from rewarm.data.model_folder import check_model_folder
from rewarm.errors import UserError
from rewarm.evaluation.held_out import HeldOutLoss, evaluate_domain, held_out_windows, summarise
from rewarm.files import read_json


def evaluate_run(
    path: Path, overrides: Iterable[str], data: Mapping[str, str], windows: int | None
) -> list[tuple[Domain, HeldOutLoss]]:
    """Held-out losses of a run's model through its engine. Collective.

    Args:
        path: the run, or one of its checkpoints.
        overrides: settings to change.
        data: domains by name and path; the run's own when empty.
        windows: held-out windows per domain; None means the run's setting.
    """
    from rewarm.engine.environment import find_ranks
    from rewarm.train.open import open_model
    from rewarm.train.tokenizers import check_tokenizers

    model = open_model(path, overrides)
    if data:
        length = model.config.batch.sequence_length
        domains = [open_domain(name, domain_of_option(name, where), length, None) for name, where in data.items()]
        check_tokenizers(model.tokenizer, model.architecture, domains)
    else:
        domains = model.stage(find_ranks().world_size).evaluated
    limit = windows or model.config.evaluation.windows_per_domain
    size, vocab_size = model.config.evaluation_micro_batch_size, model.architecture.vocab_size
    engine = model.engine()
    try:
        return [(domain, evaluate_domain(engine, domain, limit, size, vocab_size)) for domain in domains]
    finally:
        engine.close()


def evaluate_huggingface(
    folder: Path, data: Mapping[str, str], sequence_length: int, windows: int, overrides: Iterable[str]
) -> list[tuple[Domain, HeldOutLoss]]:
    """Held-out losses of a Hugging Face folder through transformers, in this process.

    Raises:
        UserError: if no domain is given, or settings of a run are; if a domain was built with another tokenizer, or
            the windows are longer than the model's positions, where the losses would mean nothing.
    """
    from rewarm.model.reference import window_losses
    from rewarm.train.parent import tokenizer_of
    from rewarm.train.tokenizers import check_same_tokenizer

    for override in overrides:
        raise UserError(f"{override}: {folder} is a Hugging Face folder and has no settings", fix="leave it out")
    if not data:
        raise UserError(
            f"{folder} is a Hugging Face folder and names no domains", fix="give them: --data NAME=PATH, once for each"
        )
    check_model_folder(folder)
    domains = [open_domain(name, domain_of_option(name, where), sequence_length, None) for name, where in data.items()]
    _check_positions(folder, sequence_length)
    tokenizer = tokenizer_of(folder)
    if tokenizer is not None:
        check_same_tokenizer(tokenizer, domains)
    results = []
    for domain in domains:
        tokens = held_out_windows(domain.held_out, windows)
        results.append((domain, summarise(domain, window_losses(folder, tokens), sequence_length)))
    return results


def _check_positions(folder: Path, sequence_length: int) -> None:
    longest = read_json(folder / "config.json", fix="copy the model again").get("max_position_embeddings")
    if isinstance(longest, int) and sequence_length > longest:
        raise UserError(
            f"windows of {sequence_length} tokens are above max_position_embeddings={longest} of {folder}",
            fix=f"give --sequence-length {longest} or less",
        )
