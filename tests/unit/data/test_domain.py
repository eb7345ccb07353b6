"""Opening a domain: splits, identity, cost, and what is said when it cannot be opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patience import PATIENCE
from rewarm.config.data import DomainConfig
from rewarm.data import indexed
from rewarm.data.domain import file_digest, info_digest, open_domain
from rewarm.errors import UserError
from unit.data.helpers import start_python, write_pair


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    lengths = np.random.default_rng(1).integers(10, 200, 300)
    write_pair(tmp_path / "a", np.arange(lengths.sum(), dtype=np.int32), lengths.tolist())
    return tmp_path / "a"


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5])
def test_bare_pair_holds_out_whole_documents_at_its_end(pair: Path, fraction: float) -> None:
    domain = open_domain("a", DomainConfig(path=str(pair), held_out_fraction=fraction), 32)
    source = domain.train.source
    starts = [source.document_start(i) for i in range(source.num_documents)]
    assert domain.train.start == 0 and domain.train.stop == domain.held_out.start
    assert domain.held_out.stop == source.num_tokens and domain.held_out.start in starts
    wanted = fraction * source.num_tokens
    following = min([s for s in starts if s > domain.held_out.start], default=source.num_tokens)
    assert domain.held_out.num_tokens >= round(wanted) > source.num_tokens - following - 1


def test_held_out_prefix(pair: Path, tmp_path: Path) -> None:
    write_pair(tmp_path / "valid", np.arange(500, dtype=np.uint16))
    domain = open_domain("a", DomainConfig(path=str(pair), held_out=str(tmp_path / "valid")), 32)
    assert domain.train.num_tokens == domain.train.source.num_tokens and domain.held_out.num_tokens == 500
    with pytest.raises(UserError, match=r"held_out_fraction=0\.5 would be ignored"):
        config = DomainConfig(path=str(pair), held_out=str(tmp_path / "valid"), held_out_fraction=0.5)
        open_domain("a", config, 32)


def test_fingerprint_goes_by_content(pair: Path, tmp_path: Path) -> None:
    first = open_domain("a", DomainConfig(path=str(pair)), 32)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for suffix in (".bin", ".idx"):
        (moved / f"b{suffix}").write_bytes(Path(f"{pair}{suffix}").read_bytes())
    assert open_domain("b", DomainConfig(path=str(moved / "b")), 64).fingerprint == first.fingerprint
    other_split = DomainConfig(path=str(pair), held_out_fraction=0.3)
    assert open_domain("a", other_split, 32).fingerprint != first.fingerprint
    content = bytearray((moved / "b.bin").read_bytes())
    content[0] ^= 1
    (moved / "b.bin").write_bytes(content)
    assert open_domain("b", DomainConfig(path=str(moved / "b")), 32).fingerprint != first.fingerprint


class _Letters:
    """Every token is one letter of two UTF-8 bytes; tokens that divide by 4 are special."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "é" * sum(1 for token in token_ids if token % 4)


def test_bytes_per_token_of_a_bare_pair_is_measured(pair: Path) -> None:
    domain = open_domain("a", DomainConfig(path=str(pair), held_out_fraction=0.2), 32)
    assert domain.held_out_bytes_per_token is None
    assert domain.measure_bytes_per_token(_Letters()) == pytest.approx(1.5)
    assert domain.held_out_bytes_per_token == pytest.approx(1.5)


def test_what_cannot_be_opened_is_named_with_its_fix(tmp_path: Path, pair: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_pair(tmp_path / "short", np.arange(30, dtype=np.uint16), [20, 10])
    write_pair(tmp_path / "single", np.arange(3000, dtype=np.uint16))
    write_pair(tmp_path / "empty", np.empty(0, dtype=np.uint16), [0])
    write_pair(tmp_path / "lone", np.arange(30, dtype=np.uint16))
    (tmp_path / "lone.idx").unlink()
    for path, words in (
        (tmp_path / "nowhere", "neither such a folder nor"),
        (tmp_path / "folder", "no domain.json"),
        (tmp_path / "short", "less than one window"),
        (tmp_path / "single", "whole documents"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "lone", "lone.idx does not exist"),
        (Path(f"{pair}.bin"), "names one file of a pair"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            open_domain("mine", DomainConfig(path=str(path)), 64)
        assert str(path) in str(caught.value) and caught.value.fix
    with pytest.raises(UserError, match=r"held_out=nothing: nothing\.bin does not exist"):
        open_domain("mine", DomainConfig(path=str(pair), held_out="nothing"), 64)


def test_what_no_configuration_names_is_not_blamed_on_one(tmp_path: Path, pair: Path) -> None:
    write_pair(tmp_path / "single", np.arange(3000, dtype=np.uint16))
    for config in (
        DomainConfig(path=str(tmp_path / "nowhere")),
        DomainConfig(path=f"{pair}.bin"),
        DomainConfig(path=str(tmp_path / "single")),
        DomainConfig(path=str(pair), held_out="nothing"),
        DomainConfig(path=str(pair), held_out=str(pair), held_out_fraction=0.3),
    ):
        with pytest.raises(UserError) as caught:
            open_domain("mine", config, 64, section=None)
        assert "data.mine" not in str(caught.value) and caught.value.fix
        with pytest.raises(UserError, match=r"data\.mine"):
            open_domain("mine", config, 64)


_OPEN_MANY = """
import os, resource, struct, sys
from pathlib import Path
from rewarm.config.data import DomainConfig
from rewarm.data.domain import open_domain
from rewarm.data.indexed import MAGIC, IndexHeader
import numpy as np
folder, tokens, count = Path(sys.argv[1]), 5_000_000_000, 5_000_000
header = IndexHeader(np.dtype(np.uint16), count, count + 1)
for i in range(300):
    with open(folder / f"{i}.bin", "wb") as stream:
        stream.truncate(2 * tokens)
    with open(folder / f"{i}.idx", "wb") as stream:
        stream.truncate(header.size)
        stream.write(struct.pack("<9sQBQQ", MAGIC, 1, 8, count, count + 1))
        for offset, layout, value in (
            (34 + 4 * (count - 1), "<i", 1000),
            (header.pointers_offset + 8 * (count - 1), "<q", 2 * (tokens - 1000)),
            (header.size - 8, "<q", count),
        ):
            stream.seek(offset)
            stream.write(struct.pack(layout, value))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = {str(i): DomainConfig(path=str(folder / str(i)), held_out=str(folder / "0")) for i in range(300)}
domains = [open_domain(name, domain, 4096) for name, domain in config.items()]
for domain in domains:
    domain.train.read(np.array([0, len(domain.train) - 1]))
assert sum(domain.train.num_tokens for domain in domains) == 1_500_000_000_000
assert len(os.listdir("/proc/self/fd")) < 280, "each map holds a file open"
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_and_open_files_do_not_grow_with_the_data(tmp_path: Path) -> None:
    """300 domains of 1.5 * 10^12 tokens in all, in sparse files: a table of them would take 15 GB."""
    process = start_python("-c", _OPEN_MANY, str(tmp_path))
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert int(printed) < 100


def test_no_flipped_bit_of_an_index_passes(pair: Path) -> None:
    """Lengths and offsets follow from each other; the header is checked by itself."""
    index = Path(f"{pair}.idx")
    whole = index.read_bytes()
    documents = len(whole) - 8 * 301
    generator = np.random.default_rng(0)
    for place in [*range(34), *generator.integers(34, documents, 150).tolist()]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        index.write_bytes(damaged)
        with pytest.raises(UserError):
            open_domain("a", DomainConfig(path=str(pair)), 32)
    index.write_bytes(whole)
    open_domain("a", DomainConfig(path=str(pair)), 32)


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A domain as ``rewarm data build`` leaves it, on a fingerprint of nothing but its own files."""
    tokens = np.random.default_rng(2).integers(0, 99, 9000).astype(np.uint16)
    for name, part in (("train", tokens[:8000]), ("held_out", tokens[8000:])):
        write_pair(tmp_path / name, part, [20] * (len(part) // 20))
    info: dict[str, Any] = {"format": 1, "tokenizer": "../tokenizer", "vocab_size": 99}
    for name in ("train", "held_out"):
        files = {key: file_digest(tmp_path / f"{name}{end}") for key, end in PAIR.items()}
        info[name] = {"tokens": 8000 if name == "train" else 1000, "bytes": 1, "documents": 1, **files}
    (tmp_path / "domain.json").write_text(json.dumps(info | {"digest": info_digest(info)}))
    return tmp_path


PAIR = {"content_hash": ".bin", "index_hash": ".idx"}


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "held_out.bin", "held_out.idx", "domain.json"])
def test_no_flipped_bit_of_a_built_domain_passes(built: Path, name: str) -> None:
    open_domain("a", DomainConfig(path=str(built)), 32)
    whole = (built / name).read_bytes()
    generator = np.random.default_rng(1)
    for place in [0, len(whole) - 1, *generator.integers(0, len(whole), 60).tolist()]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        (built / name).write_bytes(damaged)
        with pytest.raises(UserError, match=name.replace(".", r"\.") if name == "domain.json" else None):
            open_domain("a", DomainConfig(path=str(built)), 32)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"format": 1}', '{"format": 1, "train": []}', "\udcff", "null"]
)
def test_a_damaged_domain_file_is_named(built: Path, text: str) -> None:
    (built / "domain.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"domain\.json"):
        open_domain("a", DomainConfig(path=str(built)), 32)


def test_a_file_that_changes_under_a_run_is_refused(pair: Path) -> None:
    domain = open_domain("a", DomainConfig(path=str(pair)), 32)
    before = domain.train.read(np.array([3]))
    indexed._map.cache_clear()  # what a process with many domains does to those that it did not read lately
    assert np.array_equal(domain.train.read(np.array([3])), before)
    content = Path(f"{pair}.bin").read_bytes()
    for change in (lambda file: file.write_bytes(content[:-4]), Path.unlink):
        change(Path(f"{pair}.bin"))
        indexed._map.cache_clear()
        with pytest.raises(UserError, match=r"a\.bin was changed or removed"):
            domain.train.read(np.array([3]))
