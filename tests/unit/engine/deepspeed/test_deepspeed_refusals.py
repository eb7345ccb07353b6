"""What the deepspeed engine refuses, and with which words."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE
from rewarm.config.deepspeed import DeepSpeedConfig
from rewarm.config.load import build
from rewarm.engine.deepspeed import extensions
from rewarm.engine.deepspeed.swap import SwapFolder, check_room
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
        ({"parallel": {"pipeline": 2}, "deepspeed": {"zero_stage": 3}}, ["parallel.pipeline=2", "engine=megatron"]),
        ({"parallel": {"tensor": 2, "sequence": True}}, ["parallel.sequence=true", "engine=megatron"]),
        ({"engine": "megatron", "parallel": {"context": 2}}, ["parallel.context=2", "engine=megatron"]),
        ({"parallel": {"context": 2, "tensor": 2}}, ["parallel.context=2", "parallel.tensor=2"]),
        ({"parallel": {"context": 3}}, ["sequence_length=256", "parallel.context=3"]),
        ({"parallel": {"context": 2}, "deepspeed": {"attention": "eager"}}, ["attention=eager", "sdpa"]),
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


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention layers"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic rotary positions"),
    ],
)
def test_models_whose_sequences_cannot_be_split(more: dict[str, Any], word: str) -> None:
    model = HuggingFaceModel({**LLAMA.config, **more})
    message = refused(model, 2, parallel={"context": 2})
    assert "parallel.context=2" in message
    assert word in message
    allowed = HuggingFaceModel({**LLAMA.config, "sliding_window": 128, "use_sliding_window": False})
    assert check_layout(build(values(parallel={"context": 2})), allowed, 4).data == 2


def test_sequence_longer_than_the_model_can() -> None:
    message = refused(LLAMA, batch={"sequence_length": 1024})
    assert "batch.sequence_length=1024" in message
    assert "max_position_embeddings=512" in message


def test_trusting_code_that_is_not_there() -> None:
    assert "trust_remote_code" in refused(LLAMA, deepspeed={"trust_remote_code": True})


def test_code_of_the_model_is_not_run_unasked(tmp_path: Path) -> None:
    own = {"model_type": "homegrown", "auto_map": {}, "vocab_size": 8}
    assert "deepspeed.trust_remote_code=true" in refused(HuggingFaceModel(own, str(tmp_path)))
    gone = HuggingFaceModel(own, str(tmp_path / "gone"))
    assert "which is gone" in refused(gone, deepspeed={"trust_remote_code": True})


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


def test_missing_compiler_in_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for settings in ({}, {"offload_ratio": 1.0, "offload_optimizer": "nvme", "nvme_path": str(tmp_path)}):
        model = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_ratio": 0.5, "extensions_folder": str(tmp_path)}
        message = refused(LLAMA, deepspeed=model | settings)
        assert "no c++ here" in message
        assert "install g++" in message


def test_folder_for_nvme_that_cannot_be_written(tmp_path: Path) -> None:
    settings = {"zero_stage": 3, "offload_optimizer": "nvme"}
    message = refused(LLAMA, deepspeed=settings | {"nvme_path": str(tmp_path / "missing")})
    assert f"nvme_path={tmp_path / 'missing'} cannot be written: No such file or directory" in message
    assert "cannot be written" in refused(LLAMA, deepspeed=settings | {"nvme_path": "/proc"})


@pytest.mark.parametrize(("bits", "least"), [(32, 20e9), (16, 18e9)])
def test_folder_for_nvme_without_room(bits: int, least: float, tmp_path: Path) -> None:
    """Master, moments and gradient in fp32, and the parameter itself; what is below a MiB stays in memory."""
    settings = DeepSpeedConfig.model_validate(
        {"zero_stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme", "nvme_path": str(tmp_path)}
    )
    check_room(settings, [1000] * 10**6, ranks=10**6, parameter_bytes=bits // 8)
    disk = os.statvfs(tmp_path)
    enough = int(disk.f_bavail * disk.f_frsize / least * 0.98)
    check_room(settings, [10**6] * 1000, ranks=enough, parameter_bytes=bits // 8)
    with pytest.raises(UserError, match=r"GB free, and what \d+ ranks .* at least \d+\.00 GB") as caught:
        check_room(settings, [10**6] * 1000, ranks=enough + 10, parameter_bytes=bits // 8)
    assert f"nvme_path={tmp_path}" in str(caught.value)


def test_file_that_contradicts_is_refused_before_the_ranks_start(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_accumulation_steps": 3}')
    message = refused(LLAMA, 2, deepspeed={"json_file": str(path)})
    assert "gradient_accumulation_steps=3, but the run's settings give 4" in message


def test_swap_folders_of_two_processes(tmp_path: Path) -> None:
    left = tmp_path / "rewarm-left"
    left.mkdir()
    (left / "lock").touch()
    values: dict[str, Any] = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    }
    first, second = SwapFolder(str(tmp_path)), SwapFolder(str(tmp_path))
    assert not left.exists()
    assert first.path.is_dir()
    assert first.path != second.path
    assert first.use(values)["zero_optimization"]["offload_optimizer"]["nvme_path"] == str(first.path)
    assert values["zero_optimization"]["offload_optimizer"]["nvme_path"] == str(tmp_path)
    first.close()
    second.close()
    assert not list(tmp_path.glob("rewarm-*"))


def slow_compiler(folder: Path) -> Path:
    """A compiler that writes down its process and then takes for ever."""
    compiler = folder / "slow-compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo $$ >> {folder}/compiling; exec sleep 1000;; esac\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IEXEC)
    return compiler


def test_build_ends_with_whoever_asked_for_it(tmp_path: Path) -> None:
    """Left alone its compilers would go on beside the next build's, in the same folder."""
    code = (
        "import sys; from rewarm.config.deepspeed import DeepSpeedConfig as C;"
        "from rewarm.engine.deepspeed.extensions import prepare_extensions as prepare;"
        "prepare(C(zero_stage=3, offload_optimizer='cpu', offload_ratio=0.5, extensions_folder=sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["CXX"] = str(slow_compiler(tmp_path))
    asking = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment, stderr=subprocess.PIPE)
    wait_for((tmp_path / "compiling").exists)
    assert asking.stderr is not None
    asking.kill()
    assert b"compiling DeepSpeed's cpu_adam extension" in asking.stderr.read()
    asking.wait()
    for number in (tmp_path / "compiling").read_text().split():
        wait_for(lambda compiler=Path("/proc", number): not compiler.exists())  # type: ignore[misc]


def wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_slow_compiler_is_stopped_and_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(slow_compiler(tmp_path)))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "unused")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    settings = twin_flow(tmp_path / "built", build_timeout=0.05)
    with pytest.raises(UserError, match="build_timeout=0.05"):
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
