"""The one shape of FedSP and of every baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedsp.fitting import Optimisation
from fedsp.parties import Party
from fedsp.payload import Payload
from fedsp.rounds import Request, Update


@dataclass(frozen=True)
class Stage:
    """So many steps of so many examples, with this optimisation. No steps, no stage."""

    steps: int
    batch_size: int
    optimisation: Optimisation


class Method(Protocol):
    """What a federation runs. A method sees parties and payloads; how they reach each other is not its business."""

    def init(self, server: Party) -> Payload:
        """What is broadcast in round 1."""

    def client_update(self, client: Party, request: Request) -> Update:
        """What an asked client answers.

        Raises:
            TrainingDiverged: a loss is not finite.
        """

    def server_update(self, server: Party, aggregated: Payload, round: int, seed: int) -> tuple[Payload, float | None]:
        """What is broadcast next, and the server's last training loss, if it trained.

        Raises:
            TrainingDiverged: a loss is not finite.
        """
