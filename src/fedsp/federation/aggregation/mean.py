"""Validation of updates, their weighted mean, and the server optimizer, all on tensors by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from fedsp.errors import PayloadError
from fedsp.federation.messages import Failure, Request, Update
from fedsp.models.payload import Payload, check, shapes_of


def validate_update(
    reply: Update | Failure,
    requests: Mapping[str, Request],
    seen: Mapping[str, object],
    max_change: float,
) -> str | None:
    """Why a reply is refused, or None when it may be aggregated.

    `requests` are the open requests by client, `seen` the clients that have been counted already,
    `max_change` the root mean square by which a reply may differ from what was broadcast.
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
    try:
        check(reply.payload, shapes_of(request.payload))
    except PayloadError as error:
        return str(error)
    change = _root_mean_square_difference(reply.payload, request.payload)
    if change > max_change:
        return (
            f"the reply differs from the broadcast by {change:.3g} per value (root mean square),"
            f" more than round.max_change = {max_change:g}"
        )
    return None


def _root_mean_square_difference(one: Payload, other: Payload) -> float:
    numbers = sum(tensor.numel() for tensor in one.values())
    return math.sqrt(
        sum(float((a - b).square().sum()) for a, b in _parts(one, other)) / max(numbers, 1)
    )


def _parts(one: Payload, other: Payload) -> Iterable[tuple[Tensor, Tensor]]:
    """Aligned float64 chunks of both payloads, made lazily: validating a large reply needs little
    additional memory."""
    pairs = (
        (torch.split(one[name].flatten(), 1 << 16), torch.split(other[name].flatten(), 1 << 16))
        for name in sorted(one)
    )
    return (
        (a.double(), b.double())
        for a, b in chain.from_iterable(zip(*pair, strict=True) for pair in pairs)
    )


def weighted_mean(payloads: Mapping[str, Payload], weights: Mapping[str, float]) -> Payload:
    """The mean of payloads by client, weighted, summed in float64 in the order of the client ids,
    so any arrival order gives these bits."""
    total = sum(weights[client] for client in sorted(payloads))
    mean: Payload = {}
    for client in sorted(payloads):
        for name, tensor in payloads[client].items():
            share = tensor.double() * (weights[client] / total)
            mean[name] = share if name not in mean else mean[name] + share
    return {name: tensor.to(torch.float32) for name, tensor in sorted(mean.items())}


Replies = Mapping[str, Payload]
Weights = Mapping[str, float]


class Aggregator:
    """Aggregates replies to the broadcast `sent` into one payload, before the server optimizer and
    the server step: by their weighted mean, unless a subclass does otherwise.

    `weights` come from the server's register; `asked` is the number of sampled clients; `own` is
    the result of the server's own step on `sent`, if `by_reference`. If `always`, rounds without
    replies are aggregated too.
    """

    always = False

    @property
    def by_reference(self) -> bool:
        return False

    def __call__(
        self, sent: Payload, replies: Replies, weights: Weights, asked: int, own: Payload | None
    ) -> Payload:
        return weighted_mean(replies, weights)


def update_cosine(payloads: Mapping[str, Payload], sent: Payload) -> float | None:
    """The mean cosine similarity of two clients' updates, over all pairs: 1 if all have the same
    direction, near 0 if they are unrelated (client drift).

    None if fewer than two clients changed anything.
    """
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in sent.items()}
    count = 0
    for client in sorted(payloads):
        length = math.sqrt(
            sum(float((a - b).square().sum()) for a, b in _parts(payloads[client], sent))
        )
        if length > 0:
            count += 1
            for name, tensor in payloads[client].items():
                total[name] += (tensor.double() - sent[name]) / length
    if count < 2:
        return None
    return (sum(float(tensor.square().sum()) for tensor in total.values()) - count) / (
        count * (count - 1)
    )


STEPS = (1.0, 1.5, 2.0, 3.0)
"""Lengths of the server's step, as multiples of the aggregated update, that a line search tries."""


def _or_infinite(loss: Callable[[Payload], float]) -> Callable[[Payload], float]:
    """A loss, infinite where it is not finite."""

    def finite(payload: Payload) -> float:
        value = loss(payload)
        return value if math.isfinite(value) else math.inf

    return finite


@dataclass(frozen=True)
class ServerOptimizer:
    """How the server applies the aggregated update: as it is (`none`), with momentum (FedAvgM; Hsu,
    Qi and Brown, https://arxiv.org/abs/1909.06335), or as many times as the server's validation
    loss is lowest (`line_search`, one of `STEPS`): where clients differ, the mean of their updates
    is shorter than each."""

    kind: Literal["none", "momentum", "line_search"] = "none"
    learning_rate: float = 1.0
    momentum: float = 0.9

    def step(
        self, sent: Payload, mean: Payload, state: Payload, loss: Callable[[Payload], float]
    ) -> tuple[Payload, Payload]:
        """The payload after the step, and the optimizer's state (the momentum of each tensor),
        which the next round's step is given. `loss` is the validation loss of a payload."""
        if self.kind == "none":
            return mean, {}
        if self.kind == "line_search":
            tried = [
                mean
                if times == 1.0
                else {name: start.lerp(mean[name], times) for name, start in sent.items()}
                for times in STEPS
            ]
            return min(tried, key=_or_infinite(loss)), {}
        payload, momenta = {}, {}
        for name, start in sent.items():
            momentum = (
                self.momentum * state.get(name, torch.zeros_like(start)).double()
                + mean[name].double()
                - start.double()
            )
            payload[name] = (start.double() + self.learning_rate * momentum).float()
            momenta[name] = momentum.float()
        return payload, momenta
