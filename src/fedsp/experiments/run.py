"""A whole run: from a run directory to parties, a method and the rounds. The caller chooses the
transport."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fedsp.config import RunConfig
from fedsp.config_file import makes_package
from fedsp.data.dataset import examples_digest, load_dataset
from fedsp.data.encoding import Encoded, encode_choices, encode_targets
from fedsp.data.files import text_digest
from fedsp.data.seeding import derive_seed
from fedsp.errors import PrivacyError, StorageError
from fedsp.experiments.build import Federation, build_federation
from fedsp.experiments.costs import measure
from fedsp.experiments.privacy_statement import privacy_statement
from fedsp.experiments.run_directory import STATEMENT, RunDirectory, trained_rounds
from fedsp.experiments.server_setup import (
    Server,
    open_server,
    score_test,
    validation_sample,
)
from fedsp.federation.aggregation.mean import ServerOptimizer
from fedsp.federation.aggregation.private import DPAggregator
from fedsp.federation.aggregation.robust import Robust
from fedsp.federation.agreement import agreement_of, example_privacy
from fedsp.federation.attacks import triggered
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.clients import Clients
from fedsp.federation.codecs import FLOAT32
from fedsp.federation.loop import RoundConfig, RunState, federate
from fedsp.federation.messages import Failure, Request, RoundRecord, Transport, Update
from fedsp.federation.methods.registry import find_method
from fedsp.federation.party import Party
from fedsp.models.loading import in_few_bits
from fedsp.models.payload import Payload
from fedsp.models.soft_prompt import SoftPrompt
from fedsp.privacy import LEDGER, Ledger, noise_for
from fedsp.storage import write_json
from fedsp.training.evaluation import by_client, in_parts
from fedsp.training.stage import validation_loss


def run_experiment(
    run: RunDirectory,
    engine: Callable[[Clients], Transport],
    callbacks: Callbacks,
    register: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Run, or go on with, everything a run directory asks for; returns the figures that are also in
    `result.json`.

    With a `register` (clients elsewhere, and the examples of each) the clients' text is not read
    here.

    Raises:
        FedspError: whatever cannot be done, as one sentence; what was done before stands.
    """
    if run.finished:
        return run.result()
    started, before = time.perf_counter(), run.seconds()
    forget_peak_memory()
    config = run.config
    entry = find_method(config.method)
    dataset = load_dataset(config, run.partition())
    server = open_server(config, dataset)
    if entry.deployable and config.round.clients != 0 and register is None:
        _check_promises(config, run, server)
    held = {client: len(rows) for client, rows in dataset.partition.clients.items()}
    asked = (
        (config.round.may_ask(held) if register is None else register) if entry.federated else {}
    )
    if not run.pinned:
        config.require_judges(asked)
    if asked and (config.round.clients or 0) > len(asked):
        callbacks.info(
            f"round.clients = {config.round.clients}: all {len(asked)} clients are asked"
        )
    # what cannot be trained on or scored is found out before a package is made
    if not run.pinned:
        theirs = [index for rows in dataset.partition.clients.values() for index in rows]
        encode_targets(server.tokenizer, dataset.held(theirs), server.max_tokens)
    own = dataset.held(dataset.partition.server)
    examples = encode_targets(server.tokenizer, own, server.max_tokens)
    validation = encode_targets(server.tokenizer, validation_sample(server), server.max_tokens)
    encode_choices(server.tokenizer, dataset.test, server.max_tokens)
    federation = build_federation(server, run, callbacks, register)
    auxiliary = federation.package

    def spent() -> dict[str, float]:
        return {
            "all": before["all"] + time.perf_counter() - started,
            "distillation": server.seconds.get("distillation", before["distillation"]),
        }

    run.write_seconds(spent())
    run.pin(
        {
            "data.train": dataset.train_digest,
            "global model": server.digest,
            "auxiliary model": auxiliary.digest() if auxiliary else "none",
            **_public_text(config),
            "data.validation": examples_digest(dataset.validation),
            "data.test": examples_digest(dataset.test),
        }
    )
    run.write_partition(asdict(dataset.partition))
    state = run.state(callbacks.info)
    party = federation.server(examples, run)
    spec = (
        replace(federation.messenger.spec, projection=0)
        if isinstance(federation.messenger, SoftPrompt)
        else None
    )
    if dataset.partition.test:
        callbacks.info(
            f"data.test names no file: {len(dataset.partition.test)} of the {len(dataset.train)}"
            " examples in data.train are held out for the test"
        )
    dropped = party.shortened + sum(row.dropped > 0 for row in validation)
    if dropped:
        callbacks.info(
            f"{dropped} of the server's {len(party.examples) + len(validation)} examples are longer"
            f" than {server.max_tokens} tokens and lose their oldest context"
        )

    # before anything is loaded into the messenger
    untuned = _test_untuned(server, party) if dataset.test and entry.rounds else None

    def validate(payload: Payload) -> float:
        party.messenger.load(payload)
        loss = validation_loss(party.model, party.messenger, validation)
        assert loss is not None
        return loss

    def write_statement(asking: Sequence[str] = ()) -> dict[str, Any] | None:
        statement = privacy_statement(
            run,
            federation.clients.register,
            server.max_tokens,
            asking,
            tested=auxiliary or federation.model,
        )
        if statement:
            write_json(run.path / STATEMENT, statement)
        return statement

    def save(now: RunState, record: RoundRecord) -> None:
        run.save_round(now, record, now.best, spec)
        run.write_seconds(spent())
        write_statement()
        callbacks.round_done(record, config.round.rounds)

    settings = round_config(config, run, len(federation.clients.register))
    if isinstance(settings.aggregator, DPAggregator):
        noise = (
            settings.aggregator.noise_multiplier
            * math.sqrt(sum(tensor.numel() for tensor in party.messenger.payload().values()))
            / settings.aggregator.expected
        )
        callbacks.info(
            f"the noise on the mean of {settings.aggregator.expected:g} clients has {noise:.3g}"
            " times the L2 norm of the largest change that one of them can make"
        )
    transport = engine(federation.clients)
    if federation.attack:
        transport = federation.attack.transport(transport)
    if config.privacy.unit == "example":
        transport = _with_statement(transport, write_statement)
    final = federate(
        federation.clients.method,
        party,
        federation.clients.register,
        transport,
        settings,
        state=state,
        validate=validate,
        save=save,
        start=_start_of_clients(config, federation) if state is None else None,
    )
    if asked and config.validation.by == "clients" and final.best_loss is None:
        callbacks.info("no client has told a validation loss: the last round's numbers are taken")
    figures = _figures(run, federation, final, spent())
    figures["cost"] = _cost(
        federation, party, final, config.seed, validation if config.privacy.unit != "none" else None
    )
    if dataset.test:
        party.messenger.load(final.best)
        figures |= _test(run, server, party, federation)
        if untuned:
            figures["zero_shot"] = untuned
        if entry.deployable and auxiliary:
            figures["auxiliary_test"] = _test_auxiliary(server, federation, final.best)
    if statement := write_statement():
        figures["epsilon"] = statement["epsilon"]
        callbacks.info(statement["sentence"])
    figures["peak_memory_bytes"] = peak_memory()
    run.finish(final.best, final.best_round, figures, spec)
    return figures


def _start_of_clients(config: RunConfig, federation: Federation) -> Payload | None:
    """What every client's messenger holds before the first round; None where nothing is sent as a
    change, or clients share none that is made anew."""
    if config.compression.down == FLOAT32 or federation.client_messenger is None:
        return None
    return federation.client_messenger().payload()


def _public_text(config: RunConfig) -> dict[str, str]:
    """The digest of the public text, where the run makes its package of it; it need not be there
    any more once that is made."""
    distill = config.distill
    if not (makes_package(config) and distill.reads_files):
        return {}
    gone = not all(Path(name).exists() for name in distill.text)
    return {} if gone else {"distill.text": text_digest(distill.text)}


def _test_untuned(server: Server, party: Party) -> dict[str, float]:
    """Figures of the test questions without what is tuned, while the messenger changes nothing."""
    tests = server.dataset.test
    return score_test(party.model, None, tests, server.tokenizer, server.max_tokens)[0]


def _test(
    run: RunDirectory, server: Server, party: Party, federation: Federation
) -> dict[str, Any]:
    """Figures of what is in place on the test questions, and by client where something divides the
    questions."""
    dataset = server.dataset
    with torch.no_grad():
        prefix = party.messenger.prefix(party.model)
    figures, scored = score_test(
        party.model, prefix, dataset.test, server.tokenizer, server.max_tokens
    )
    run.write_scores(
        asdict(row)
        | {
            "right": row.right,
            "log_likelihoods": [round(value, 5) for value in row.log_likelihoods],
        }
        for row in scored
    )
    groups, held, parts = dataset.groups, dataset.partition.clients, in_parts(scored, dataset.test)
    if federation.attack and federation.attack.kind == "backdoor":
        poisoned = [triggered(example) for example in dataset.test]
        figures["attack_success"] = score_test(
            party.model, prefix, poisoned, server.tokenizer, server.max_tokens
        )[0]["accuracy"]
    # what kinds of questions a client holds is its own
    if groups is None or not held or run.config.privacy.unit != "none":
        return {"test": figures, **parts}
    own = {client: [groups[0][index] for index in rows] for client, rows in held.items()}
    return {"test": figures, **parts, "clients": by_client(scored, groups[1], own)}


def _test_auxiliary(server: Server, federation: Federation, best: Payload) -> dict[str, float]:
    """Figures of the same questions through the package, which say what was learned, where those of
    the global model say what of it was transferred."""
    auxiliary, dataset = federation.package, server.dataset
    assert auxiliary is not None and federation.client_messenger is not None
    messenger = federation.client_messenger()
    messenger.load(best)
    with torch.no_grad():
        prefix = messenger.prefix(auxiliary)
    return score_test(auxiliary, prefix, dataset.test, server.tokenizer, server.max_tokens)[0]


def _with_statement(
    transport: Transport, write_statement: Callable[[Sequence[str]], object]
) -> Transport:
    """The statement counts a round before anybody is asked in it, so that it is never behind what
    was released."""

    def transport_with_statement(requests: list[Request]) -> Iterable[Update | Failure]:
        write_statement([request.client for request in requests if request.train])
        return transport(requests)

    return transport_with_statement


def _cost(
    federation: Federation, party: Party, final: RunState, seed: int, instead: list[Encoded] | None
) -> dict[str, dict[str, float]]:
    """The measured cost of one round of the server, and of the first client if its text is here;
    on the rows `instead`, if given, so that a private client's rows stay unused. Quantized models
    are left out: torch's counter does not see their operations.
    """
    costs = {}
    method = federation.clients.method
    party.messenger.load(final.best)
    if not in_few_bits(federation.model):
        costs["server"] = measure(method, party, "server", derive_seed(seed, "server", 1))
    party.messenger.load(final.best)
    if not federation.clients.here:
        return costs
    name = min(federation.clients.register)
    client = federation.clients.party(name)
    if instead is not None:
        if not instead:
            return costs
        client = replace(client, examples=instead)
    if in_few_bits(client.model):
        return costs
    client.messenger.load(final.payload)
    costs["client"] = measure(method, client, "client", derive_seed(seed, "client", name, 1))
    return costs


def _check_promises(config: RunConfig, run: RunDirectory, server: Server) -> None:
    """Check, before any training, that the run's privacy and robust rule hold for its clients."""
    held = config.round.may_ask(
        {client: len(rows) for client, rows in server.dataset.partition.clients.items()}
    )
    round_config(config, run, len(held))
    privacy = example_privacy(agreement_of(config, server.max_tokens))
    if privacy:
        for examples in set(held.values()):
            privacy.steps(examples, config.client.batch_size, config.client.prompt_steps)


def round_config(config: RunConfig, run: RunDirectory, clients: int) -> RoundConfig:
    """What holds in every round of a run with so many clients.

    Raises:
        PrivacyError: no noise is enough for the promise, or its delta is none.
        StorageError: the ledger is not the one that the rounds so far were paid from.
        TooFewClients: fewer are asked than the robust rule needs.
    """
    section = config.round
    return RoundConfig(
        run=run.identity,
        seed=config.seed,
        rounds=section.rounds if find_method(config.method).rounds else 0,
        clients=section.clients,
        min_clients=section.min_clients,
        weighting=section.weighting,
        max_change=section.max_change,
        validate_by=config.validation.by,
        validate_every=config.validation.every,
        patience=config.validation.patience
        and config.validation.patience * config.validation.every,
        optimizer=ServerOptimizer(section.optimizer, section.learning_rate, section.momentum),
        **_combining(config, run, clients),
        max_loss_rise=config.aggregation.max_loss_rise,
        up=config.compression.up,
        down=config.compression.down,
    )


def _combining(config: RunConfig, run: RunDirectory, clients: int) -> dict[str, Any]:
    """How many payloads become one: the weighted mean, a robust rule, or the private mean with its
    own way of asking clients."""
    privacy, rounds = config.privacy, config.round.rounds
    if privacy.unit == "client" and clients:
        if privacy.delta * clients >= 1:
            raise PrivacyError(
                f"privacy.delta = {privacy.delta:g} is too large for {clients} clients: with one"
                f" chance in {1 / privacy.delta:g} all text of a client may be disclosed; set it"
                f" below {1 / clients:.1g}"
            )
        expected = config.round.asked(clients)
        rate = expected / clients
        noise = privacy.noise_multiplier or noise_for(
            privacy.epsilon or 0.0, privacy.delta, rate, rounds
        )
        ledger, done = Ledger(run.path / LEDGER), len(trained_rounds(run.records()))
        if sum(release.count for release in ledger.releases()) < done:
            raise StorageError(
                f"the privacy ledger {ledger.path} has fewer releases than the {done} finished"
                " rounds, so the epsilon spent is unknown: restore it from a backup"
            )
        return {
            "aggregator": DPAggregator(
                bound=privacy.clip,
                noise_multiplier=noise,
                sampling_rate=rate,
                expected=expected,
                delta=privacy.delta,
                epsilon=privacy.epsilon,
                ledger=ledger,
            ),
            "sampling_rate": rate,
        }
    robust = robust_rule(config, clients)
    return {"aggregator": robust} if robust else {}


def robust_rule(config: RunConfig, clients: int) -> Robust | None:
    """The run's rule against malicious clients; None where answers are simply averaged.

    Raises:
        TooFewClients: fewer are asked than the rule needs.
    """
    section = config.aggregation
    if not section.robust:
        return None
    robust = Robust(
        rule=section.rule,
        malicious=section.malicious,
        mixing=section.mixing,
        norm_bound=section.norm_bound,
    )
    if asked := config.round.asked(clients):
        robust.malicious_among(asked)
    return robust


def _figures(
    run: RunDirectory, federation: Federation, final: RunState, seconds: Mapping[str, float]
) -> dict[str, Any]:
    records = run.records()
    shortened = max((record["shortened_examples"] for record in records), default=0)
    # goes from 0 to 1 with one long example of one client
    told = run.config.privacy.unit != "client"
    return ({"shortened_client_examples": shortened} if told else {}) | {
        "best_round": final.best_round,
        "validation_loss": final.best_loss,
        "bytes_down": sum(record["bytes_down"] for record in records),
        "bytes_up": sum(record["bytes_up"] for record in records),
        "message_bytes": sum(tensor.numel() * 4 for tensor in final.best.values()),
        "package_bytes": federation.package.bytes if federation.package else 0,
        "disclosed_share": federation.disclosed_share,
        "failures": sum(len(record["failed"]) for record in records),
        "updates": sum(len(record["answered"]) for record in trained_rounds(records)),
        "seconds": seconds["all"],
        "seconds_distillation": seconds["distillation"],
        "seconds_rounds": sum(record["seconds"] for record in records),
        "seconds_training": sum(record["seconds_training"] for record in records),
    }


def forget_peak_memory() -> None:
    """Let the peak count from here on, where the system can do that; else it stays that of the
    whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident memory of this process, bytes: since it was last forgotten, on Linux."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM:")
        )
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
