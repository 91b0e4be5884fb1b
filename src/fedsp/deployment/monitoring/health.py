"""How a server or a client is, for the monitoring of its own machine: `/healthz` says it in a
sentence of JSON, `/metrics` in figures for Prometheus (https://prometheus.io). Nobody else's
machine reaches either.

`/healthz` answers 200, or 503 while something is wrong that a person may have to mend.
"""

from __future__ import annotations

import ipaddress
import json
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from types import TracebackType
from typing import Any

import uvicorn

import fedsp
from fedsp.deployment.processes import host_and_port, require_free
from fedsp.errors import ConfigurationError, require_installed
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.messages import RoundRecord

FIGURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "fedsp_info": ("1, labelled by version and by server or client", ("version", "role")),
    "fedsp_round": ("the last finished round", ()),
    "fedsp_rounds": ("the rounds of the run", ()),
    "fedsp_round_finished_seconds": ("when that round was finished, in Unix time", ()),
    "fedsp_round_clients": ("clients of the last finished round", ("state",)),
    "fedsp_round_bytes": ("bytes of the last finished round", ("direction",)),
    "fedsp_validation_loss": ("validation loss of the last round that has one, nats per token", ()),
    "fedsp_answers": ("requests that this client has answered since it was started", ("kind",)),
    "fedsp_bytes_sent": ("bytes that this client has sent since it was started", ()),
    "fedsp_answer_seconds": ("when this client answered last, in Unix time", ()),
    "fedsp_epsilon": ("epsilon that this client's ledger has counted so far", ()),
    "fedsp_server_reached": ("1 while this client's way to the server is open, else 0", ()),
}
"""What each figure says, and its labels. A server has those of rounds, a client the others."""

Scope = MutableMapping[str, Any]
Send = Callable[[Scope], Awaitable[None]]


class Health:
    """Answers until it is closed; with no address it answers nobody.

    Raises:
        ConfigurationError: the address is not one of this machine alone, or is in use, or the
            library for it is not installed. `key` is the setting that the message names.
    """

    def __init__(self, address: str | None, key: str, role: str) -> None:
        self._gauges: dict[str, Any] = {}
        self._server: uvicorn.Server | None = None
        self.wrong = ""
        if address is None:
            return
        host, port = host_and_port(address, key)
        if not _only_here(host):
            raise ConfigurationError(
                f"{key}: {address!r} can be reached from other machines: name one of this machine"
                f" alone, such as 127.0.0.1:{port}"
            )
        require_installed("flower", f"{key} needs", "prometheus_client")
        from prometheus_client import CollectorRegistry, Gauge, make_asgi_app

        registry = CollectorRegistry()
        self._gauge = partial(Gauge, registry=registry)
        metrics = make_asgi_app(registry)

        async def app(scope: Scope, receive: Any, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] == "/metrics":
                await metrics(scope, receive, send)
            elif scope["type"] == "http":
                known = scope["path"] == "/healthz"
                said = {"status": self.wrong or "ok", "role": role} if known else None
                status = 404 if not known else 503 if self.wrong else 200
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": status, "headers": headers})
                body = json.dumps(said).encode() + b"\n"
                await send({"type": "http.response.body", "body": body})

        require_free(host, port, key)
        told = uvicorn.Config(app, host=host, port=port, lifespan="off", log_level="error")
        self._server = uvicorn.Server(told)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        self.set("fedsp_info", 1, version=str(fedsp.__version__), role=role)

    def __enter__(self) -> Health:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server:
            self._server.should_exit = True
            self._thread.join(5)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a figure of FIGURES, which is told from then on."""
        if self._server:
            self._of(name, labels).set(value)

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a figure of FIGURES."""
        if self._server:
            self._of(name, labels).inc(value)

    def _of(self, name: str, labels: dict[str, str]) -> Any:
        if name not in self._gauges:
            self._gauges[name] = self._gauge(name, *FIGURES[name])
        gauge = self._gauges[name]
        return gauge.labels(**labels) if labels else gauge

    def callbacks(self) -> Callbacks:
        """What keeps the figures of a server's rounds."""
        return Callbacks(round_done=self._round_done)

    def _round_done(self, record: RoundRecord, rounds: int) -> None:
        if record.validation is not None:
            self.set("fedsp_validation_loss", record.validation)
        if not record.trained:
            return
        self.set("fedsp_round", record.round)
        self.set("fedsp_rounds", rounds)
        self.set("fedsp_round_finished_seconds", time.time())
        for state, clients in (
            ("asked", record.asked),
            ("answered", record.answered),
            ("failed", record.failed),
        ):
            self.set("fedsp_round_clients", len(clients), state=state)
        self.set("fedsp_round_bytes", record.bytes_down, direction="down")
        self.set("fedsp_round_bytes", record.bytes_up, direction="up")


def _only_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
