"""Example-level differential privacy for any method: each client reply is recorded in the ledger,
made once, and carries only the payload."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsp.errors import PolicyError, StorageError
from fedsp.federation.messages import Request, Update
from fedsp.federation.methods.base import Method, Side, Work
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.models.payload import Payload, same
from fedsp.models.trainable import entries_below
from fedsp.training.dp_sgd import ExamplePrivacy


@dataclass(frozen=True)
class PrivateAnswers:
    """A method with private client updates. The server's side is the method's own, since processing
    private replies is post-processing.

    Losses, times and counts depend on the examples and are not sent. A repeated request gets the
    saved reply, or is refused once that is deleted: a new reply would be a second release. If a
    crash loses the reply of a round that is in the ledger, the round is recorded (and costs
    epsilon) again.
    """

    method: Method
    privacy: ExamplePrivacy

    def init(self, server: Party) -> Payload:
        return self.method.init(server)

    def client_update(self, client: Party, request: Request) -> Update:
        """See `Method.client_update`.

        Raises:
            PolicyError: the request cannot be answered privately, or would exceed a privacy budget.
            StorageError: a reply was sent that is missing from the ledger.
        """
        assert client.ledger is not None
        if not request.train:
            raise PolicyError("validation by clients is not covered by differential privacy")
        answers = StateStore(client.store.folder / "answers")
        if unpaid := [
            number for number in answers.rounds() if not client.ledger.paid(request.run, number)
        ]:
            raise StorageError(
                f"the privacy ledger {client.ledger.path} has no entry for round {unpaid[0]}, which"
                " was answered: the epsilon spent is unknown; restore the ledger from a backup"
            )
        given = answers.at(request.round)
        if given and same(entries_below(given, "asked"), request.payload):
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
        client.store.flush()  # a repeated request gets the answer, and trains nothing
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
