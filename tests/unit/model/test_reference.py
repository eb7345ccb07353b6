"""Losses and text of a Hugging Face folder as transformers runs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rewarm.errors import UserError
from rewarm.model.reference import generate_text, window_losses
from unit.model.families import VOCAB_SIZE, save_model, windows
from unit.model.test_tokenizer_check import save_tokenizer


def test_losses_are_the_cross_entropies_of_each_window(tmp_path: Path) -> None:
    model = save_model("qwen2", tmp_path)
    tokens = windows(5, 17)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.double()
    picked = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    losses = window_losses(tmp_path, tokens.numpy(), micro_batch_size=2)
    assert losses.dtype == np.float64 and losses.shape == (5,)
    np.testing.assert_allclose(losses, -picked.sum(1).numpy(), rtol=1e-6)


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    save_model("llama2", tmp_path)
    tokens = windows(2, 17).numpy()
    exact, rounded = window_losses(tmp_path, tokens), window_losses(tmp_path, tokens, dtype="bfloat16")
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=2e-2)


def test_text_depends_on_the_seed_alone_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model("llama2", tmp_path)
    save_tokenizer(tmp_path, VOCAB_SIZE, 0)
    capfd.readouterr()
    state = torch.random.get_rng_state()
    first, again, other = (generate_text(tmp_path, "word3", 12, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first.startswith("word3")
    assert torch.equal(torch.random.get_rng_state(), state)
    window_losses(tmp_path, windows(1, 9).numpy())
    assert capfd.readouterr() == ("", "")


def test_unusable_folders_and_tokens_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        window_losses(tmp_path / "nowhere", windows(1, 9).numpy())
    save_model("llama2", tmp_path)
    with pytest.raises(UserError, match=f"the token {VOCAB_SIZE}, .* {VOCAB_SIZE} embedding rows"):
        window_losses(tmp_path, np.full((1, 9), VOCAB_SIZE))
    with pytest.raises(UserError, match="no tokenizer"):
        generate_text(tmp_path, "word3", 3, 1)
    save_tokenizer(tmp_path, VOCAB_SIZE, 0)
    with pytest.raises(UserError, match="'' has no tokens"):
        generate_text(tmp_path, "", 3, 1)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"missing keys .* model\.layers\.2\.mlp\.up_proj\.weight"):
        window_losses(tmp_path, windows(1, 9).numpy())
