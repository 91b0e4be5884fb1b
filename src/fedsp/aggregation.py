"""Admission of replies, and their mean. Tensors by name; nothing here knows of language models."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedsp.errors import PayloadError
from fedsp.payload import Payload, check
from fedsp.rounds import Failure, Request, Update


def admit(reply: Update | Failure, requests: Mapping[str, Request], seen: Mapping[str, object], max_change: float) -> str | None:
    """Why a reply is refused, or None when it may be aggregated.

    `requests` are the open requests by client, `seen` the clients that have been counted already, `max_change` the root mean square by
    which a reply may differ from what was broadcast.
    """
    if isinstance(reply, Failure):
        return reply.reason
    request = requests.get(reply.client)
    if request is None:
        return f"client {reply.client!r} was not asked in this round"
    if reply.client in seen:
        return "a second reply to one request"
    if reply.round != request.round:
        return f"a reply to round {reply.round} in round {request.round}"
    ((name, sent),) = request.payload.items()
    try:
        check(reply.payload, tuple(sent.shape))
    except PayloadError as error:
        return str(error)
    change = _root_mean_square_difference(reply.payload[name], sent)
    if change > max_change:
        return f"{name} differs from the broadcast by {change:.3g} per number (root mean square), more than round.max_change = {max_change:g}"
    return None


def _root_mean_square_difference(one: Tensor, other: Tensor) -> float:
    """In float64, a part at a time: a reply may be large and may lie, so judging it takes no more memory than it does."""
    parts = zip(torch.split(one.flatten(), 1 << 16), torch.split(other.flatten(), 1 << 16), strict=True)
    return math.sqrt(sum(float((a.double() - b.double()).square().sum()) for a, b in parts) / max(one.numel(), 1))


def weighted_mean(payloads: Mapping[str, Payload], weights: Mapping[str, float]) -> Payload:
    """The mean of payloads by client, weighted, summed in float64 in the order of the client ids, so any arrival order gives these bits."""
    total = sum(weights[client] for client in sorted(payloads))
    mean: Payload = {}
    for client in sorted(payloads):
        for name, tensor in payloads[client].items():
            share = tensor.double() * (weights[client] / total)
            mean[name] = share if name not in mean else mean[name] + share
    return {name: tensor.to(torch.float32) for name, tensor in sorted(mean.items())}
