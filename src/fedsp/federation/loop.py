"""The round loop: sample, exchange, admit, aggregate, server step, validate, keep. It knows tensors by name and nothing of language models."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, ParamSpec, TypeVar

import torch

from fedsp.data.seeding import derive_seed
from fedsp.errors import TooFewClients, TrainingDiverged
from fedsp.federation.aggregation.mean import Aggregator, ServerOptimizer, WeightedMean, update_cosine, validate_update
from fedsp.federation.codecs import FLOAT32, Codec
from fedsp.federation.compression import difference, say
from fedsp.federation.messages import Request, RoundRecord, Transport, Update, sample_clients
from fedsp.federation.methods.base import Method
from fedsp.federation.party import Party
from fedsp.models.payload import Payload
from fedsp.privacy import poisson_sample


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """What holds in every round. `clients` None asks all, 0 asks none; `max_change` is a root mean square per number. With `sampling_rate` each client is
    asked with that probability, and not by the seed; `max_loss_rise` is the bound of the acceptance gate, a share of the loss before; `up` and `down` are the
    codings of replies and of broadcasts."""

    run: str
    seed: int
    rounds: int
    clients: int | None
    min_clients: int
    weighting: Literal["examples", "uniform"]
    max_change: float
    validate_by: Literal["server", "clients", "none"]
    validate_every: int = 1
    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    combine: Aggregator = field(default_factory=WeightedMean)
    sampling_rate: float | None = None
    max_loss_rise: float | None = None
    up: Codec = FLOAT32
    down: Codec = FLOAT32


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands after a round: what is broadcast next, the best payload so far with its validation loss, the server optimizer's state, what the
    broadcast still owes to the server's own payload, and the bytes that make it of the one before."""

    round: int
    payload: Payload
    best: Payload
    best_round: int
    best_loss: float | None
    optimizer: Payload = field(default_factory=dict)
    owed: Payload = field(default_factory=dict)
    change: bytes = b""

    def consider(self, payload: Payload, round: int, loss: float | None) -> RunState:
        """This standing with a candidate, which becomes the best if its loss is the lowest so far."""
        if loss is None or not math.isfinite(loss) or (self.best_loss is not None and loss >= self.best_loss):
            return self
        return replace(self, best=payload, best_round=round, best_loss=loss)


Given = ParamSpec("Given")
Result = TypeVar("Result")
Register = Mapping[str, int]
"""The server's own record of its clients: id to number of examples."""
Validate = Callable[[Payload], float]
Keep = Callable[[RunState, RoundRecord], None]


def federate(
    method: Method, server: Party, register: Register, exchange: Transport, rules: RoundConfig, *, standing: RunState | None, validate: Validate, keep: Keep
) -> RunState:
    """Run the rounds that are left after `standing` (None: from the start), and return the last standing.

    `keep` is called after each round, before anything of the next one is sent. With validation by clients, what a client reports is its loss
    under the prompt it received, so each prompt is judged a round later, and the last one in an exchange of its own.

    Raises:
        TooFewClients: a round had fewer admitted updates than `rules.min_clients`; the standing before it has been kept.
        TrainingDiverged: a loss was not finite, with the round and the party.
    """
    work = _Timed()
    validate = _Tried(work(validate))
    server_update = work(method.server_update)
    if standing is None:
        payload = method.init(server)
        first = validate(payload) if rules.validate_by == "server" else None
        standing = RunState(round=0, payload=payload, best=payload, best_round=0, best_loss=first)
    for round in range(standing.round + 1, rules.rounds + 1):
        started = time.perf_counter()
        work.seconds = 0.0
        asked = _asked(register, rules, round)
        updates, failed, traffic = _collect(exchange, _requests(asked, round, standing, rules), rules.max_change)
        if len(updates) < min(rules.min_clients, len(asked)):
            reasons = "; ".join(f"{client}: {reason}" for client, reason in sorted(failed.items()))
            raise TooFewClients(
                f"round {round} has {len(updates)} admitted updates of {len(asked)} asked, round.min_clients is {rules.min_clients} ({reasons or 'no replies'}); the run stands after round {standing.round} and can be resumed"
            )
        if rules.validate_by == "clients" and asked:
            standing = standing.consider(standing.payload, standing.round, _clients_loss(updates, register))
        weights = {client: float(register[client]) if rules.weighting == "examples" else 1.0 for client in updates}
        sent, told = standing.payload, {client: update.payload for client, update in updates.items()}
        own_seed = derive_seed(rules.seed, "server", round)
        try:
            reference = server_update(server, sent, round, own_seed)[0] if rules.combine.by_reference else None
            aggregated, optimizer = sent, standing.optimizer
            if told or rules.combine.always:
                mean = rules.combine(sent, told, weights, len(asked), reference)
                aggregated, optimizer = rules.optimizer.step(sent, mean, standing.optimizer)
            aggregated = _plus(aggregated, standing.owed)
            gate = _gate(standing, aggregated, validate, rules.max_loss_rise)
            if not gate.passed:
                aggregated, optimizer = _plus(sent, standing.owed), standing.optimizer
            payload, server_loss = server_update(server, aggregated, round, own_seed)
            if not all(torch.isfinite(tensor).all() for tensor in payload.values()):
                raise TrainingDiverged("what it tuned has numbers that are not finite: lower server.learning_rate")
        except TrainingDiverged as error:
            raise TrainingDiverged(f"round {round}, server: {error}; the prompt of round {standing.round} is kept") from error
        standing = replace(standing, round=round, optimizer=optimizer)
        validation = None
        if rules.validate_by == "server" and (round % rules.validate_every == 0 or round == rules.rounds):
            validation = validate(payload)
            standing = standing.consider(payload, round, validation)
        elif rules.validate_by == "none":
            standing = replace(standing, best=payload, best_round=round)
        elif rules.validate_by == "clients":
            validation = _clients_loss(updates, register)
        standing = _to_broadcast(standing, sent, payload, rules.down)
        seconds_training = work.seconds + sum(update.seconds for update in updates.values())
        keep(
            standing,
            RoundRecord(
                round=round,
                asked=asked,
                answered=sorted(updates),
                failed=dict(sorted(failed.items())),
                bytes_down=traffic[0],
                bytes_up=traffic[1],
                client_losses=_mean_losses(updates),
                server_loss=server_loss,
                validation=validation,
                best_round=standing.best_round,
                shortened_examples=sum(update.shortened for update in updates.values()),
                seconds=time.perf_counter() - started,
                seconds_training=seconds_training,
                update_cosine=update_cosine(told, sent),
                spikes=sum(update.spikes for update in updates.values()),
                gate_loss=gate.loss,
                accepted=gate.passed,
            ),
        )
    if rules.validate_by == "clients" and register:
        asked = sample_clients(list(register), len(register) if rules.clients is None else rules.clients, rules.seed, rules.rounds + 1)
        updates, _, _ = _collect(exchange, _requests(asked, rules.rounds + 1, standing, rules, train=False), rules.max_change)
        standing = standing.consider(standing.payload, standing.round, _clients_loss(updates, register))
    return standing


def _asked(register: Register, rules: RoundConfig, round: int) -> list[str]:
    """Those asked in a round: drawn from the seed, or, where privacy counts on the draw, by nobody who can be known."""
    ordered = sorted(register)
    if rules.sampling_rate is not None:
        return [ordered[index] for index in poisson_sample(len(ordered), rules.sampling_rate)]
    return sample_clients(ordered, len(ordered) if rules.clients is None else rules.clients, rules.seed, round)


class _Timed:
    """Seconds spent in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[Given, Result]) -> Callable[Given, Result]:
        def timed(*arguments: Given.args, **named: Given.kwargs) -> Result:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


class _Tried:
    """Validation losses of the last three prompts: what was broadcast, aggregated and tuned is often one and the same, and is not tried twice."""

    def __init__(self, validate: Validate) -> None:
        self.validate = validate
        self.tried: deque[tuple[Payload, float]] = deque(maxlen=3)

    def __call__(self, payload: Payload) -> float:
        known = next((loss for one, loss in self.tried if one is payload), None)
        if known is None:
            known = self.validate(payload)
            self.tried.append((payload, known))
        return known


@dataclass(frozen=True)
class _Gate:
    loss: float | None = None
    passed: bool = True


def _gate(standing: RunState, aggregated: Payload, validate: Validate, max_loss_rise: float | None) -> _Gate:
    """The aggregate tried on the server's validation questions, against the lowest loss so far: against what was broadcast a small rise would pass in every
    round. A loss that is not finite does not pass."""
    if max_loss_rise is None or aggregated is standing.payload:
        return _Gate()
    lowest, loss = standing.best_loss, validate(aggregated)
    return _Gate(loss, math.isfinite(loss) and (lowest is None or loss <= lowest * (1 + max_loss_rise)))


def _requests(asked: list[str], round: int, standing: RunState, rules: RoundConfig, train: bool = True) -> list[Request]:
    return [
        Request(
            run=rules.run,
            round=round,
            client=client,
            seed=derive_seed(rules.seed, "client", client, round),
            payload=standing.payload,
            train=train,
            change=standing.change,
            sent_in=rules.down,
            answer_in=rules.up,
        )
        for client in asked
    ]


def _to_broadcast(standing: RunState, sent: Payload, payload: Payload, down: Codec) -> RunState:
    """What the next round is sent: the payload, or as much of its change as the coding says; the rest is owed."""
    if down.exact:
        return replace(standing, payload=payload)
    change, said, owed = say(difference(payload, sent), {}, down)
    return replace(standing, payload=_plus(sent, said), owed=owed, change=change)


def _plus(payload: Payload, more: Payload) -> Payload:
    return {name: payload[name] + more[name] for name in sorted(payload)} if more else payload


def _collect(exchange: Transport, requests: list[Request], max_change: float) -> tuple[dict[str, Update], dict[str, str], tuple[int, int]]:
    """Admitted updates and reasons of failure, by client, and the bytes sent down and up, refused ones included."""
    by_client = {request.client: request for request in requests}
    updates: dict[str, Update] = {}
    failed: dict[str, str] = {}
    down = up = 0
    for reply in exchange(requests) if requests else ():
        down, up = down + reply.bytes_down, up + reply.bytes_up
        reason = validate_update(reply, by_client, updates, max_change)
        if reason is None and isinstance(reply, Update):
            updates[reply.client] = reply
        else:
            failed[reply.client] = str(reason)
    failed |= {client: "did not answer" for client in by_client if client not in updates and client not in failed}
    return updates, failed, (down, up)


def _clients_loss(updates: Mapping[str, Update], register: Register) -> float | None:
    """The median of the clients' validation losses, each weighted by the register; what is not a number is not counted. A mean would let one client choose the
    round: 0 once, and the largest loss that is admitted in every other."""
    told = sorted(
        (update.validation, register[update.client]) for update in updates.values() if update.validation is not None and math.isfinite(update.validation)
    )
    half, below = sum(weight for _, weight in told) / 2, 0.0
    for place, (loss, weight) in enumerate(told):
        below += weight
        if below > half or place == len(told) - 1:
            return loss
        if below == half:
            return (loss + told[place + 1][0]) / 2
    return None


def _mean_losses(updates: Mapping[str, Update]) -> dict[str, float]:
    """The mean of each stage's last loss over the clients that tell it."""
    names = sorted({name for update in updates.values() for name in update.losses})
    told = {name: [update.losses[name] for _, update in sorted(updates.items()) if name in update.losses] for name in names}
    return {name: sum(losses) / len(losses) for name, losses in told.items()}
