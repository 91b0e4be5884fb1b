"""A socket on this machine, between a process of fedsp's that holds a model or text and one of
Flower's that carries messages. Nothing that is received is ever executed: it is read as bytes and
JSON."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedsp.errors import DeploymentError
from fedsp.federation.transport.message import Answer, Message

SOCKET = "FEDSP_SOCKET"
"""The environment variable that tells Flower's side where the socket is."""

LARGEST = 1 << 30
GONE = "the process on the other side of the local socket has gone"


class Channel:
    """One connection: values as JSON, messages as bytes behind them."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        self._connection = Connection(connection.detach())

    def send(self, value: Any, messages: list[Message] | None = None) -> None:
        """Send a JSON value and messages.

        Raises:
            DeploymentError: the other side has gone.
        """
        messages = messages or []
        head = {"value": value, "headers": [message.header for message in messages]}
        try:
            self._connection.send_bytes(json.dumps(head).encode())
            for message in messages:
                self._connection.send_bytes(message.payload)
        except OSError as error:
            raise DeploymentError(GONE) from error

    def receive(self) -> tuple[Any, list[Message]]:
        """The next value and its messages.

        Raises:
            DeploymentError: the other side has gone.
        """
        try:
            head = json.loads(self._connection.recv_bytes(LARGEST))
            return head["value"], [
                Message(header, self._connection.recv_bytes(LARGEST)) for header in head["headers"]
            ]
        except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
            raise DeploymentError(GONE) from error

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class Socket:
    """A listening socket at `path`, or, without one, in a new folder that only this user can enter.

    Raises:
        DeploymentError: nobody can listen there.
    """

    def __init__(self, path: str | None = None) -> None:
        # short: a socket's path has room for about 100 characters
        self._folder = None if path else tempfile.mkdtemp(prefix="fedsp-")
        self.path = path or f"{self._folder}/socket"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(self.path)
            Path(self.path).chmod(0o600)
        except OSError as error:
            raise DeploymentError(
                f"cannot listen at {self.path} ({error.strerror}): remove what is there, or set"
                f" {SOCKET} to another path"
            ) from error
        self._socket.listen(8)

    def accept(self, check: Callable[[], None], seconds: float | None = None) -> Channel:
        """The next connection; `check` is called while none comes, and may raise.

        Raises:
            DeploymentError: none has come in so many seconds.
        """
        self._socket.settimeout(0.5)
        started = time.monotonic()
        while seconds is None or time.monotonic() - started < seconds:
            with contextlib.suppress(TimeoutError):
                return Channel(self._socket.accept()[0])
            check()
        raise DeploymentError(
            f"Flower's app has not connected in {seconds:g} s; the logs in the run's folder say why"
        )

    def close(self) -> None:
        """Stop listening and leave nothing behind."""
        self._socket.close()
        Path(self.path).unlink(missing_ok=True)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def connect(path: str) -> Channel:
    """A connection to the socket at `path`.

    Raises:
        DeploymentError: nobody listens there.
    """
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
    except OSError as error:
        raise DeploymentError(
            f"nobody listens at {path}: start `fedsp serve` or `fedsp join` first"
            f" ({error.strerror})"
        ) from error
    return Channel(connection)


class SocketLink:
    """A link whose other end is in another process of this machine, behind a channel; see `carry`.
    `check` is called at each look, and may raise."""

    def __init__(self, channel: Channel, check: Callable[[], None] = lambda: None) -> None:
        self._channel, self._check = channel, check

    def nodes(self) -> set[int]:
        self._check()
        return set(self._call(["nodes"])[0])

    def push(
        self, sends: list[tuple[int, Message]], group: str, seconds: float, longest: int
    ) -> list[str]:
        call = ["push", [node for node, _ in sends], group, seconds, longest]
        return list(self._call(call, [message for _, message in sends])[0])

    def pull(self, message_ids: list[str]) -> list[Answer]:
        found, messages = self._call(["pull", message_ids])
        bodies = iter(messages)
        return [
            Answer(
                message_id=message_id,
                node=node,
                message=next(bodies) if answered else None,
                fault=fault,
            )
            for message_id, node, answered, fault in found
        ]

    def _call(self, value: Any, messages: list[Message] | None = None) -> tuple[Any, list[Message]]:
        self._channel.send(value, messages)
        return self._channel.receive()


def carry(link: Any, channel: Channel) -> None:
    """The other end of a SocketLink: run the calls that arrive through the channel on `link`, until
    it closes."""
    while True:
        try:
            (name, *arguments), messages = channel.receive()
        except DeploymentError:
            return
        if name == "nodes":
            channel.send(sorted(link.nodes()))
        elif name == "push":
            nodes, *rest = arguments
            channel.send(link.push(list(zip(nodes, messages, strict=True)), *rest))
        else:
            found = link.pull(*arguments)
            heads = [[one.message_id, one.node, bool(one.message), one.fault] for one in found]
            channel.send(heads, [one.message for one in found if one.message])
