"""Ids that begin and end a text, for the config.json and the generation config of an export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewarm.data.model_folder import read_json
from rewarm.data.tokenizer import special_token_ids
from rewarm.model.description import HuggingFaceModel, ModelDescription

GENERATION = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_generation_config(folder: Path, end_of_document: list[int]) -> None:
    """A generation config for a model that was trained from random weights, so that what it writes can end.

    Args:
        folder: holds the tokenizer, and gets the file.
        end_of_document: ids that ended the documents it was trained on; none means the tokenizer's EOS.
    """
    ids: dict[str, Any] = dict(special_token_ids(folder))
    ends = list(dict.fromkeys([*end_of_document, *([ids["eos_token_id"]] if "eos_token_id" in ids else [])]))
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        ids.setdefault("pad_token_id", ends[0])  # generate() needs one to fill up a batch
    if ids:
        (folder / GENERATION).write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


def lacks_token_ids(model: ModelDescription) -> bool:
    """True for a model that started from random weights: nothing but its tokenizer says which ids end a text."""
    if isinstance(model, HuggingFaceModel):
        return "eos_token_id" in model.config and model.config["eos_token_id"] is None
    return not model.huggingface_config


def with_token_ids(model: ModelDescription, companions: Path) -> ModelDescription:
    """A model whose config.json will name its BOS, EOS and padding token.

    Args:
        model: one that lacks them.
        companions: folder with its tokenizer and generation config.

    Raises:
        UserError: if the tokenizer cannot be opened.
    """
    generation = read_json(companions, GENERATION) or {}
    # Not the padding of generation, which may be the EOS: transformers would leave that row of the embedding out of
    # what it trains.
    named = special_token_ids(companions) | {
        key: generation[key] for key in _IDS[:2] if generation.get(key) is not None
    }
    ids = {key: named.get(key) for key in _IDS}
    if isinstance(model, HuggingFaceModel):
        return replace(model, config=model.config | ids)
    return replace(model, huggingface_config=ids)
