"""Every hook, and every mixer through its controller, goes on after a resume as if nothing had happened."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from rewarm.config.load import build
from rewarm.config.mixture import MixtureConfig
from rewarm.config.registry import HOOKS, MIXERS
from rewarm.config.section import Section
from rewarm.data.indexed import IndexedWriter, token_dtype
from rewarm.engine.base import Batch, GradientStatistics, StepResult
from rewarm.errors import UserError
from rewarm.mixing.controller import MixtureController
from rewarm.mixing.mixers.build import build_mixer
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weight_log import WeightLog
from rewarm.mixing.weights import quantise
from rewarm.train.hooks.base import Hook
from rewarm.train.hooks.build import build_hooks
from rewarm.train.loop import train
from rewarm.train.run import Run, StepRecord
from rewarm.train.session import begin, prepare
from rewarm.train.stage import resolve_stage
from unit.config.test_registry import NEEDED

STEPS = 8
MODEL = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1,
         "vocab_size": 100}  # fmt: skip
SWITCHED_ON: dict[str, dict[str, Any]] = {}
"""Settings of the hooks that need some; the others are switched on with an empty section."""


SHOWN = {"note", "velocities"}
"""Attributes of mixers that only tell of the last update: no later one reads them, and each sets them anew."""


class TinyEngine:
    """One rank with four weights, which follow the tokens; its losses and gradients follow the weights."""

    rank, world_size, data_parallel_rank, data_parallel_size, is_main = 0, 1, 0, 1, True

    def __init__(self, num_domains: int) -> None:
        self.num_domains, self.weights = num_domains, np.zeros(4)

    def train_step(self, batch: Batch, learning_rate: float) -> StepResult:
        self.weights += learning_rate * (batch.tokens[:, :4].mean(axis=0) - self.weights)
        counts = np.bincount(batch.domains, minlength=self.num_domains) * (batch.tokens.shape[1] - 1)
        losses = np.bincount(batch.domains, self.evaluate(batch.tokens, 1), minlength=self.num_domains)
        return StepResult(losses, counts, float(np.linalg.norm(self.weights)))

    def evaluate(self, tokens: np.ndarray, micro_batch_size: int) -> np.ndarray:
        found: np.ndarray = np.abs(tokens[:, 1:] / 100 - self.weights.mean()).sum(axis=1)
        return found

    def domain_gradients(self, tokens: list[np.ndarray], chunk_size: int) -> GradientStatistics:
        gradients = np.stack([self.weights - windows[:, :4].mean(axis=0) for windows in tokens])
        products = gradients @ gradients.T
        return GradientStatistics(products, products.diagonal().copy(), np.ones(len(tokens)))

    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        np.save(folder / "weights.npy", self.weights)

    def load(self, folder: Path, *, optimizer: bool = True) -> None:
        self.weights = np.load(folder / "weights.npy")

    def rng_state(self) -> dict[str, Any]:
        return {"cpu": torch.zeros(4, dtype=torch.uint8)}

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def any_rank(self, flag: bool) -> bool:
        return flag

    def parameter_count(self) -> int:
        return 4

    def dry_run(self, batch: Batch) -> None: ...
    def set_rng_state(self, state: Any) -> None: ...
    def barrier(self) -> None: ...


class NoSettings(Section):
    """Nothing to set."""


class Keeps(Hook):
    """A running mean of the weights, in a file, and a count of the steps."""

    name = "keeps"

    def __init__(self) -> None:
        self._steps, self._mean = 0, np.zeros(4)

    def after_step(self, run: Run, record: StepRecord) -> None:
        self._steps += 1
        self._mean += (cast(Any, run.engine).weights - self._mean) / self._steps

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]

    def save_sharded(self, run: Run, folder: Path) -> None:
        np.save(folder / f"rank-{run.engine.rank}.npy", self._mean)

    def load_sharded(self, run: Run, folder: Path) -> None:
        self._mean = np.load(folder / f"rank-{run.engine.rank}.npy")


class Forgets(Keeps):
    """Has state, and nothing that keeps it."""

    name = "forgets"
    state_dict, save_sharded = Hook.state_dict, Hook.save_sharded


class HalfForgets(Keeps):
    """Saves all of its state and restores a part."""

    name = "half_forgets"

    def load_sharded(self, run: Run, folder: Path) -> None: ...


class Probe(Hook):
    """Takes a picture of all hooks after each step, and where an invocation starts."""

    name = "probe"

    def __init__(self) -> None:
        self.pictures: dict[int, dict[str, Any]] = {}

    def start(self, run: Run) -> None:
        self.pictures[run.step] = {
            f"{hook.name}.{name}": picture(value)
            for hook in run.hooks
            for name, value in vars(hook).items()
            if hook is not self and name not in hook.transient
        }

    def after_step(self, run: Run, record: StepRecord) -> None:
        self.start(run)


def picture(value: Any, above: tuple[int, ...] = ()) -> Any:
    """A value as plain data to the last bit, through attributes of attributes."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, Path):
        return value.name
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), np.shape(value), np.asarray(value).tobytes()
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    if id(value) in above:
        return "..."
    above = (*above, id(value))
    if isinstance(value, Mapping):
        return {str(key): picture(inner, above) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [picture(inner, above) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(str(picture(inner, above)) for inner in value)
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    inside = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    return type(value).__name__, {name: picture(inner, above) for name, inner in inside.items() if name not in SHOWN}


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of what is not the same in two pictures."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with two domains to work in, and a registry to add hooks to."""
    for seed, name in enumerate("ab"):
        writer = IndexedWriter(tmp_path / name, token_dtype(100))
        for document in np.random.default_rng(seed).integers(0, 40 + 60 * seed, (100, 40)):
            writer.add(document.astype(token_dtype(100)), [40])
        writer.close()
    monkeypatch.chdir(tmp_path)
    HOOKS.load()
    before = dict(HOOKS._methods)
    yield tmp_path
    HOOKS._methods.clear()
    HOOKS._methods.update(before)


def invoke(folder: str, stop_at: int | None = None, **more: Any) -> tuple[Run, Probe]:
    """One invocation of a stage with every hook that is registered, under a mixer that compares gradients."""
    values: dict[str, Any] = {
        "name": "x", "runs_folder": folder, "model": MODEL, "data": {"a": "a", "b": "b"},
        "duration": f"{STEPS} steps", "batch": {"sequence_length": 16, "global_batch_size": 8, "micro_batch_size": 8},
        "stop_at": None if stop_at is None else f"{stop_at} steps", "mixture": {"mixer": "doge"},
        "evaluation": {"interval": "2 steps", "windows_per_domain": 4},
        "checkpoint": {"interval": "1 steps", "keep": 3},
        "tracking": {"interval": 3, "wandb": {"mode": "disabled"}},
        "hooks": {m.name: SWITCHED_ON.get(m.name, {}) for m in HOOKS.methods() if m.settings is not None},
    }  # fmt: skip
    config = build(values | more)
    stage = resolve_stage(config, 1)
    config.folder.mkdir(parents=True, exist_ok=True)
    run = begin(prepare(config, stage, cast(Any, TinyEngine(2))))
    probe = Probe()
    run.hooks.append(probe)
    try:
        train(run)
    finally:
        run.feed.close()
        run.tracker.close()
    return run, probe


def files(folder: str) -> dict[str, bytes]:
    """What a run writes that a resume has to reproduce, byte for byte."""
    run = Path(folder) / "x"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {"metrics": repr([{**line, "tokens_per_second": 0} for line in lines]).encode()}
    saved = run / "checkpoints" / f"step-{STEPS}"
    paths = [run / "evaluation.jsonl", run / "mixture.jsonl", saved / "state.json"]
    paths += [path for part in ("model", "hooks") for path in (saved / part).rglob("*") if path.is_file()]
    return found | {str(path.relative_to(run)): path.read_bytes() for path in paths}


def forgotten(*steps: int) -> list[str]:
    """What differs between a run that is stopped and resumed after some steps and one that is not."""
    _, whole = invoke("whole")
    wrong = set()
    for last in [*steps, None]:
        run, seen = invoke("parts", last)
        assert {hook.name for hook in run.hooks} == {*HOOKS, "probe"}
        wrong |= {name for at in seen.pictures for name in differing(whole.pictures[at], seen.pictures[at])}
    return sorted(wrong) + differing(files("whole"), files("parts"))


def test_every_hook_goes_on_as_if_there_had_been_no_stop(place: Path) -> None:
    """Stopped where an evaluation was made and a line of metrics is open, and once more between two evaluations."""
    HOOKS.register("keeps", settings=NoSettings)(Keeps)
    assert forgotten(4, 5) == []
    assert Path("parts/x/checkpoints/step-8/hooks/keeps/rank-0.npy").is_file()
    assert len(Path("parts/x/mixture.jsonl").read_text().splitlines()) > 2, "the mixer was not updated"


def test_hooks_that_forget_are_found(place: Path) -> None:
    for hook in (Forgets, HalfForgets):
        HOOKS.register(hook.name, settings=NoSettings)(hook)
    lost = ["forgets._mean", "forgets._steps", "half_forgets._mean"]
    assert forgotten(5) == [*lost, f"checkpoints/step-{STEPS}/hooks/half_forgets/rank-0.npy"]


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_goes_on_as_if_there_had_been_no_stop(name: str, tmp_path: Path) -> None:
    config = MixtureConfig.model_validate({"mixer": name, **({name: NEEDED[name]} if name in NEEDED else {})})
    names = ["a", "b"]

    def controller() -> MixtureController:
        mixer = build_mixer(config, names, np.array([0.5, 0.5]), lambda text: 2)
        return MixtureController(config, mixer, replayed={}, replay_fraction=0.0, total_samples=10**6, held_out={})

    def update(each: MixtureController, step: int, log: str) -> str:
        random = np.random.default_rng(step)
        each.observe(random.uniform(1, 2, 2) * 500, np.full(2, 500))
        if not each.is_active:
            return ""
        gradients = random.normal(size=(2, 4))
        products = gradients @ gradients.T
        statistics = products, products.diagonal().copy(), random.uniform(1, 2, 2)
        sampler = Sampler([SampledDomain(name, 10**6, name) for name in names], 1, quantise(np.ones(2)))
        losses = dict(zip(names, random.uniform(1, 2, 2).tolist(), strict=True))
        lines = WeightLog(tmp_path / f"{log}-{step}.jsonl")
        needed = statistics if each.mixer.needs_gradients else None
        return repr(each.commit(each.propose(step, losses, 64 * step, sampler, lines, needed), lines))

    unbroken = controller()
    for step in range(1, 4):
        update(unbroken, step, "unbroken")
    unbroken.observe(np.array([7.0, 5.0]), np.array([3, 2]))  # a checkpoint may stand between two evaluations
    resumed = controller()
    resumed.load_state_dict(json.loads(json.dumps(unbroken.state_dict())))
    assert picture(resumed) == picture(unbroken)
    for step in range(4, 7):
        assert update(resumed, step, "resumed") == update(unbroken, step, "unbroken")
    assert picture(resumed) == picture(unbroken)


def test_the_order_is_fixed_and_a_hook_states_where_it_stands(place: Path) -> None:
    HOOKS.register("keeps", settings=NoSettings)(Keeps)
    values: dict[str, Any] = {"name": "x", "model": {}, "data": {"a": "a"}}
    names = [hook.name for hook in build_hooks(build(values))]
    assert names == ["signals", "tracking", "evaluation", "mixture", "checkpoint"]
    config = build({**values, "hooks": {"keeps": {}}})
    names = [hook.name for hook in build_hooks(config)]
    assert names == ["signals", "tracking", "evaluation", "mixture", "keeps", "checkpoint"]
    with pytest.raises(UserError, match=r"unknown setting hooks.kept; did you mean hooks.keeps"):
        build({**values, "hooks": {"kept": {}}})
    HOOKS.register("keeps", settings=NoSettings)(type("Late", (Keeps,), {"order": 901, "__module__": __name__}))
    with pytest.raises(UserError, match=r"hooks.keeps has order=901, and a hook stands after signals \(0\) and before"):
        build_hooks(config)


def test_a_hook_without_settings_cannot_be_switched_on(place: Path) -> None:
    with pytest.raises(ValueError, match="hook 'keeps' has no settings, by which hooks.keeps could switch it on"):
        HOOKS.register("keeps")(Keeps)


def test_a_hook_that_is_switched_off_at_a_resume_is_missed(place: Path) -> None:
    HOOKS.register("keeps", settings=NoSettings)(Keeps)
    invoke("runs", 3)
    with pytest.raises(UserError, match="hooks.keeps"):
        invoke("runs", hooks={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewarm.train.session.check_same_stage", lambda config, folder: [])
        with pytest.raises(UserError, match="holds the state of the hook 'keeps', which this run does not have"):
            invoke("runs", hooks={})


def test_after_an_error_every_hook_is_told_and_closed(place: Path) -> None:
    told: list[str] = []

    class Fails(Keeps):
        def after_step(self, run: Run, record: StepRecord) -> None:
            raise RuntimeError("planted")

        def on_error(self, run: Run, error: BaseException) -> None:
            told.append(f"error {error}")
            raise ValueError("another one, which must not hide the first")

        def close(self, run: Run) -> None:
            told.append("close")

    before = signal.getsignal(signal.SIGTERM)
    HOOKS.register("keeps", settings=NoSettings)(Fails)
    with pytest.raises(RuntimeError, match="planted"):
        invoke("runs")
    assert told == ["error planted", "close"]
    assert signal.getsignal(signal.SIGTERM) is before, "the other hooks are closed, too"


EXTENSION = """
from rewarm.config.registry import HOOKS
from rewarm.config.section import Section
from rewarm.train.hooks.base import Hook


class CountsConfig(Section):
    '''Counts every so many steps.'''

    every: int = 1
    '''Steps between two counts.'''


@HOOKS.register("counts", settings=CountsConfig)
class Counts(Hook):
    name = "counts"

    def __init__(self, *, every):
        self.every, self.count = every, 0

    def after_step(self, run, record):
        self.count += run.step % self.every == 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]
"""


def test_an_extension_brings_a_hook_that_its_section_switches_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "my_hooks.py").write_text(EXTENSION)
    monkeypatch.setattr(sys, "path", list(sys.path))
    more: dict[str, Any] = {"extensions": ["my_hooks"], "hooks": {"counts": {"every": 2}}}
    invoke("runs", 5, **more)
    run, _ = invoke("runs", **more)
    assert [vars(hook) for hook in run.hooks if hook.name == "counts"] == [{"every": 2, "count": 4}]
    sys.modules.pop("my_hooks")
