"""Mutated configurations: each is read or refused with a message, and none is a stack trace.

``REWARM_FUZZ=100000`` tries that many instead, ``REWARM_FUZZ_SEED`` others.
"""

from __future__ import annotations

import copy
import datetime
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewarm.config.load import apply_overrides, build, dump, load
from rewarm.config.run import RunConfig
from rewarm.config.yaml_text import dump_yaml
from rewarm.engine.deepspeed.json import deepspeed_json
from rewarm.errors import UserError
from rewarm.schedule.learning_rate import LearningRate

SEED = int(os.environ.get("REWARM_FUZZ_SEED", "17"))
PHASES = [{"weights": {"a": 1, "b": 2}, "at": "50%"}, {"weights": {"a": 1, "b": 0}, "learning_rate_fraction": 0.2}]
BASES: list[dict[str, Any]] = [
        {"name": "run", "model": {"num_key_value_heads": 2}, "data": {"a": "data/a"}, "duration": "1e6 tokens"},
        {
            "name": "run", "parent": "runs/base", "data": {"a": "a", "b": {"path": "b", "max_epochs": 2}},
            "mixture": {"mixer": "phased", "weights": {"a": 1, "b": 3}, "phased": {"phases": PHASES}},
            "replay": {"fraction": 0.1, "domains": {"old": 1}, "paths": {"old": "x"}}, "stop_at": "30 steps",
            "schedule": {"kind": "infinite", "plateau": 1e-4, "start": 1e-5, "warmup": "10 steps", "minimum": 1e-6},
        },
        {
            "name": "run", "parent": "models/m", "engine": "deepspeed", "data": {"a": "a", "b": "b"},
            "deepspeed": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_ratio": 0.5},
            "mixture": {"mixer": "velocitune", "velocitune": {"targets": {"a": 2.5, "b": 1.0}}},
            "tracking": {"wandb": {"mode": "offline", "project": "p"}}, "evaluation": {"interval": "5%"},
        },
        {
            "name": "run", "model": {}, "data": {"a": "a", "b": "b"}, "offload": {"mode": "nvme", "nvme_paths": ["/s"]},
            "mixture": {"mixer": "skill_it", "skill_it": {"graph": {"a": {"b": 1.0}}}, "objective": {"a": 1},
                        "conditioning": {"prefixes": {"a": "x: "}, "until": "50%"}},
            "parallel": {"data": 4, "tensor": 2, "sequence": True}, "optimizer": {"name": "adamw_8bit"},
        },
]  # fmt: skip
DEEP: list[Any] = []
for _ in range(100):
    DEEP = [DEEP]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**10_000, 0.5, 1e308, 5e-324, float("inf"), float("nan"), "",
    " ", "~", "~nobody-here/x", "$", "$NOT_SET_HERE/x", "${}", "no", "2024", "1e999 steps", "1e300 tokens", "0 steps",
    "100", "1e400%", "9" * 10_000, "inf", "nan", "a\nb", "a\0b", "\ud800", "é" * 300, "x" * 100_000, [], {}, [[]],
    [None], {"": 1}, {"x": {}}, {1: 2}, {None: 1}, {"a": float("nan"), "b": 1}, {"a": 10**400},
    DEEP, {datetime.date(2024, 1, 1): 0}, b"x", {1, 2}, 1j, (1, 2), datetime.date(2024, 1, 1), object,
]  # fmt: skip


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a nested value with every key in it."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield values, key
        if isinstance(value, dict | list):
            yield from places(value)


def mutated(chance: random.Random) -> dict[str, Any]:
    values = copy.deepcopy(chance.choice([*BASES, *RESOLVED]))
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        container, key = chance.choice(list(places(values)))
        kind = chance.random()
        other, other_key = chance.choice(list(places(values)))
        if kind < 0.7:
            container[key] = copy.deepcopy(chance.choice(ODD))
        elif kind < 0.8:
            container[key] = copy.deepcopy(other[other_key])
        elif kind < 0.9 and isinstance(container, dict):
            container[chance.choice(["odd", 3, None, "a.b", "name", other_key])] = container.pop(key)
        elif isinstance(container, dict) and len(container) > 1:
            del container[key]
    return values


def use(config: RunConfig) -> None:
    """What the commands do with a configuration before they look at any file."""
    assert build(load_text(dump(config))) == config
    LearningRate(config.schedule, config.total_tokens, config.tokens_per_step).describe()
    assert config.folder and config.last_step >= 0 and config.gradient_windows >= 0
    if config.engine == "deepspeed" and config.deepspeed.json_file is None:
        deepspeed_json(config, 1)


def load_text(text: str) -> dict[str, Any]:
    from rewarm.config.yaml_text import parse_yaml

    return dict(parse_yaml(text))


RESOLVED = [load_text(dump(build(values))) for values in BASES]


def survives(action: Any) -> bool:
    """Whether something is done rather than refused. Anything but a UserError of bounded length is a failure."""
    try:
        action()
    except UserError as error:
        text = str(error)
        assert text.strip() and len(text) < 20_000, text[:500]
        text.encode()
        return False
    return True


def number(default: int) -> int:
    return int(os.environ.get("REWARM_FUZZ", default))


def fuzz_values(count: int) -> None:
    chance = random.Random(SEED)
    done = 0
    for _ in range(count):
        values = mutated(chance)
        done += survives(lambda values=values: use(build(values)))
    assert count / 50 < done < count  # neither all refused nor none


def fuzz_text(count: int, path: Path) -> None:
    chance = random.Random(SEED)
    texts = [dump_yaml(values) for values in [*BASES, *RESOLVED]]
    noise = ["\t", "  ", "\n", ":", "- ", "{", "}", "[", "&a ", "*a", "!!int ", "!!python/object:os.system ", "? ", "'"]
    noise += ["<<: ", '"', "\0", "\x85", "\ufeff", "| ", "%", "---\n", "...\n", "9" * 50, "# ", "2024-99-99 ", "1:2:3 "]
    for _ in range(count):
        text = chance.choice(texts)
        lines = text.splitlines(keepends=True)
        for _ in range(chance.choice((1, 1, 2, 4))):
            spot = chance.randrange(len(lines))
            line, column = lines[spot], chance.randrange(len(lines[spot]) + 1)
            lines[spot] = chance.choice(
                [line[:column] + chance.choice(noise) + line[column:], line + line, line[:column], ""]
            )
        raw = bytearray("".join(lines).encode())
        if chance.random() < 0.3 and raw:
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        path.write_bytes(raw)
        survives(lambda: use(load(path)))


def fuzz_overrides(count: int) -> None:
    chance = random.Random(SEED)
    for _ in range(count):
        values = copy.deepcopy(chance.choice([*BASES, *RESOLVED]))
        keys = [str(key) for _, key in places(values)]
        parts = [chance.choice([*keys, "", " ", "a", "\ud800", "0"]) for _ in range(chance.choice((1, 1, 2, 3)))]
        text = (
            ".".join(parts)
            + "="
            + chance.choice(["", "null", "3", "{a: 1, a: 2}", "[", "*a", "no", "\udcff", "\0", "~"])
        )

        def apply(values: dict[str, Any] = values, text: str = text) -> None:
            apply_overrides(values, [text])
            use(build(values))

        survives(apply)


def test_mutated_values_are_read_or_refused() -> None:
    fuzz_values(number(400))


def test_mutated_text_is_read_or_refused(tmp_path: Path) -> None:
    fuzz_text(number(150), tmp_path / "stage.yaml")


def test_mutated_overrides_are_applied_or_refused() -> None:
    fuzz_overrides(number(150))


@pytest.mark.slow
def test_many_mutated_configurations(tmp_path: Path) -> None:
    fuzz_values(number(20_000))
    fuzz_text(number(5_000), tmp_path / "stage.yaml")
    fuzz_overrides(number(5_000))
