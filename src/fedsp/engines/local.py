"""The embedded default: every client in this process, one after another. Payloads are packed and unpacked as on any wire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedsp.clients import Clients
from fedsp.errors import PolicyError, TrainingDiverged
from fedsp.payload import pack, unpack
from fedsp.rounds import Exchange, Failure, Request, Update


def local(clients: Clients) -> Exchange:
    """An exchange that asks each client in turn.

    Raises (when iterated):
        TrainingDiverged: a client's loss is not finite, with the round and the client.
    """

    def exchange(requests: list[Request]) -> Iterable[Update | Failure]:
        for request in requests:
            down = pack(request.payload)
            try:
                update = clients.method.client_update(clients.party(request.client), replace(request, payload=unpack(down)))
            except TrainingDiverged as error:
                raise TrainingDiverged(f"round {request.round}, client {request.client!r}: {error}; the prompt of round {request.round - 1} is kept") from error
            except PolicyError as error:
                yield Failure(request.round, request.client, str(error), bytes_down=len(down))
                continue
            up = pack(update.payload) if request.train else b""
            yield replace(update, payload=unpack(up) if up else request.payload, bytes_down=len(down), bytes_up=len(up))

    return exchange
