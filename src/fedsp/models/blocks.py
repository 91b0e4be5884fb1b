"""The blocks of a Hugging Face model: where they stand and compute, what goes into them, and the
caches that they read and write."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.cache_utils import Cache, DynamicLayer

from fedsp.errors import ModelError


@dataclass(frozen=True)
class Switch:
    """The sequence length, in positions of a call, above which a model's rotary frequencies change:
    once, or, with `every_length`, for each longer length."""

    positions: int
    every_length: bool


def rotation_switch(config: PretrainedConfig) -> Switch | None:
    """The switch that a configuration names: `longrope` takes other frequencies above its original
    length (Ding et al., LongRoPE, ICML 2024, https://arxiv.org/abs/2402.13753), `dynamic` ones for
    every length above it."""
    text = config.get_text_config()
    named = getattr(text, "rope_parameters", None) or {}
    found = []
    for rope in [named, *(part for part in named.values() if isinstance(part, dict))]:
        if rope.get("rope_type") == "dynamic":
            found.append(Switch(int(text.max_position_embeddings), True))
        elif rope.get("rope_type") == "longrope":
            length = (
                rope.get("original_max_position_embeddings")
                or getattr(text, "original_max_position_embeddings", None)
                or text.max_position_embeddings
            )
            found.append(Switch(int(length), False))
    return min(found, key=lambda switch: switch.positions) if found else None


class Captured(Exception):
    """Raised by `CapturingCache` to return a block's keys and values and skip its attention."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class CapturingCache(Cache):  # type: ignore[misc]
    """A cache that stops the block at the moment its keys and values are known."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        raise Captured(key_states, value_states)


class FixedLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer that `update` never extends: gradient checkpointing runs a block twice."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat(
            [self.values, value_states], dim=-2
        )


def find_backbone(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The part of a causal language model that computes its last hidden states, and its path; the
    model itself (path "") where it has no such part."""
    decoder = model.get_decoder()
    parts = (
        [decoder]
        if isinstance(decoder, PreTrainedModel) and decoder is not model
        else list(model.children())
    )
    found = next((part for part in parts if isinstance(part, PreTrainedModel)), model)
    return next(
        ((path, module) for path, module in model.named_modules() if module is found), ("", model)
    )


def find_blocks(model: PreTrainedModel, layers: int, name: str) -> tuple[str, nn.ModuleList]:
    """The list of the model's blocks, found by their number, and its path below the backbone.

    Raises:
        ModelError: there is no list of that many modules.
    """
    for path, module in find_backbone(model)[1].named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return path, module
    raise ModelError(
        f"{name} has no list of {layers} blocks, so fedsp cannot tell its layers apart"
    )


NO_SETTING = re.compile(r"(^|_)(layer|block)_?(idx|id|index|number)$|^training$")
"""Names under which a block keeps its own depth, or whether it is trained."""


def difference(one: nn.Module, other: nn.Module) -> str | None:
    """The first difference between two blocks, in words, or None: in their module types, the shapes
    of their weights and buffers, or their scalar attributes."""
    for (path, module), (other_path, beside) in zip_longest(
        one.named_modules(), other.named_modules(), fillvalue=("", None)
    ):
        if path != other_path or type(module) is not type(beside):
            where = path if module is not None else other_path
            kinds = ["missing" if it is None else type(it).__name__ for it in (module, beside)]
            return f"{where or 'the block'} is {kinds[0]} in the one and {kinds[1]} in the other"
        assert module is not None and beside is not None
        settings, others = _settings(module), _settings(beside)
        for key in sorted(settings.keys() | others.keys()):
            if settings.get(key) != others.get(key):
                return (
                    f"{path + '.' if path else ''}{key} is {settings.get(key)!r} in the one and"
                    f" {others.get(key)!r} in the other"
                )
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | NoneType)
        and not key.startswith("_")
        and not NO_SETTING.search(key)
    }
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return plain | {key: tuple(value.shape) for key, value in tensors}


def fused(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with GPT-2's GELU of eight operations, each saving a tensor for the backward pass,
    replaced in place by PyTorch's single one."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())
    return model


def runs_on(module: nn.Module, parameter: Tensor) -> torch.device:
    """The device on which a module computes: that of `parameter`, or, if accelerate offloads it,
    the execution device of accelerate's hook."""
    if parameter.device.type != "meta":
        return parameter.device
    places = (
        getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        for part in module.modules()
    )
    found = next((place for place in places if place is not None), None)
    return parameter.device if found is None else torch.device(found)


BlockCall = tuple[Tensor, tuple[Any, ...], dict[str, Any]]


@contextmanager
def recorded(blocks: nn.ModuleList) -> Iterator[list[BlockCall]]:
    """The hidden states (B, T, D), the other arguments and the named ones of each call of a block
    while the context lasts."""
    calls: list[BlockCall] = []

    def record(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)  # torch passes this very one on
        hidden = arguments[0] if arguments else named.pop("hidden_states")
        calls.append((hidden, arguments[1:], named))

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forwarding(modules: Iterable[nn.Module], make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace each module's forward by what `make` makes of it for as long as the context lasts."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    for module, _ in before:
        module.forward = make(module.forward)
    try:
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:  # accelerate's
                module.forward = forward
