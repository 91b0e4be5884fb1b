"""`Method`, the interface of FedSP and all baselines, and federated averaging, which most baselines
use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from fedsp.federation.messages import Request, Update
from fedsp.federation.party import Party
from fedsp.models.payload import Payload
from fedsp.models.trainable import Trainable
from fedsp.training.stage import Stage

Side = Literal["client", "server"]


class Work(NamedTuple):
    """One stage of a party's round, and what is trained in it."""

    stage: Stage
    target: Trainable


class Method(Protocol):
    """A method of federated tuning. It works on parties and payloads and does not depend on the
    transport between them."""

    def init(self, server: Party) -> Payload:
        """The payload that is broadcast in round 1."""

    def client_update(self, client: Party, request: Request) -> Update:
        """The reply of a sampled client.

        Raises:
            TrainingDiverged: a loss is not finite.
        """

    def server_update(
        self, server: Party, aggregated: Payload, round: int, seed: int
    ) -> tuple[Payload, float | None]:
        """The payload that is broadcast next, and the server's last training loss (nats per token;
        None if it did not train).

        Raises:
            TrainingDiverged: a loss is not finite.
        """

    def work(self, party: Party, side: Side) -> list[Work]:
        """The stages of a party's round, in order: what its cost is measured on, and what privacy
        is charged for."""


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """Federated averaging: clients take steps on their own text, the server takes the mean and may
    take steps on its own.

    What is tuned, and through which model, depends on the parties. H. B. McMahan, E. Moore, D.
    Ramage, S. Hampson, B. Agüera y Arcas. *Communication-Efficient Learning of Deep Networks from
    Decentralized Data*. AISTATS 2017. https://arxiv.org/abs/1602.05629.
    """

    client_stage: Stage
    server_stage: Stage

    def init(self, server: Party) -> Payload:
        return server.messenger.payload()

    def client_update(self, client: Party, request: Request) -> Update:
        with client.round_state(request.round, request.seed, request.payload) as local:
            client.messenger.load(request.payload)
            validation = client.validate()
            if request.train:
                local.train(client.messenger, self.client_stage)
        return local.update(validation)

    def server_update(
        self, server: Party, aggregated: Payload, round: int, seed: int
    ) -> tuple[Payload, float | None]:
        if not self.server_stage.steps:
            return aggregated, None
        with server.round_state(round, seed, aggregated) as local:
            server.messenger.load(aggregated)
            loss = local.train(server.messenger, self.server_stage)
        return server.messenger.payload(), loss

    def work(self, party: Party, side: Side) -> list[Work]:
        stage = self.client_stage if side == "client" else self.server_stage
        return [Work(stage, party.messenger)] if stage.steps else []
