"""Every value that a setting offers selects something of its own, and nothing selects by a value that is not offered.

A value that is added to the schema alone fails here: the tables below say what each of them builds.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest

from rewarm.config import registry
from rewarm.config.load import build
from rewarm.config.registry import Registry
from rewarm.config.run import RunConfig, run_schema
from rewarm.config.section import Section

MADE_UP = "made-up"
REGISTRIES = {found.setting: found for found in vars(registry).values() if type(found) is Registry}
"""Of what a stage chooses one; hooks, of which it switches on any number, have tests of their own."""


def literals(annotation: Any) -> set[str]:
    """The words that an annotation offers, be it by itself or beside other types."""
    if typing.get_origin(annotation) is Literal:
        return {value for value in typing.get_args(annotation) if isinstance(value, str)}
    return set().union(*(literals(part) for part in typing.get_args(annotation)))


def sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections in an annotation."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, Section):
            yield annotation
        return
    for part in typing.get_args(annotation):
        yield from sections(part)


def choices(section: type[Section], place: str = "") -> dict[str, set[str]]:
    """The values of every setting that names one of several, by its place in a stage."""
    found: dict[str, set[str]] = {}
    for name, field in section.model_fields.items():
        if values := literals(field.annotation):
            found[place + name] = values
        for inner in sections(field.annotation):
            found |= choices(inner, f"{place}{name}.")
    return found


def stage(place: str, value: str) -> RunConfig:
    """A stage in which a setting has a value that nothing has checked."""
    engine = "deepspeed" if place.startswith("deepspeed.") else "megatron"
    config = build({"name": "x", "engine": engine, "model": {}, "data": {"a": "a"}, "batch": {"global_batch_size": 8}})
    *outer, name = place.split(".")
    changed: Section = config
    parts = [config, *((changed := getattr(changed, key)) for key in outer)]
    result = parts.pop().model_copy(update={name: value})
    for key in reversed(outer):
        result = parts.pop().model_copy(update={key: result})
    return typing.cast(RunConfig, result)


def engine_of(config: RunConfig) -> str:
    from rewarm.engine.build import build_engine, prepare_engine
    from rewarm.engine.deepspeed.engine import DeepSpeedEngine
    from rewarm.engine.megatron.engine import MegatronEngine
    from rewarm.model.description import HuggingFaceModel

    model: Any = HuggingFaceModel({}) if config.engine == "deepspeed" else architecture(config)
    with pytest.MonkeyPatch.context() as patch:
        for kind in (MegatronEngine, DeepSpeedEngine):
            patch.setattr(kind, "__init__", lambda *arguments: None)
        prepare_engine(config)
        return type(build_engine(config, model, ["a"])).__name__


def architecture(config: RunConfig) -> Any:
    from rewarm.model.architecture import Architecture

    assert config.model is not None
    return Architecture.from_config(config.model, 64)


def precision_of(config: RunConfig) -> tuple[str, int]:
    from rewarm.engine.device import dtype_of
    from rewarm.planner.memory import BYTES

    return str(dtype_of(config.precision)), BYTES[config.precision]


def half_of(config: RunConfig) -> bool:
    from rewarm.engine.deepspeed.json import deepspeed_json

    return bool(deepspeed_json(config, 1)["bf16"]["enabled"])


def placement_of(config: RunConfig) -> str:
    from rewarm.offload.planning.plan import plan
    from rewarm.offload.planning.routes import Job, Machine

    rates = {"h2d": 25e9, "d2h": 25e9, "duplex": 40e9, "dram": 80e9, "cpu_rate": 1e9, "device_rate": 4e10}
    machine = Machine(**rates, device_free=40e9, host_free=4e11, nvme_read=5e9, nvme_write=5e9, nvme_free=1e12)
    return plan(config.offload, machine, Job(1_000_000_000, 0.1, 0.2)).placement.name


def state_on_device(config: RunConfig) -> int:
    from rewarm.planner import memory

    settings = config.offload.model_copy(update={"subgroup_size": 100, "slots": 1, "resident_fraction": 0.5})
    return memory.state_on_device(config.model_copy(update={"offload": settings}), 1000, 2) // 100


def zero_device(key: str) -> Callable[[RunConfig], str | None]:
    def find(config: RunConfig) -> str | None:
        from rewarm.engine.deepspeed.json import deepspeed_json

        found: str | None = deepspeed_json(config, 1)["zero_optimization"].get(key, {}).get("device")
        return found

    return find


def attention_options(config: RunConfig) -> str | None:
    from rewarm.engine.deepspeed import model

    return model.attention_options(config.deepspeed).get("attn_implementation")


def core_attention(config: RunConfig) -> str:
    from rewarm.engine.megatron import attention
    from rewarm.engine.megatron.transformer import decoder_config, layer_spec
    from rewarm.errors import UserError
    from rewarm.model.architecture import Architecture

    assert config.model is not None
    architecture = Architecture.from_config(config.model, 100)
    try:
        spec = layer_spec(config.megatron.attention, architecture, decoder_config(config, architecture))
    except UserError as error:
        return error.message.partition(",")[0]
    core = spec.submodules.self_attention.submodules.core_attention
    return next(name for name, value in vars(attention).items() if value is core)


def first_rate(config: RunConfig) -> float:
    from rewarm.replay.lineage import Lineage, Stage
    from rewarm.schedule.learning_rate import LearningRate
    from rewarm.train.parent_rate import with_parent_rate

    config = with_parent_rate(config, Lineage((Stage("parent", "run", "/parent", 1e-5, 10),)))
    return LearningRate(config.schedule, config.total_tokens, config.tokens_per_step).phases[0].at(0)


def model_copies(config: RunConfig) -> int:
    from rewarm.engine.layout import check_layout

    return check_layout(config, architecture(config), 2).data


def threads_of(config: RunConfig) -> str:
    from rewarm.engine import threads

    class Ranks:
        rank = 0

        def gather(self, value: Any) -> list[Any]:
            return [value]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.set_num_threads", lambda number: None)
        patch.delenv("OMP_NUM_THREADS", raising=False)
        return str(threads.set_threads(config, architecture(config), Ranks(), [3], 0.0)[1])  # type: ignore[arg-type]


def replayed(config: RunConfig) -> tuple[bool, bool]:
    from rewarm.replay.lineage import ConsumedDomain, Lineage, Stage, order_identity
    from rewarm.replay.windows import replay_order

    own = order_identity("content", 10, 0)
    domain = ConsumedDomain("a", "/a", None, "content", 16, 1, "", order=own)
    lineage = Lineage((Stage("parent", "run", "/parent", domains=(domain,)),))
    order = replay_order(lineage, config.replay.windows, domain, 10, 0)
    return order.replayed, order.once


def wandb_mode(config: RunConfig) -> str:
    from rewarm.tracking.wandb import resolve_mode

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        return resolve_mode(config.tracking.wandb)


MOVED = {"none": None, "cpu": "cpu", "nvme": "nvme"}
SELECTED: dict[str, list[tuple[Callable[[RunConfig], Any], dict[str, Any]]]] = {
    "engine": [(engine_of, {"megatron": "MegatronEngine", "deepspeed": "DeepSpeedEngine"})],
    "precision": [
        (precision_of, {"float32": ("torch.float32", 4), "bfloat16": ("torch.bfloat16", 2)}),
        (half_of, {"float32": False, "bfloat16": True}),
    ],
    "optimizer_state": [(lambda config: config.keeps_optimizer_state, {"reset": False, "keep": True})],
    "activation_recomputation": [(lambda config: config.recomputes_activations, {"none": False, "full": True})],
    "offload.mode": [
        (placement_of, {"auto": "resident", "none": "resident", "cpu": "zero_offload", "streamed": "streamed",
                        "twinflow": "twinflow", "deep_optimizer_states": "deep_optimizer_states (k=2)",
                        "nvme": "zero_infinity"}),
        (state_on_device, {"auto": 0, "none": 120, "cpu": 0, "streamed": 12, "twinflow": 60,
                           "deep_optimizer_states": 12, "nvme": 0}),
    ],
    "deepspeed.offload_optimizer": [(zero_device("offload_optimizer"), MOVED)],
    "deepspeed.offload_parameters": [(zero_device("offload_param"), MOVED)],
    "deepspeed.attention": [
        (attention_options, {"auto": None, "sdpa": "sdpa", "eager": "eager", "flash_attention_2": "flash_attention_2"}),
    ],
    "megatron.attention": [
        (core_attention, {"sdpa": "SDPACore", "local": "LocalCore",
                          "transformer_engine": "megatron.attention=transformer_engine"}),
    ],
    "schedule.start": [(first_rate, {"parent": 1e-5})],
    "parallel.data": [(model_copies, {"auto": 2})],
    "distributed.threads": [(threads_of, {"auto": "3 CPU threads a rank (as the checkpoint was made with)"})],
    "replay.windows": [(replayed, {"seen": (True, False), "unseen": (False, True), "all": (False, False)})],
    "tracking.wandb.mode": [
        (wandb_mode, {"auto": "offline", "online": "online", "offline": "offline", "disabled": "disabled"}),
    ],
}  # fmt: skip
"""What each value of a setting selects, in every place where something is selected by it."""

OFFERED = choices(run_schema())


def test_every_setting_that_names_one_of_several_is_in_the_table_or_in_a_registry() -> None:
    assert set(OFFERED) - set(REGISTRIES) == set(SELECTED) - set(REGISTRIES)
    assert set(REGISTRIES) <= set(OFFERED)


@pytest.mark.parametrize("place", SELECTED)
def test_each_value_selects_what_the_table_says_and_no_other_value_selects_anything(place: str) -> None:
    for select, expected in SELECTED[place]:
        assert {value: select(stage(place, value)) for value in OFFERED[place]} == expected
        with pytest.raises((ValueError, AssertionError, KeyError), match=MADE_UP):
            select(stage(place, MADE_UP))


@pytest.mark.parametrize("place", REGISTRIES)
def test_a_registry_offers_its_methods_and_refuses_any_other(place: str) -> None:
    assert set(REGISTRIES[place]) == OFFERED[place]
    with pytest.raises(ValueError, match=MADE_UP):
        REGISTRIES[place][MADE_UP]


def test_a_value_that_is_only_in_the_schema_fails() -> None:
    class Planted(Section):
        mode: Literal["none", "cpu", "planted"] | None = None

    class Stage(Section):
        offload: dict[str, Planted]

    assert choices(Stage) == {"offload.mode": {"none", "cpu", "planted"}}
    select, _ = SELECTED["offload.mode"][0]
    with pytest.raises(KeyError, match="planted"):
        select(stage("offload.mode", "planted"))
