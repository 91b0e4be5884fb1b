"""The epsilon audit of a finished private run: its clients' own examples as canaries, each in or
out by a coin, in one more run of the same configuration; or, at client level, canary clients beside
the real ones."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fedsp.audit.epsilon_bounds import estimated_epsilon, lower_bound, spheres
from fedsp.audit.findings import EPSILON
from fedsp.audit.shadows import (
    Opened,
    Shadow,
    alignment,
    changes_of,
    check_audited,
    encoded_rows,
    open_audited,
    promised,
    train_shadow,
)
from fedsp.data.seeding import derive_seed
from fedsp.errors import RunError
from fedsp.experiments.run import round_config
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.loop import RunState, federate
from fedsp.federation.messages import Request, Update
from fedsp.federation.methods.base import Averaging
from fedsp.federation.party import Party
from fedsp.models.payload import as_row, from_row
from fedsp.privacy import LEDGER, Ledger
from fedsp.storage import write_json
from fedsp.training.loop import Optimisation
from fedsp.training.stage import Stage

CANARIES = 1000


def audit_epsilon(folder: Path, *, callbacks: Callbacks | None = None) -> dict[str, Any]:
    """The audit of a finished private run, also written to its `epsilon.json`: what is promised,
    what is refuted at 95 %, and what so many canaries could refute.

    A bound above the promise proves that the promise is broken; one below it proves nothing.

    Raises:
        RunError: there is no finished run of FedSP with simulated clients and differential privacy,
            or it has too few examples.
    """
    callbacks = callbacks or Callbacks()
    check_promise(RunDirectory.open(folder))
    opened = open_audited(folder, callbacks)
    unit, delta = opened.run.config.privacy.unit, opened.run.config.privacy.delta
    promise, scores, included, about = (
        _example_level(opened, callbacks) if unit == "example" else _client_level(opened)
    )
    bound = lower_bound(scores, included, delta=delta)
    figures = {
        "unit": unit,
        "promised": promise,
        "broken": bound.epsilon > promise,
        **asdict(bound),
        **about,
    }
    write_json(opened.run.path / EPSILON, figures)
    return figures


def check_promise(run: RunDirectory) -> None:
    """Whether there is anything to hold a run to.

    Raises:
        RunError: there is none, or the run is not for this audit.
    """
    check_audited(run)
    if run.config.privacy.unit == "none":
        raise RunError(
            f"{run.path} has no differential privacy: privacy.unit is 'none', so there is no"
            " epsilon to audit; audit a private run"
        )


def _example_level(
    opened: Opened, callbacks: Callbacks
) -> tuple[float, list[float], list[bool], dict[str, Any]]:
    if len(opened.rows) < CANARIES:
        raise RunError(
            f"{opened.run.path} has {len(opened.rows)} examples at its clients: the audit needs"
            f" {CANARIES} canaries, which are those examples: audit a larger run"
        )
    shadow: Shadow = train_shadow(opened, 0)
    callbacks.info("a run with half of the examples, by coins, is trained")
    rows, clients = encoded_rows(opened), sorted(set(opened.holders))
    prompt = opened.federation.clients.party(clients[0]).prompt
    holder = torch.tensor([clients.index(client) for client in opened.holders])[:, None]
    total = torch.zeros(len(rows))
    for number in range(len(shadow.updates)):
        cosines = alignment(
            opened.auxiliary,
            prompt,
            shadow.broadcasts[number],
            changes_of(shadow, number, clients),
            rows,
        )
        total += cosines.gather(1, holder)[:, 0]
    return (
        promised(opened, shadow),
        total.tolist(),
        shadow.included.tolist(),
        {
            "canaries_are": "the clients' own examples",
            "score": "cosine with the client's updates, summed over rounds",
        },
    )


def _client_level(opened: Opened) -> tuple[float, list[float], list[bool], dict[str, Any]]:
    """Canary clients on a sphere, who answer whenever they are asked, in a federation with the
    run's own settings: its sampling, checks, clipping, sum, noise and ledger."""
    config = opened.run.config
    seed = derive_seed(config.seed, "canary clients")
    rows = spheres(CANARIES, len(as_row(opened.start)), config.privacy.clip, seed)
    coins = random.Random(seed)
    included = [coins.random() < 0.5 for _ in rows]
    register = {str(index): 1 for index, there in enumerate(included) if there}

    def transport(requests: list[Request]) -> Iterable[Update]:
        for request in requests:
            yield Update(
                round=request.round,
                client=request.client,
                payload=from_row(
                    as_row(request.payload) + rows[int(request.client)], request.payload
                ),
            )

    with tempfile.TemporaryDirectory(prefix="fedsp-canaries-") as temporary:
        run = RunDirectory.create(
            config.model_copy(
                update={
                    "output": temporary,
                    "validation": config.validation.model_copy(update={"by": "none"}),
                }
            )
        )
        settings = replace(
            round_config(run.config, run, len(opened.federation.clients.register)),
            max_change=math.inf,
        )
        server = Party(
            id="server",
            model=opened.federation.model,
            messenger=opened.federation.messenger,
            examples=[],
            store=run.state_store("server"),
        )
        nothing = Stage(
            name="none",
            seed_label="none",
            steps=0,
            batch_size=1,
            optimisation=Optimisation(learning_rate=0.0),
        )
        begin = RunState(
            round=0, payload=opened.start, best=opened.start, best_round=0, best_loss=None
        )
        final = federate(
            Averaging(client_stage=nothing, server_stage=nothing),
            server,
            register,
            transport,
            settings,
            state=begin,
            validate=lambda payload: 0.0,
            save=lambda *_: None,
        )
        promise = Ledger(run.path / LEDGER).epsilon(config.privacy.delta)
    total = as_row(final.payload) - as_row(opened.start)
    cosines = (rows @ total / (config.privacy.clip * total.norm())).tolist()
    inside = [cosine for cosine, there in zip(cosines, included, strict=True) if there]
    about = {
        "canaries_are": "clients on a sphere, who answer whenever they are asked",
        "score": "cosine with the sum of the releases",
        "estimate": estimated_epsilon(inside, len(total), delta=config.privacy.delta),
    }
    return promise, cosines, included, about
