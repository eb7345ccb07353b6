"""The DeepSpeed configuration that a run stands for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE
from rewarm.config.load import build
from rewarm.config.run import RunConfig
from rewarm.engine.deepspeed.json import deepspeed_json
from rewarm.engine.deepspeed.json_file import ADDABLE, merge
from rewarm.errors import UserError


def config(**settings: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": "x",
        "engine": "deepspeed",
        "parent": "model",
        "data": {"a": "a"},
        "batch": {"global_batch_size": 32, "micro_batch_size": 4},
    }
    return build(values | settings)


def test_batch_clipping_and_precision_are_written_out() -> None:
    values = deepspeed_json(config(optimizer={"gradient_clipping": 0.0}, precision="bfloat16"), 2)
    assert values["gradient_clipping"] == 0.0
    assert values["gradient_accumulation_steps"] == 4
    assert values["train_batch_size"] == 32
    assert values["bf16"]["enabled"] is True
    assert values["fp16"]["enabled"] is False
    assert values["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_deepspeed_reads_back_what_was_meant(stage: int, offload: str) -> None:
    if stage == 0 and offload == "cpu":
        pytest.skip("refused")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    values = deepspeed_json(config(deepspeed={"zero_stage": stage, "offload_optimizer": offload}), 1)
    read = DeepSpeedZeroConfig(**values["zero_optimization"])
    assert read.stage == stage
    assert (read.offload_optimizer is not None) == (offload == "cpu")
    known = {name for field, info in DeepSpeedZeroConfig.model_fields.items() for name in (field, info.alias)}
    assert set(values["zero_optimization"]) <= known


def test_every_top_level_key_is_one_that_deepspeed_reads() -> None:
    import deepspeed.runtime.config as source

    runtime = Path(source.__file__).parent
    files = [
        "config.py",
        "constants.py",
        "precision_config.py",
        "tensor_parallel/config.py",
        "swap_tensor/constants.py",
    ]
    files += [f"../{name}" for name in ("monitor/config.py", "profiling/constants.py", "utils/config.py")]
    files += ["../comm/constants.py"]
    text = "".join(runtime.joinpath(name).read_text() for name in files)
    for key in [*deepspeed_json(config(parallel={"tensor": 2}), 1), *ADDABLE]:
        assert f'"{key}"' in text or f"'{key}'" in text or f"{key}: " in text, key


HARMLESS = {
    "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory",  # deprecated, refused in a user's file
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
    "save_muon_momentum_buffer_in_memory", "pipeline_loading_checkpoint",  # of checkpoints that are not written here
    "stage3_model_persistence_threshold", "stage3_module_granularity_threshold", "stage3_allgather_sequential",
    "leaf_module", "override_module_apply",  # when and where something is fetched, not what is computed
    "log_trace_cache_warnings", "enable_sanity_checks",
}  # fmt: skip


def test_no_default_of_zero_that_could_change_training_is_left_out() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given: set[str] = set()
    for stage in (1, 3):
        settings = {"zero_stage": stage, "offload_optimizer": "cpu"}
        settings |= {"offload_parameters": "cpu"} if stage == 3 else {}
        given |= set(deepspeed_json(config(deepspeed=settings), 1)["zero_optimization"])
    known = {info.alias or name for name, info in DeepSpeedZeroConfig.model_fields.items()}
    assert known - given == HARMLESS


def test_generating_needs_no_torch_and_no_deepspeed() -> None:
    code = (
        "import sys; from rewarm.config.load import build; from rewarm.engine.deepspeed.json import deepspeed_json;"
        "deepspeed_json(build({'name': 'x', 'engine': 'deepspeed', 'parent': 'p', 'data': {'a': 'a'}}), 1);"
        "print('torch' in sys.modules, 'deepspeed' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE, env=environment
    )
    assert done.stdout.split() == ["False", "False"]


def test_users_file_adds_keys_and_repeats_values(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"gradient_clipping": "auto", "comms_logger": {"enabled": True}, "bf16": {"enabled": False}})
    )
    values = deepspeed_json(config(deepspeed={"json_file": str(path)}), 1)
    assert values["comms_logger"] == {"enabled": True}
    assert values["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"gradient_clipping": 0.3}, ["gradient_clipping=0.3", "1.0"]),
        ({"gradient_cliping": 0.3}, ["gradient_cliping", "did you mean gradient_clipping"]),
        ({"compression_training": {}}, ["compression_training", "no effect"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel", "parallel.tensor"]),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ["deepspeed.offload_parameters decides"]),
        ({"zero_optimization": {"sub_group_size": 1000}}, ["deepspeed.sub_group_size decides"]),
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage=3", "1"]),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, ["zenflow"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "optimizer section"]),
        ({"flops_profiler": "auto"}, ["flops_profiler", "auto"]),
    ],
)
def test_users_file_may_not_contradict(tmp_path: Path, user: dict[str, Any], words: list[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(user))
    with pytest.raises(UserError) as error:
        deepspeed_json(config(deepspeed={"json_file": str(path)}), 1)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_merge_leaves_its_arguments_alone() -> None:
    values: dict[str, Any] = {"a": {"b": 1}}
    assert merge(values, {"a": {"c": 2}}, "f") == {"a": {"b": 1, "c": 2}}
    assert values == {"a": {"b": 1}}
