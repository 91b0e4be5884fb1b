"""Random models of a few families, small enough for any test."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from fedsp.models.prompted_lm import PromptedLM

_LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


FAMILIES: dict[str, Any] = {
    "gpt2": GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "opt": OPTConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
        dropout=0.0,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    ),
    "llama": LlamaConfig(**_LLAMA, num_key_value_heads=2),
    "qwen2": Qwen2Config(**_LLAMA, num_key_value_heads=2),
    "mistral": MistralConfig(**_LLAMA, num_key_value_heads=2),
    "gemma": GemmaConfig(**_LLAMA, num_key_value_heads=1, head_dim=16),
    "gpt_neox": GPTNeoXConfig(**_LLAMA),
}


def tiny_model(family: str, *, seed: int = 0, positions: Any = "hugging_face") -> PromptedLM:
    """A random model of a family: 4 layers, hidden size 32, 97 tokens; weights large enough that
    logits differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(deepcopy(FAMILIES[family]), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.requires_grad_(False)
    return PromptedLM(model, f"tiny {family}", positions=positions)
