"""Any method whose clients answer with example-level differential privacy: each answer is paid for,
given once, and says nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedsp.errors import PolicyError, StorageError
from fedsp.federation.messages import Request, Update
from fedsp.federation.methods.base import Method, Side, Work
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.models.payload import Payload
from fedsp.models.trainable import entries_below
from fedsp.training.dp_sgd import ExamplePrivacy


@dataclass(frozen=True)
class PrivateAnswers:
    """A method, and what its clients promise. The server's side is the method's own: what it makes
    of private answers is post-processing.

    Losses, times and counts depend on the examples, so none of them leaves. A request that comes
    again gets the answer that was given, for as long as it is kept, and then none: a second one
    would be a second release. A round that was paid for and whose answer a crash took is paid for
    again.
    """

    method: Method
    privacy: ExamplePrivacy

    def init(self, server: Party) -> Payload:
        return self.method.init(server)

    def client_update(self, client: Party, request: Request) -> Update:
        """See `Method.client_update`.

        Raises:
            PolicyError: what is asked cannot be answered privately, or the client's budget is
                spent.
            StorageError: an answer was given that the ledger does not know of.
        """
        assert client.ledger is not None
        if not request.train:
            raise PolicyError("validation by clients is not covered by differential privacy")
        answers = StateStore(client.store.folder / "answers")
        if unpaid := [
            number for number in answers.rounds() if not client.ledger.paid(request.run, number)
        ]:
            raise StorageError(
                f"the privacy ledger {client.ledger.path} does not know of round {unpaid[0]}, which"
                " was answered: what was spent is not known; restore it from a backup"
            )
        given = answers.at(request.round)
        if given and _same(entries_below(given, "asked"), request.payload):
            return Update(
                round=request.round, client=client.id, payload=entries_below(given, "answer")
            )
        if client.ledger.paid(request.run, request.round) and (
            given or max(answers.rounds(), default=0) > request.round
        ):
            raise PolicyError(
                f"round {request.round} was answered already: another answer would be another"
                " release"
            )
        for work in self.method.work(client, "client"):
            if work.stage.privacy is None:
                raise PolicyError(
                    f"the stage {work.stage.name!r} has no differential privacy, so no answer of"
                    " this round would be private"
                )
            release = self.privacy.steps(
                len(client.examples), work.stage.batch_size, work.stage.steps
            ).release
            for budget, run in (
                (self.privacy.epsilon or math.inf, request.run),
                (client.max_epsilon, None),
            ):
                if (
                    math.isfinite(budget)
                    and client.ledger.epsilon(self.privacy.delta, release, run=run) > budget
                ):
                    whose = "the run's" if run else "this client's"
                    raise PolicyError(
                        f"another round would take more than {whose} budget of epsilon = {budget:g}"
                        f" at delta = {self.privacy.delta:g}"
                    )
            client.ledger.spend(
                release, run=request.run, round=request.round, stage=work.stage.name
            )
        update = self.method.client_update(client, request)
        answers.save(
            request.round,
            {f"asked/{name}": tensor for name, tensor in request.payload.items()}
            | {f"answer/{name}": tensor for name, tensor in update.payload.items()},
        )
        return Update(round=request.round, client=client.id, payload=update.payload)

    def server_update(
        self, server: Party, aggregated: Payload, round: int, seed: int
    ) -> tuple[Payload, float | None]:
        return self.method.server_update(server, aggregated, round, seed)

    def work(self, party: Party, side: Side) -> list[Work]:
        return self.method.work(party, side)


def _same(one: Payload, other: Payload) -> bool:
    return sorted(one) == sorted(other) and all(torch.equal(one[name], other[name]) for name in one)
