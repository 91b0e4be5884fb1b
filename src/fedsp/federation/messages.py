"""The messages of a round, and the randomness that belongs to each of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedsp.data.seeding import derive_seed
from fedsp.federation.codecs import FLOAT32, Codec

if TYPE_CHECKING:
    from fedsp.models.payload import Payload


@dataclass(frozen=True, kw_only=True)
class Request:
    """The server's request to one client in one round: train on the broadcast `payload`, or, if
    `train` is False, only validate it.

    `change`: the difference from the previous round's broadcast, or in the first round from what
    every client's messenger holds at its start, encoded in `sent_in` (may be empty); sent instead
    of the payload to clients that have that. `answer_in`: codec of the reply.
    """

    run: str
    round: int
    client: str
    seed: int
    payload: Payload
    train: bool = True
    change: bytes = field(default=b"", repr=False)
    sent_in: Codec = FLOAT32
    answer_in: Codec = FLOAT32


@dataclass(frozen=True, kw_only=True)
class Update:
    """A client's reply. `validation`: loss of its held-out examples under the prompt that it
    *received*. `shortened`: number of its examples truncated at the start. `spikes`: number of
    steps whose loss was above 1.5 times the median of their stage.
    """

    round: int
    client: str
    payload: Payload
    losses: dict[str, float] = field(default_factory=dict)
    validation: float | None = None
    seconds: float = 0.0
    shortened: int = 0
    spikes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A client that was asked and did not answer with anything that could be used, and why."""

    round: int
    client: str
    reason: str
    bytes_up: int = 0
    bytes_down: int = 0

    @classmethod
    def of(cls, request: Request, reason: str, **traffic: int) -> Failure:
        """That a request failed; `traffic` is bytes_up and bytes_down."""
        return cls(round=request.round, client=request.client, reason=reason, **traffic)


Transport = Callable[[list[Request]], Iterable[Update | Failure]]
"""The only interface between the algorithm and an engine. Replies may come in any order."""


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One line of `rounds.jsonl`. Bytes as serialised; seconds of wall clock; losses in nats per
    answer token; `seconds_training` are those of the clients' updates, if they report them, of
    the server's step and of validation, with what these read and write of their own state;
    `validation` is of the payload that the round `validated` left: where clients validate, of the
    one that they received, so of the round before. `update_cosine` is the mean cosine between two
    clients' changes; `acceptance_loss` the aggregate's validation loss in the acceptance check, and
    `accepted` whether it passed. `trained`: no, where clients were asked for their validation loss
    alone, behind the last round.
    """

    round: int
    asked: list[str]
    answered: list[str]
    failed: dict[str, str]
    bytes_down: int
    bytes_up: int
    client_losses: dict[str, float]
    server_loss: float | None
    validation: float | None
    best_round: int
    shortened_examples: int
    seconds: float
    seconds_training: float
    update_cosine: float | None = None
    spikes: int = 0
    acceptance_loss: float | None = None
    accepted: bool = True
    validated: int | None = None
    trained: bool = True

    @property
    def judged(self) -> int:
        """The round whose payload `validation` is of."""
        return self.round if self.validated is None else self.validated


def sample_clients(clients: Sequence[str], count: int, seed: int, round: int) -> list[str]:
    """The clients asked in a round: `count` of the sorted ids, drawn from (seed, round) alone."""
    ordered = sorted(clients)
    if count >= len(ordered):
        return ordered
    return sorted(random.Random(derive_seed(seed, "sample", round)).sample(ordered, count))
