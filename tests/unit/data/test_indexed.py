"""The file format, against Megatron-Core's own reader and builder."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from rewarm.data.indexed import MAX_SEQUENCE_TOKENS, IndexedTokens, IndexedWriter, token_dtype
from rewarm.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Transformer Engine and Apex")


def _documents(dtype: type, count: int = 50, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, np.iinfo(dtype).max, rng.integers(1, 40)).astype(dtype) for _ in range(count)]


def _write(prefix: Path, documents: list[np.ndarray]) -> None:
    writer = IndexedWriter(prefix, documents[0].dtype)
    for piece in (documents[:7], documents[7:]):
        writer.add(np.concatenate(piece), [len(document) for document in piece])
    writer.close()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_bytes_equal_those_of_megatrons_builder(tmp_path: Path, dtype: type) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    documents = _documents(dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    _write(tmp_path / "ours", documents)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == len(documents)
    assert all(np.array_equal(read[i], document) for i, document in enumerate(documents))


def test_documents_of_several_sequences_as_megatron_writes_them(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = _documents(np.int32, count=20)
    builder = IndexedDatasetBuilder(str(tmp_path / "sentences.bin"), dtype=np.int32)
    for document in documents:
        cut = len(document) // 2
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [cut, len(document) - cut])
    builder.finalize(str(tmp_path / "sentences.idx"))
    opened = IndexedTokens(tmp_path / "sentences")
    assert opened.num_documents == 20 and opened.header.num_sequences == 40
    for i, document in enumerate(documents):
        assert np.array_equal(opened.document(i), document)


def test_binary_search_agrees_with_a_scan(tmp_path: Path) -> None:
    documents = _documents(np.uint16)
    _write(tmp_path / "a", documents)
    opened = IndexedTokens(tmp_path / "a")
    starts = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    assert [opened.document_start(i) for i in range(len(documents) + 1)] == starts.tolist()
    for token in range(opened.num_tokens):
        assert opened.last_document_at_or_before(token) == np.flatnonzero(starts[:-1] <= token)[-1]


def test_dtype_boundary_is_megatrons() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (100, 65499, 65500, 65536, 200_000):
        assert token_dtype(size) == np.dtype(DType.optimal_dtype(size))


@pytest.mark.parametrize("change", [-1, -2, 2])
def test_wrong_size_of_bin_is_refused_with_both_sizes(tmp_path: Path, change: int) -> None:
    _write(tmp_path / "a", _documents(np.uint16))
    size = (tmp_path / "a.bin").stat().st_size
    with open(tmp_path / "a.bin", "r+b") as stream:
        stream.truncate(size + change)
    with pytest.raises(UserError) as caught:
        IndexedTokens(tmp_path / "a")
    assert all(part in str(caught.value) for part in ("a.bin", str(size), str(size + change), "fix:"))


def test_damaged_index_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a", _documents(np.uint16))
    index = tmp_path / "a.idx"
    whole = index.read_bytes()
    for damaged, words in (
        (whole[:-8], "cut short"),
        (whole[:20], "not a Megatron index"),
        (b"x" + whole[1:], "not a Megatron index"),
        (b"A" + whole[1:], "not a Megatron index"),
        (whole[:33], "not a Megatron index"),
        (b"", "not a Megatron index"),
        (whole[:9] + struct.pack("<Q", 0) + whole[17:], "version 0"),
        (whole[:9] + struct.pack("<Q", 2) + whole[17:], "version 2"),
        (whole[:17] + b"\x07" + whole[18:], "dtype code 7"),
        (whole[:-8] + struct.pack("<q", 3), "closes its documents"),
    ):
        index.write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            IndexedTokens(tmp_path / "a")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
def test_every_integer_type_has_megatrons_code(tmp_path: Path, dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    _write(tmp_path / "a", _documents(dtype))
    assert (tmp_path / "a.idx").read_bytes()[17] == DType.code_from_dtype(dtype)
    opened = IndexedTokens(tmp_path / "a")
    assert opened.dtype == dtype and np.array_equal(opened.document(49), _documents(dtype)[49])
    assert np.array_equal(opened.tokens, np.concatenate(_documents(dtype)))


def test_documents_outside_of_the_stream_are_broken_invariants(tmp_path: Path) -> None:
    _write(tmp_path / "a", _documents(np.uint16))
    opened = IndexedTokens(tmp_path / "a")
    assert opened.document_start(50) == opened.num_tokens
    for document in (-1, 51):
        with pytest.raises(AssertionError):
            opened.document_start(document)
    assert np.iinfo(np.int32).max == MAX_SEQUENCE_TOKENS


def test_a_pair_without_documents_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    (tmp_path / "a.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 0, 0))
    opened = IndexedTokens(tmp_path / "a")
    assert (opened.num_tokens, opened.num_documents, len(opened.tokens)) == (0, 0, 0)


def test_nothing_has_its_final_name_before_close(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "a", np.dtype(np.uint16))
    writer.add(np.arange(5, dtype=np.uint16), [5])
    assert not list(tmp_path.glob("a.bin")) and not list(tmp_path.glob("a.idx"))
    writer.abort()
    assert list(tmp_path.iterdir()) == []
