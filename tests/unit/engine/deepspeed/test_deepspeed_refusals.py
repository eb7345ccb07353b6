"""What the deepspeed engine refuses, and with which words."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from rewarm.config.deepspeed import DeepSpeedConfig
from rewarm.config.load import build
from rewarm.engine.deepspeed import extensions
from rewarm.engine.layout import check_layout
from rewarm.errors import UserError
from rewarm.model.description import HuggingFaceModel

LLAMA = HuggingFaceModel(
    {"model_type": "llama", "vocab_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
)


def values(**settings: Any) -> dict[str, Any]:
    return {"name": "x", "engine": "deepspeed", "parent": "model", "data": {"a": "a"}} | settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"parallel": {"pipeline": 2}}, ["parallel.pipeline=2", "engine=deepspeed", "engine=megatron"]),
        ({"parallel": {"tensor": 2, "sequence": True}}, ["parallel.sequence=true", "engine=megatron"]),
        ({"precision": "bfloat16", "deepspeed": {"zero_stage": 0}}, ["bfloat16", "zero_stage", "1 or more"]),
        ({"megatron": {"attention": "local"}}, ["megatron.attention=local", "engine=deepspeed"]),
        ({"engine": "megatron", "deepspeed": {"zero_stage": 2}}, ["deepspeed.zero_stage=2", "engine=megatron"]),
        ({"deepspeed": {"zero_stage": 0, "offload_optimizer": "cpu"}}, ["offload_optimizer=cpu", "not 0"]),
        ({"deepspeed": {"zero_stage": 2, "offload_parameters": "cpu"}}, ["offload_parameters=cpu", "zero_stage=3"]),
        ({"deepspeed": {"zero_stage": 2, "offload_optimizer": "nvme"}}, ["offload_optimizer=nvme", "zero_stage=3"]),
        ({"deepspeed": {"zero_stage": 2, "offload_optimizer": "cpu", "offload_ratio": 0.5}}, ["offload_ratio=0.5"]),
        ({"deepspeed": {"zero_stage": 3, "offload_optimizer": "nvme"}}, ["nvme_path"]),
        ({"deepspeed": {"nvme_path": "/fast"}}, ["nvme_path=/fast", "ignored"]),
        ({"deepspeed": {"sub_group_size": 7}}, ["sub_group_size=7", "zero_stage=1"]),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build(values(**settings))
    for word in words:
        assert word in str(error.value)


def refused(model: HuggingFaceModel, world: int = 1, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        check_layout(build(values(**settings)), model, world)
    return str(error.value)


def test_model_without_a_tensor_parallel_plan() -> None:
    message = refused(HuggingFaceModel({"model_type": "gpt2", "vocab_size": 64}), 2, parallel={"tensor": 2})
    assert "parallel.tensor=2" in message
    assert "gpt2" in message


def test_heads_that_do_not_divide() -> None:
    assert "num_attention_heads=4" in refused(LLAMA, 3, parallel={"tensor": 3})


def test_sequence_longer_than_the_model_can() -> None:
    message = refused(LLAMA, batch={"sequence_length": 1024})
    assert "batch.sequence_length=1024" in message
    assert "max_position_embeddings=512" in message


def test_trusting_code_that_is_not_there() -> None:
    assert "trust_remote_code" in refused(LLAMA, deepspeed={"trust_remote_code": True})


def test_code_of_the_model_is_not_run_unasked(tmp_path: Path) -> None:
    from rewarm.engine.deepspeed.model import load_config

    model = HuggingFaceModel({"model_type": "homegrown", "auto_map": {}, "vocab_size": 8}, str(tmp_path))
    with pytest.raises(UserError, match="trust_remote_code=true"):
        load_config(model, DeepSpeedConfig())


def test_unknown_model_type() -> None:
    from rewarm.engine.deepspeed.model import load_config

    with pytest.raises(UserError, match="homegrown"):
        load_config(HuggingFaceModel({"model_type": "homegrown"}), DeepSpeedConfig())


def twin_flow(folder: Path, **settings: Any) -> DeepSpeedConfig:
    base = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_ratio": 0.5, "extensions_folder": str(folder)}
    return DeepSpeedConfig.model_validate(base | settings)


def test_missing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError) as error:
        extensions.check_compiler(twin_flow(tmp_path))
    assert "no-such-compiler" in str(error.value)
    assert "g++" in str(error.value)
    extensions.check_compiler(DeepSpeedConfig(zero_stage=3, offload_optimizer="cpu"))  # needs none


def test_slow_compiler_is_stopped_and_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "slow-compiler"
    compiler.write_text("#!/bin/sh\nsleep 1000\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "unused")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    settings = twin_flow(tmp_path / "built", build_timeout=0.2)
    with pytest.raises(UserError, match="build_timeout=0.2"):
        extensions.prepare_extensions(settings)
    assert not list(tmp_path.glob("built/*/*/lock"))


def test_stale_lock_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "unused")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    settings = twin_flow(tmp_path)
    place = extensions.extensions_folder(settings) / "cpu_adam"
    place.mkdir(parents=True)
    (place / "cpu_adam.so").touch()
    (place / "lock").touch()
    long_ago = time.time() - 3600
    os.utime(place / "lock", (long_ago, long_ago))
    extensions.prepare_extensions(settings)
    assert not (place / "lock").exists()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(place.parent)
