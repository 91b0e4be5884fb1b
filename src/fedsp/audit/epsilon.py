"""The epsilon audit of a finished private run: its clients' own examples as canaries, each in or
out by a coin, in one more run of the same configuration; or, at client level, canary clients beside
the real ones."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedsp.audit.epsilon_bounds import estimated_epsilon, lower_bound, spheres
from fedsp.audit.shadows import (
    Opened,
    Options,
    Shadow,
    alignment,
    changes_of,
    check_audited,
    open_audited,
    promised,
    rounds_again,
    train_shadow,
)
from fedsp.data.seeding import derive_seed
from fedsp.errors import RunError
from fedsp.experiments.run import round_config
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.agreement import agreement_of
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.clients import make_method
from fedsp.federation.messages import Request, Update
from fedsp.models.payload import as_row, from_row
from fedsp.privacy import LEDGER, Ledger

CANARIES = 1000


def audit_epsilon(folder: Path, options: Options) -> dict[str, Any]:
    """The audit of a finished private run: what is promised, what is refuted at 95 %, and what so
    many canaries could refute.

    Raises:
        RunError: there is no finished run of FedSP with simulated clients and differential privacy,
            or it has too few examples.
    """
    opened = open_audited(folder, options.callbacks)
    unit, delta = opened.run.config.privacy.unit, opened.run.config.privacy.delta
    promise, scores, included, about = (
        _example_level(opened, options.callbacks) if unit == "example" else _client_level(opened)
    )
    bound = lower_bound(scores, included, delta=delta)
    return {
        "unit": unit,
        "promised": promise,
        "broken": bound["epsilon"] > promise,
        **bound,
        **about,
    }


def check_promise(run: RunDirectory) -> None:
    """Refuse a run that is not for this audit, or that promises nothing (RunError)."""
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
    clients = sorted(set(opened.holders))
    holder = torch.tensor([clients.index(client) for client in opened.holders])[:, None]
    total = torch.zeros(len(opened.rows))
    for number in range(len(shadow.updates)):
        changes = changes_of(shadow, number, clients)
        cosines = alignment(opened, shadow.broadcasts[number], changes, opened.encoded)
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
        settings = round_config(run.config, run, len(opened.federation.clients.register))
        # without a section of the server's steps, it takes none
        method = make_method(agreement_of(config, opened.server.max_tokens), None)
        settings = replace(settings, max_change=math.inf)
        final = rounds_again(opened, run, method, register, transport, settings)
        promise = Ledger(run.path / LEDGER).epsilon(config.privacy.delta)
    total = as_row(final) - as_row(opened.start)
    cosines = (rows @ total / (config.privacy.clip * total.norm())).tolist()
    inside = [cosine for cosine, there in zip(cosines, included, strict=True) if there]
    about = {
        "canaries_are": "clients on a sphere, who answer whenever they are asked",
        "score": "cosine with the sum of the releases",
        "estimate": estimated_epsilon(inside, len(total), delta=config.privacy.delta),
    }
    return promise, cosines, included, about
