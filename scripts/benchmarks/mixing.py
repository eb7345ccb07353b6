"""Speed of the sampler: picks per second, and the cost of opening a large corpus.

    python scripts/benchmarks/mixing.py [--megatron] [--json FILE]

``--megatron`` also lets Megatron-Core's ``BlendedMegatronDatasetBuilder`` index a corpus of 200 such domains, with as
many tokens as ``--megatron-tokens`` says: its indexes grow with the tokens, so 10^12 of them need time and disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "framework"))

from rewarm.mixing.native import sampler_library
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weights import quantise

SEQUENCE_LENGTH = 4096


def corpus(num_domains: int, total_tokens: int, seed: int = 0) -> list[int]:
    """Tokens of each domain, log-normally uneven."""
    sizes = np.random.default_rng(seed).lognormal(0, 1.5, num_domains)
    return [max(10 * SEQUENCE_LENGTH, int(size)) for size in sizes / sizes.sum() * total_tokens]


def open_sampler(tokens: list[int], *, native: bool) -> Sampler:
    """A sampler over the corpus, weights by the square root of the size."""
    domains = [SampledDomain(f"d{i}", n // SEQUENCE_LENGTH, f"content {i}") for i, n in enumerate(tokens)]
    return Sampler(domains, 1, quantise(np.sqrt(tokens)), native=native)


def picks_per_second(num_domains: int, *, native: bool, repeats: int = 5) -> float:
    """Best of several draws of whole (domain, window) samples, permutation included."""
    sampler = open_sampler(corpus(num_domains, 10**12), native=native)
    count = 1_000_000 if native else 20_000
    return max(count / seconds(lambda: sampler.draw(count)) for _ in range(repeats))


def batch_microseconds(batch_size: int = 32, repeats: int = 2000) -> float:
    """CPU time of drawing one global batch from 50 domains by numpy alone, microseconds."""
    sampler = open_sampler(corpus(50, 10**12), native=False)
    return 1e6 / repeats * seconds(lambda: [sampler.draw(batch_size) for _ in range(repeats)])


def seconds(action: Callable[[], object]) -> float:
    """CPU seconds of this process, which other load on the machine does not add to."""
    started = time.process_time()
    action()
    return time.process_time() - started


def resident_mib() -> float:
    """Peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def opening(total_tokens: int) -> dict[str, float]:
    """Cost of opening 200 domains and drawing the first batch of 1024."""
    tokens = corpus(200, total_tokens)
    before = resident_mib()
    cost = seconds(lambda: open_sampler(tokens, native=True).draw(1024))
    return {"tokens": total_tokens, "seconds": cost, "mib": resident_mib() - before}


def megatron_opening(total_tokens: int, folder: Path) -> dict[str, float]:
    """The same with Megatron-Core: token files that are holes on the disk, indexes as it builds them."""
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokens = corpus(200, total_tokens)
    for index, size in enumerate(tokens):
        _write_hollow_domain(folder / f"d{index}", size)

    class _Tokenizer:
        unique_identifiers: dict[str, str] = {"class": "none"}  # noqa: RUF012
        vocab_size = 65536
        eod = 0
        pad = 0

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=SEQUENCE_LENGTH, split="100,0,0", path_to_cache=str(folder / "cache"),
        blend=([str(folder / f"d{i}") for i in range(200)], np.sqrt(tokens).tolist()), tokenizer=_Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, mid_level_dataset_surplus=0.5,
    )  # fmt: skip
    before = resident_mib()
    # As many samples as the rarest domain, in proportion to its weight, has in one epoch.
    weights = np.sqrt(tokens) / np.sqrt(tokens).sum()
    samples = int(min(np.array(tokens) // SEQUENCE_LENGTH / weights) * 0.5)

    def build() -> None:
        train = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]
        assert train is not None and torch.is_tensor(train[0]["tokens"])

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    started = time.perf_counter()
    cost = seconds(build)
    wall = time.perf_counter() - started
    torch.distributed.destroy_process_group()
    disk = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()) / 2**20
    return {"tokens": total_tokens, "samples": samples, "seconds": cost, "wall_seconds": wall,
            "mib": resident_mib() - before, "index_mib_on_disk": disk}  # fmt: skip


def _write_hollow_domain(prefix: Path, size: int, document: int = 2000) -> None:
    """A .bin of zeros that takes no disk, and its .idx of documents."""
    from rewarm.data.indexed import IndexedWriter

    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    writer.add(np.zeros(document, dtype=np.uint16), [document])
    writer.close()
    _stretch(prefix, size // document, document)


def _stretch(prefix: Path, count: int, document: int) -> None:
    """Rewrite the index for ``count`` documents: header, number of sequences and documents, lengths, pointers, ends."""
    header = prefix.with_suffix(".idx").read_bytes()[: 9 + 8 + 1]
    lengths = np.full(count, document, dtype=np.int32)
    pointers = np.arange(count, dtype=np.int64) * document * 2
    counts = np.array([count, count + 1], dtype=np.uint64)
    ends = np.arange(count + 1, dtype=np.int64)
    parts = [header, *(part.tobytes() for part in (counts, lengths, pointers, ends))]
    prefix.with_suffix(".idx").write_bytes(b"".join(parts))
    with prefix.with_suffix(".bin").open("r+b") as file:
        file.truncate(count * document * 2)


def main() -> None:
    """Measure, print, and write the figures if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", action="store_true", help="also index a corpus with Megatron-Core")
    parser.add_argument("--megatron-tokens", type=float, default=1e9, help="tokens of that corpus")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    figures: dict[str, object] = {"machine": platform.processor() or platform.machine(), "numpy": np.__version__}
    figures["opening"] = [opening(10**12)]
    figures["numpy_picks_per_second"] = {k: picks_per_second(k, native=False) for k in (5, 50)}
    figures["numpy_microseconds_per_batch_of_32"] = batch_microseconds()
    if sampler_library() is not None:
        figures["native_picks_per_second"] = {k: picks_per_second(k, native=True) for k in (5, 50, 200)}
    else:
        print("the native library is not built: python setup.py build_ext --inplace", file=sys.stderr)
    if arguments.megatron:
        figures["opening_of_the_same_corpus"] = opening(int(arguments.megatron_tokens))
        with tempfile.TemporaryDirectory() as folder:
            figures["megatron"] = megatron_opening(int(arguments.megatron_tokens), Path(folder))
    print(json.dumps(figures, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
