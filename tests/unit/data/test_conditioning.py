"""A prefix stands where it should, is not learned, and leaves the windows what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rewarm.config.mixture import ConditioningConfig
from rewarm.data.conditioning import prefix_tokens, read_with_prefix
from rewarm.data.indexed import IndexedWriter, token_dtype
from rewarm.data.windows import WindowReader
from rewarm.errors import UserError

PREFIX = np.array([900, 901])


@pytest.fixture
def reader(tmp_path: Path) -> WindowReader:
    """Documents of 3, 0, 9 and 12 tokens that count on: 0..2, 3..11, 12..23."""
    writer = IndexedWriter(tmp_path / "pair", token_dtype(1000))
    first = 0
    for length in (3, 0, 9, 12):
        writer.add(np.arange(first, first + length).astype(token_dtype(1000)), [length])
        first += length
    writer.close()
    return WindowReader(tmp_path / "pair", 8)


def test_the_prefix_stands_at_the_window_and_at_each_document_inside(reader: WindowReader) -> None:
    assert [reader.document_starts(window) for window in range(2)] == [[3], [4]]
    tokens, mask = read_with_prefix(reader, np.array([1, 0]), PREFIX)
    np.testing.assert_array_equal(tokens[1], [900, 901, 0, 1, 2, 900, 901, 3, 4])
    np.testing.assert_array_equal(tokens[0], [900, 901, 8, 9, 10, 11, 900, 901, 12])
    # What predicts the prefix is not learned; what the prefix predicts is.
    np.testing.assert_array_equal(mask[1], [False, True, True, True, False, False, True, True])
    np.testing.assert_array_equal(mask[0], [False, True, True, True, True, False, False, True])


def test_a_document_that_begins_with_the_window_has_one_prefix(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "pair", token_dtype(1000))
    for document in range(3):
        writer.add(np.arange(document * 8, document * 8 + 8).astype(token_dtype(1000)), [8])
    writer.close()
    tokens, mask = read_with_prefix(WindowReader(tmp_path / "pair", 8), np.array([1]), PREFIX)
    np.testing.assert_array_equal(tokens[0], [900, 901, *range(8, 15)])
    np.testing.assert_array_equal(mask[0], [False, *[True] * 7])


def test_prefixes_are_refused_without_tokenizer_or_when_too_long(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    with pytest.raises(UserError, match="no tokenizer is known"):
        prefix_tokens({"a": "x"}, None, 4)
    backend = Tokenizer(models.WordLevel({"source": 0, "a": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert prefix_tokens({"a": "source a"}, tmp_path, 4)["a"].tolist() == [0, 1]
    for text in ("source " * 5, ""):
        with pytest.raises(UserError, match="takes 1 to 4"):
            prefix_tokens({"a": text}, tmp_path, 4)
    with pytest.raises(ValueError, match="remove one of the two"):
        ConditioningConfig.model_validate({"prefixes": {"a": "x"}, "until": "50%", "until_learning_rate_fraction": 0.5})
