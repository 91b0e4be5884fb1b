"""The parties of a federation, a client or the server: model, messenger and examples, and the state
that each keeps between rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedsp.data.encoding import Encoded
from fedsp.federation.messages import Update
from fedsp.federation.state_store import StateStore
from fedsp.models.auxiliary import AuxiliaryModel
from fedsp.models.payload import Payload
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import SoftPrompt
from fedsp.models.trainable import Messenger, Tensors, Trainable, entries_below
from fedsp.privacy import Ledger
from fedsp.training.loop import gradients_set
from fedsp.training.stage import Stage, train_stage, validation_loss


@dataclass(kw_only=True)
class Party:
    """One side of the federation.

    model: the language model: the global model at the server, the auxiliary model at a client.
    messenger: what it tunes and sends.
    examples: what it trains on; a client never trains on `held_out`, and validates on it.
    store: its own state between rounds, on disk.
    ledger: the record of private releases of its examples; None without example-level privacy.
    max_epsilon: the largest epsilon that the releases in the ledger may add up to.
    """

    id: str
    model: PromptedLM
    messenger: Messenger
    examples: Sequence[Encoded]
    store: StateStore
    held_out: Sequence[Encoded] = field(default_factory=tuple)
    ledger: Ledger | None = None
    max_epsilon: float = math.inf

    @property
    def prompt(self) -> SoftPrompt:
        """The messenger of FedSP."""
        assert isinstance(self.messenger, SoftPrompt)
        return self.messenger

    @property
    def shortened(self) -> int:
        """How many of its examples were longer than the model reads, and lost their oldest
        context."""
        return sum(row.dropped > 0 for row in [*self.examples, *self.held_out])

    def validate(self) -> float | None:
        """The loss of its held-out examples, nats per answer token; None if it holds none out."""
        return validation_loss(self.model, self.messenger, self.held_out)

    @contextmanager
    def round_state(
        self, round: int, seed: int, received: Payload, start: Tensors | None = None
    ) -> Iterator[LocalRound]:
        """Restore the party's own state before a round; save it afterwards if anything was trained.

        `start`: the auxiliary weights as distributed, if clients train them. The clients of a
        process share one model: it has this party's auxiliary weights within the context, and
        `start` again afterwards.

        Raises:
            StorageError: the state is damaged or could not be written.
        """
        earlier = self.store.load(before=round)
        self.messenger.restore(entries_below(earlier, "messenger"))
        with self.own_weights(entries_below(earlier, "auxiliary"), start or {}):
            local = LocalRound(
                party=self, round=round, seed=seed, received=received, earlier=earlier
            )
            yield local
            if state := local.state():
                self.store.save(round, state)

    @contextmanager
    def own_weights(self, weights: Tensors, start: Tensors) -> Iterator[None]:
        """Put auxiliary weights into the model for a while; `start` are those that are put back.
        Nothing happens where either is empty."""
        if not start:
            yield
            return
        assert isinstance(self.model, AuxiliaryModel)
        if weights:
            self.model.load_weights(weights)
        try:
            yield
        finally:
            self.model.load_weights(start)


@dataclass(kw_only=True)
class LocalRound:
    """One party in one round: its stages, and what they leave behind."""

    party: Party
    round: int
    seed: int
    received: Payload
    earlier: Tensors
    started: float = field(default_factory=time.perf_counter)
    trained: dict[str, Trainable] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    spikes: int = 0
    moments: Tensors = field(default_factory=dict)

    def train(self, target: Trainable, stage: Stage) -> float | None:
        """One stage on the party's messenger or model; the other is frozen. Returns the last loss,
        nats per token; None without steps, or with privacy.

        Raises:
            TrainingDiverged: a loss is not finite.
        """
        if not stage.steps:
            return None
        party = self.party
        frozen = party.messenger.trained().values() if target is not party.messenger else ()
        with gradients_set(frozen, False):
            result = train_stage(
                stage,
                target,
                party.model,
                party.messenger,
                party.examples,
                received=self.received,
                round=self.round,
                seed=self.seed,
                moments=entries_below(self.earlier, stage.name) if stage.keep_optimizer else None,
            )
        self.trained[stage.name] = target
        self.spikes += result.spikes
        if result.last is not None:
            self.losses[stage.name] = result.last
        if stage.keep_optimizer:
            self.moments |= {
                f"{stage.name}/{name}": tensor for name, tensor in result.moments.items()
            }
        return result.last

    def state(self) -> Tensors:
        """What the party keeps until its next round: its part of the messenger that does not
        travel, its auxiliary weights, AdamW's moments."""
        if not self.trained:
            return {}
        state = {
            f"messenger/{name}": tensor for name, tensor in self.party.messenger.own_state().items()
        } | self.moments
        for target in self.trained.values():
            if target is not self.party.messenger:
                state |= {
                    f"auxiliary/{name}": parameter for name, parameter in target.trained().items()
                }
        return state

    def update(self, validation: float | None) -> Update:
        """The reply: the messenger as it is now, or what was received where nothing was trained."""
        party = self.party
        if not self.trained:
            return Update(
                round=self.round, client=party.id, payload=self.received, validation=validation
            )
        return Update(
            round=self.round,
            client=party.id,
            payload=party.messenger.payload(),
            losses=self.losses,
            validation=validation,
            seconds=time.perf_counter() - self.started,
            shortened=party.shortened,
            spikes=self.spikes,
        )
