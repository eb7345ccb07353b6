"""Does a tokenizer fit a model?"""

from __future__ import annotations

from pathlib import Path

from rewarm.data.tokenizer import open_backend
from rewarm.errors import UserError
from rewarm.model.description import ModelDescription


def required_rows(tokenizer: str | Path) -> int:
    """Rows of an embedding that every id of a tokenizer finds a place in: the largest id plus 1.

    Raises:
        UserError: if the folder holds no tokenizer that can be loaded.
    """
    folder = Path(tokenizer)
    try:
        vocabulary = open_backend(folder).get_vocab(with_added_tokens=True)
    except UserError as error:
        raise UserError(f"no tokenizer can be loaded from {folder}: {error.message}", fix=error.fix) from error
    if not vocabulary:
        raise UserError(f"the tokenizer in {folder} has no tokens", fix="give the folder of a trained tokenizer")
    return max(vocabulary.values()) + 1


def check_tokenizer_fits(tokenizer: str | Path, architecture: ModelDescription, model: str) -> None:
    """Refuse a tokenizer with ids that the model has no row for; fewer ids than rows are usual and fine.

    Args:
        tokenizer: folder of a Hugging Face tokenizer.
        architecture: the model's.
        model: what the user calls the model, for the message.

    Raises:
        UserError: naming both sizes.
    """
    rows = required_rows(tokenizer)
    if rows > architecture.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer} has ids up to {rows - 1}, but {model} has {architecture.vocab_size} "
            "embedding rows (vocab_size)",
            fix="use the tokenizer that belongs to the model and build the data with it",
        )
