"""The clients' side, opened from a configuration and the package alone: nothing of the global model is needed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from fedsp.algorithm import FedSP
from fedsp.auxiliary import AuxiliaryModel
from fedsp.config import RunConfig
from fedsp.data.encoding import Encoded, encode_targets
from fedsp.fitting import Optimisation
from fedsp.methods.base import Stage
from fedsp.parties import Party, Rest
from fedsp.prompts import PromptSpec, SoftPrompt
from fedsp.rounds import derive_seed
from fedsp.runs import RunDirectory
from fedsp.server import Questions

HELD_OUT_AT_CLIENTS = 0.1


@dataclass
class Clients:
    """What the clients' side has, all of them together: the package, the method, and access to each client's own rows."""

    method: FedSP
    register: dict[str, int]
    party: Callable[[str], Party]


def make_method(config: RunConfig, auxiliary: AuxiliaryModel | None) -> FedSP:
    """FedSP with the configuration's numbers; where no client is asked there is no auxiliary model."""
    client, server, rounds = config.client, config.server, config.round.rounds

    def stage(steps: int, batch_size: int, rate: float, decay: float) -> Stage:
        return Stage(steps, batch_size, Optimisation(rate, decay, client.warmup, rounds * steps))

    return FedSP(
        align=stage(client.align_steps, client.batch_size, client.align_learning_rate, client.weight_decay),
        speak=stage(client.speak_steps, client.batch_size, client.learning_rate, client.weight_decay),
        server=stage(server.steps, server.batch_size, server.learning_rate, server.weight_decay),
        keep_optimizer=client.keep_optimizer,
        package=auxiliary.weights() if auxiliary and client.align_steps else {},
    )


def make_client(client: str, config: RunConfig, auxiliary: AuxiliaryModel, rows: list[Encoded], rest: Rest) -> Party:
    """A client, from its own rows and the package alone: nothing of the global model is needed."""
    spec = PromptSpec(config.prompt.space, config.prompt.length, auxiliary.prompt_shape, config.prompt.projection)
    held = max(1, round(HELD_OUT_AT_CLIENTS * len(rows))) if config.validation.by == "clients" and len(rows) > 1 else 0
    order = random.Random(derive_seed(config.seed, "held out", client)).sample(rows, len(rows))
    prompt = SoftPrompt(spec, seed=derive_seed(config.seed, "prompt")).to(auxiliary.device)
    return Party(client, auxiliary, prompt, order[held:], rest, order[:held])


def open_clients(config: RunConfig, auxiliary: AuxiliaryModel, questions: Questions, run: RunDirectory, max_tokens: int) -> Clients:
    """Every client of a run in one process. Parties are made when asked for, from rows and what rests on disk; few stay in memory."""

    @lru_cache(maxsize=32)
    def encoded(client: str) -> list[Encoded]:
        return encode_targets(auxiliary.tokenizer, questions.held(questions.partition.clients[client]), max_tokens)

    def party(client: str) -> Party:
        return make_client(client, config, auxiliary, encoded(client), run.rest(f"client {client}"))

    register = {client: len(rows) for client, rows in questions.partition.clients.items()}
    return Clients(make_method(config, auxiliary), register, party)
