"""A server over TLS in a thread of the test's own process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from fedsp.deployment.parties.credentials import CERTIFICATE, KEY


@contextlib.contextmanager
def serving(
    app: Any,
    folder: Path,
    port: int,
    listen: Callable[[uvicorn.Config], list[socket.socket]] | None = None,
    **more: Any,
) -> Iterator[None]:
    tls: dict[str, Any] = {"ssl_certfile": folder / CERTIFICATE, "ssl_keyfile": folder / KEY}
    server = uvicorn.Server(
        config=uvicorn.Config(
            app,
            host="127.0.0.1",
            port=port,
            log_level="error",
            timeout_graceful_shutdown=1,
            **tls,
            **more,
        )
    )
    sockets = listen(server.config) if listen else None
    thread = threading.Thread(target=server.run, args=[sockets])
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join(20)
