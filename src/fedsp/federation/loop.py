"""The round loop: sample clients, collect updates, aggregate, server step, validate, save.

It works on tensors by name and knows nothing of language models: the method and its parties are
opaque here.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import torch

from fedsp.data.seeding import derive_seed
from fedsp.errors import TooFewClients, TrainingDiverged
from fedsp.federation.aggregation.mean import (
    STEPS,
    Aggregator,
    ServerOptimizer,
    update_cosine,
    validate_update,
)
from fedsp.federation.codecs import FLOAT32, Codec
from fedsp.federation.compression import difference, encode_with_residual
from fedsp.federation.messages import Request, RoundRecord, Transport, Update, sample_clients
from fedsp.models.payload import Payload, same
from fedsp.privacy import poisson_sample

ServerParty = TypeVar("ServerParty", contravariant=True)

Register = Mapping[str, int]
"""The server's own record of its clients: id to number of examples."""
Validate = Callable[[Payload], float]
"""The validation loss of a payload at the server, nats per answer token."""


class ServerMethod(Protocol[ServerParty]):
    """The server's side of a method (`fedsp.federation.methods.base.Method`)."""

    def init(self, server: ServerParty) -> Payload: ...

    def server_update(
        self, server: ServerParty, aggregated: Payload, round: int, seed: int
    ) -> tuple[Payload, float | None]: ...


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """Settings that hold in every round.

    run, seed, rounds: the run's identity, its seed, and how many rounds it has.
    clients: clients sampled per round; None samples all, 0 samples none.
    sampling_rate: if set, each client is sampled independently with this probability instead.
    min_clients: accepted updates that a round needs.
    weighting: whether the mean weighs clients by their examples, or all alike.
    max_change: largest root mean square difference of an update from the broadcast, per number.
    validate_by, validate_every: who computes the validation loss, and every how many rounds.
    patience: rounds without a lower validation loss after which no other one follows.
    optimizer, aggregator: how updates become one payload, and how the server applies it.
    max_loss_rise: bound of the acceptance check, as a share of the lowest validation loss so far.
    up, down: codecs of updates and of broadcasts.
    """

    run: str
    seed: int
    rounds: int
    clients: int | None
    min_clients: int
    weighting: Literal["examples", "uniform"]
    max_change: float
    validate_by: Literal["server", "clients", "none"]
    validate_every: int = 1
    patience: int | None = None
    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    aggregator: Aggregator = field(default_factory=Aggregator)
    sampling_rate: float | None = None
    max_loss_rise: float | None = None
    up: Codec = FLOAT32
    down: Codec = FLOAT32


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run after a round: everything that resuming it needs.

    round, payload: the last finished round, and what is broadcast in the next one.
    best, best_round, best_loss: the payload with the lowest validation loss so far.
    best_losses: where clients validate, what each of them reported of it.
    optimizer: state of the server optimizer.
    residual: what a lossy broadcast leaves out, to be added to the next one.
    change: the encoded bytes that turn the previous broadcast into this one, if it is encoded.
    """

    round: int
    payload: Payload
    best: Payload
    best_round: int
    best_loss: float | None
    optimizer: Payload = field(default_factory=dict)
    residual: Payload = field(default_factory=dict)
    change: bytes = b""
    best_losses: Mapping[str, float] = field(default_factory=dict)

    def consider(self, payload: Payload, round: int, loss: float | None) -> RunState:
        """This state, with the payload as the best one if its loss is the lowest so far."""
        if loss is None or not math.isfinite(loss):
            return self
        if self.best_loss is not None and loss >= self.best_loss:
            return self
        return replace(self, best=payload, best_round=round, best_loss=loss)

    def judged(self, updates: Mapping[str, Update], register: Register) -> RunState:
        """This state, with the payload that clients received as the best one if its loss is lower
        than that of the best so far, by those who have reported both: others have other text. Where
        nobody has, the later one is taken."""
        losses = _clients_losses(updates)
        loss = _median(losses, register)
        both = losses.keys() & self.best_losses.keys()
        before, now = (
            _median({client: known[client] for client in both}, register)
            for known in (self.best_losses, losses)
        )
        if loss is None or (now is not None and before is not None and now >= before):
            return self
        return replace(
            self, best=self.payload, best_round=self.round, best_loss=loss, best_losses=losses
        )


Save = Callable[[RunState, RoundRecord], None]


def federate(
    method: ServerMethod[ServerParty],
    server: ServerParty,
    register: Register,
    transport: Transport,
    settings: RoundConfig,
    *,
    state: RunState | None,
    validate: Validate,
    save: Save,
    start: Payload | None = None,
) -> RunState:
    """Run the rounds that are left after `state` (None: all of them), until the settings' patience
    is at its end, and return the last state.

    `start` is what every client's messenger holds before the first round, if that is known; where
    it is the first broadcast, only that nothing changes is sent, in a lossy codec.
    `save` is called after each round, before anything of the next one is sent. If clients validate,
    they report the loss of the payload that they received, so each payload is judged one round
    later, and the last one in a round without training, for which `save` is called once more. Where
    no client has ever reported one, the last payload is the best.

    Raises:
        TooFewClients: a round had fewer accepted updates than `settings.min_clients`; the state
            before it has been saved.
        TrainingDiverged: a loss was not finite; the message names the round and the party.
    """
    timer = _Timer()
    tried = len(STEPS) if settings.optimizer.kind == "line_search" else 0
    validate = _Cached(timer(validate), 3 + tried)
    server_update = timer(method.server_update)
    if state is None:
        payload = method.init(server)
        loss = validate(payload) if settings.validate_by == "server" else None
        state = RunState(round=0, payload=payload, best=payload, best_round=0, best_loss=loss)
        if start is not None and same(start, payload) and settings.down != FLOAT32:
            change, _, _ = encode_with_residual(difference(payload, start), {}, settings.down)
            state = replace(state, change=change)
    for round in range(state.round + 1, settings.rounds + 1):
        if settings.patience and round - 1 - state.best_round >= settings.patience:
            break
        started = time.perf_counter()
        timer.seconds = 0.0
        sampled = _sample(register, settings, round)
        requests = _requests(sampled, round, state, settings)
        updates, failed, traffic = _collect(transport, requests, settings.max_change)
        if len(updates) < min(settings.min_clients, len(sampled)):
            reasons = "; ".join(f"{client}: {reason}" for client, reason in sorted(failed.items()))
            raise TooFewClients(
                f"round {round} has {len(updates)} accepted updates of {len(sampled)} asked, "
                f"round.min_clients is {settings.min_clients} ({reasons or 'no replies'}); the run "
                f"stands after round {state.round} and can be resumed"
            )
        if settings.validate_by == "clients" and sampled:
            state = state.judged(updates, register)
        broadcast, payloads = state.payload, {name: one.payload for name, one in updates.items()}
        seed = derive_seed(settings.seed, "server", round)
        aggregator = settings.aggregator
        try:
            reference = None
            if aggregator.by_reference:
                reference, _ = server_update(server, broadcast, round, seed)
            aggregated, optimizer = broadcast, state.optimizer
            if payloads or aggregator.always:
                by_examples = settings.weighting == "examples"
                weights = {one: float(register[one]) if by_examples else 1.0 for one in updates}
                mean = aggregator(broadcast, payloads, weights, len(sampled), reference)
                aggregated, optimizer = settings.optimizer.step(
                    broadcast, mean, state.optimizer, validate
                )
            aggregated = _plus(aggregated, state.residual)
            acceptance_loss, accepted = _accept(state, aggregated, validate, settings.max_loss_rise)
            if not accepted:
                aggregated, optimizer = _plus(broadcast, state.residual), state.optimizer
            payload, server_loss = server_update(server, aggregated, round, seed)
            if not all(torch.isfinite(tensor).all() for tensor in payload.values()):
                raise TrainingDiverged(
                    "the tuned values are not finite: lower server.learning_rate"
                )
        except TrainingDiverged as error:
            raise TrainingDiverged(
                f"round {round}, server: {error}; the prompt of round {state.round} is kept"
            ) from error
        state = replace(state, round=round, optimizer=optimizer)
        validation, validated = None, round
        due = round % settings.validate_every == 0 or round == settings.rounds
        if settings.validate_by == "server" and due:
            validation = validate(payload)
            state = state.consider(payload, round, validation)
        elif settings.validate_by == "none":
            state = replace(state, best=payload, best_round=round)
        elif settings.validate_by == "clients":
            validation, validated = _clients_loss(updates, register), round - 1
        state = _next_broadcast(state, payload, settings.down)
        record = RoundRecord(
            round=round,
            asked=sampled,
            **_answers(updates, failed, traffic),
            client_losses=_mean_losses(updates),
            server_loss=server_loss,
            validation=validation,
            best_round=state.best_round,
            shortened_examples=sum(update.shortened for update in updates.values()),
            seconds=time.perf_counter() - started,
            seconds_training=timer.seconds + sum(update.seconds for update in updates.values()),
            update_cosine=update_cosine(payloads, broadcast),
            spikes=sum(update.spikes for update in updates.values()),
            acceptance_loss=acceptance_loss,
            accepted=accepted,
            validated=validated,
        )
        save(state, record)
    if settings.validate_by == "clients" and register:
        state = _judged_last(state, register, transport, settings, save)
    return state


def _judged_last(
    state: RunState, register: Register, transport: Transport, settings: RoundConfig, save: Save
) -> RunState:
    """The state after the clients have reported their loss of the last payload."""
    started = time.perf_counter()
    last = settings.rounds + 1
    sampled = _sample(register, settings, last)
    requests = _requests(sampled, last, state, settings, train=False)
    updates, failed, traffic = _collect(transport, requests, settings.max_change)
    state = state.judged(updates, register)
    if state.best_loss is None:
        state = replace(state, best=state.payload, best_round=state.round)
    record = RoundRecord(
        round=last,
        asked=sampled,
        **_answers(updates, failed, traffic),
        client_losses={},
        server_loss=None,
        validation=_clients_loss(updates, register),
        best_round=state.best_round,
        shortened_examples=0,
        seconds=time.perf_counter() - started,
        seconds_training=sum(update.seconds for update in updates.values()),
        validated=state.round,
        trained=False,
    )
    save(state, record)
    return state


def _sample(register: Register, settings: RoundConfig, round: int) -> list[str]:
    """The clients of a round: drawn from the seed, or from secret randomness if a sampling rate is
    set, since then the privacy accountant relies on nobody knowing who was drawn."""
    ordered = sorted(register)
    if settings.sampling_rate is not None:
        return [ordered[index] for index in poisson_sample(len(ordered), settings.sampling_rate)]
    count = len(ordered) if settings.clients is None else settings.clients
    return sample_clients(ordered, count, settings.seed, round)


def _requests(
    clients: list[str], round: int, state: RunState, settings: RoundConfig, train: bool = True
) -> list[Request]:
    return [
        Request(
            run=settings.run,
            round=round,
            client=client,
            seed=derive_seed(settings.seed, "client", client, round),
            payload=state.payload,
            train=train,
            change=state.change,
            sent_in=settings.down,
            answer_in=settings.up,
        )
        for client in clients
    ]


def _collect(
    transport: Transport, requests: list[Request], max_change: float
) -> tuple[dict[str, Update], dict[str, str], tuple[int, int]]:
    """Accepted updates and reasons of failure by client, and bytes down and up, those of refused
    updates included."""
    by_client = {request.client: request for request in requests}
    updates: dict[str, Update] = {}
    failed: dict[str, str] = {}
    down = up = 0
    for reply in transport(requests) if requests else ():
        down, up = down + reply.bytes_down, up + reply.bytes_up
        reason = validate_update(reply, by_client, updates, max_change)
        if reason is None and isinstance(reply, Update):
            updates[reply.client] = reply
        else:
            failed[reply.client] = str(reason)
    silent = set(by_client) - set(updates) - set(failed)
    return updates, failed | dict.fromkeys(silent, "did not answer"), (down, up)


def _answers(
    updates: Mapping[str, Update], failed: Mapping[str, str], traffic: tuple[int, int]
) -> dict[str, Any]:
    """What `_collect` found, as a record has it."""
    return {
        "answered": sorted(updates),
        "failed": dict(sorted(failed.items())),
        "bytes_down": traffic[0],
        "bytes_up": traffic[1],
    }


def _accept(
    state: RunState, aggregated: Payload, validate: Validate, max_loss_rise: float | None
) -> tuple[float | None, bool]:
    """The acceptance check: the aggregate's validation loss against the lowest so far. Against the
    last broadcast a small rise would pass in every round. A loss that is not finite fails."""
    if max_loss_rise is None or aggregated is state.payload:
        return None, True
    lowest, loss = state.best_loss, validate(aggregated)
    passed = lowest is None or loss <= lowest * (1 + max_loss_rise)
    return loss, math.isfinite(loss) and passed


def _next_broadcast(state: RunState, payload: Payload, down: Codec) -> RunState:
    """The state with what the next round broadcasts: the payload, or, in a lossy codec, the last
    broadcast plus the decoded change; the rest is the residual."""
    if down == FLOAT32:
        return replace(state, payload=payload)
    change, decoded, residual = encode_with_residual(difference(payload, state.payload), {}, down)
    return replace(state, payload=_plus(state.payload, decoded), residual=residual, change=change)


def _plus(payload: Payload, more: Payload) -> Payload:
    return {name: payload[name] + more[name] for name in sorted(payload)} if more else payload


def _clients_losses(updates: Mapping[str, Update]) -> dict[str, float]:
    """The clients' validation losses, of those that have a finite one."""
    return {
        client: update.validation
        for client, update in updates.items()
        if update.validation is not None and math.isfinite(update.validation)
    }


def _clients_loss(updates: Mapping[str, Update], register: Register) -> float | None:
    return _median(_clients_losses(updates), register)


def _median(losses: Mapping[str, float], register: Register) -> float | None:
    """The median of clients' losses, weighted by the register. A mean would let one client choose
    the round: 0 once, and the largest accepted loss in every other."""
    ordered = sorted((loss, register[client]) for client, loss in losses.items())
    half, below = sum(weight for _, weight in ordered) / 2, 0.0
    for place, (loss, weight) in enumerate(ordered):
        below += weight
        if below > half or place == len(ordered) - 1:
            return loss
        if below == half:
            return (loss + ordered[place + 1][0]) / 2
    return None


def _mean_losses(updates: Mapping[str, Update]) -> dict[str, float]:
    """The mean of each stage's last loss over the clients that report it, in the order of ids."""
    ordered = [update for _, update in sorted(updates.items())]
    names = sorted({name for update in ordered for name in update.losses})
    losses = {name: [one.losses[name] for one in ordered if name in one.losses] for name in names}
    return {name: sum(values) / len(values) for name, values in losses.items()}


class _Timer(ContextDecorator):
    """Seconds spent in the functions that it decorates, none of which calls another."""

    seconds = 0.0

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.started


class _Cached:
    """Validation losses of the last `most` payloads: what was broadcast, tried, aggregated and
    tuned is often the same object, and is then validated once."""

    def __init__(self, validate: Validate, most: int) -> None:
        self.validate = validate
        self.cache: deque[tuple[Payload, float]] = deque(maxlen=most)

    def __call__(self, payload: Payload) -> float:
        loss = next((known for one, known in self.cache if one is payload), None)
        if loss is None:
            loss = self.validate(payload)
            self.cache.append((payload, loss))
        return loss
