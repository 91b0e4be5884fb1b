"""What travels: one named float32 tensor, and its bytes. This is an allow-list, and it has one entry."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedsp.errors import PayloadError
from fedsp.frames import PAYLOAD

Payload = dict[str, Tensor]
"""Flat, on the CPU, float32, names sorted. All that ever travels is {PROMPT: (P, L, 2, H, K) or (P, L, D)}."""

PROMPT = PAYLOAD


def pack(payload: Payload) -> bytes:
    """The payload as safetensors bytes: what is counted as traffic, and what any engine sends."""
    data: bytes = save({name: payload[name].detach().to("cpu", torch.float32).contiguous() for name in sorted(payload)})
    return data


def unpack(data: bytes) -> Payload:
    """The payload that `pack` wrote.

    Raises:
        PayloadError: the bytes are not safetensors.
    """
    try:
        return dict(sorted(load(data).items()))
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise PayloadError(f"the {len(data)} bytes received are no payload: {error}") from error


def check(payload: Payload, shape: tuple[int, ...]) -> None:
    """Hold a payload against what may travel: exactly one tensor, PROMPT, of this shape, float32, every number finite.

    Raises:
        PayloadError: anything else, with what was found and what was expected.
    """
    if list(payload) != [PROMPT]:
        raise PayloadError(f"the payload names {sorted(payload)}, expected exactly [{PROMPT!r}]")
    values = payload[PROMPT]
    if tuple(values.shape) != shape:
        raise PayloadError(f"{PROMPT} has shape {tuple(values.shape)}, expected {shape}")
    if values.dtype != torch.float32:
        raise PayloadError(f"{PROMPT} is {values.dtype}, expected torch.float32")
    wrong = sum(int((~torch.isfinite(part)).sum()) for part in torch.split(values.flatten(), 1 << 16))  # in parts: it may be large and may lie
    if wrong:
        raise PayloadError(f"{PROMPT} holds {wrong} numbers that are not finite")
