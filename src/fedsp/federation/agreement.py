"""The signed agreement with clients: settings of a run, and its privacy guarantee."""

from __future__ import annotations

import math
from dataclasses import replace

from fedsp.config import Agreement, ClientSection, RunConfig, ServerSection, TaskSection
from fedsp.federation.methods.registry import Stages
from fedsp.training.dp_sgd import ExamplePrivacy
from fedsp.training.loop import Optimisation
from fedsp.training.stage import Stage


def agreement_of(config: RunConfig, max_tokens: int) -> Agreement:
    """The part of a configuration that clients need, without the server's file names."""
    return Agreement(
        seed=config.seed,
        rounds=config.round.rounds,
        max_tokens=max_tokens,
        positions=config.model.positions,
        data=TaskSection(**config.data.model_dump(include=set(TaskSection.model_fields))),
        prompt=config.prompt.model_copy(update={"init": "broadcast", "init_text": None}),
        messenger=config.messenger,
        client=config.client,
        clients_validate=config.validation.by == "clients",
        privacy=config.privacy,
        compression=config.compression,
        runs=config.federation.runs if config.federation else 1,
    )


def stages_of(
    client: ClientSection,
    server: ServerSection | None,
    rounds: int,
    privacy: ExamplePrivacy | None = None,
) -> Stages:
    """The three stages with a configuration's settings. A client does not know the server's, which
    then has no steps."""

    def stage(
        name: str, label: str, of: ClientSection | ServerSection, steps: int, rate: float
    ) -> Stage:
        return Stage(
            name=name,
            seed_label=label,
            steps=steps,
            batch_size=of.batch_size,
            optimisation=Optimisation(
                learning_rate=rate,
                weight_decay=of.weight_decay,
                warmup=client.warmup,
                total_steps=rounds * steps,
            ),
            keep_optimizer=client.keep_optimizer,
        )

    steps, rate = (server.steps, server.learning_rate) if server else (0, client.learning_rate)
    messenger = stage("prompt", "speak", client, client.prompt_steps, client.learning_rate)
    return Stages(
        auxiliary=stage(
            "auxiliary", "align", client, client.auxiliary_steps, client.auxiliary_learning_rate
        ),
        messenger=replace(
            messenger,
            proximal=client.proximal,
            privacy=privacy,
            reads=0 if client.auxiliary_steps else rounds * messenger.steps * messenger.batch_size,
        ),
        server=stage("server", "server", server or client, steps, rate),
    )


def example_privacy(agreement: Agreement) -> ExamplePrivacy | None:
    """The privacy that every client gives each of its examples; None without example-level
    privacy."""
    section = agreement.privacy
    if section.unit != "example":
        return None
    return ExamplePrivacy(
        bound=section.clip,
        delta=section.delta,
        rounds=agreement.rounds,
        epsilon=section.epsilon,
        noise_multiplier=section.noise_multiplier,
    )


def promised_epsilon(agreement: Agreement, examples: int) -> float:
    """The upper bound on the epsilon of one example over all runs that the signed agreement allows,
    for a client with this many examples; infinite without example-level privacy."""
    privacy = example_privacy(agreement)
    if privacy is None:
        return math.inf
    if privacy.epsilon is not None:
        return agreement.runs * privacy.epsilon
    client, rounds = agreement.client, agreement.runs * agreement.rounds
    return privacy.spent(examples, client.batch_size, client.prompt_steps, rounds)
