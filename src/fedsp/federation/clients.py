"""The clients' side, built from the signed agreement and the package alone: nothing of the global
model is needed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from fedsp.config import Agreement, PromptSection, ServerSection
from fedsp.data.encoding import Encoded
from fedsp.data.seeding import derive_seed
from fedsp.federation.agreement import example_privacy, stages_of
from fedsp.federation.methods.base import Method
from fedsp.federation.methods.private import PrivateAnswers
from fedsp.federation.methods.registry import MethodEntry, find_method
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.models.auxiliary import AuxiliaryModel
from fedsp.models.messengers import making as messengers
from fedsp.models.prompted_lm import ModelShape, PromptedLM
from fedsp.models.soft_prompt import PromptSpec
from fedsp.models.trainable import Messenger
from fedsp.privacy import Ledger

HELD_OUT_AT_CLIENTS = 0.1


@dataclass(kw_only=True)
class Clients:
    """All clients of a run: the method, how many examples each has by the server's register, and,
    if their text is in this process, the parties."""

    method: Method
    register: dict[str, int]
    party: Callable[[str], Party]
    here: bool = True


def make_method(
    agreement: Agreement,
    auxiliary: AuxiliaryModel | None,
    server: ServerSection | None = None,
    entry: MethodEntry | None = None,
) -> Method:
    """The method with the agreement's settings, FedSP if no entry is given. Where no client is
    asked there is no auxiliary model."""
    entry, privacy = entry or find_method("fedsp"), example_privacy(agreement)
    start = auxiliary.weights() if auxiliary and agreement.client.auxiliary_steps else {}
    method = entry.algorithm(stages_of(agreement.client, server, agreement.rounds, privacy), start)
    return PrivateAnswers(method, privacy) if privacy else method


def make_party(
    client: str,
    agreement: Agreement,
    model: PromptedLM,
    messenger: Messenger,
    examples: list[Encoded],
    store: StateStore,
    *,
    ledger: Ledger | None = None,
    max_epsilon: float = math.inf,
) -> Party:
    """A client of any method. Where clients validate, a tenth of its examples is held out.
    `max_epsilon` bounds what all releases in its ledger may add up to."""
    held = (
        max(1, round(HELD_OUT_AT_CLIENTS * len(examples)))
        if agreement.clients_validate and len(examples) > 1
        else 0
    )
    order = random.Random(derive_seed(agreement.seed, "held out", client)).sample(
        examples, len(examples)
    )
    return Party(
        id=client,
        model=model,
        messenger=messenger,
        examples=order[held:],
        store=store,
        held_out=order[:held],
        ledger=ledger,
        max_epsilon=max_epsilon,
    )


def prompt_spec(section: PromptSection, model: ModelShape) -> PromptSpec:
    """The prompt that `[prompt]` describes."""
    return PromptSpec(
        space=section.space, length=section.length, model=model, projection=section.projection
    )


def client_messenger(agreement: Agreement, auxiliary: AuxiliaryModel) -> Callable[[], Messenger]:
    """Makes the messenger into which a client of FedSP loads what it receives."""
    spec = prompt_spec(agreement.prompt, auxiliary.prompt_shape)
    return messengers.client_messenger(
        auxiliary, spec, agreement.messenger.model_dump(), agreement.seed
    )


def client_shapes(
    agreement: Agreement, auxiliary: AuxiliaryModel, messenger: Callable[[], Messenger]
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors that a client takes and sends, and no others."""
    spec = prompt_spec(agreement.prompt, auxiliary.prompt_shape)
    return messengers.client_shapes(auxiliary, spec, messenger, agreement.messenger.kind)


def absent_clients(method: Method, register: dict[str, int]) -> Clients:
    """Clients whose text is on other machines; `register` gives the examples of each, as their
    owners have reported to the server."""

    def nobody(client: str) -> Party:
        raise AssertionError(
            f"client {client!r} was opened in a process that does not hold its text"
        )

    return Clients(method=method, register=register, party=nobody, here=False)
