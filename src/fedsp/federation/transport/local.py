"""The embedded default: every client on this machine, one after another in this process, or in
several processes (`workers`). Payloads are serialized and read as over a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from fedsp.errors import PayloadError, PolicyError, TrainingDiverged
from fedsp.federation.clients import Clients
from fedsp.federation.compression import read_values
from fedsp.federation.messages import Failure, Request, Transport, Update
from fedsp.federation.transport.request_handler import answer_bytes
from fedsp.models.payload import Payload, pack, unpack

Answer = Callable[[], tuple[Update, bytes]]
"""Gives a client's reply and the bytes of its payload, or raises what went wrong."""


def local(clients: Clients) -> Transport:
    """A transport that asks each client in turn.

    Raises (when iterated):
        TrainingDiverged: a client's loss is not finite, with the round and the client.
    """
    return on_this_machine(lambda request: partial(answer_here, clients, request))


def answer_here(clients: Clients, request: Request) -> tuple[Update, bytes]:
    """The reply of a client whose text is in this process, and the bytes of its payload."""
    party = clients.party(request.client)
    with party.store.together():
        update = clients.method.client_update(party, request)
        return update, answer_bytes(update, request, party)


def on_this_machine(begin: Callable[[Request], Answer], ahead: int = 0) -> Transport:
    """A transport that hands each request, as the client receives it, to `begin`; so many may begin
    `ahead` of the one whose answer is waited for. Replies come in the order of the requests."""
    before: tuple[int, Payload, set[str]] = (0, {}, set())
    """The last round, its broadcast, and who has answered it."""

    def transport(requests: list[Request]) -> Iterable[Update | Failure]:
        nonlocal before
        last, known, have = before
        answered: set[str] = set()
        whole = pack(requests[0].payload)
        before = (requests[0].round, requests[0].payload, answered)
        begun: deque[tuple[Request, int, Answer]] = deque()

        def finish() -> Update | Failure:
            request, bytes_down, answer = begun.popleft()
            try:
                update, up = answer()
            except TrainingDiverged as error:
                raise TrainingDiverged(
                    f"round {request.round}, client {request.client!r}: {error}; the prompt of"
                    f" round {request.round - 1} is kept"
                ) from error
            except (PolicyError, PayloadError) as error:
                return Failure.of(request, str(error), bytes_down=bytes_down)
            answered.add(request.client)
            payload = read_values(up, request.payload, request.answer_in) if up else request.payload
            return replace(update, payload=payload, bytes_down=bytes_down, bytes_up=len(up))

        for request in requests:
            first = request.round == 1  # whoever begins has what it begins with
            has = first or (last == request.round - 1 and request.client in have)
            follows = bool(request.change) and has
            down = request.change if follows else whole
            base = request.payload if first else known
            received = read_values(down, base, request.sent_in) if follows else unpack(down)
            begun.append((request, len(down), begin(replace(request, payload=received))))
            if len(begun) > ahead:
                yield finish()
        while begun:
            yield finish()

    return transport
