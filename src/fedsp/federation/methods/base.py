"""The one shape of FedSP and of every baseline, and what they have in common."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fedsp.data.encoding import Batch, Encoded, collate, training_batches
from fedsp.data.seeding import derive_seed
from fedsp.federation.messages import Request, Update
from fedsp.federation.party import Party
from fedsp.models.payload import Payload
from fedsp.models.trainable import Tensors
from fedsp.training.dp_sgd import ExamplePrivacy, fit_privately
from fedsp.training.loop import Optimisation, TrainResult, answer_loss, fit

Side = Literal["client", "server"]


@dataclass(frozen=True)
class Stage:
    """So many steps of so many examples, with this optimisation. No steps, no stage.

    With `privacy` each example's gradient is clipped, the lots are Poisson samples with `batch_size` examples expected, and noise is added; nothing else
    of the examples is told. `proximal` is mu of FedProx (Li et al., MLSys 2020, https://arxiv.org/abs/1812.06127): mu / 2 times the squared distance from what was
    received is added to the loss.
    """

    steps: int
    batch_size: int
    optimisation: Optimisation
    proximal: float = 0.0
    privacy: ExamplePrivacy | None = None


@dataclass(frozen=True)
class Work:
    """What a party does in a round: a stage by name, and what is trained in it."""

    name: str
    stage: Stage
    train: Mapping[str, nn.Parameter]


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

    def work(self, party: Party, side: Side) -> list[Work]:
        """What a party of this side does in a round, in order: what a cost is measured on."""


@dataclass(frozen=True)
class Averaging:
    """Federated averaging of whatever is tuned: clients take steps on their own text, the server takes the mean and may take steps on its own.

    H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas. *Communication-Efficient Learning of Deep Networks from Decentralized
    Data*. AISTATS 2017. https://arxiv.org/abs/1602.05629. What is tuned, and through which model, is the parties' affair. `keep_optimizer`
    lets AdamW's moments rest with each party between rounds.
    """

    client: Stage
    server: Stage
    keep_optimizer: bool = False

    def init(self, server: Party) -> Payload:
        """One start for all."""
        return server.tuned.payload()

    def client_update(self, client: Party, request: Request) -> Update:
        """Steps on what was received. See `Method.client_update`."""
        started = time.perf_counter()
        state = client.rest.load(before=request.round) if self._rests(client) else {}
        client.tuned.take_up(request.payload, part(state, "tuned"))
        validation = validation_loss(client, client.held_out)
        if not request.train:
            return Update(request.round, client.id, request.payload, validation=validation)
        fitted = self._tune(client, "client", request.payload, request.round, request.seed, state)
        losses = {} if fitted.last is None else {"client": fitted.last}
        return Update(request.round, client.id, client.tuned.payload(), losses, validation, time.perf_counter() - started, client.shortened, fitted.spikes)

    def server_update(self, server: Party, aggregated: Payload, round: int, seed: int) -> tuple[Payload, float | None]:
        """Steps on the mean. See `Method.server_update`."""
        if not self.server.steps:
            return aggregated, None
        state = server.rest.load(before=round) if self._rests(server) else {}
        server.tuned.take_up(aggregated, part(state, "tuned"))
        fitted = self._tune(server, "server", aggregated, round, seed, state)
        return server.tuned.payload(), fitted.last

    def work(self, party: Party, side: Side) -> list[Work]:
        """One stage on what is tuned."""
        return [Work(side, stage, party.tuned.trained()) for stage in [self.client if side == "client" else self.server] if stage.steps]

    def _tune(self, party: Party, side: Side, received: Payload, round: int, seed: int, state: Tensors) -> TrainResult:
        stage = self.client if side == "client" else self.server
        fitted = take_steps(party, Work(side, stage, party.tuned.trained()), received, round, seed, part(state, side) if self.keep_optimizer else None)
        if self._rests(party):
            kept = {f"tuned/{name}": tensor for name, tensor in party.tuned.own_state().items()}
            if self.keep_optimizer:
                kept |= {f"{side}/{name}": tensor for name, tensor in fitted.moments.items()}
            party.rest.save(round, kept)
        return fitted

    def _rests(self, party: Party) -> bool:
        """Whether a party has anything to keep from one round to the next."""
        return self.keep_optimizer or bool(party.tuned.own_state())


def take_steps(party: Party, work: Work, received: Payload, round: int, seed: int, moments: Tensors | None) -> TrainResult:
    """One stage of one party: AdamW steps on the cross-entropy of its own answers, nats per token.

    Raises:
        TrainingDiverged: a loss is not finite.
    """
    stage = work.stage
    first_step = (round - 1) * stage.steps
    if stage.privacy:
        private = stage.privacy.steps(len(party.examples), stage.batch_size, stage.steps)
        return fit_privately(party.model, party.prompt, party.examples, private, stage.optimisation, first_step=first_step, moments=moments)

    def loss(batch: Batch) -> Tensor:
        value = answer_loss(party.model, party.tuned.prefix(party.model), batch.to(party.model.device))
        return value + stage.proximal / 2 * party.tuned.distance(received) if stage.proximal else value

    batches = training_batches(party.examples, steps=stage.steps, batch_size=stage.batch_size, seed=derive_seed(seed, work.name))
    return fit(work.train, loss, batches, stage.optimisation, first_step=first_step, moments=moments)


@torch.no_grad()
def validation_loss(party: Party, rows: Sequence[Encoded], batch_size: int = 32) -> float | None:
    """Mean loss, nats per answer token, of what a party has tuned, through its model, on rows that nothing was trained on."""
    if not rows:
        return None
    prefix, total, count = party.tuned.prefix(party.model), 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        tokens = sum(len(row.ids) - row.start for row in batch)
        total += tokens * float(answer_loss(party.model, prefix, collate(batch).to(party.model.device)))
        count += tokens
    return total / count


def part(state: Tensors, name: str) -> Tensors:
    """The entries of a party's state below a name, without it."""
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in state.items() if key.startswith(f"{name}/")}
