"""A transport to clients on other machines, over any link that delivers messages to nodes. It waits
for the nodes it needs, asks each once, asks again if a reply was lost, and goes on without those
that stay away."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from fedsp.errors import PayloadError
from fedsp.federation.messages import Failure, Request, Transport, Update
from fedsp.federation.transport.message import Answer, Message
from fedsp.federation.transport.wire import (
    REFUSALS,
    most_bytes,
    read_reply,
    signed_reply,
    write_request,
)
from fedsp.models.payload import shapes_of


class NodeLink(Protocol):
    """A connection that delivers messages to nodes and back."""

    def nodes(self) -> set[int]:
        """The nodes that are connected now."""

    def push(
        self, sends: list[tuple[int, Message]], group: str, seconds: float, longest: int
    ) -> list[str]:
        """Send a message to each node, which expires after `seconds`; returns an id for each. No
        answer's payload has more than `longest` bytes."""

    def pull(self, message_ids: list[str]) -> list[Answer]:
        """The answers that have come to some of these messages; each is given once."""


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Timeouts in seconds.

    connect: wait for a client that is not connected. reply: wait for its reply to a request.
    retry: send a request without a reply again after this time, then after twice as long, and so
    on, since a client that was restarted has forgotten it. lost: send a request whose reply was
    lost again after this time, and report a client as disconnected. poll: time between two looks.
    """

    connect: float = 600.0
    reply: float = 3600.0
    retry: float = 120.0
    lost: float = 5.0
    poll: float = 0.2


REVOKED = "its key is revoked"
LOST_AT_MOST, AT_ONCE = 10, 16
"""`LOST_AT_MOST`: lost replies per client and round before it fails. `AT_ONCE`: requests sent in
one batch, to limit memory."""

Traffic = Callable[[int, str, str, dict[str, int]], None]
"""Called for each message: round, client, direction ("down" or "up"), bytes by name."""


@dataclass(kw_only=True)
class _Pending:
    """A client of this round: when it was last seen connected, when it was first asked, when it may
    be asked again, and what it was sent."""

    request: Request
    seen: float
    first: float | None = None
    again: float = 0.0
    interval: float = 0.0
    down: int = 0
    lost: int = 0
    follows: bool = False

    def fails(self, now: float, timeouts: Timeouts) -> str | None:
        """Why the round goes on without it, or None while it may still answer."""
        if self.first is not None and now - self.first > timeouts.reply:
            return f"no reply within {timeouts.reply:g} s"
        if self.lost > LOST_AT_MOST:
            return f"its replies were lost {self.lost} times"
        if now - self.seen > timeouts.connect:
            return f"not connected for {timeouts.connect:g} s"
        return None


def remote(
    link: NodeLink,
    node_of: Mapping[str, int],
    timeouts: Timeouts,
    traffic: Traffic,
    info: Callable[[str], None],
    package: str = "",
    keys: Mapping[str, Callable[[bytes, bytes], bool]] | None = None,
    members: Callable[[], Collection[str]] | None = None,
) -> Transport:
    """A transport over a link. `node_of` maps clients to nodes. A reply is accepted once, only from
    the node of its client, and, with `keys`, which say of a statement and a signature whether a
    client's key made it, only with the client's signature over the request and the reply. Whoever
    is not there is not waited for any longer once it is none of the `members`.

    `package`: digest of the package that clients must have, sent with each request. Clients that
    replied in the previous round are sent only the encoded change, if there is one; a client that
    reports that it lost that broadcast is sent the whole payload.
    """
    has: dict[str, int] = {}
    """The last round whose broadcast a client has answered; 0: it has what it begins with."""

    def transport(requests: list[Request]) -> Iterable[Update | Failure]:
        started = time.monotonic()
        open = {
            request.client: _Pending(
                request=request,
                seen=started,
                follows=has.get(request.client, 0) == request.round - 1,
            )
            for request in requests
        }
        sent: dict[str, tuple[str, Message, bool]] = {}
        """By id, until it is answered: the client, the message, and whether that carries a change
        only; two copies of one may be waiting for a client that was restarted."""
        named: list[str] = []

        def ask(clients: list[str], now: float) -> None:
            messages = {
                client: write_request(open[client].request, package, follows=open[client].follows)
                for client in clients
            }
            sends = [(node_of[client], message) for client, message in messages.items()]
            longest = max(most_bytes(shapes_of(open[name].request.payload)) for name in clients)
            ids = link.push(sends, str(requests[0].round), 2 * timeouts.reply, longest)
            for (client, message), message_id in zip(messages.items(), ids, strict=True):
                one = open[client]
                one.first = now if one.first is None else one.first
                one.interval = 2 * one.interval or timeouts.retry
                one.again, one.down = now + one.interval, one.down + len(message.payload)
                sent[message_id] = client, message, one.follows
                traffic(requests[0].round, client, "down", message.sizes())

        def fate(answer: Answer, asked: Message, client: str, one: _Pending) -> Update | Failure:
            if answer.message is None:
                return Failure.of(one.request, answer.fault)
            reply = answer.message
            traffic(one.request.round, client, "up", reply.sizes())
            try:
                if answer.node != node_of[client]:
                    raise PayloadError("the reply came from another node")
                if keys is not None:
                    reply = signed_reply(reply, asked, keys[client])
            except PayloadError as error:
                return Failure.of(one.request, str(error), bytes_up=len(reply.payload))
            return read_reply(reply, one.request)

        while open:
            connected, now = link.nodes(), time.monotonic()
            here = [client for client in open if node_of[client] in connected]
            for client in here:
                open[client].seen = now
            due = [client for client in here if now >= open[client].again]
            for start in range(0, len(due), AT_ONCE):
                ask(due[start : start + AT_ONCE], now)
            for answer in link.pull([key for key, (client, *_) in sent.items() if client in open]):
                client, asked, short = sent.pop(answer.message_id, ("", Message(""), False))
                if client not in open:
                    continue
                if answer.message is None and not answer.fault:
                    open[client].lost += 1
                    open[client].again = min(open[client].again, now + timeouts.lost)
                    continue
                one = open[client]
                reply = fate(answer, asked, client, one)
                lacks = isinstance(reply, Failure) and reply.reason == REFUSALS["broadcast"]
                if short and lacks:
                    if one.follows:
                        one.follows, one.again = False, now
                    continue
                del open[client]
                if isinstance(reply, Update):
                    has[client] = one.request.round
                yield replace(reply, bytes_down=one.down)
            now = time.monotonic()
            away = {client for client, one in open.items() if one.seen < now - timeouts.lost}
            revoked = away.difference(members()) if away and members else ()
            for client, one in list(open.items()):
                reason = REVOKED if client in revoked else one.fails(now, timeouts)
                if reason:
                    del open[client]
                    named = [name for name in named if name != client]
                    yield Failure.of(one.request, reason, bytes_down=one.down)
            still = sorted(away & open.keys())
            if still != named and now - started > 2:
                named = still
                info(
                    f"round {requests[0].round}: waiting for {', '.join(named)} to connect"
                    if named
                    else f"round {requests[0].round}: every asked client is connected"
                )
            if open:
                time.sleep(timeouts.poll)

    return transport
