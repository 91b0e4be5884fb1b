"""The server's gate: the only port that is open to clients. It speaks TLS and passes on what Flower's nodes need, and nothing else.

Flower's SuperLink serves three APIs on one port, and whoever reaches it can start a run, that is: run code on the server. So the SuperLink
listens on this machine alone, and the gate passes only its Fleet API (`POST /v1/fleet/...`), whose every request a registered node has signed.

    python -m fedsp.engines.gate LISTEN_HOST LISTEN_PORT SUPERLINK_PORT FOLDER COUNTS

When it is stopped it adds one line to the file COUNTS: requests, bytes up and bytes down of each call, bodies as they were before TLS.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, ClassVar

import httpx
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedsp.credentials import CA, CERTIFICATE, KEY

PASSED = re.compile(r"/v1/fleet/[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
"""The paths that are passed on, whole: no dots, no percent signs, nothing that another reader could take for another path."""

SIGNED = {b"flwr-public-key", b"flwr-signature"}
"""Headers that every call of a registered node has. Whether they hold is Flower's to say; without them nothing of a body is read."""

LARGEST = 8 << 20
"""Bytes of one request's body: Flower cuts what is larger into pieces of 5 MB at most."""

LONGEST_HEADERS = 16 << 10
"""Bytes of a request's line and headers."""

HELD = 512 << 20
"""Bytes of bodies that are held at once, of all requests together."""

AT_ONCE, EACH = 256, 128
"""Requests that are passed on at once; and connections, and requests, that one address may have at once. Nobody has been authenticated yet."""

HEADERS_WITHIN, BODY_WITHIN = 15.0, 60.0
"""Seconds in which a connection must have sent the headers of a request, and a request its whole body."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Answer = tuple[int, list[tuple[bytes, bytes]], bytes, int]


class Gate:
    """An ASGI app that passes on signed calls `POST /v1/fleet/...` to the SuperLink on this machine. No machine can keep it from others: each has its own share of
    requests, and none waits for another's body."""

    def __init__(self, port: int, authority: Path, counts: Path) -> None:
        self._counts: dict[str, list[int]] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._of_address: Counter[str] = Counter()
        self._held = 0
        self._file = counts
        self._url = f"https://127.0.0.1:{port}"
        context = ssl.create_default_context(cafile=str(authority))
        self._client = httpx.AsyncClient(verify=context, timeout=httpx.Timeout(120.0), limits=httpx.Limits(max_connections=256))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            address = str((scope.get("client") or ("",))[0])
            self._of_address[address] += 1
            try:
                status, headers, body, received = await self._answer(scope, receive) if self._of_address[address] <= EACH else REFUSED_BUSY
            finally:
                self._of_address[address] -= 1
                self._of_address += Counter()  # forget addresses that have none
            if status < 400:
                entry = self._counts.setdefault(str(scope["path"]).removeprefix("/v1/fleet/"), [0, 0, 0])
                entry[:] = entry[0] + 1, entry[1] + received, entry[2] + len(body)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive) -> Answer:
        raw = bytes(scope.get("raw_path") or b"").decode("latin-1")
        if scope["method"] != "POST" or not PASSED.fullmatch(raw) or raw != scope["path"] or scope.get("query_string"):
            return 404, [], b"", 0
        if not {name.lower() for name, _ in scope["headers"]} >= SIGNED:
            return 401, [], b"", 0
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_WITHIN):
                fault = await self._read(body, receive)
            if fault:
                return fault, [], b"", 0
            async with self._turns:
                return await self._pass_on(raw, scope, bytes(body))
        except TimeoutError:
            return 408, [], b"", 0
        finally:
            self._held -= len(body)

    async def _read(self, body: bytearray, receive: Receive) -> int:
        """Read a request's body into `body`; returns the status of the refusal, or 0."""
        more = True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return 400
            part = event.get("body", b"")
            if len(body) + len(part) > LARGEST:
                return 413
            if self._held + len(part) > HELD:
                return 503
            body += part
            self._held += len(part)
            more = bool(event.get("more_body"))
        return 0

    async def _pass_on(self, path: str, scope: MutableMapping[str, Any], body: bytes) -> Answer:
        headers = [(name, value) for name, value in scope["headers"] if name not in HOP]
        try:
            reply = await self._client.post(self._url + path, content=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL):
            return 503, [], b"", 0
        kept = [(name.lower(), value) for name, value in reply.headers.raw if name.lower() not in HOP and name.lower() != b"content-encoding"]
        return reply.status_code, kept, reply.content, len(body)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while (event := (await receive())["type"]) != "lifespan.shutdown":
            await send({"type": f"{event}.complete"})
        await self._client.aclose()
        if self._counts:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(self._counts) + "\n")
        await send({"type": "lifespan.shutdown.complete"})


REFUSED_BUSY: Answer = (429, [], b"", 0)

HOP = {b"host", b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"te", b"upgrade", b"expect"}
"""Headers that belong to one connection."""


class Guarded(H11Protocol):
    """A connection that is cut where its address has too many, or where no headers come in time."""

    open: ClassVar[Counter[str]] = Counter()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._address = str((self.client or ("",))[0])
        Guarded.open[self._address] += 1
        self._patience = self.loop.call_later(HEADERS_WITHIN, transport.abort)
        if Guarded.open[self._address] > EACH:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. A request that has begun has its own time."""
        super().data_received(data)
        if self.cycle is not None:
            self._patience.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._patience.cancel()
        Guarded.open[self._address] -= 1
        if not Guarded.open[self._address]:
            del Guarded.open[self._address]
        super().connection_lost(exc)


SERVING: dict[str, Any] = {"http": Guarded, "h11_max_incomplete_event_size": LONGEST_HEADERS, "access_log": False}
"""How uvicorn serves a gate."""


def main(host: str, port: int, superlink: int, folder: Path, counts: Path, kind: type[Gate] = Gate) -> None:
    """Serve until stopped; TLS 1.2 or later with the server's certificate."""
    uvicorn.run(
        kind(superlink, folder / CA, counts),
        host=host,
        port=port,
        ssl_certfile=folder / CERTIFICATE,
        ssl_keyfile=folder / KEY,
        log_level="warning",
        timeout_graceful_shutdown=3,
        **SERVING,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
