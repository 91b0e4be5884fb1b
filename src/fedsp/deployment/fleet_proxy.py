"""The server's proxy: the only port that is open to clients. It speaks TLS and passes on what
Flower's nodes need, and nothing else.

Flower's SuperLink serves three APIs on one port, and whoever reaches it can start a run, that is:
run code on the server. So the SuperLink listens on this machine alone, and the proxy passes only
its Fleet API (`POST /v1/fleet/...`), and of that what a registered client has signed. By itself it
answers `POST /v1/fedsp/greeting`, signed alike, with its version and the time, by which a client
sees at once whether it is known here (`fedsp.deployment.monitoring.connection`).

    python -m fedsp.deployment.fleet_proxy LISTEN_HOST LISTEN_PORT SUPERLINK_PORT FOLDER COUNTS

When it is stopped it adds one line to the file COUNTS: requests, bytes up and bytes down of each
call, bodies as they were before TLS.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import resource
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, ClassVar

import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

import fedsp
from fedsp.config_file import REGISTER
from fedsp.deployment.monitoring.connection import GREETING
from fedsp.deployment.parties.credentials import (
    CA,
    CERTIFICATE,
    KEY,
    KEY_HEADER,
    SIGNATURE_HEADER,
    TIME_HEADER,
    client_keys,
    has_signed,
)
from fedsp.errors import FedspError, StorageError, first_line
from fedsp.federation.chained_log import record_event

PASSED = re.compile(r"/v1/fleet/[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
"""The paths that are passed on, whole: no dots, no percent signs, nothing that another reader could
take for another path."""

LARGEST = 8 << 20
"""Bytes of one request's body: Flower cuts what is larger into pieces of 5 MB at most."""

LONGEST_HEADERS = 16 << 10
"""Bytes of a request's line and headers."""

HELD = 64 << 20
"""Bytes of bodies that are held of one client at once, all of its requests together."""

AT_ONCE, EACH = 256, 128
"""Requests that are passed on at once; and connections, and requests, that one address may have at
once. Nobody has been authenticated yet."""

MOST_STRANGERS = 20
"""Keys that are not known, of which one proxy writes into the security log."""

UNREAD_FOR = 10.0
"""Seconds for which a register that cannot be read, since it is being written, leaves the clients
before; then nobody is let in."""

HEADERS_WITHIN, BODY_WITHIN = 15.0, 60.0
"""Seconds in which a connection must have sent the headers of a request, and a request its whole
body."""

UNKNOWN_NODE = b'{"code": 2004, "detail": "Failed to activate SuperNode."}'
"""What Flower says to a node whose key it does not know, which tells the node that trying again is
of no use."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Answer = tuple[int, list[tuple[bytes, bytes]], bytes, int]


class FleetProxy:
    """An ASGI app that passes on the calls `POST /v1/fleet/...` that a client in the register of a
    server's folder has signed to the SuperLink on this machine. Requests are limited per address
    and memory per client, so no machine can block others."""

    def __init__(self, port: int, folder: Path, counts: Path) -> None:
        self._counts: dict[str, list[int]] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._of_address: Counter[str] = Counter()
        self._held: Counter[bytes] = Counter()
        self._file = counts
        self._folder = folder
        self._noted: set[tuple[str, ...]] = set()
        self._strangers = 0
        self._unread_since: float | None = None
        self._changed = self._last_change()
        self._keys = client_keys(folder)
        self._url = f"https://127.0.0.1:{port}"
        context = ssl.create_default_context(cafile=str(folder / CA))
        self._client = httpx.AsyncClient(
            verify=context, timeout=httpx.Timeout(120.0), limits=httpx.Limits(max_connections=256)
        )

    async def __call__(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:  # pragma: no mutate block
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._respond(scope, receive, send)

    async def _respond(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        address = str((scope.get("client") or ("",))[0])
        self._of_address[address] += 1
        try:
            status, headers, body, received = (
                await self._answer(scope, receive)
                if self._of_address[address] <= EACH
                else (429, [], b"", 0)
            )
        finally:
            self._of_address[address] -= 1
            self._of_address += Counter()  # forget addresses that have none
        call = str(scope.get("path", ""))
        if status < 400 and call != GREETING:
            entry = self._counts.setdefault(call.removeprefix("/v1/fleet/"), [0, 0, 0])
            entry[:] = entry[0] + 1, entry[1] + received, entry[2] + len(body)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive) -> Answer:
        raw = bytes(scope.get("raw_path") or b"").decode("latin-1")
        if (
            scope["method"] != "POST"
            or not (PASSED.fullmatch(raw) or raw == GREETING)
            or raw != scope["path"]
            or scope.get("query_string")
        ):
            return 404, [], b"", 0
        names = Counter(name.lower() for name, _ in scope["headers"])
        if any(names[name.encode()] > 1 for name in (KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER)):
            return 400, [], b"", 0  # Flower might read another of them than is checked here
        client = self._signer({name.lower(): value for name, value in scope["headers"]})
        if isinstance(client, tuple):
            return client
        if raw == GREETING:
            name = self._keys[client][0] if client in self._keys else ""
            told = {"fedsp": str(fedsp.__version__), "time": time.time(), "client": name}
            return 200, [(b"content-type", b"application/json")], json.dumps(told).encode(), 0
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_WITHIN):
                fault = await self._read(body, client, receive)
            if fault:
                return fault, [], b"", 0
            async with self._turns:
                return await self._pass_on(raw, scope, bytes(body))
        except TimeoutError:
            return 408, [], b"", 0
        finally:
            self._held[client] -= len(body)

    def _signer(self, headers: Mapping[bytes, bytes]) -> bytes | Answer:
        """The key of the registered client that signed a call; the refusal where none did."""
        try:
            key = base64.b64decode(headers[KEY_HEADER.encode()], validate=True)
            signature = base64.b64decode(headers[SIGNATURE_HEADER.encode()], validate=True)
            when = headers[TIME_HEADER.encode()]
        except (KeyError, ValueError):
            return 401, [], b"", 0
        keys = self._registered()
        if key not in keys:
            self._note("key refused", sha256=hashlib.sha256(key).hexdigest())
            return 412, [(b"content-type", b"application/json")], UNKNOWN_NODE, 0
        name, public = keys[key]
        if not has_signed(public, when, signature):
            self._note("signature refused", client=name)
            return 401, [], b"", 0
        self._note("connected", client=name)
        return key

    def _note(self, event: str, **about: str) -> None:
        """Write an event into the security log of the server's folder, each once; of keys that are
        not known only the first, since anybody can make more."""
        noted = event, *about.values()
        if noted in self._noted:
            return
        if event == "key refused":
            if self._strangers > MOST_STRANGERS:
                return
            self._strangers += 1
            if self._strangers > MOST_STRANGERS:
                event, about = "more keys refused", {"than": str(MOST_STRANGERS)}
        self._noted.add(noted)
        with contextlib.suppress(StorageError):
            record_event(self._folder, event, **about)

    def _registered(self) -> Mapping[bytes, Any]:
        """The keys of the clients that were in the register at the start and still are: who is
        revoked is turned away at once, and who is new is known to Flower from the next start."""
        try:
            changed = self._last_change()
            if changed != self._changed:
                now = client_keys(self._folder)
                self._keys = {key: self._keys[key] for key in self._keys if key in now}
                self._changed = changed
            self._unread_since = None
        except (OSError, FedspError) as error:
            if self._unread_since is None:
                self._unread_since = time.monotonic()
            if time.monotonic() - self._unread_since > UNREAD_FOR:
                self._note("register unreadable, nobody is let in", why=first_line(error))
                return {}
        return self._keys

    def _last_change(self) -> list[int]:
        return [
            path.stat().st_mtime_ns for path in (self._folder / REGISTER, self._folder / "clients")
        ]

    async def _read(self, body: bytearray, client: bytes, receive: Receive) -> int:
        """Read a request's body into `body`; returns the status of the refusal, or 0."""
        more = True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return 400
            part = event.get("body", b"")
            if len(body) + len(part) > LARGEST:
                return 413
            if self._held[client] + len(part) > HELD:
                return 503
            body += part
            self._held[client] += len(part)
            more = bool(event.get("more_body"))
        return 0

    async def _pass_on(self, path: str, scope: MutableMapping[str, Any], body: bytes) -> Answer:
        headers = [(name, value) for name, value in scope["headers"] if name not in HOP]
        try:
            reply = await self._client.post(self._url + path, content=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL):
            return 503, [], b"", 0
        kept = [
            (name.lower(), value)
            for name, value in reply.headers.raw
            if name.lower() not in HOP and name.lower() != b"content-encoding"
        ]
        return reply.status_code, kept, reply.content, len(body)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while (event := (await receive())["type"]) != "lifespan.shutdown":
            await send({"type": f"{event}.complete"})
        await self._client.aclose()
        if self._counts:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(self._counts) + "\n")
        await send({"type": "lifespan.shutdown.complete"})


HOP = set(b"host connection keep-alive transfer-encoding content-length te upgrade expect".split())
"""Headers that belong to one connection."""


class Patient(H11Protocol):
    """A connection, aborted if the headers of a request do not arrive in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._patience.cancel()  # a request that has begun has its own time
        elif self._patience.cancelled():
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._patience = self.loop.call_later(HEADERS_WITHIN, self.transport.abort)


class Listening(socket.socket):
    """A listening socket that takes at most `EACH` connections of an address; it hangs up on others
    before TLS is spoken."""

    open: ClassVar[Counter[str]] = Counter()

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        if Listening.open[address[0]] >= EACH:
            connection.close()
            raise ConnectionAbortedError  # the event loop waits for the next one
        return Counted(connection.detach(), address[0]), address


class Counted(socket.socket):
    """A connection that counts until it is closed."""

    def __init__(self, descriptor: int, address: str) -> None:
        super().__init__(fileno=descriptor)
        self._address = address
        Listening.open[address] += 1

    def close(self) -> None:
        if self.fileno() >= 0:
            Listening.open[self._address] -= 1
            if not Listening.open[self._address]:
                del Listening.open[self._address]
        super().close()


SERVING: dict[str, Any] = {
    "http": Patient,
    "loop": "asyncio",  # others do not ask a socket of ours to accept
    "h11_max_incomplete_event_size": LONGEST_HEADERS,
    "access_log": False,
}
"""How uvicorn serves the proxy."""


def listen(config: uvicorn.Config) -> list[socket.socket]:
    """The socket of a server; this process may have as many as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return [Listening(fileno=config.bind_socket().detach())]


def main(host: str, port: int, superlink: int, folder: Path, counts: Path) -> None:
    """Serve until stopped; TLS 1.2 or later with the server's certificate."""
    config = uvicorn.Config(
        FleetProxy(superlink, folder, counts),
        host=host,
        port=port,
        ssl_certfile=folder / CERTIFICATE,
        ssl_keyfile=folder / KEY,
        log_level="warning",
        timeout_graceful_shutdown=3,
        **SERVING,
    )
    uvicorn.Server(config).run(sockets=listen(config))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
