"""Small models of several families as transformers makes them, and plain torch training to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ranks.tiny import DOMAINS, GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH, VOCAB_SIZE, global_batch
from rewarm.config.load import build
from rewarm.config.run import RunConfig
from rewarm.engine.base import Batch

LEARNING_RATE = 1e-3

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {"head_dim": 16},
    "phi": {"hidden_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {},
    "olmo2": {},
}
FAMILIES = tuple(_MORE)
"""Dense models whose state is all trained."""
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_WITH_CONSTANTS: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64,
        "num_kv_shared_layers": 0,
    },
    "glm4_moe": {**_EXPERTS, "n_routed_experts": 8, "first_k_dense_replace": 1},
    "afmoe": {**_EXPERTS, "num_experts": 8, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2},
}
WITH_CONSTANTS = tuple(_WITH_CONSTANTS)
"""Models of which a part is not trained: a persistent buffer of every layer, of a router, and a parameter."""
_WITH_EXPERTS: dict[str, dict[str, Any]] = {
    # So many that a rank's batch leaves some of them out.
    "qwen3_moe": {**_EXPERTS, "num_experts": 64, "num_experts_per_tok": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
WITH_EXPERTS = tuple(_WITH_EXPERTS)


def write_model(family: str, folder: Path, seed: int = 0, **sizes: int) -> Path:
    """A folder with a random model of a family, written by transformers alone; ``sizes`` replace the usual ones."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    more = {**_MORE, **_WITH_CONSTANTS, **_WITH_EXPERTS}[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**_SIZES, **more, **sizes}))
    with torch.no_grad():
        for constant in constants(model).values():
            constant.copy_(0.5 + torch.rand_like(constant))
        for parameter in model.parameters():  # transformers' zero biases and unit norms would hide a lost one
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def constants(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What of a model's state is not trained. A model that transformers has loaded has forgotten it in part."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(model.config)
    trained = {name for name, parameter in built.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in trained}


def deepspeed_config(folder: Path, **settings: Any) -> RunConfig:
    """A run that continues the model of a folder; ``settings`` are sections, merged one level deep."""
    values: dict[str, Any] = {
        "name": "tiny",
        "engine": "deepspeed",
        "parent": str(folder),
        "data": {name: name for name in DOMAINS},
        "duration": "100 steps",
        "batch": {
            "sequence_length": SEQUENCE_LENGTH,
            "global_batch_size": GLOBAL_BATCH_SIZE,
            "micro_batch_size": 2,
        },
        "optimizer": {"gradient_clipping": 0.5},
    }
    for key, value in settings.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return build(values)


def masked_batch(step: int) -> Batch:
    """The global batch of a step, whose windows count very different numbers of targets."""
    batch = global_batch(step)
    kept = np.random.default_rng(1000 + step).random(batch.tokens[:, 1:].shape)
    return Batch(batch.tokens, batch.domains, kept < np.linspace(0.1, 1.0, GLOBAL_BATCH_SIZE)[:, None])


def plain_steps(
    folder: Path, config: RunConfig, steps: int, *, masked: bool = False
) -> Iterator[tuple[float, float, torch.nn.Module]]:
    """Train with torch alone: loss, gradient norm before clipping, and the model after each step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    model.get_input_embeddings().padding_idx = None  # the batches hold that token, as text
    settings = config.optimizer
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE)
    if settings.name == "adamw":
        betas = (settings.beta1, settings.beta2)
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=betas, eps=settings.epsilon, fused=False)
    for step in range(steps):
        batch = masked_batch(step) if masked else global_batch(step)
        tokens = torch.from_numpy(batch.tokens)
        logits = model(input_ids=tokens[:, :-1]).logits
        losses = cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = losses.mean() if batch.loss_mask is None else losses[torch.from_numpy(batch.loss_mask)].mean()
        optimizer.zero_grad()
        loss.backward()
        # In double: torch's sum over half a million squares in fp32 is off by more than what is tested.
        norms = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if settings.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping)
        optimizer.step()
        yield loss.item(), norm.item(), model
