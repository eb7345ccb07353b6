"""Slices of sharded files, and files written in place, checked with the safetensors library and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewarm.errors import UserError
from rewarm.model.architecture import parameter_count
from rewarm.model.huggingface import architecture_from_huggingface
from rewarm.model.safetensors_io import INDEX, TensorFolder, TensorWriter
from rewarm.model.tensors import open_weights, tensor_shapes
from unit.model.families import save_model, stored_tensors

SHAPES = {"a": (5, 4), "b.bias": (3,), "c": (2, 6), "d": (1, 1)}


def _tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit, num_files", [(5_000_000_000, 1), (100, 2), (1, 4)])
def test_written_files_hold_what_was_written(dtype: torch.dtype, limit: int, num_files: int, tmp_path: Path) -> None:
    if dtype == torch.bfloat16 and limit == 100:
        limit = 50
    tensors = _tensors(dtype)
    writer = TensorWriter(tmp_path, SHAPES, dtype, max_shard_bytes=limit)
    for name in reversed(SHAPES):
        writer.write(name, tensors[name])
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    stored = stored_tensors(tmp_path)
    assert list(stored) and stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == dtype and torch.equal(stored[name], tensor)
    if num_files > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in tensors.values())
        assert all(sum(t.nbytes for t in load_file(f).values()) <= max(limit, 80) for f in files)


def test_writing_converts_to_the_type_of_the_folder(tmp_path: Path) -> None:
    tensors = _tensors(torch.float32)
    writer = TensorWriter(tmp_path, SHAPES, torch.bfloat16)
    for name, tensor in tensors.items():
        writer.write(name, tensor.t().contiguous().t() if tensor.dim() == 2 else tensor)
    writer.close()
    assert all(torch.equal(stored_tensors(tmp_path)[name], tensors[name].bfloat16()) for name in SHAPES)


def test_a_tensor_left_out_is_noticed(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, SHAPES, torch.float32)
    writer.write("a", torch.zeros(5, 4))
    with pytest.raises(AssertionError, match=r"b\.bias"):
        writer.close()


def test_blocks_are_read_from_several_files(tmp_path: Path) -> None:
    tensors = _tensors(torch.float32)
    writer = TensorWriter(tmp_path, SHAPES, torch.float32, max_shard_bytes=1)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    with TensorFolder(tmp_path) as folder:
        assert folder.shapes() == SHAPES
        assert torch.equal(folder.read("a", slice(1, 3)), tensors["a"][1:3])
        assert torch.equal(folder.read("c", columns=slice(2, 5)), tensors["c"][:, 2:5])
        assert torch.equal(folder.read("b.bias", slice(2, 3)), tensors["b.bias"][2:])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model("llama2", tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def _rewrite(folder: Path, file: str, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / file) | {k: v for k, v in change.items() if v is not None}
    save_file({k: v for k, v in tensors.items() if change.get(k, v) is not None}, folder / file, {"format": "pt"})


def test_shapes_are_those_that_transformers_saves(model: Path) -> None:
    architecture = architecture_from_huggingface(model)
    stored = stored_tensors(model)
    assert tensor_shapes(architecture) == {name: tuple(stored[name].shape) for name in tensor_shapes(architecture)}
    assert tensor_shapes(architecture).keys() == stored.keys()
    assert parameter_count(architecture) == sum(tensor.numel() for tensor in stored.values())


def test_old_rotary_buffers_are_passed_over(tmp_path: Path) -> None:
    save_model("llama2", tmp_path)
    _rewrite(tmp_path, "model.safetensors", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    with open_weights(tmp_path, architecture_from_huggingface(tmp_path)) as weights:
        assert weights.shapes() == tensor_shapes(architecture_from_huggingface(tmp_path))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model.norm.weight": None}, "lacks the tensor model.norm.weight"),
        ({"lm_head.weight": None}, "tie_word_embeddings"),
        ({"model.layers.1.self_attn.o_proj.bias": torch.zeros(64)}, r"model\.layers\.1\.self_attn\.o_proj\.bias"),
        ({"model.norm.weight": torch.zeros(63)}, r"model\.norm\.weight has shape \(63,\)"),
        ({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, r"model\.norm\.weight has type I8"),
    ],
    ids=["missing", "missing output", "surplus", "misshapen", "integers"],
)
def test_tensors_that_are_not_the_models_are_named(
    change: dict[str, torch.Tensor | None], named: str, tmp_path: Path
) -> None:
    save_model("llama2", tmp_path)
    architecture = architecture_from_huggingface(tmp_path)
    open_weights(tmp_path, architecture)
    _rewrite(tmp_path, "model.safetensors", change)
    with pytest.raises(UserError, match=named):
        open_weights(tmp_path, architecture)


def test_a_tied_model_may_carry_an_equal_output_layer_but_no_other(tmp_path: Path) -> None:
    save_model("llama3", tmp_path)
    architecture = architecture_from_huggingface(tmp_path)
    embedding = stored_tensors(tmp_path)["model.embed_tokens.weight"]
    _rewrite(tmp_path, "model.safetensors", {"lm_head.weight": embedding.clone()})
    assert "lm_head.weight" not in open_weights(tmp_path, architecture).shapes()
    embedding[200, 3] += 1
    _rewrite(tmp_path, "model.safetensors", {"lm_head.weight": embedding})
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        open_weights(tmp_path, architecture)


def test_damaged_folders_are_named(model: Path) -> None:
    file = sorted(model.glob("*.safetensors"))[1]
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=file.name):
        TensorFolder(model)
    file.unlink()
    with pytest.raises(UserError, match=file.name):
        TensorFolder(model)
    file.write_bytes(data)
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.norm.bias"] = file.name
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"places model\.norm\.bias"):
        TensorFolder(model)
    (model / INDEX).write_text("{")
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        TensorFolder(model)
    (model / INDEX).unlink()
    with pytest.raises(UserError, match="holds neither") as caught:
        TensorFolder(model)
    assert "model.safetensors.index.json is missing" in str(caught.value.fix)


def _split(folder: Path, seed: int) -> None:
    """Another model's weights in two files with an index."""
    writer = TensorWriter(
        folder, tensor_shapes(architecture_from_huggingface(folder)), torch.float32, max_shard_bytes=200_000
    )
    generator = torch.Generator().manual_seed(seed)
    for name, shape in tensor_shapes(architecture_from_huggingface(folder)).items():
        writer.write(name, torch.randn(shape, generator=generator))
    writer.close()


def _as_transformers_reads(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


@pytest.mark.parametrize("named", [None, "model.safetensors", INDEX, "others.safetensors"])
def test_of_several_sets_of_weights_the_one_that_transformers_reads_is_read(named: str | None, tmp_path: Path) -> None:
    save_model("llama2", tmp_path)
    _split(tmp_path, 3)
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / INDEX).is_file()
    save_file({k: v + 1 for k, v in load_file(tmp_path / "model.safetensors").items()}, tmp_path / "others.safetensors")
    if named is not None:
        values = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**values, "transformers_weights": named}))
    theirs = _as_transformers_reads(tmp_path)
    with open_weights(tmp_path, architecture_from_huggingface(tmp_path)) as weights:
        for name in weights.shapes():
            assert torch.equal(weights.read(name), theirs[name]), name


def test_a_tied_model_with_its_output_layer_alone_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    save_model("llama3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with open_weights(tmp_path, architecture_from_huggingface(tmp_path)) as weights:
        assert torch.equal(weights.read("model.embed_tokens.weight", slice(3, 9)), tensors["lm_head.weight"][3:9])
        assert "lm_head.weight" not in weights.shapes()
    assert torch.equal(_as_transformers_reads(tmp_path)["model.embed_tokens.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize(
    "files, advice",
    [
        (["pytorch_model.bin"], "loading and saving the model once"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "loading and saving the model once"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "index.json is missing"),
        (["model.fp16.safetensors"], "does not read model.fp16.safetensors"),
        (["consolidated.safetensors"], "does not read consolidated.safetensors"),
        (["llama.Q4_K_M.gguf"], "gguf"),
        ([], "no weights"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(files: list[str], advice: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UserError, match="holds neither") as caught:
        TensorFolder(tmp_path)
    assert advice in str(caught.value.fix)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd"])
def test_an_index_leads_nowhere_else(file: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match="outside of the folder"):
        TensorFolder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": file}))
    with pytest.raises(UserError, match="outside of the folder"):
        TensorFolder(tmp_path)


def test_missing_files_are_counted(model: Path) -> None:
    files = sorted(model.glob("*.safetensors"))
    for file in files[1:3]:
        file.unlink()
    with pytest.raises(UserError, match=f"lacks 2 of the {len(files)} files .* first {files[1].name}"):
        TensorFolder(model)


def test_links_of_a_download_are_followed_and_broken_ones_are_missing(tmp_path: Path) -> None:
    save_model("llama2", tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / file).symlink_to(tmp_path / "blobs" / file)
    assert TensorFolder(tmp_path / "snapshot").shapes()
    (tmp_path / "blobs" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds neither"):
        TensorFolder(tmp_path / "snapshot")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    save_model("llama2", tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    with pytest.raises(UserError, match="an adapter"):
        TensorFolder(tmp_path)


def test_tensors_may_keep_a_type_of_their_own(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor(1.25),
        "b": torch.tensor([3, 1 << 40]),
        "c": torch.tensor([True, False]),
        "d": torch.ones(2),
    }
    exact = {name: tensor.dtype for name, tensor in tensors.items() if name != "d"}
    writer = TensorWriter(tmp_path, {k: tuple(v.shape) for k, v in tensors.items()}, torch.bfloat16, exact=exact)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    stored = stored_tensors(tmp_path)
    assert all(torch.equal(stored[name], tensors[name]) and stored[name].dtype == exact[name] for name in exact)
    assert stored["d"].dtype == torch.bfloat16
    assert TensorFolder(tmp_path).whole("a") == 1.25
