"""A whole run: from a run directory to parties, a method and the rounds. Whoever calls brings the engine and watches."""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedsp.algorithm import validation_loss
from fedsp.auxiliary import AuxiliaryModel, disclosed_share
from fedsp.clients import Clients, absent_clients, open_clients
from fedsp.config import RunConfig
from fedsp.data.encoding import encode_targets
from fedsp.data.tasks import Example
from fedsp.federation import Rules, Standing, federate
from fedsp.parties import Party
from fedsp.payload import PROMPT, Payload
from fedsp.rounds import Exchange, RoundRecord, derive_seed
from fedsp.runs import RunDirectory
from fedsp.server import Server, Watcher, evaluate_prompt, initial_prompt, load_questions, make_auxiliary, open_server, rows_digest


def run_experiment(run: RunDirectory, engine: Callable[[Clients], Exchange], watcher: Watcher, register: dict[str, int] | None = None) -> dict[str, Any]:
    """Run, or go on with, everything a run directory asks for; returns the figures that are also in `result.json`.

    With a `register` (clients elsewhere, and the examples of each) the clients' text is not read here.

    Raises:
        FedspError: whatever cannot be done, as one sentence; what was done before stands.
    """
    started = time.perf_counter()
    config = run.config
    questions = load_questions(config, run.partition())
    server = open_server(config, questions)
    asks = bool(questions.partition.clients if register is None else register) and config.round.clients != 0
    auxiliary = make_auxiliary(server, run.auxiliary, watcher) if asks else None
    run.pin({"data.train": rows_digest(questions.train), "auxiliary model": auxiliary.digest() if auxiliary else "none"})
    run.write_partition(questions.partition.to_json())
    standing = run.standing(watcher.say)
    prompt = initial_prompt(server).to(server.model.device)
    own = questions.held(questions.partition.server)
    party = Party("server", server.model, prompt, encode_targets(server.tokenizer, own, server.max_tokens), run.rest("server"))
    validation = encode_targets(server.tokenizer, _some(questions.validation, config), server.max_tokens)
    if auxiliary and register is None:
        clients = open_clients(config, auxiliary, questions, run)
    else:
        clients = absent_clients(config, auxiliary, register or {}, server.max_tokens)
    dropped = party.shortened + sum(row.dropped > 0 for row in validation)
    if dropped:
        watcher.say(
            f"{dropped} of the server's {len(party.examples) + len(validation)} examples are longer than {server.max_tokens} tokens and lose their oldest context"
        )

    def validate(payload: Payload) -> float:
        party.prompt.load(payload)
        loss = validation_loss(party, validation)
        assert loss is not None
        return loss

    def keep(now: Standing, record: RoundRecord) -> None:
        run.keep(now, record, replace(prompt.spec, projection=0))
        watcher.round_done(record, config.round.rounds)

    final = federate(clients.method, party, clients.register, engine(clients), _rules(config, run), standing=standing, validate=validate, keep=keep)
    figures = _figures(run, server, auxiliary, final, time.perf_counter() - started)
    if questions.test:
        prompt.load(final.best)
        figures["test"] = evaluate_prompt(server.model, prompt, questions.test, questions.task, server.tokenizer, server.max_tokens)
    figures["peak_memory_bytes"] = peak_memory()
    run.finish(final, figures, replace(prompt.spec, projection=0))
    return figures


def _rules(config: RunConfig, run: RunDirectory) -> Rules:
    section = config.round
    return Rules(
        run.identity,
        config.seed,
        section.rounds,
        section.clients,
        section.min_clients,
        section.weighting,
        section.max_change,
        config.validation.by,
        config.validation.every,
    )


def _some(validation: list[Example], config: RunConfig) -> list[Example]:
    count = min(len(validation), config.validation.examples)
    return random.Random(derive_seed(config.seed, "validation")).sample(validation, count)


def _figures(run: RunDirectory, server: Server, auxiliary: AuxiliaryModel | None, final: Standing, seconds: float) -> dict[str, Any]:
    records = run.records()
    return {
        "best_round": final.best_round,
        "validation_loss": final.best_loss,
        "bytes_down": sum(record["bytes_down"] for record in records),
        "bytes_up": sum(record["bytes_up"] for record in records),
        "prompt_bytes": final.best[PROMPT].numel() * 4,
        "disclosed_share": disclosed_share(auxiliary, server.model) if auxiliary else 0.0,
        "shortened_client_examples": max((record["shortened_examples"] for record in records), default=0),
        "failures": sum(len(record["failed"]) for record in records),
        "seconds": seconds,
        "seconds_distillation": server.seconds.get("distillation", 0.0),
        "seconds_rounds": sum(record["seconds"] for record in records),
        "seconds_training": sum(record["seconds_training"] for record in records),
    }


def peak_memory() -> int:
    """Peak resident memory of this process, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
