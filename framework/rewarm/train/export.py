"""A run's model as a Hugging Face folder, and the proof that both compute the same."""

from __future__ import annotations

from pathlib import Path

from rewarm.engine.environment import find_ranks
from rewarm.errors import UserError
from rewarm.evaluation.held_out import HeldOutLoss, evaluate_domain, held_out_windows, summarise
from rewarm.model.files import check_free, is_export
from rewarm.replay.lineage import FILE_NAME
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
    replace = replace or is_export(folder)
    check_free(folder, replace=replace)
    domains = model.stage(find_ranks().world_size).evaluated if evaluate else []
    settings, vocab_size = model.config.evaluation, model.architecture.vocab_size
    windows, size = settings.windows_per_domain, model.config.evaluation_micro_batch_size
    engine = model.engine()
    try:
        losses = [(domain.name, evaluate_domain(engine, domain, windows, size, vocab_size)) for domain in domains]
        lineage = model.checkpoint / FILE_NAME
        engine.export_huggingface(folder, tokenizer=model.tokenizer, lineage=lineage, dtype=dtype, replace=replace)
        return losses
    finally:
        engine.close()


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
