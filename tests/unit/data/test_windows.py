"""Windows: which tokens they hold, how far they reach, what opening costs."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarm.data.indexed import IndexedTokens
from rewarm.data.windows import WindowReader
from unit.data.helpers import write_pair, write_sparse_pair


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 200), length=st.integers(1, 50), data=st.data())
def test_every_token_but_the_first_and_a_tail_is_a_target_once(
    tmp_path_factory: pytest.TempPathFactory, total: int, length: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("windows")
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start, total))
    write_pair(folder / "a", np.arange(total, dtype=np.uint16))
    reader = WindowReader(folder / "a", length, start, stop)
    assert len(reader) == max(0, (stop - start - 1) // length) and reader.num_tokens == stop - start
    windows = reader.read(np.arange(len(reader)))
    assert windows.dtype == np.int64 and windows.shape == (len(reader), length + 1)
    assert windows[:, 1:].ravel().tolist() == list(range(start + 1, start + 1 + len(reader) * length))
    assert np.array_equal(windows[1:, 0], windows[:-1, -1])


def test_order_and_repeats_are_kept_and_strangers_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", np.arange(100, dtype=np.int32))
    reader = WindowReader(tmp_path / "a", 9)
    assert reader.read(np.array([10, 0, 10]))[:, 0].tolist() == [90, 0, 90]
    assert reader.read(np.array([], dtype=np.int64)).shape == (0, 10)
    for wrong in (-1, 11):
        with pytest.raises(IndexError):
            reader.read(np.array([wrong]))


def test_reads_are_right_past_two_to_the_31_tokens(tmp_path: Path) -> None:
    document = 1_000_000
    write_sparse_pair(tmp_path / "big", 3_000 * document, document)
    marks = [0, 2**31 - 1, 2**31, 2**31 + 1, 2**32 // 2 + 12345, 3_000 * document - 1]
    with open(tmp_path / "big.bin", "r+b") as stream:
        for value, token in enumerate(marks, start=1):
            stream.seek(token * 2)
            stream.write(struct.pack("<H", value))
    reader = WindowReader(tmp_path / "big", 1024)
    assert len(reader) == (3_000 * document - 1) // 1024
    last = len(reader) - 1
    for value, token in enumerate(marks[:-1], start=1):
        assert reader.read(np.array([min(token // 1024, last)]))[0, token - min(token // 1024, last) * 1024] == value
    assert reader.source.document_start(2500) == 2500 * document
    assert reader.source.last_document_at_or_before(2**31 + 5) == (2**31 + 5) // document


def test_a_pickled_reader_opens_the_file_again(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", np.arange(50_000, dtype=np.uint16))
    reader = WindowReader(IndexedTokens(tmp_path / "a"), 10, 100, 40_000)
    reader.read(np.array([0]))
    raw = pickle.dumps(reader)
    assert len(raw) < 1000
    again = pickle.loads(raw)
    assert len(again) == len(reader)
    assert np.array_equal(again.read(np.array([5, 2])), reader.read(np.array([5, 2])))
