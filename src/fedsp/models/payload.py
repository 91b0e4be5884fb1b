"""What travels: named float32 tensors, and their bytes. This is an allow-list: in FedSP it has one
entry, the soft prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedsp.errors import PayloadError

UNREADABLE = (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError)
"""What safetensors raises for bytes that are none."""

Payload = dict[str, Tensor]
"""Flat, on the CPU, float32, names sorted. In FedSP all that ever travels is {PROMPT: (P, L, 2, H,
K) or (P, L, D)}; baselines send what they tune."""

Shapes = Mapping[str, tuple[int, ...]]

PROMPT = "prompt.values"
"""The one tensor that travels in FedSP."""


def pack(payload: Payload) -> bytes:
    """The payload as safetensors bytes: what is counted as traffic, and what any engine sends."""
    data: bytes = save(
        {
            name: payload[name].detach().to("cpu", torch.float32).contiguous()
            for name in sorted(payload)
        }
    )
    return data


def unpack(data: bytes) -> Payload:
    """The payload that `pack` wrote.

    Raises:
        PayloadError: the bytes are not safetensors.
    """
    try:
        return dict(sorted(load(data).items()))
    except UNREADABLE as error:
        raise PayloadError(f"the {len(data)} bytes received are no payload: {error}") from error


def shapes_of(payload: Payload) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a payload."""
    return {name: tuple(tensor.shape) for name, tensor in payload.items()}


def check(payload: Payload, shapes: Shapes) -> None:
    """Verify that a payload has exactly these names and shapes, in float32, and only finite values.

    Raises:
        PayloadError: it does not; the message says what was found and what was expected.
    """
    if sorted(payload) != sorted(shapes):
        raise PayloadError(
            f"the payload names {_few(sorted(payload))}, expected exactly {_few(sorted(shapes))}"
        )
    for name, values in payload.items():
        if tuple(values.shape) != tuple(shapes[name]):
            raise PayloadError(
                f"{name} has shape {tuple(values.shape)}, expected {tuple(shapes[name])}"
            )
        if values.dtype != torch.float32:
            raise PayloadError(f"{name} is {values.dtype}, expected torch.float32")
        # the sum of large numbers may be infinite as well
        if not math.isfinite(values.sum()) and (wrong := _not_finite(values)):
            raise PayloadError(f"{name} holds {wrong} numbers that are not finite")


def _not_finite(values: Tensor) -> int:
    """Number of values that are not finite, counted in chunks to bound the memory."""
    return sum(
        int((~torch.isfinite(part)).sum()) for part in torch.split(values.flatten(), 1 << 16)
    )


def _few(names: list[str]) -> str:
    shown = [name if len(name) <= 100 else f"{name[:100]}..." for name in names[:4]]
    return str(shown) if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def as_row(payload: Payload) -> Tensor:
    """All numbers of a payload (N,), float64, in the order of the names."""
    return torch.cat([payload[name].flatten().double() for name in sorted(payload)])


def from_row(row: Tensor, like: Payload) -> Payload:
    """The payload of these names and shapes with the numbers (N,) of a row."""
    names = sorted(like)
    parts = torch.split(row, [like[name].numel() for name in names])
    return {name: part.view_as(like[name]).float() for name, part in zip(names, parts, strict=True)}


def same(one: Payload, other: Payload) -> bool:
    """Whether both have the same tensors, to the bit."""
    return sorted(one) == sorted(other) and all(torch.equal(one[name], other[name]) for name in one)
