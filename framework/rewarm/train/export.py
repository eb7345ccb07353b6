"""A run's model as a Hugging Face folder, and the proof that both compute the same."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewarm.data.tokenizer import tokenizer_fingerprint
from rewarm.engine.environment import find_ranks
from rewarm.errors import UserError
from rewarm.evaluation.held_out import HeldOutLoss, evaluate_domain, held_out_windows, summarise
from rewarm.model.files import carry_files, carry_tokenizer, check_free, is_export
from rewarm.model.generation import GENERATION, lacks_token_ids, with_token_ids, write_generation_config
from rewarm.replay.lineage import FILE_NAME
from rewarm.train.companions import check_digests
from rewarm.train.open import OpenModel


def write_export(
    model: OpenModel, folder: Path, dtype: str, *, replace: bool, evaluate: bool
) -> list[tuple[str, HeldOutLoss]]:
    """Write the folder, and evaluate the model through its engine if asked. Collective.

    Args:
        model: the checkpoint.
        folder: what is written.
        dtype: of the tensors, ``float32`` or ``bfloat16``.
        replace: overwrite what is there; an earlier export is overwritten without it.
        evaluate: also compute the held-out losses of the run's domains.

    Returns:
        Name and loss of each domain; empty unless asked for.
    """
    overwrite = replace or is_export(folder)
    check_free(folder, replace=overwrite)
    domains = model.stage(find_ranks().world_size).evaluated if evaluate else []
    settings, vocab_size = model.config.evaluation, model.architecture.vocab_size
    windows, size = settings.windows_per_domain, model.config.evaluation_micro_batch_size
    with _complete(model) as complete:
        engine = complete.engine()
        try:
            losses = [(domain.name, evaluate_domain(engine, domain, windows, size, vocab_size)) for domain in domains]
            lineage = model.checkpoint / FILE_NAME
            engine.export_huggingface(
                folder, tokenizer=complete.companions, lineage=lineage, dtype=dtype, replace=overwrite
            )
        finally:
            engine.close()
    if model.tokenizer is not None and find_ranks().rank == 0:
        _check_tokenizer(model.tokenizer, folder)
    return losses


@contextmanager
def _complete(model: OpenModel) -> Iterator[OpenModel]:
    """The model with token ids and a generation config, where it started from random weights.

    Raises:
        UserError: if what the run keeps for its exports was damaged since.
    """
    if model.companions is not None:
        check_digests(model.companions)
    if model.companions is None or model.tokenizer is None or not lacks_token_ids(model.architecture):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="rewarm-export-") as scratch:
        kept = Path(scratch)
        carry_tokenizer(model.tokenizer, kept)
        carry_files(model.companions, kept, kind="model")
        if not (kept / GENERATION).exists():  # of a run that was started by an older version
            write_generation_config(kept, [])
        yield dataclasses.replace(model, architecture=with_token_ids(model.architecture, kept), companions=kept)


def _check_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Refuse a tokenizer that ``AutoTokenizer`` takes for one of another class beside the export's config.json."""
    if tokenizer_fingerprint(folder) != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"the tokenizer of the export {folder} makes other ids than the run's ({tokenizer}): by the export's "
            "config.json AutoTokenizer chooses another class",
            fix='set "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json, if its tokenizer.json '
            "alone makes the right ids",
        )


def check_export(
    model: OpenModel, folder: Path, losses: list[tuple[str, HeldOutLoss]], tolerance: float
) -> list[tuple[str, float, float]]:
    """Compare the engine's losses with those of transformers on the exported folder.

    Args:
        model: what was exported.
        folder: the export.
        losses: of the engine.
        tolerance: largest difference in nats per token.

    Returns:
        Domain, the engine's loss, transformers' loss.

    Raises:
        UserError: naming the first domain whose losses differ by more.
    """
    from rewarm.model.reference import window_losses

    settings = model.config.evaluation
    rows = []
    for domain, (name, ours) in zip(model.stage(1).evaluated, losses, strict=True):
        tokens = held_out_windows(domain.held_out, settings.windows_per_domain)
        sums = window_losses(
            folder,
            tokens,
            model.config.evaluation_micro_batch_size,
            dtype=model.config.precision,
            trust_remote_code=model.config.deepspeed.trust_remote_code,
        )
        theirs = summarise(domain, sums, tokens.shape[1] - 1)
        if not abs(ours.loss - theirs.loss) <= tolerance:
            raise UserError(
                f"the export {folder} does not compute what the engine does: {name} has a held-out loss of "
                f"{theirs.loss:.6f} under transformers and {ours.loss:.6f} under the engine (tolerance {tolerance:g})",
                fix="do not use the export; report this with the run's config.yaml",
            )
        rows.append((name, ours.loss, theirs.loss))
    return rows
