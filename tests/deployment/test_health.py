"""What a machine's own monitoring sees of a server and of a client."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import httpx
import pytest

import fedsp
from fedsp.deployment.monitoring.health import FIGURES, Health
from fedsp.deployment.processes import free_port
from fedsp.errors import ConfigurationError
from fedsp.federation.messages import RoundRecord

RECORD = RoundRecord(
    round=2,
    asked=["a", "b", "c"],
    answered=["a", "b"],
    failed={"c": "no reply"},
    bytes_down=300,
    bytes_up=200,
    client_losses={},
    server_loss=None,
    validation=1.5,
    best_round=2,
    shortened_examples=0,
    seconds=1.0,
    seconds_training=1.0,
)


def ask(port: int, path: str) -> httpx.Response:
    until = time.monotonic() + 20
    while True:
        try:
            return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False)
        except httpx.ConnectError:
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.fixture()
def running() -> Iterator[tuple[Health, int]]:
    port = free_port()
    with Health(f"127.0.0.1:{port}", "health", "server") as health:
        yield health, port


def test_figures_of_rounds_are_told_to_prometheus(running: tuple[Health, int]) -> None:
    health, port = running
    health.callbacks().round_done(RECORD, 10)
    health.add("fedsp_answers", kind="update")
    health.add("fedsp_answers", kind="update")
    lines = ask(port, "/metrics").text.splitlines()
    told = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert told["fedsp_round"] == "2.0" and told["fedsp_rounds"] == "10.0"
    assert told['fedsp_round_clients{state="answered"}'] == "2.0"
    assert told['fedsp_round_clients{state="failed"}'] == "1.0"
    assert told['fedsp_round_bytes{direction="up"}'] == "200.0"
    assert told["fedsp_validation_loss"] == "1.5"
    assert told['fedsp_answers{kind="update"}'] == "2.0"
    assert told[f'fedsp_info{{role="server",version="{fedsp.__version__}"}}'] == "1.0"
    assert {line.split()[2] for line in lines if line.startswith("# HELP")} == {
        name for name in FIGURES if name.startswith(("fedsp_round", "fedsp_val", "fedsp_info"))
    } | {"fedsp_answers"}, "what is not known is not told, not even as 0"


def test_health_says_what_is_wrong(running: tuple[Health, int]) -> None:
    health, port = running
    assert ask(port, "/healthz").json() == {"status": "ok", "role": "server"}
    health.wrong = "the server does not answer"
    said = ask(port, "/healthz")
    assert said.status_code == 503 and said.json()["status"] == "the server does not answer"
    assert ask(port, "/").status_code == 404


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "[::]:9464", "10.0.0.1:9464", "example.com:1"])
def test_no_other_machine_is_told(address: str) -> None:
    with pytest.raises(ConfigurationError, match="can be reached from other machines"):
        Health(address, "federation.health", "server")


def test_a_port_in_use_is_said() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigurationError, match="health: cannot listen on 127"),
    ):
        Health(f"127.0.0.1:{taken.getsockname()[1]}", "health", "client")


def test_it_ends_with_the_run(running: tuple[Health, int]) -> None:
    health, port = running
    ask(port, "/healthz")
    health.__exit__(None, None, None)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)
