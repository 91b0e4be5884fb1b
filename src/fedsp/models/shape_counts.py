"""What a model's configuration and a layer plan imply: parameters, by what they are for, counted on
the meta device, so without any weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

import torch
from torch import nn

from fedsp.errors import ModelError
from fedsp.models.adapter import linear_sizes
from fedsp.models.auxiliary import (
    embedding_parameters,
    empty_auxiliary,
    parse_plan,
    planned_config,
    require_kinds,
)
from fedsp.models.blocks import find_blocks
from fedsp.models.loading import NF4_BLOCK, empty_model, read_model_config
from fedsp.models.messengers.making import Which, blocks_of
from fedsp.models.prompted_lm import ModelShape, most_positions
from fedsp.models.soft_prompt import PromptSpec, Space
from fedsp.models.trainable import trainable


def count_shapes(name: str, plan: str | list[int], prompt_layers: list[int] | None) -> Any:
    """The counts of a model and of its auxiliary model, as JSON.

    `positions`: the longest sequence. `global` and `auxiliary`: all `parameters`, those in
    `matrices` of blocks, and those that a token is `multiplied` by, where a shared layer counts at
    each depth. `distilled`: parameters of the auxiliary model's depths that are not frozen.
    `prompts`: the shape of one virtual token in each space. `layers`: of each value of
    messenger.layers, the layers it stands for by name, with the shapes of their parameters and the
    inputs and outputs of their linear modules. `few_bits`: bytes of a matrix's number in quantized
    precisions.

    Raises:
        ModelError: the configuration cannot be had, or is not that of a transformer.
        ConfigurationError: the plan does not fit it.
    """
    config = read_model_config(name)
    text = config.get_text_config()
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if getattr(text, key, None) is None:
            raise ModelError(
                f"{name} ({config.model_type}) has no {key} in its configuration, so it is not a"
                " transformer that takes a soft prompt: choose another model.name"
            )
    layers = parse_plan(plan, text.num_hidden_layers, prompt_layers)
    with torch.device("meta"):
        model = empty_model(config)
        auxiliary = empty_auxiliary(planned_config(config, layers), layers)
    blocks = find_blocks(auxiliary, layers.depth, name)[1]
    whole = find_blocks(model, text.num_hidden_layers, name)[1]
    require_kinds(whole, blocks, layers, name)
    free = {
        id(parameter): parameter.numel()
        for block, frozen in zip(blocks, layers.frozen, strict=True)
        if not frozen
        for parameter in block.parameters()
    }
    shape = shape_of(config)
    return {
        "plan": {key: list(values) for key, values in asdict(layers).items()},
        "shape": asdict(shape),
        "attention_heads": text.num_attention_heads,
        "vocabulary": text.vocab_size,
        "positions": most_positions(config),
        "global": _counts(model, whole),
        "auxiliary": _counts(auxiliary, blocks),
        "distilled": sum(free.values()),
        "layers": {
            which: {
                f"layers.{number:03d}": _sizes(blocks[depth])
                for number, (depth, *_) in blocks_of(layers, which).items()
            }
            for which in get_args(Which)
        },
        "embeddings": sum(one.numel() for one in embedding_parameters(auxiliary).values()),
        "few_bits": {"8bit": 1.0, "4bit": 0.5 + 4 / NF4_BLOCK},
        "prompts": {
            space: list(PromptSpec(space=space, length=1, model=shape).shape[1:])
            for space in get_args(Space)
        },
    }


def shape_of(config: Any) -> ModelShape:
    """The `ModelShape` of a model with this Hugging Face configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return ModelShape(
        layers=text.num_hidden_layers,
        heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        hidden=text.hidden_size,
    )


def _sizes(block: nn.Module) -> dict[str, Any]:
    return {
        "parameters": {name: list(one.shape) for name, one in block.named_parameters()},
        "linears": linear_sizes(block),
    }


def _counts(model: Any, blocks: Any) -> dict[str, int]:
    each = [parameter for block in blocks for parameter in block.parameters()]
    matrices = {id(parameter): parameter.numel() for parameter in each if parameter.dim() > 1}
    return {
        "parameters": sum(parameter.numel() for parameter in trainable(model).values()),
        "matrices": sum(matrices.values()),
        "multiplied": sum(parameter.numel() for parameter in each if parameter.dim() > 1),
    }
