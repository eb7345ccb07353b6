"""The decoder: Megatron-Core's GPTModel with our norm, attention core and loss, by spec injection."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu

from rewarm.config.run import RunConfig
from rewarm.engine import device
from rewarm.engine.megatron.activation import SwiGLU
from rewarm.engine.megatron.attention import LocalCore, SDPACore, with_rotary
from rewarm.engine.megatron.loss import token_losses
from rewarm.engine.megatron.norm import AddNormalised, RMSNorm, WidthNorm
from rewarm.engine.megatron.rotary import Rotary
from rewarm.errors import UserError, ensure
from rewarm.model.architecture import Architecture
from rewarm.model.families.base import family_of


@dataclass
class DecoderConfig(TransformerConfig):
    """Megatron-Core's settings and the rotary positions that the attention core applies."""

    rotary: Rotary | None = None


class Decoder(GPTModel):
    """A GPTModel whose loss leaves padded vocabulary columns out."""

    true_vocab_size: int

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Args: labels int64 [B, S], logits [S, B, V / tensor]. Returns: token losses, fp32 [B, S]."""
        return token_losses(logits, labels, self.true_vocab_size).t()


def decoder_config(config: RunConfig, architecture: Architecture) -> DecoderConfig:
    """Translate a run's settings into Megatron-Core's."""
    dtype = device.dtype_of(config.precision)
    return DecoderConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=silu,
        # Takes the activation from the layer's specification, where ours stands.
        use_te_activation_func=config.megatron.attention != "transformer_engine",
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        # Weights are drawn by initialize.py, the same on every layout.
        perform_initialization=False,
        use_cpu_initialization=not device.is_gpu(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Decides how the gradient buffers scale; Megatron reads it when they are built.
        calculate_per_token_loss=True,
        # Kernels of Apex or Transformer Engine; none of them is needed for a correct step.
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        rotary=Rotary(architecture),
        **_parallel_settings(config),
    )


def _parallel_settings(config: RunConfig) -> dict[str, Any]:
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline > 1
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "sequence_parallel": parallel.sequence,
        # Batched sends pair up wrongly when the previous and the next stage are the same rank, as with two
        # interleaved stages: training goes on with wrong activations.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # Freeing a stage's output races with gloo, which still reads it; CUDA streams order the two.
        "deallocate_pipeline_outputs": device.is_gpu() and parallel.pipeline > 1,
    }
    if config.recomputes_activations:
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return settings


def layer_spec(attention: str, architecture: Architecture, decoder: DecoderConfig) -> ModuleSpec:
    """The modules of one transformer layer.

    Args:
        attention: ``megatron.attention``.
        architecture: whose family says what norms there are.
        decoder: Megatron-Core's settings.

    Raises:
        UserError: if Transformer Engine is asked for and not installed, cannot be imported, or does not have the
            family's layers.
    """
    family, qk_norm = family_of(architecture), architecture.qk_norm
    if attention == "transformer_engine":
        if family.norms_after():
            raise UserError(
                f"megatron.attention=transformer_engine fuses norms with the matrices behind them, but "
                f"model.family={architecture.family} has its norms after them",
                fix="set megatron.attention=sdpa",
            )
        if find_spec("transformer_engine") is None:
            raise UserError(
                "megatron.attention=transformer_engine, but Transformer Engine is not installed",
                fix="pip install transformer-engine[pytorch] on a machine with a GPU, or set megatron.attention=sdpa",
            )
        if not gpt_layer_specs.HAVE_TE:
            raise UserError(
                "megatron.attention=transformer_engine, but Megatron-Core cannot import the Transformer Engine that is "
                "installed",
                fix="python -c 'import transformer_engine.pytorch' says why; or set megatron.attention=sdpa",
            )
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
        parts = spec.submodules.self_attention.submodules
        parts.core_attention = with_rotary(parts.core_attention)
        if qk_norm:  # before Transformer Engine 1.9 Megatron-Core takes one here that knows no RMSNorm
            parts.q_layernorm, parts.k_layernorm = _qk_norms(architecture)
        return spec
    if attention == "sdpa":
        core: type = SDPACore
    elif attention == "local":
        core = LocalCore
    else:
        raise ValueError(f"there is no megatron.attention {attention!r}")
    spec = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    if family.norms_after():
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = IdentityOp
        after = ModuleSpec(AddNormalised, params={"config": decoder})
        spec.submodules.self_attn_bda = spec.submodules.mlp_bda = after
    else:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    parts = spec.submodules.self_attention.submodules
    parts.core_attention = core
    spec.submodules.mlp.submodules.activation_func = SwiGLU
    if qk_norm:
        parts.q_layernorm, parts.k_layernorm = _qk_norms(architecture)
    return spec


def _qk_norms(architecture: Architecture) -> tuple[ModuleSpec | type, ModuleSpec | type]:
    """What normalises queries and keys: each head, or all of them together."""
    if family_of(architecture).qk_norm() == "head":
        return RMSNorm, RMSNorm
    heads, groups = architecture.num_attention_heads, architecture.num_key_value_heads
    return (
        ModuleSpec(WidthNorm, params={"num_heads": heads}),
        ModuleSpec(WidthNorm, params={"num_heads": groups}),
    )


def build_chunks(config: RunConfig, architecture: Architecture, decoder: DecoderConfig) -> list[Decoder]:
    """This rank's parts of the model, one per virtual pipeline stage, with undefined weights."""
    parallel = config.parallel
    stages = parallel.virtual_pipeline
    layer = layer_spec(config.megatron.attention, architecture, decoder)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    chunks = []
    for stage in range(stages):
        vp_stage = stage if stages > 1 else None
        num_layers = get_num_layers_to_build(decoder, vp_stage=vp_stage)
        chunk = Decoder(
            config=decoder,
            transformer_layer_spec=TransformerBlockSubmodules([layer] * num_layers, layer_norm=RMSNorm),
            vocab_size=architecture.padded_vocab_size(config.megatron.vocab_divisor, parallel.tensor),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=rank == 0 and stage == 0,
            post_process=rank == parallel.pipeline - 1 and stage == stages - 1,
            share_embeddings_and_output_weights=architecture.tie_embeddings,
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        chunk.true_vocab_size = architecture.vocab_size
        final_norm = getattr(chunk.decoder, "final_layernorm", None)
        ensure(not chunk.post_process or isinstance(final_norm, RMSNorm), "the decoder was built without a final norm")
        _mark_split_weights(chunk)
        chunks.append(chunk)
    return chunks


def _mark_split_weights(chunk: Decoder) -> None:
    """Megatron-Core marks the axis that tensor ranks split only where it draws the weights itself. Unmarked, they
    would be taken for copies, and all but the first rank's left out of the gradient norm."""
    axes = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in chunk.modules():
        axis = axes.get(type(module))
        if axis is not None and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, axis, 1)
