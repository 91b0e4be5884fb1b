"""The embedded default: every client in this process, one after another. Payloads are serialized
and read as over a network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedsp.errors import PayloadError, PolicyError, TrainingDiverged
from fedsp.federation.clients import Clients
from fedsp.federation.compression import read_values
from fedsp.federation.messages import Failure, Request, Transport, Update
from fedsp.federation.transport.request_handler import answer_bytes
from fedsp.models.payload import Payload, pack, unpack


def local(clients: Clients) -> Transport:
    """A transport that asks each client in turn.

    Raises (when iterated):
        TrainingDiverged: a client's loss is not finite, with the round and the client.
    """
    before: tuple[int, Payload, set[str]] = (0, {}, set())
    """The last round, its broadcast, and who has answered it."""

    def transport(requests: list[Request]) -> Iterable[Update | Failure]:
        nonlocal before
        last, known, have = before
        answered: set[str] = set()
        whole = pack(requests[0].payload)
        before = (requests[0].round, requests[0].payload, answered)
        for request in requests:
            follows = bool(request.change) and last == request.round - 1 and request.client in have
            down = request.change if follows else whole
            received = read_values(down, known, request.sent_in) if follows else unpack(down)
            try:
                party = clients.party(request.client)
                update = clients.method.client_update(party, replace(request, payload=received))
                up = answer_bytes(update, request, party)
            except TrainingDiverged as error:
                raise TrainingDiverged(
                    f"round {request.round}, client {request.client!r}: {error}; the prompt of"
                    f" round {request.round - 1} is kept"
                ) from error
            except (PolicyError, PayloadError) as error:
                yield Failure.of(request, str(error), bytes_down=len(down))
                continue
            answered.add(request.client)
            payload = read_values(up, request.payload, request.answer_in) if up else request.payload
            yield replace(update, payload=payload, bytes_down=len(down), bytes_up=len(up))

    return transport
