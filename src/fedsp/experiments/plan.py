"""What a run will cost and disclose, counted before anything is trained and without any weights.

Floating-point operations are those of matrix products: two per weight and token in a forward pass,
4 H_q K per token and key in attention. A step on the prompt needs a forward pass and a backward
pass to the inputs (2 forwards' worth); a step on the weights needs 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fedsp.config import RunConfig
from fedsp.errors import FedspError, ModelError, first_line
from fedsp.experiments.server_setup import model_name
from fedsp.federation.codecs import Codec
from fedsp.federation.compression import write_values
from fedsp.models.auxiliary import (
    embedding_parameters,
    empty_auxiliary,
    parse_plan,
    planned_config,
    require_kinds,
)
from fedsp.models.blocks import find_blocks
from fedsp.models.loading import NF4_BLOCK, SPLIT, Precision, empty_model, read_model_config
from fedsp.models.payload import PROMPT, pack
from fedsp.models.prompted_lm import ModelShape
from fedsp.models.soft_prompt import PromptSpec
from fedsp.models.trainable import trainable

BYTES_PER_NUMBER = 4
TEXT_TOKENS = 64
ANSWER_TOKENS = 8


def make_plan(config: RunConfig, clients: int) -> dict[str, Any]:
    """The figures of `fedsp plan`: everything that the configuration implies for a run with so many
    clients. Parameters and bytes are counts; operations are per step of one batch; shares are of
    the global model.

    Memory is weights in their precision, and gradients and AdamW's moments in float32; activations
    come on top. The disclosed share is what stays bit for bit after distillation; the handed-out
    share is what would, with no distillation. Embeddings that are not handed out verbatim count in
    neither.

    Raises:
        ModelError: the model's configuration cannot be had.
        ConfigurationError: the layer plan does not fit it.
    """
    try:
        return _counted(config, clients)
    except FedspError:
        raise
    except Exception as error:  # it says by layer, or not at all, what is counted here
        raise ModelError(
            f"{model_name(config)} cannot be planned for: its configuration does not say what is"
            f" counted ({first_line(error)})"
        ) from error


def _counted(config: RunConfig, clients: int) -> dict[str, Any]:
    name = model_name(config)
    global_config = read_model_config(name)
    text = global_config.get_text_config()
    missing = [
        key
        for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
        if getattr(text, key, None) is None
    ]
    if missing:
        raise ModelError(
            f"{name} ({global_config.model_type}) has no {missing[0]} in its configuration, so it"
            " is not a transformer that takes a soft prompt: choose another model.name"
        )
    plan = parse_plan(config.auxiliary.plan, text.num_hidden_layers, config.auxiliary.prompt_layers)
    with torch.device("meta"):
        model = empty_model(global_config)
        auxiliary = empty_auxiliary(planned_config(global_config, plan), plan)
    blocks = find_blocks(auxiliary, plan.depth, name)[1]
    require_kinds(find_blocks(model, text.num_hidden_layers, name)[1], blocks, plan, name)
    shape = shape_of(global_config)
    spec = PromptSpec(space=config.prompt.space, length=config.prompt.length, model=shape)
    message = len(pack({PROMPT: torch.zeros(spec.shape)}))
    asked = config.round.asked(clients)
    up, change = (
        _message_bytes(spec, codec) for codec in (config.compression.up, config.compression.down)
    )
    follows = asked / clients if clients else 0.0  # of those asked: have the broadcast before
    per_round = round(asked * (up + follows * change + (1 - follows) * message))
    whole, small = _count(model), _count(auxiliary)
    handed = verbatim = small
    if config.distill.steps:
        free = {
            id(p): p.numel()
            for block, frozen in zip(blocks, plan.frozen, strict=True)
            if not frozen
            for p in block.parameters()
        }
        verbatim = small - sum(free.values()) if any(plan.frozen) else 0
    if config.auxiliary.embeddings != "verbatim":
        embeddings = sum(
            parameter.numel() for parameter in embedding_parameters(auxiliary).values()
        )
        handed, verbatim = small - embeddings, max(0, verbatim - embeddings)
    prompt = math.prod(spec.shape)
    tokens = min(config.data.max_tokens or TEXT_TOKENS, TEXT_TOKENS)
    forward = forward_operations(auxiliary, plan.depth, spec.length, tokens)
    client, server = config.client, config.server
    cuda = config.model.device.startswith("cuda") or (
        config.model.device in ("auto", SPLIT) and torch.cuda.is_available()
    )
    server_precision = (
        "bfloat16" if config.model.precision == "auto" and cuda else config.model.precision
    )
    whole_at_first = round(asked * follows * (message - change))
    return {
        "model": name,
        "layers": list(plan.sources),
        "prompt_layers": list(plan.prompt_layers),
        "global_parameters": whole,
        "auxiliary_parameters": small,
        "ratio": whole / small,
        "package_bytes": small * BYTES_PER_NUMBER,
        "prompt_parameters": prompt,
        "bytes_per_message": message,
        "bytes_per_round": per_round,
        "bytes_in_all": per_round * config.round.rounds + whole_at_first,
        "client_operations_auxiliary": (
            3 * forward * client.batch_size if client.auxiliary_steps else 0.0
        ),
        "client_operations_prompt": 2 * forward * client.batch_size if client.prompt_steps else 0.0,
        "server_operations": (
            2 * forward_operations(model, shape.layers, spec.length, tokens) * server.batch_size
            if server.steps
            else 0.0
        ),
        "client_memory_bytes": _weight_bytes(auxiliary, plan.depth, config.auxiliary.precision)
        + BYTES_PER_NUMBER * (4 * prompt + (3 * small if client.auxiliary_steps else 0)),
        "server_memory_bytes": _weight_bytes(model, shape.layers, server_precision)
        + BYTES_PER_NUMBER * 4 * prompt,
        "disclosed_share": verbatim / whole,
        "handed_out_share": handed / whole,
        "tokens_per_example": tokens,
    }


def _message_bytes(spec: PromptSpec, codec: Codec) -> int:
    """What a prompt takes in a codec, when its numbers change by a normal."""
    noise = torch.randn(spec.shape, generator=torch.Generator().manual_seed(0))
    return len(write_values({PROMPT: noise}, {PROMPT: torch.zeros(spec.shape)}, codec))


def shape_of(config: Any) -> ModelShape:
    """The `ModelShape` of a model with this Hugging Face configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        layers=text.num_hidden_layers,
        heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=size,
        hidden=text.hidden_size,
    )


def forward_operations(model: Any, depth: int, prompt: int, tokens: int) -> float:
    """Floating-point operations of one forward pass over one example behind a prompt, logits at
    ANSWER_TOKENS positions; shared depths count each time."""
    text = model.config.get_text_config()
    shape = shape_of(model.config)
    blocks = find_blocks(model, depth, "the model")[1]
    weights: int = sum(p.numel() for block in blocks for p in block.parameters() if p.dim() > 1)
    attention = 4 * depth * text.num_attention_heads * shape.head_size * tokens * (prompt + tokens)
    head = 2 * shape.hidden * text.vocab_size * min(tokens, ANSWER_TOKENS)
    return float(2 * weights * tokens + attention + head)


def _weight_bytes(model: Any, depth: int, precision: Precision) -> int:
    """What the weights of a model take: in few bits the matrices of its blocks, each scale of
    `4bit` in float32; all else as large as in its precision."""
    each = 2 if precision == "bfloat16" else BYTES_PER_NUMBER
    few = {"8bit": 1.0, "4bit": 0.5 + BYTES_PER_NUMBER / NF4_BLOCK}.get(precision, each)
    blocks = find_blocks(model, depth, "the model")[1]
    matrices = sum({id(p): p.numel() for p in blocks.parameters() if p.dim() > 1}.values())
    return round(few * matrices + each * (_count(model) - matrices))


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in trainable(model).values())
