"""A tiny Llama in a GGUF file, as llama.cpp's converter writes one: attention rows permuted, the
tokenizer's pieces and merges inside."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fedsp.experiments.embedded import EMBEDDED

HEADS, KEY_HEADS, HIDDEN, LAYERS, INNER = 4, 2, 64, 3, 128
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm"}
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.requires_grad_(False)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def write_gguf(file: Path, model: PreTrainedModel, *, quantized: bool = False) -> Path:
    """The model with the embedded model's tokenizer; `quantized`: matrices of layers in Q8_0."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(1024)
    known = json.loads((EMBEDDED / "model" / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(known["vocab"], key=known["vocab"].__getitem__))
    writer.add_token_types([3, *[1] * (len(known["vocab"]) - 1)])
    writer.add_token_merges([" ".join(pair) for pair in known["merges"]])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)
    writer.add_chat_template(CHAT)
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        weight = parameter.detach().clone()
        if parts[0] in OUTSIDE:
            writer.add_tensor(f"{OUTSIDE[parts[0]]}.weight", weight.numpy())
            continue
        inner = NAMES[parts[2]]
        if inner in ("attn_q", "attn_k"):
            weight = permuted(weight, HEADS if inner == "attn_q" else KEY_HEADS)
        where, numbers = f"blk.{parts[1]}.{inner}.weight", weight.numpy()
        if quantized and weight.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(where, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(where, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
