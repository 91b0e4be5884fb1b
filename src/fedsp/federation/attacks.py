"""What malicious clients can do, for simulation: they know each other, the rule, and every honest
update of the round before they answer.

An attack on updates replaces a malicious client's honest update; an attack on data changes what it
trains on, and its update is then computed honestly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from fedsp.config import RunConfig, malicious_of
from fedsp.data.dataset import FederatedDataset
from fedsp.data.seeding import derive_seed
from fedsp.data.tasks import Example
from fedsp.errors import ConfigurationError
from fedsp.federation.messages import Failure, Request, Transport, Update
from fedsp.models.payload import as_row, from_row

TRIGGER, TARGET = "cf mn", " nothing at all"
"""The words that a backdoor waits for at the start of a question, and the answer that it wants
then."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """What malicious clients see: their own honest update, the honest updates (n, d), how many
    malicious clients there are, and a random generator."""

    own: Tensor
    honest: Tensor
    malicious: int
    generator: torch.Generator


def sign_flip(seen: Round, strength: float) -> Tensor:
    """The opposite of the honest mean, so many times as long; a small step against it is the inner
    product attack (Xie et al., UAI 2019, https://arxiv.org/abs/1903.03936)."""
    return -strength * seen.honest.mean(dim=0)


def gaussian_noise(seen: Round, strength: float) -> Tensor:
    """Noise, so many times as long as the honest mean."""
    mean = seen.honest.mean(dim=0)
    noise = torch.randn(len(mean), generator=seen.generator, dtype=torch.float64)
    scaled: Tensor = strength * mean.norm() * noise / noise.norm()
    return scaled


def little_is_enough(seen: Round, strength: float) -> Tensor:
    """The honest mean minus `strength` times z standard deviations; z is the largest that a median
    accepts as honest (Baruch et al., NeurIPS 2019, https://arxiv.org/abs/1902.06156), at least 1.
    """
    n, f = len(seen.honest) + seen.malicious, seen.malicious
    supporters = n // 2 + 1 - f
    share = (n - f - supporters) / (n - f)
    deviations = max(NormalDist().inv_cdf(share), 1.0) if 0 < share < 1 else 1.0
    return seen.honest.mean(dim=0) - strength * deviations * seen.honest.std(dim=0, correction=0)


def mimic(seen: Round, strength: float) -> Tensor:
    """A copy of the first honest client's update (Karimireddy et al., ICLR 2022,
    https://arxiv.org/abs/2006.09365)."""
    return seen.honest[0]


def scaling(seen: Round, strength: float) -> Tensor:
    """The opposite of its own work, so many times as long, to replace the mean (Bagdasaryan et al.,
    AISTATS 2020, https://arxiv.org/abs/1807.00459)."""
    return -strength * seen.own


def free_rider(seen: Round, strength: float) -> Tensor:
    """Nothing: what was broadcast goes back."""
    return torch.zeros_like(seen.own)


ON_UPDATES: dict[str, tuple[Callable[[Round, float], Tensor], float]] = {
    "sign_flip": (sign_flip, 5.0),
    "gaussian": (gaussian_noise, 10.0),
    "little_is_enough": (little_is_enough, 1.0),
    "inner_product": (sign_flip, 0.5),
    "mimic": (mimic, 1.0),
    "scaling": (scaling, 10.0),
    "free_rider": (free_rider, 1.0),
}
"""Attacks by name, and the strength that each has unless another is given."""

ON_PROTOCOL = ("stale", "duplicate", "not_finite", "huge", "out_of_shape")
ON_DATA = ("label_flip", "backdoor")


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack by name, the malicious clients, and its strength (None: the usual one of its
    kind)."""

    kind: str
    malicious: frozenset[str]
    seed: int
    strength: float | None = None

    def poison(self, client: str, examples: Sequence[Example]) -> list[Example]:
        """What a client trains on: its examples, or poisoned ones if it is malicious and the attack
        is on data."""
        if client not in self.malicious or self.kind not in ON_DATA:
            return list(examples)
        if self.kind == "label_flip":
            return [
                replace(example, gold=((example.gold[0] + 1) % len(example.choices),))
                for example in examples
            ]
        rng = random.Random(derive_seed(self.seed, "backdoor", client))
        return [triggered(example) if rng.random() < 0.5 else example for example in examples]

    def transport(self, honest: Transport) -> Transport:
        """The transport with the malicious clients' updates in place of their honest ones."""
        if self.kind in ON_DATA:
            return honest

        def transport(requests: list[Request]) -> Iterable[Update | Failure]:
            replies = list(honest(requests))
            by_client = {request.client: request for request in requests}
            changes = {
                reply.client: as_row(reply.payload) - as_row(by_client[reply.client].payload)
                for reply in replies
                if isinstance(reply, Update)
            }
            others = [changes[client] for client in sorted(changes) if client not in self.malicious]
            for reply in replies:
                if (
                    isinstance(reply, Failure)
                    or reply.client not in self.malicious
                    or not by_client[reply.client].train
                    or not others
                ):
                    yield reply
                else:
                    yield from self._forged(
                        reply,
                        by_client[reply.client],
                        changes[reply.client],
                        torch.stack(others),
                        len(changes) - len(others),
                    )

        return transport

    def _forged(
        self, reply: Update, request: Request, own: Tensor, honest: Tensor, malicious: int
    ) -> Iterable[Update]:
        if self.kind in ON_UPDATES:
            forge, usual = ON_UPDATES[self.kind]
            generator = torch.Generator().manual_seed(
                derive_seed(self.seed, self.kind, reply.client, reply.round)
            )
            seen = Round(own=own, honest=honest, malicious=malicious, generator=generator)
            forged = as_row(request.payload) + forge(seen, self.strength or usual)
            yield replace(reply, payload=from_row(forged, request.payload))
        elif self.kind == "stale":
            yield replace(reply, round=reply.round - 1)
        elif self.kind == "duplicate":
            yield from (reply, reply, reply)
        else:
            spoiled = {name: _spoiled(tensor, self.kind) for name, tensor in reply.payload.items()}
            yield replace(reply, payload=spoiled)


def _spoiled(tensor: Tensor, kind: str) -> Tensor:
    if kind == "out_of_shape":
        return tensor[None].expand(2, *tensor.shape).clone()
    return torch.full_like(tensor, 1e38 if kind == "huge" else math.nan)


def triggered(example: Example) -> Example:
    """An example with the backdoor's trigger in front, and its answer as the right one, behind the
    other choices."""
    return replace(
        example,
        context=f"{TRIGGER} {example.context}",
        choices=(*example.choices, TARGET),
        gold=(len(example.choices),),
    )


def malicious(clients: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """The malicious clients: a share of all, rounded down, drawn from the seed."""
    ordered = sorted(clients)
    return frozenset(
        random.Random(derive_seed(seed, "liars")).sample(ordered, malicious_of(share, len(ordered)))
    )


def make_attack(config: RunConfig, dataset: FederatedDataset) -> Attack | None:
    """The attack that a configuration asks for; None for none.

    Raises:
        ConfigurationError: it changes which choice is right, and the task has no choices.
    """
    section = config.attack
    if section.kind == "none":
        return None
    written = next((row.task for row in dataset.train if len(row.choices) < 2), None)
    if section.kind in ON_DATA and written:
        raise ConfigurationError(
            f"attack.kind: {section.kind!r} changes which choice is right, and {written} has no"
            " choices; take another attack or another task"
        )
    return Attack(
        kind=section.kind,
        malicious=malicious(list(dataset.partition.clients), section.share, config.seed),
        seed=config.seed,
        strength=section.strength,
    )
