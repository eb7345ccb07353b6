"""Speed of the mixing engine: picks, opening a large corpus, feeding a batch, updating a mixer.

    python scripts/benchmarks/mixing.py [--json FILE]
    python scripts/benchmarks/mixing.py --against megatron:1e11 streaming:1e11 [--python PYTHON]

Times are CPU seconds of this process, its reading threads included, so that a busy machine adds nothing to them. A
step is one of the quickstart's model on one thread. ``--against`` also opens the same corpus of 200 domains with
others, each in a process of its own, see ``mixing_openings.py``; their cost grows with the tokens, so 10^12 of them may
need more time and memory than there are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "framework"))
sys.path.insert(0, str(Path(__file__).parent))

from mixing_openings import NUM_DOMAINS, SEQUENCE_LENGTH, corpus, resident_mib, seconds

from rewarm.mixing.native import sampler_library
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weights import align, quantise

if TYPE_CHECKING:
    from rewarm.train.feed import Feed
    from rewarm.train.run import Run

LENGTH, BATCH, VOCAB = 128, 16, 2048
STAGE: dict[str, Any] = {
    "name": "mixing",
    "model": {
        "num_layers": 4, "hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_embeddings": True, "vocab_size": VOCAB,
    },
    "duration": "1000 steps",
    "batch": {"sequence_length": LENGTH, "global_batch_size": BATCH, "micro_batch_size": BATCH},
    "schedule": {"peak": 1e-4},
    "evaluation": {"interval": "100 steps"},
    "checkpoint": {"interval": None},
    "tracking": {"wandb": {"mode": "disabled"}},
}  # fmt: skip
"""The quickstart's model and batch."""
DOMAINS = [f"d{number}" for number in range(4)]
MIXERS: dict[str, dict[str, Any]] = {
    "velocitune": {"targets": dict.fromkeys(DOMAINS, 1.0)},
    "dynamic_batch_loading": {"targets": dict.fromkeys(DOMAINS, 1.0)},
    "odm": {},
    "ado": {"warmup": "1 steps"},
    "skill_it": {"graph": {name: {name: 1.0} for name in DOMAINS}},
    "aioli": {},
    "pike": {},
    "doge": {},
}


def open_sampler(tokens: list[int], *, native: bool) -> Sampler:
    """A sampler over the corpus, weights by the square root of the size."""
    domains = [SampledDomain(f"d{i}", n // SEQUENCE_LENGTH, f"content {i}") for i, n in enumerate(tokens)]
    return Sampler(domains, 1, quantise(np.sqrt(tokens)), native=native)


def picks_per_second(num_domains: int, *, native: bool, repeats: int = 5) -> float:
    """Best of several draws of whole (domain, window) samples, permutation included."""
    sampler = open_sampler(corpus(num_domains, 10**12), native=native)
    count = 1_000_000 if native else 20_000
    return max(count / seconds(lambda: sampler.draw(count)) for _ in range(repeats))


def opening(total_tokens: int) -> dict[str, float]:
    """Cost of opening 200 domains and drawing the first batch of 1024."""
    tokens = corpus(NUM_DOMAINS, total_tokens)
    before = resident_mib()
    cost = seconds(lambda: open_sampler(tokens, native=True).draw(1024))
    return {"tokens": total_tokens, "seconds": cost, "mib": resident_mib() - before}


def write_domains(folder: Path, names: list[str]) -> dict[str, str]:
    """Pairs of noise: what reading costs does not depend on the tokens."""
    from rewarm.data.indexed import IndexedWriter, token_dtype

    for number, name in enumerate(names):
        writer = IndexedWriter(folder / name, token_dtype(VOCAB))
        generator = np.random.default_rng(number)
        for _ in range(100):
            writer.add(generator.integers(0, VOCAB, 4000).astype(token_dtype(VOCAB)), [4000])
        writer.close()
    return {name: str(folder / name) for name in names}


def open_run(folder: Path, data: dict[str, str], name: str, mixture: dict[str, Any]) -> Run:
    """A run of the quickstart's model, before its first step."""
    from rewarm.config.load import build
    from rewarm.engine.build import build_engine
    from rewarm.train.folder import prepare_folder
    from rewarm.train.session import begin, prepare
    from rewarm.train.stage import resolve_stage

    config = build({**STAGE, "name": name, "data": data, "mixture": mixture, "runs_folder": str(folder / "runs")})
    prepare_folder(config.folder)
    stage = resolve_stage(config, 1)
    return begin(prepare(config, stage, build_engine(config, stage.architecture, stage.names)))


def open_feed(folder: Path, data: dict[str, str]) -> Feed:
    """What feeds a run of the same batch from other domains, without a model."""
    from rewarm.config.load import build
    from rewarm.train.feed import Feed
    from rewarm.train.stage import resolve_stage

    stage = resolve_stage(build({**STAGE, "name": "many", "data": data, "runs_folder": str(folder / "runs")}), 1)
    return Feed(
        stage.sampler(None, []), stage.trained, global_batch_size=BATCH, total_samples=1000 * BATCH,
        rank=0, num_ranks=1, vocab_size=VOCAB,
    )  # fmt: skip


def feeding(run: Run, steps: int = 20) -> dict[str, float]:
    """Milliseconds of a step, its hooks included but for evaluations, and of feeding a batch."""
    from rewarm.train.loop import train_one_step

    for hook in run.hooks:
        hook.start(run)
    step = 1e3 * statistics.median(seconds(lambda: train_one_step(run)) for _ in range(steps))
    return {"step_ms": step, **shares(run.feed, step)}


def shares(feed: Feed, step: float, batches: int = 300) -> dict[str, float]:
    """Milliseconds of feeding a batch, the median and the worst of many, and their shares of a step."""
    feeds = sorted(1e3 * seconds(feed.next) for _ in range(batches))
    median, worst = statistics.median(feeds), feeds[-1]
    return {"feed_ms": median, "worst_feed_ms": worst, "share": median / step, "worst_share": worst / step}


def updating(run: Run, folder: Path, updates: int = 100) -> dict[str, float]:
    """CPU milliseconds of an evaluation of four domains, and of an update of each mixer after so many before it (five,
    where it compares gradients): the gradients, the decision, the line in the weight log with its sync, and the
    scheduling."""
    from rewarm.config.mixture import MixtureConfig
    from rewarm.evaluation.held_out import evaluate_domain
    from rewarm.mixing.controller import MixtureController
    from rewarm.mixing.mixers.build import build_mixer
    from rewarm.mixing.weight_log import WeightLog

    def evaluate() -> None:
        for domain in run.stage.evaluated:
            evaluate_domain(run.engine, domain, settings.windows_per_domain, settings.micro_batch_size, VOCAB)

    settings = run.config.evaluation
    figures = {"evaluation_ms": 1e3 * min(seconds(evaluate) for _ in range(2))}
    for name, section in MIXERS.items():
        config = MixtureConfig.model_validate({"mixer": name, name: section})
        mixer = build_mixer(config, DOMAINS, np.full(4, 0.25), lambda text: int(text.split()[0]))
        controller = MixtureController(
            config, mixer, replayed={}, replay_fraction=0.0, total_samples=10**6, held_out={}
        )  # fmt: skip
        sampler = Sampler([SampledDomain(d, 10**6, d) for d in DOMAINS], 1, quantise(np.ones(4)))
        log = WeightLog(folder / f"{name}.jsonl")

        windows = config.gradient_windows(settings.windows_per_domain)

        def update(
            number: int, controller: Any = controller, sampler: Any = sampler, log: Any = log, windows: int = windows
        ) -> None:
            gradients = compared(run, windows, number) if windows else None
            losses = dict(zip(DOMAINS, 1.5 + (number + 2.0) ** -np.linspace(0.2, 0.5, 4), strict=True))
            controller.observe(np.array([*losses.values()]) * 5e4, np.full(4, 50_000))
            change = controller.propose(number, losses, sampler.sample_index + 48, sampler, log, gradients)
            entry = controller.commit(change, log)
            sampler.schedule_weights(align(entry.weights, DOMAINS), entry.sample)
            sampler.draw(64)

        spent = [seconds(lambda n=n: update(n)) for n in range(5 if mixer.needs_gradients else updates)]
        figures[f"{name}_ms"] = 1e3 * statistics.median(spent[-10:])
    return figures


def compared(run: Run, count: int, turn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a run reads of the gradients of its domains at an update."""
    from rewarm.evaluation.held_out import rotated_windows
    from rewarm.train.hooks.mixture import GRADIENT_CHUNK

    windows = [rotated_windows(domain.held_out, count, turn, b"key") for domain in run.stage.evaluated]
    found = run.engine.domain_gradients(windows, GRADIENT_CHUNK)
    return found.products, found.squared_norms, found.variances


def against(contenders: list[str], python: str) -> list[dict[str, Any]]:
    """Others on the same corpus, and this sampler at the same size."""
    results: list[dict[str, Any]] = []
    for contender in contenders:
        name, _, tokens = contender.partition(":")
        command = [python, str(Path(__file__).parent / "mixing_openings.py"), name, tokens]
        started = time.perf_counter()
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
        if ran.returncode:
            results.append({"contender": name, "tokens": tokens, "failed": ran.stderr.strip().splitlines()[-1:]})
            continue
        found = json.loads(ran.stdout.strip().splitlines()[-1])
        results.append({"contender": name, **found, "wall_seconds": time.perf_counter() - started})
    return results


def measure() -> dict[str, Any]:
    """All of rewarm's own figures."""
    figures: dict[str, Any] = {"machine": platform.machine(), "numpy": np.__version__, "opening": opening(10**12)}
    figures["numpy_picks_per_second"] = {k: picks_per_second(k, native=False) for k in (5, 50)}
    if sampler_library() is not None:
        figures["native_picks_per_second"] = {k: picks_per_second(k, native=True) for k in (5, 50, 200)}
    else:
        print("the native library is not built: python setup.py build_ext --inplace", file=sys.stderr)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        many = [f"m{number}" for number in range(50)]
        data = write_domains(folder, DOMAINS + many)
        run = open_run(folder, {name: data[name] for name in DOMAINS}, "few", {"mixer": "odm"})
        figures["feeding_4_domains"] = feeding(run)
        figures["updating"] = updating(run, folder)
        step = figures["feeding_4_domains"]["step_ms"]
        figures["feeding_50_domains"] = shares(open_feed(folder, {name: data[name] for name in many}), step)
        run.engine.close()
    return figures


def main() -> None:
    """Measure, print, and write the figures if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", nargs="+", metavar="NAME:TOKENS", help="megatron:1e9, streaming:1e9, ...")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has what --against needs")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    if arguments.against:
        figures: dict[str, Any] = {"against": against(arguments.against, arguments.python)}
        figures["rewarm"] = [opening(int(float(one.partition(":")[2]))) for one in arguments.against]
    else:
        figures = measure()
    print(json.dumps(figures, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
