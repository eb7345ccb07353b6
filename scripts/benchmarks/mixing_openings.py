"""What others do when the corpus of ``mixing.py`` is opened: Megatron-Core's blend and MosaicML Streaming.

    python scripts/benchmarks/mixing_openings.py megatron|streaming TOKENS

Prints one line of JSON. The token files are holes on the disk and no token is read: what is measured is what stands
between the start and the first sample, the indexes that Megatron-Core writes and the order of an epoch that Streaming
draws. Streaming needs ``pip install mosaicml-streaming``.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SEQUENCE_LENGTH = 4096
NUM_DOMAINS = 200
_DOCUMENT = 20_000
_SHARD_SAMPLES = 8192
"""Windows of a shard of 64 MiB, Streaming's default."""


def corpus(num_domains: int, total_tokens: int, seed: int = 0) -> list[int]:
    """Tokens of each domain, log-normally uneven."""
    sizes = np.random.default_rng(seed).lognormal(0, 1.5, num_domains)
    return [max(10 * SEQUENCE_LENGTH, int(size)) for size in sizes / sizes.sum() * total_tokens]


def seconds(action: Callable[[], object]) -> float:
    """CPU seconds of this process, which other load on the machine does not add to."""
    started = time.process_time()
    action()
    return time.process_time() - started


def resident_mib() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def megatron(total_tokens: int, folder: Path) -> dict[str, float]:
    """``BlendedMegatronDatasetBuilder``, which indexes every domain for one epoch of the rarest."""
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokens = corpus(NUM_DOMAINS, total_tokens)
    for index, size in enumerate(tokens):
        _write_hollow_domain(folder / f"d{index}", size)

    class _Tokenizer:
        unique_identifiers: dict[str, str] = {"class": "none"}  # noqa: RUF012
        vocab_size = 65536
        eod = 0
        pad = 0

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=SEQUENCE_LENGTH, split="100,0,0", path_to_cache=str(folder / "cache"),
        blend=([str(folder / f"d{i}") for i in range(NUM_DOMAINS)], np.sqrt(tokens).tolist()), tokenizer=_Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, mid_level_dataset_surplus=0.5,
    )  # fmt: skip
    weights = np.sqrt(tokens) / np.sqrt(tokens).sum()
    samples = int(min(np.array(tokens) // SEQUENCE_LENGTH / weights) * 0.5)

    def build() -> None:
        train = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]
        assert train is not None and torch.is_tensor(train[0]["tokens"])

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    before = resident_mib()
    cost = seconds(build)
    after = resident_mib()
    torch.distributed.destroy_process_group()
    disk = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()) / 2**20
    return {"samples": samples, "seconds": cost, "mib": after - before, "index_mib_on_disk": disk}


def streaming(total_tokens: int, folder: Path) -> dict[str, float]:
    """``StreamingDataset`` over one stream a domain, by proportion, up to the order of its first epoch."""
    from streaming import Stream, StreamingDataset

    tokens = corpus(NUM_DOMAINS, total_tokens)
    for index, size in enumerate(tokens):
        _write_hollow_stream(folder / f"d{index}", size // SEQUENCE_LENGTH)
    weights = np.sqrt(tokens) / np.sqrt(tokens).sum()
    before = resident_mib()

    def open_and_order() -> None:
        streams = [Stream(local=str(folder / f"d{i}"), proportion=float(w)) for i, w in enumerate(weights)]
        dataset = StreamingDataset(streams=streams, batch_size=1024, shuffle=True, shuffle_seed=1, predownload=0)
        # What its iterator does before it asks for the first shard.
        dataset._unique_worker_world = dataset._unique_rank_world.detect_workers()
        dataset._parallel_worker_world = dataset._parallel_rank_world.detect_workers()
        assert len(dataset._get_work(*dataset._resume_incr_epoch())) > 0

    return {"seconds": seconds(open_and_order), "mib": resident_mib() - before}


def _write_hollow_stream(folder: Path, samples: int) -> None:
    """The index of shards that hold windows of uint16; the shards themselves are empty."""
    folder.mkdir()
    counts = [_SHARD_SAMPLES] * (samples // _SHARD_SAMPLES) + [samples % _SHARD_SAMPLES]
    shards = []
    for number, count in enumerate(filter(None, counts)):
        name = f"shard.{number:05d}.mds"
        (folder / name).touch()
        raw = {"basename": name, "bytes": 0, "hashes": {}}
        shards.append({
            "column_encodings": ["ndarray:uint16"], "column_names": ["tokens"], "column_sizes": [None],
            "compression": None, "format": "mds", "hashes": [], "raw_data": raw, "samples": count,
            "size_limit": 2**26, "version": 2, "zip_data": None,
        })  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))


def _write_hollow_domain(prefix: Path, size: int) -> None:
    """A .bin of zeros that takes no disk, and its .idx of documents."""
    from rewarm.data.indexed import IndexedWriter

    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    writer.add(np.zeros(_DOCUMENT, dtype=np.uint16), [_DOCUMENT])
    writer.close()
    _stretch(prefix, max(1, size // _DOCUMENT))


def _stretch(prefix: Path, count: int) -> None:
    """Rewrite the index for ``count`` documents: header, number of sequences and documents, lengths, pointers, ends."""
    header = prefix.with_suffix(".idx").read_bytes()[: 9 + 8 + 1]
    lengths = np.full(count, _DOCUMENT, dtype=np.int32)
    pointers = np.arange(count, dtype=np.int64) * _DOCUMENT * 2
    counts = np.array([count, count + 1], dtype=np.uint64)
    ends = np.arange(count + 1, dtype=np.int64)
    parts = [header, *(part.tobytes() for part in (counts, lengths, pointers, ends))]
    prefix.with_suffix(".idx").write_bytes(b"".join(parts))
    with prefix.with_suffix(".bin").open("r+b") as file:
        file.truncate(count * _DOCUMENT * 2)


def main() -> None:
    """One contender, one line of JSON."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "framework"))
    contender, tokens = {"megatron": megatron, "streaming": streaming}[sys.argv[1]], int(float(sys.argv[2]))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"tokens": tokens, **contender(tokens, Path(folder))}))


if __name__ == "__main__":
    main()
