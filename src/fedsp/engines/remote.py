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
    """Seconds that a round waits for a client to be connected, and for its reply once it was asked; seconds between two looks."""

    wait: float = 600.0
    reply: float = 3600.0
    look: float = 0.2


Traffic = Callable[[int, str, str, dict[str, int]], None]
"""Told of each frame: round, client, direction ("down" or "up"), bytes by name."""


def remote(wire: Wire, node_of: Mapping[str, int], patience: Patience, traffic: Traffic, say: Callable[[str], None]) -> Exchange:
    """An exchange over a wire. `node_of` says which node is whose; a reply counts only from the node that was asked."""

    def exchange(requests: list[Request]) -> Iterable[Update | Failure]:
        away = {request.client: request for request in requests}
        open: dict[str, tuple[Request, int]] = {}
        asked_at: dict[str, float] = {}
        started = time.monotonic()
        since = dict.fromkeys(away, started)
        said: list[str] = []
        while away or open:
            connected = wire.nodes() if away else set()
            here = [request for client, request in away.items() if node_of[client] in connected]
            frames = [(node_of[request.client], write_request(request)) for request in here]
            if frames:
                for request, (_, frame), message in zip(here, frames, wire.push(frames, str(here[0].round), patience.reply), strict=True):
                    traffic(request.round, request.client, "down", frame.sizes())
                    open[message] = request, len(frame.payload)
                    asked_at[message] = time.monotonic()
                    del away[request.client]
            for answer in wire.pull(list(open)) if open else ():
                if answer.message not in open:
                    continue
                request, down = open.pop(answer.message)
                if answer.fault:
                    yield Failure(request.round, request.client, answer.fault, bytes_down=down)
                    continue
                if answer.frame is None:
                    away[request.client], since[request.client] = request, time.monotonic()
                    continue
                traffic(request.round, request.client, "up", answer.frame.sizes())
                if answer.node != node_of[request.client]:
                    yield Failure(request.round, request.client, "the reply came from another node", len(answer.frame.payload), down)
                else:
                    yield read_reply(answer.frame, request, down)
            now = time.monotonic()
            for message, (request, down) in list(open.items()):
                if now - asked_at[message] > patience.reply:
                    del open[message]
                    yield Failure(request.round, request.client, f"no reply within {patience.reply:g} s", bytes_down=down)
            for client, request in list(away.items()):
                if now - since[client] > patience.wait:
                    del away[client]
                    yield Failure(request.round, client, f"not connected for {patience.wait:g} s")
            if sorted(away) != said and now - started > 2:
                said = sorted(away)
                say(
                    f"round {requests[0].round}: waiting for {', '.join(said)} to connect"
                    if said
                    else f"round {requests[0].round}: every asked client is connected"
                )
            if away or open:
                time.sleep(patience.look)

    return exchange
