"""An exchange with clients that are elsewhere, over anything that carries frames to nodes. It waits for the nodes it needs, asks each once,
asks again one that was lost on the way, and goes on without those that stay away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fedsp.frames import Answer, Frame
from fedsp.rounds import Exchange, Failure, Request, Update
from fedsp.wire import read_reply, write_request


class Wire(Protocol):
    """Frames to nodes and back."""

    def nodes(self) -> set[int]:
        """The nodes that are connected now."""

    def push(self, sends: list[tuple[int, Frame]], group: str, seconds: float) -> list[str]:
        """Send a frame to each node; returns a name for each message."""

    def pull(self, messages: list[str]) -> list[Answer]:
        """The answers that have come to some of these messages; each is given once."""


@dataclass(frozen=True)
class Patience:
    """Seconds: that a round waits for a client to be connected, and for its reply once it was asked; after which it is asked once more, twice as
    many later again, and so on (a client that was restarted has forgotten that it was asked); between two looks."""

    wait: float = 600.0
    reply: float = 3600.0
    again: float = 120.0
    look: float = 0.2


Traffic = Callable[[int, str, str, dict[str, int]], None]
"""Told of each frame: round, client, direction ("down" or "up"), bytes by name."""


@dataclass
class _Asked:
    """A client that has been sent its request: when first, when it will be sent again, under which names of messages."""

    request: Request
    first: float
    again: float
    interval: float
    down: int = 0


def remote(wire: Wire, node_of: Mapping[str, int], patience: Patience, traffic: Traffic, say: Callable[[str], None]) -> Exchange:
    """An exchange over a wire. `node_of` says which node is whose; a reply counts only from the node that was asked, and only once."""

    def exchange(requests: list[Request]) -> Iterable[Update | Failure]:
        started = time.monotonic()
        away = {request.client: (request, started) for request in requests}
        asked: dict[str, _Asked] = {}
        client_of: dict[str, str] = {}
        named: list[str] = []

        def ask(clients: list[str]) -> None:
            frames = [(node_of[client], write_request(asked[client].request)) for client in clients]
            for client, (_, frame), message in zip(clients, frames, wire.push(frames, str(requests[0].round), patience.reply), strict=True):
                asked[client].down += len(frame.payload)
                client_of[message] = client
                traffic(requests[0].round, client, "down", frame.sizes())

        def fate(answer: Answer, client: str, one: _Asked) -> Update | Failure:
            if answer.frame is None:
                return Failure(one.request.round, client, answer.fault, bytes_down=one.down)
            traffic(one.request.round, client, "up", answer.frame.sizes())
            if answer.node != node_of[client]:
                return Failure(one.request.round, client, "the reply came from another node", len(answer.frame.payload), one.down)
            return read_reply(answer.frame, one.request, one.down)

        while away or asked:
            connected = wire.nodes() if away or asked else set()
            now = time.monotonic()
            here = [client for client in away if node_of[client] in connected]
            for client in here:
                asked[client] = _Asked(away.pop(client)[0], now, now + patience.again, patience.again)
            late = [client for client, one in asked.items() if now > one.again and node_of[client] in connected]
            for client in late:
                asked[client].interval *= 2
                asked[client].again = now + asked[client].interval
            if here or late:
                ask(here + late)
            for answer in wire.pull([message for message, client in client_of.items() if client in asked]):
                client = client_of.pop(answer.message, "")
                if client not in asked:
                    continue
                if answer.frame is None and not answer.fault:  # lost on the way: wait for the client, and ask again
                    away[client] = asked.pop(client).request, time.monotonic()
                else:
                    yield fate(answer, client, asked.pop(client))
            now = time.monotonic()
            for client, one in list(asked.items()):
                if now - one.first > patience.reply:
                    yield Failure(one.request.round, client, f"no reply within {patience.reply:g} s", bytes_down=asked.pop(client).down)
            for client, (request, since) in list(away.items()):
                if now - since > patience.wait:
                    del away[client]
                    yield Failure(request.round, client, f"not connected for {patience.wait:g} s")
            if sorted(away) != named and now - started > 2:
                named = sorted(away)
                say(
                    f"round {requests[0].round}: waiting for {', '.join(named)} to connect"
                    if named
                    else f"round {requests[0].round}: every asked client is connected"
                )
            if away or asked:
                time.sleep(patience.look)

    return exchange
