"""The clients' side, opened from a configuration and the package alone: nothing of the global model is needed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from fedsp.algorithm import FedSP
from fedsp.auxiliary import AuxiliaryModel
from fedsp.config import Agreement, RunConfig, ServerSection
from fedsp.data.encoding import Encoded, encode_targets
from fedsp.fitting import Optimisation
from fedsp.methods.base import Stage
from fedsp.parties import Party, Rest
from fedsp.prompts import PromptSpec, SoftPrompt
from fedsp.rounds import derive_seed
from fedsp.runs import RunDirectory
from fedsp.server import Questions, token_limit

HELD_OUT_AT_CLIENTS = 0.1


@dataclass
class Clients:
    """What the clients' side has, all of them together: the package, the method, and access to each client's own rows."""

    method: FedSP
    register: dict[str, int]
    party: Callable[[str], Party]


def agreement_of(config: RunConfig, max_tokens: int) -> Agreement:
    """What a run asks of its clients: all that a client needs to know of the configuration, and no file name of the server's."""
    return Agreement(
        seed=config.seed,
        rounds=config.round.rounds,
        max_tokens=max_tokens,
        positions=config.model.positions,
        prompt=config.prompt.model_copy(update={"init": "broadcast", "init_text": None}),
        client=config.client,
        clients_validate=config.validation.by == "clients",
    )


def make_method(agreement: Agreement, auxiliary: AuxiliaryModel | None, server: ServerSection | None = None) -> FedSP:
    """FedSP with the agreement's numbers. Where no client is asked there is no auxiliary model; a client knows nothing of the server's steps."""
    client, rounds = agreement.client, agreement.rounds

    def stage(steps: int, batch_size: int, rate: float, decay: float) -> Stage:
        return Stage(steps, batch_size, Optimisation(rate, decay, client.warmup, rounds * steps))

    speak = stage(client.speak_steps, client.batch_size, client.learning_rate, client.weight_decay)
    return FedSP(
        align=stage(client.align_steps, client.batch_size, client.align_learning_rate, client.weight_decay),
        speak=speak,
        server=stage(server.steps, server.batch_size, server.learning_rate, server.weight_decay) if server else replace(speak, steps=0),
        keep_optimizer=client.keep_optimizer,
        package=auxiliary.weights() if auxiliary and client.align_steps else {},
    )


def make_client(client: str, agreement: Agreement, auxiliary: AuxiliaryModel, rows: list[Encoded], rest: Rest) -> Party:
    """A client, from its own rows and the package alone: nothing of the global model is needed."""
    spec = PromptSpec(agreement.prompt.space, agreement.prompt.length, auxiliary.prompt_shape, agreement.prompt.projection)
    held = max(1, round(HELD_OUT_AT_CLIENTS * len(rows))) if agreement.clients_validate and len(rows) > 1 else 0
    order = random.Random(derive_seed(agreement.seed, "held out", client)).sample(rows, len(rows))
    prompt = SoftPrompt(spec, seed=derive_seed(agreement.seed, "prompt")).to(auxiliary.device)
    return Party(client, auxiliary, prompt, order[held:], rest, order[:held])


def open_clients(config: RunConfig, auxiliary: AuxiliaryModel, questions: Questions, run: RunDirectory) -> Clients:
    """Every client of a run in one process. Parties are made when asked for, from rows and what rests on disk; few stay in memory."""
    agreement = agreement_of(config, token_limit(config, auxiliary))

    @lru_cache(maxsize=32)
    def encoded(client: str) -> list[Encoded]:
        return encode_targets(auxiliary.tokenizer, questions.held(questions.partition.clients[client]), agreement.max_tokens)

    def party(client: str) -> Party:
        return make_client(client, agreement, auxiliary, encoded(client), run.rest(f"client {client}"))

    register = {client: len(rows) for client, rows in questions.partition.clients.items()}
    return Clients(make_method(agreement, auxiliary, config.server), register, party)


def absent_clients(config: RunConfig, auxiliary: AuxiliaryModel | None, register: dict[str, int], max_tokens: int) -> Clients:
    """Clients whose text is elsewhere, or that there are none of: they can be asked, never opened.

    `register` gives the examples of each, as the server has been told them out of band.
    """

    def nobody(client: str) -> Party:
        raise AssertionError(f"client {client!r} was opened in a process that does not hold its text")

    return Clients(make_method(agreement_of(config, max_tokens), auxiliary, config.server), register, nobody)
