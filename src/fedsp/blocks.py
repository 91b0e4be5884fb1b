"""The blocks of a Hugging Face model: where they stand and compute, what goes into them, and the caches that they read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.cache_utils import Cache, DynamicLayer

from fedsp.errors import ModelError


class Captured(Exception):
    """Carries keys and values out of a block before it does the work that nobody needs."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class CapturingCache(Cache):  # type: ignore[misc]
    """A cache that stops the block at the moment its keys and values are known."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise Captured(key_states, value_states)


class FixedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values that are read, and never added to: a step may read them twice."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def find_blocks(backbone: nn.Module, layers: int, name: str) -> tuple[str, nn.ModuleList]:
    """The list of the model's blocks, found by their number, and its path below the backbone.

    Raises:
        ModelError: there is no list of that many modules.
    """
    for path, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return path, module
    raise ModelError(f"{name} has no list of {layers} blocks, so fedsp cannot tell its layers apart")


def fused(model: PreTrainedModel) -> PreTrainedModel:
    """GPT-2's own form of GELU in eight operations, which keep eight tensors for the backward pass, as the one operation that it is."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())
    return model


def runs_on(module: nn.Module, parameter: Tensor) -> torch.device:
    """Where a module computes: where its weights are, or, where accelerate brings them from elsewhere, where to."""
    if parameter.device.type != "meta":
        return parameter.device
    places = (getattr(getattr(part, "_hf_hook", None), "execution_device", None) for part in module.modules())
    found = next((place for place in places if place is not None), None)
    return parameter.device if found is None else torch.device(found)


def hidden_of(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The hidden states (B, T, D) that a block was called with."""
    hidden: Tensor = arguments[0] if arguments else named["hidden_states"]
    return hidden


@contextmanager
def hooked(blocks: nn.ModuleList, record: Callable[..., object]) -> Iterator[None]:
    """Call `record(module, arguments, named arguments)` before each block for as long as the context lasts."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        record(module, arguments, named)

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
