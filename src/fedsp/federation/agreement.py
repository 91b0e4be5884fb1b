"""The signed agreement with clients: settings of a run, and its privacy guarantee."""

from __future__ import annotations

import math
from dataclasses import replace

from fedsp.config import Agreement, ClientSection, RunConfig, ServerSection
from fedsp.federation.methods.registry import Stages
from fedsp.privacy import epsilon
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
        prompt=config.prompt.model_copy(update={"init": "broadcast", "init_text": None}),
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

    def optimisation(rate: float, decay: float, steps: int) -> Optimisation:
        return Optimisation(
            learning_rate=rate, weight_decay=decay, warmup=client.warmup, total_steps=rounds * steps
        )

    auxiliary = Stage(
        name="auxiliary",
        seed_label="align",
        steps=client.auxiliary_steps,
        batch_size=client.batch_size,
        optimisation=optimisation(
            client.auxiliary_learning_rate, client.weight_decay, client.auxiliary_steps
        ),
        keep_optimizer=client.keep_optimizer,
    )
    messenger = Stage(
        name="prompt",
        seed_label="speak",
        steps=client.prompt_steps,
        batch_size=client.batch_size,
        optimisation=optimisation(client.learning_rate, client.weight_decay, client.prompt_steps),
        proximal=client.proximal,
        privacy=privacy,
        keep_optimizer=client.keep_optimizer,
    )
    at_server = Stage(
        name="server",
        seed_label="server",
        steps=server.steps if server else 0,
        batch_size=server.batch_size if server else client.batch_size,
        optimisation=(
            optimisation(server.learning_rate, server.weight_decay, server.steps)
            if server
            else messenger.optimisation
        ),
        keep_optimizer=client.keep_optimizer,
    )
    return Stages(auxiliary=auxiliary, messenger=messenger, server=at_server)


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
    release = privacy.steps(
        examples, agreement.client.batch_size, agreement.client.prompt_steps
    ).release
    return epsilon(
        (replace(release, count=agreement.runs * agreement.rounds * release.count),),
        privacy.delta,
        1e-3,
    )
