"""The epsilon audit of a finished private run: its clients' own examples as canaries, each in or out by a coin, in one more run of the same configuration; or, at
client level, canary clients beside the real ones."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedsp.audit.epsilon import estimated_epsilon, lower_bound, spheres
from fedsp.audit.shadows import Opened, Shadow, alignment, changes_of, encoded_rows, open_audited, train_shadow
from fedsp.audit.tables import EPSILON
from fedsp.errors import RunError
from fedsp.payload import PROMPT, as_row, from_row
from fedsp.privacy import private_mean
from fedsp.rounds import derive_seed
from fedsp.server import Watcher
from fedsp.statement import STATEMENT
from fedsp.storage import write_json

CANARIES = 1000


def audit_epsilon(folder: Path, *, watcher: Watcher | None = None) -> dict[str, Any]:
    """The audit of a finished private run, also written to its `epsilon.json`: what is promised, what is refuted at 95 %, and what so many canaries could refute.

    A bound above the promise proves that the promise is broken; one below it proves nothing.

    Raises:
        RunError: there is no finished run of FedSP with simulated clients and differential privacy, or it has too few examples.
    """
    watcher = watcher or Watcher()
    opened = open_audited(folder, watcher)
    unit, delta = opened.run.config.privacy.unit, opened.run.config.privacy.delta
    if unit == "none":
        raise RunError(f"{folder} promises nothing: privacy.unit is 'none', so there is no epsilon to hold it to")
    promised = float(opened.run.read_json(opened.run.path / STATEMENT)["epsilon"])
    scores, included, about = _example_level(opened, watcher) if unit == "example" else _client_level(opened)
    bound = lower_bound(scores, included, delta=delta)
    figures = {"unit": unit, "promised": promised, "broken": bound.epsilon > promised, **asdict(bound), **about}
    write_json(opened.run.path / EPSILON, figures)
    return figures


def _example_level(opened: Opened, watcher: Watcher) -> tuple[list[float], list[bool], dict[str, Any]]:
    if len(opened.rows) < CANARIES:
        raise RunError(
            f"{opened.run.path} has {len(opened.rows)} examples at its clients: the audit needs {CANARIES} canaries, and takes the examples themselves"
        )
    shadow: Shadow = train_shadow(opened, 0)
    watcher.say("a run with half of the examples, by coins, is trained")
    rows, clients = encoded_rows(opened), sorted(set(opened.holders))
    prompt = opened.sides.clients.party(clients[0]).prompt
    holder = torch.tensor([clients.index(client) for client in opened.holders])[:, None]
    total = torch.zeros(len(rows))
    for number in range(len(shadow.updates)):
        cosines = alignment(opened.auxiliary, prompt, shadow.broadcasts[number], changes_of(shadow, number, clients), rows)
        total += cosines.gather(1, holder)[:, 0]
    return (
        total.tolist(),
        shadow.included.tolist(),
        {"canaries_are": "the clients' own examples", "score": "cosine with the client's updates, summed over rounds"},
    )


def _client_level(opened: Opened) -> tuple[list[float], list[bool], dict[str, Any]]:
    """Canary clients on a sphere, the same ones in every round, through the run's own clipping, sum and noise."""
    config = opened.run.config
    ledger = opened.run.read_json(opened.run.path / STATEMENT)
    sent = opened.sides.method.init(opened.sides.clients.party(min(opened.holders)))
    start = as_row(sent)
    bound, noise, rounds = config.privacy.clip, float(ledger["noise_multiplier"]), int(ledger["releases"])
    seed = derive_seed(config.seed, "canary clients")
    rows = spheres(CANARIES, len(start), bound, seed)
    coins = random.Random(seed)
    included = [coins.random() < 0.5 for _ in rows]
    replies = {str(index): from_row(start + row, sent) for index, (row, there) in enumerate(zip(rows, included, strict=True)) if there}
    total = torch.zeros_like(start)
    for _ in range(rounds):
        total += as_row(private_mean(sent, replies, bound=bound, noise_multiplier=noise, expected=float(len(opened.sides.clients.register)))) - start
    cosines = (rows @ total / (bound * total.norm())).tolist()
    inside = [cosine for cosine, there in zip(cosines, included, strict=True) if there]
    about = {
        "canaries_are": "clients on a sphere, in every round",
        "score": "cosine with the sum of the releases",
        "estimate": estimated_epsilon(inside, len(start), delta=config.privacy.delta),
        "numbers": sum(tensor.numel() for name, tensor in sent.items() if name == PROMPT),
    }
    return cosines, included, about
