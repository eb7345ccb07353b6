"""A Hugging Face folder as transformers runs it: what an export is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rewarm.data.backend import load_with_transformers
from rewarm.errors import UserError
from rewarm.model.safetensors_io import BROKEN_FOLDER, check_finite, check_no_nan


def window_losses(
    folder: str | Path,
    tokens: np.ndarray,
    micro_batch_size: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> np.ndarray:
    """Token losses of windows under ``AutoModelForCausalLM``.

    Args:
        folder: a Hugging Face folder.
        tokens: int64 [B, S + 1]; position t predicts t + 1.
        micro_batch_size: windows per forward pass.
        dtype: ``"float32"`` or ``"bfloat16"``, of the weights and activations; the loss is always float32.
        device: where to run, as torch names it.
        trust_remote_code: let Python files of the folder run.

    Returns:
        float64 [B]; sum of each window's token losses in nats.

    Raises:
        UserError: if the folder cannot be loaded, some of its weights are missing or not finite, or a token has no row.
    """
    import torch
    from torch.nn import functional

    with quiet_transformers(), torch.inference_mode():
        model = _load(folder, dtype, device, trust_remote_code)
        _check_tokens(tokens, model, folder)
        sums = np.empty(len(tokens), dtype=np.float64)
        for start in range(0, len(tokens), micro_batch_size):
            windows = torch.from_numpy(tokens[start : start + micro_batch_size].astype(np.int64)).to(model.device)
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
            losses = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].reshape(-1), reduction="none")
            sums[start : start + len(windows)] = losses.double().view(len(windows), -1).sum(dim=1).cpu().numpy()
    return sums


def generate_text(
    folder: str | Path,
    prompt: str,
    num_tokens: int,
    seed: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    device: str = "cpu",
) -> str:
    """What the model writes after a prompt; the same for the same seed.

    Args:
        folder: a Hugging Face folder with its tokenizer.
        prompt: text to continue, not empty.
        num_tokens: most tokens to add; an end-of-text token ends it earlier.
        seed: of the sampling.
        temperature: 0 takes the likeliest token every time.
        top_k: tokens that are drawn from.
        device: where to run, as torch names it.

    Returns:
        The prompt and its continuation.

    Raises:
        UserError: if the folder or its tokenizer cannot be loaded, or the prompt has no tokens.
    """
    import torch

    with quiet_transformers(), torch.inference_mode(), torch.random.fork_rng():
        model, tokenizer = _load(folder, "float32", device), _load_tokenizer(folder)
        torch.manual_seed(seed)
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        if ids["input_ids"].shape[1] == 0:
            raise UserError(
                f"{prompt!r} has no tokens under the tokenizer of {folder}", fix="give some text to continue"
            )
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        written = model.generate(**ids, max_new_tokens=num_tokens, pad_token_id=pad, **sampling)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def _load(folder: str | Path, dtype: str, device: str, trust_remote_code: bool = False) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,  # left out, transformers asks the terminal
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"transformers cannot load {folder}: {reason}", fix="give a Hugging Face model folder"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            name = sorted(str(key) for key in report[kind])[0]
            raise UserError(
                f"{folder}: {kind.replace('_', ' ')} of the weights, first {name}",
                fix="the folder is incomplete or its config.json belongs to another model",
            )
    for name, parameter in model.named_parameters():
        check_finite(parameter, name, str(folder), BROKEN_FOLDER)
    for name, buffer in model.named_buffers():
        check_no_nan(buffer, name, str(folder), BROKEN_FOLDER)
    return model.eval().to(device)


def _load_tokenizer(folder: str | Path) -> Any:
    try:
        return load_with_transformers(Path(folder))
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no tokenizer can be loaded from {folder}: {reason}") from error


def _check_tokens(tokens: np.ndarray, model: Any, folder: str | Path) -> None:
    rows = int(model.config.vocab_size)
    if tokens.size and (int(tokens.max()) >= rows or int(tokens.min()) < 0):
        worst = int(tokens.max()) if int(tokens.max()) >= rows else int(tokens.min())
        raise UserError(
            f"the data holds the token {worst}, but {folder} has {rows} embedding rows",
            fix="evaluate on data built with the model's own tokenizer",
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only, no progress bars, while transformers works; the user's settings come back afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
