"""The server's gate: the only port that is open to clients. It speaks TLS and passes on what Flower's nodes need, and nothing else.

Flower's SuperLink serves three APIs on one port, and whoever reaches it can start a run, that is: run code on the server. So the SuperLink
listens on this machine alone, and the gate passes only its Fleet API (`POST /v1/fleet/...`), whose every request a registered node has signed.

    python -m fedsp.engines.gate LISTEN_HOST LISTEN_PORT SUPERLINK_PORT FOLDER COUNTS

When it is stopped it adds one line to the file COUNTS: requests, bytes up and bytes down of each call, bodies as they were before TLS.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from fedsp.credentials import CA, CERTIFICATE, KEY

PASSED = "/v1/fleet/"
LARGEST = 8 << 20
"""Bytes of one request's body: Flower cuts what is larger into pieces of 5 MB at most."""

AT_ONCE, SLOWEST = 256, 60.0
"""Requests that are dealt with at once, and seconds that the next piece of a body may take: nobody has been authenticated yet."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gate:
    """An ASGI app that passes on `POST /v1/fleet/...` to the SuperLink on this machine."""

    def __init__(self, port: int, authority: Path, counts: Path) -> None:
        self._counts: dict[str, list[int]] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._file = counts
        self._url = f"https://127.0.0.1:{port}"
        context = ssl.create_default_context(cafile=str(authority))
        self._client = httpx.AsyncClient(verify=context, timeout=httpx.Timeout(120.0), limits=httpx.Limits(max_connections=256))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            async with self._turns:
                status, headers, body, received = await self._answer(scope, receive)
            if status < 400:
                entry = self._counts.setdefault(str(scope["path"]).removeprefix(PASSED), [0, 0, 0])
                entry[:] = entry[0] + 1, entry[1] + received, entry[2] + len(body)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive) -> tuple[int, list[tuple[bytes, bytes]], bytes, int]:
        path = str(scope["path"])
        if scope["method"] != "POST" or not path.startswith(PASSED) or ".." in path:
            return 404, [], b"", 0
        body, more = bytearray(), True
        while more:
            try:
                event = await asyncio.wait_for(receive(), SLOWEST)
            except TimeoutError:
                return 408, [], b"", 0
            if event["type"] == "http.disconnect":
                return 400, [], b"", 0
            body += event.get("body", b"")
            more = bool(event.get("more_body"))
            if len(body) > LARGEST:
                return 413, [], b"", 0
        headers = [(name, value) for name, value in scope["headers"] if name not in HOP]
        try:
            reply = await self._client.post(self._url + path, content=bytes(body), headers=headers)
        except httpx.HTTPError:
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


HOP = {b"host", b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"te", b"upgrade", b"expect"}
"""Headers that belong to one connection."""


def main(host: str, port: int, superlink: int, folder: Path, counts: Path, kind: type[Gate] = Gate) -> None:
    """Serve until stopped; TLS 1.2 or later with the server's certificate."""
    gate = kind(superlink, folder / CA, counts)
    uvicorn.run(
        gate,
        host=host,
        port=port,
        ssl_certfile=folder / CERTIFICATE,
        ssl_keyfile=folder / KEY,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
