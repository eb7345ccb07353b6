"""One tokenizer for the model and all of its domains."""

from __future__ import annotations

from pathlib import Path

from rewarm.config.run import RunConfig
from rewarm.data.domain import Domain
from rewarm.data.tokenizer import open_backend, tokenizer_fingerprint
from rewarm.errors import UserError
from rewarm.model.description import ModelDescription
from rewarm.model.tokenizer_check import check_tokenizer_fits
from rewarm.train.companions import check_digests
from rewarm.train.origin import Origin

_REBUILD = "rebuild the domain with the model's tokenizer: rewarm data build ... --tokenizer "


def choose_tokenizer(config: RunConfig, origin: Origin, new: list[Domain]) -> Path | None:
    """The configured tokenizer, else the run's or parent's, else the one the domains were built with.

    Raises:
        UserError: if the configured folder does not exist.
    """
    if config.tokenizer is not None:
        folder = Path(config.tokenizer)
        if not folder.is_dir():
            raise UserError(
                f"tokenizer={config.tokenizer}: there is no such folder",
                fix="name the folder of a Hugging Face tokenizer; rewarm data demo makes data/demo/tokenizer",
            )
        return folder
    if origin.tokenizer is not None:
        return origin.tokenizer
    built_with = next((domain.tokenizer for domain in new if domain.tokenizer is not None), None)
    return Path(built_with) if built_with is not None and Path(built_with).is_dir() else None


def check_tokenizers(tokenizer: Path | None, architecture: ModelDescription, domains: list[Domain]) -> None:
    """Refuse domains that were built with another tokenizer than the model's, or that do not fit its rows.

    Bare token files say nothing of their tokenizer; their ids are checked as they are read.

    Raises:
        UserError: naming the domain, both tokenizers or sizes, and the fix.
    """
    for domain in domains:
        if domain.vocab_size is not None and domain.vocab_size > architecture.vocab_size:
            raise UserError(
                f"domain {domain.name!r} ({domain.path}) was built with a tokenizer of {domain.vocab_size} entries, "
                f"but the model has {architecture.vocab_size} rows",
                fix=_REBUILD + "FOLDER",
            )
    if tokenizer is not None:
        check_digests(tokenizer)
        check_tokenizer_fits(tokenizer, architecture, "the model")
        check_same_tokenizer(tokenizer, domains)


def check_same_tokenizer(tokenizer: Path, domains: list[Domain]) -> None:
    """Refuse domains that were built with another tokenizer, and measure the bytes per token of those that say nothing.

    Raises:
        UserError: naming the domain, both tokenizers, and the fix.
    """
    own = tokenizer_fingerprint(tokenizer)
    decoder = None  # opened once: a large one takes a second
    for domain in domains:
        if domain.tokenizer_fingerprint not in (None, own):
            raise UserError(
                f"domain {domain.name!r} ({domain.path}) was built with another tokenizer ({domain.tokenizer}) than "
                f"the model's ({tokenizer})",
                fix=_REBUILD + str(tokenizer),
            )
        if domain.held_out_bytes_per_token is None:
            decoder = decoder or open_backend(tokenizer)
            domain.measure_bytes_per_token(decoder)
