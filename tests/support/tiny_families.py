"""A tiny random model of every family that the installed transformers offers as a causal language
model, found by its registry."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

REGISTERED = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

_SIZES: dict[int, str] = {
    97: "vocab_size vocab_size_per_layer_input",
    1: (
        "bos_token_id n_group topk_group n_shared_experts num_shared_experts mamba_n_groups"
        " n_groups"
    ),
    2: (
        "eos_token_id num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token"
        " moe_topk moe_k top_k_experts"
    ),
    4: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads num_experts num_local_experts n_routed_experts "
        "num_routed_experts moe_num_experts linear_num_key_heads linear_num_value_heads "
        "sliding_window window_size sliding_window_size attention_window_size mamba_d_conv "
        "index_topk"
    ),
    8: (
        "head_dim global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim "
        "linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim "
        "mamba_chunk_size chunk_size attention_chunk_size mamba_n_heads mamba_num_heads "
        "index_head_dim index_n_heads"
    ),
    16: (
        "kv_lora_rank q_lora_rank o_lora_rank moe_intermediate_size "
        "shared_expert_intermediate_size expert_intermediate_size hidden_size_per_layer_input "
        "mamba_d_state ssm_state_size state_size d_rel moe_latent_size"
    ),
    32: "hidden_size d_model n_embd word_embed_proj_dim embedding_size lru_width",
    64: (
        "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim "
        "encoder_ffn_dim shared_intermediate_size moe_shared_expert_intermediate_size "
        "mamba_d_ssm intermediate_size_mlp"
    ),
    128: "max_position_embeddings n_positions max_seq_len rel_extent_global rel_extent_local",
}
TINY: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()} | {
    "pad_token_id": 0
}
_LATENT = {"num_key_value_heads": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "dots3_note_text",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "kimi_linear",
            "minicpm3",
            "youtu",
        ],
        _LATENT,
    ),
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4},
    "mamba2": {"num_heads": 8},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "phi3": {"original_max_position_embeddings": 128},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "qwen4_exp_text": (
        dict.fromkeys(
            ["indexer_n_heads", "indexer_kv_heads", "indexer_budget", "indexer_compress_ratio"], 4
        )
        | {"indexer_head_dim": 8}
    ),
    "zamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beside its sizes: how many layers of which kind, and what its configuration
asks to agree."""


LONG_ROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0, 4.0, 2.0, 6.0],
        "original_max_position_embeddings": 16,
    },
    "original_max_position_embeddings": 16,
    "sliding_window": None,
}
"""Phi-3 with other rotations beyond 16 positions."""


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A configuration of a family with 4 layers, hidden size 32 and 97 tokens, windows of 4, no
    dropout; parts for pictures and sounds are as small."""
    return _small(CONFIG_MAPPING[family], SPECIAL.get(family, {}) | changes)


def _small(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    names = set(inspect.signature(kind.__init__).parameters).union(
        *(getattr(base, "__annotations__", {}) for base in kind.__mro__)
    )
    sizes = {
        name: size for name, size in TINY.items() if name in names or name in kind.attribute_map
    }
    decodes = (
        {"is_decoder": True} if "is_decoder" in names and "num_decoder_layers" not in names else {}
    )
    still = {name: 0.0 for name in names if "drop" in name and not re.search("path|pdrop$", name)}
    usual = {name: getattr(kind(), name, None) for name in kind.sub_configs if name in names}
    parts = {
        name: _small(type(part), SPECIAL.get(part.model_type, {}))
        for name, part in usual.items()
        if isinstance(part, PreTrainedConfig)
    }
    return kind(**(sizes | still | decodes | parts | changes))


def tiny_causal_lm(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model of a family, weights large enough that logits differ from token to token; no
    bias, scale or buffer of it stands where its family starts it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            tiny_config(family, **changes), dtype=torch.float32
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
            else:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        stored = set(model.state_dict())
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer += 0.5 * torch.randn(buffer.shape)
    return model.to(dtype).requires_grad_(False).eval()
