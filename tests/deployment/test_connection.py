"""A client's way to the server: whatever is in the way is named by itself."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import fedsp
from fedsp.cli import main
from fedsp.config import PartyConfig
from fedsp.config_file import read_party
from fedsp.deployment.fleet_proxy import SERVING, FleetProxy
from fedsp.deployment.monitoring import connection
from fedsp.deployment.monitoring.connection import Lookout, Refused, Unreached, check_connection
from fedsp.deployment.monitoring.health import Health
from fedsp.deployment.parties import credentials
from fedsp.deployment.parties.admission import revoke
from fedsp.deployment.parties.new_federation import init_federation
from fedsp.deployment.processes import free_port
from fedsp.errors import CredentialError, FedspError
from fedsp.federation.callbacks import Callbacks
from support.tls_server import serving


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("connection") / "federation"
    init_federation(place, ["a", "b"], "localhost:8000")
    return place


@pytest.fixture()
def place(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "federation"))


OFF = Health(None, "health", "client")


def party(place: Path, port: int, host: str = "localhost", name: str = "a") -> PartyConfig:
    path = place / name / "party.toml"
    path.write_text(
        re.sub("^server = .*$", f'server = "{host}:{port}"', path.read_text(), flags=re.M)
    )
    return read_party(path, package_known=False)


def found(party: PartyConfig) -> tuple[list[str], FedspError | None]:
    """The steps that were right, and what was wrong then."""
    steps: list[str] = []
    try:
        for step in check_connection(party, seconds=0.5):
            steps.append(step.name)
    except FedspError as error:
        return steps, error
    return steps, None


@pytest.fixture()
def open_port(place: Path) -> Iterator[int]:
    """The server's proxy, with no SuperLink behind it."""
    port = free_port()
    app = FleetProxy(free_port(), place / "server", place / "counts")
    with serving(app, place / "server", port, **SERVING):
        yield port


def greets(status: int = 200, **told: Any) -> Callable[..., Any]:
    """What stands for a proxy that answers every call alike."""
    return greets_with(json.dumps(told).encode(), status)


def greets_with(body: bytes, status: int = 200) -> Callable[..., Any]:
    """The same, for any bytes."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": body})

    return app


def test_every_step_to_a_server_is_told_and_none_of_them_is_counted(
    place: Path, open_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    party(place, open_port)
    monkeypatch.setattr(
        sys, "argv", ["fedsp", "federation", "check", str(place / "a" / "party.toml")]
    )
    with pytest.raises(SystemExit, match="0"):
        main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "port", "TLS", "key", "clock", "version"]
    assert f"fedsp {fedsp.__version__} at the server, {fedsp.__version__} here" in lines[-1]
    assert "127.0.0.1" in lines[0] and "certificate until 20" in lines[2]
    assert not (place / "counts").exists()


@contextlib.contextmanager
def mute() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@contextlib.contextmanager
def says(answer: bytes) -> Iterator[int]:
    """Something that answers the first bytes that come, and hangs up."""
    listening = socket.create_server(("127.0.0.1", 0))

    def work() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            connection.recv(4096)
            connection.sendall(answer)
            connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.close()
        thread.join(10)


@pytest.mark.parametrize(
    ("at", "passed", "message"),
    [
        (lambda: contextlib.nullcontext(free_port()), 1, "nothing listens at localhost"),
        (mute, 2, "takes the connection and then says nothing"),
        (
            lambda: says(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
            2,
            "does not speak TLS (WRONG_VERSION_NUMBER), as a plain HTTP server",
        ),
        (lambda: says(b""), 2, "closes the connection before TLS has begun"),
    ],
    ids=["a closed port", "a mute port", "an HTTP server", "one that hangs up"],
)
def test_what_is_no_server_of_ours_is_named(
    at: Callable[[], contextlib.AbstractContextManager[int]],
    passed: int,
    message: str,
    place: Path,
) -> None:
    with at() as port:
        steps, error = found(party(place, port))
    assert isinstance(error, Unreached) and message in str(error), error
    assert steps == ["name", "port"][:passed]


def test_an_unknown_host_and_one_that_does_not_answer_are_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, error = found(party(place, 8000, "no-such-machine.invalid"))
    assert steps == [] and "does not know the name 'no-such-machine.invalid'" in str(error)

    def never(*_: object, **__: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", never)
    steps, error = found(party(place, 8000))
    assert steps == ["name"] and "does not answer within 0.5 s" in str(error)
    assert isinstance(error, Unreached)


def test_an_impostor_is_named(place: Path, tmp_path: Path) -> None:
    """Something else answers there, with a certificate of its own."""
    init_federation(tmp_path / "other", ["x"], "localhost:8000")
    port = free_port()
    with serving(greets(), tmp_path / "other" / "server", port):
        steps, error = found(party(place, port))
    assert steps == ["name", "port"] and "does not verify against ca.crt" in str(error)
    assert isinstance(error, CredentialError)


def test_a_certificate_for_another_name_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, look_up = free_port(), socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *given, **named: look_up("127.0.0.1", *given, **named)
    )
    with serving(greets(), place / "server", port):
        _, error = found(party(place, port, "elsewhere.example"))
    assert "is made out for another name" in str(error) and "--address" in str(error)


@pytest.mark.parametrize(
    ("days", "message"),
    [(-1, "has expired"), (1, "is not valid yet"), (800, "soon: the owner of the model runs")],
)
def test_a_certificate_out_of_its_time_is_named_with_the_remedy(
    days: int, message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made so many days from now, and read by a machine of today."""
    shift = {-1: -credentials.DAYS - 1, 1: 1, 800: 30 - credentials.DAYS}[days]
    then = datetime.now(UTC) + timedelta(days=shift)
    with monkeypatch.context() as patch:
        patch.setattr(credentials, "_now", lambda: then)
        credentials.renew(place / "server", place / "ca.key")
    port = free_port()
    with serving(greets(fedsp=str(fedsp.__version__), time=time.time()), place / "server", port):
        if days < 800:
            _, error = found(party(place, port))
            assert isinstance(error, CredentialError) and message in str(error)
            assert days == 1 or "fedsp federation renew" in str(error)
        else:
            told = {step.name: step.found for step in check_connection(party(place, port))}
            assert message in told["TLS"]
            said: list[str] = []
            Lookout(party(place, port), Callbacks(info=said.append), OFF).look()
            assert len(said) == 1 and "soon" in said[0]


def test_a_key_that_the_server_does_not_know_is_named_and_one_that_is_revoked_at_once(
    place: Path, open_port: int, tmp_path: Path
) -> None:
    init_federation(tmp_path / "other", ["a"], "localhost:8000")
    shutil.copy(tmp_path / "other" / "a" / "client.key", place / "a" / "client.key")
    steps, error = found(party(place, open_port))
    assert steps == ["name", "port", "TLS"] and isinstance(error, Refused)
    assert "its key is not in the server's register" in str(error)
    b = party(place, open_port, name="b")
    lookout = Lookout(b, Callbacks(), OFF)
    lookout.look()
    revoke("b", place / "server")
    assert isinstance(found(b)[1], Refused)
    lookout._next = 0.0
    with pytest.raises(Refused):
        lookout.look()


def test_a_name_that_the_key_does_not_have_is_named(place: Path, open_port: int) -> None:
    own = party(place, open_port).model_copy(update={"name": "z"})
    _, error = found(own)
    assert isinstance(error, Refused) and "knows this key as 'a', and `name` says 'z'" in str(error)


@pytest.mark.parametrize(
    ("off", "message"),
    [(4.0, ""), (6.0, "6.0 s ahead of"), (-299.0, ""), (-301.0, "301.0 s behind")],
)
def test_a_wrong_clock_is_named_where_flower_would_refuse_it(
    off: float, message: str, place: Path
) -> None:
    port = free_port()
    app = greets(fedsp=str(fedsp.__version__), time=time.time() - off)
    with serving(app, place / "server", port):
        _, error = found(party(place, port))
    if message:
        told = re.search(r"clock is (\d+\.\d) s (\w+)", str(error))
        assert told and abs(float(told[1]) - abs(off)) < 3 and told[2] == message.split()[2]
    assert (error is None) == (not message) or off == 4.0, error


def test_the_bounds_of_the_clock_are_flowers() -> None:
    constant = pytest.importorskip("flwr.common.constant")
    assert connection.AHEAD == constant.SYSTEM_TIME_TOLERANCE
    assert connection.BEHIND == constant.TIMESTAMP_TOLERANCE


@pytest.mark.parametrize(
    ("app", "message"),
    [
        (greets(fedsp="0.1.9", time=0.0), "the server has fedsp 0.1.9, this client fedsp"),
        (greets(404), "answers fedsp's greeting with code 404: it is an earlier version"),
        (greets(200, fedsp=3), "answers fedsp's greeting with code 200"),
        (greets(200, fedsp="0.2.0", time=10**400), "answers fedsp's greeting with code 200"),
        (greets(200, fedsp="\ud800", time=0.0), "answers fedsp's greeting with code 200"),
        (greets_with(b"[" * 4000), "answers fedsp's greeting with code 200"),
    ],
    ids=["another version", "an earlier one", "nonsense", "long", "half a character", "nested"],
)
def test_another_version_is_refused_and_both_are_named(
    app: Callable[..., Any], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "BEHIND", 1e12)
    monkeypatch.setattr(connection, "AHEAD", 1e12)
    port = free_port()
    with serving(app, place / "server", port):
        _, error = found(party(place, port))
    assert isinstance(error, Refused) and message in str(error)
    assert "use one version at all parties" in str(error)


@pytest.mark.parametrize("other", ["0.2.9", "0.2"])
def test_a_version_of_the_same_series_is_taken(other: str) -> None:
    assert connection.series(other) == connection.series("0.2.0")
    assert connection.series("0.3.0") != connection.series("0.2.0")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_tried_again(status: int, place: Path) -> None:
    port = free_port()
    with serving(greets(status), place / "server", port):
        _, error = found(party(place, port))
    assert isinstance(error, Unreached) and f"is busy (code {status})" in str(error)


def test_a_signature_that_does_not_hold_is_named(place: Path) -> None:
    port = free_port()
    with serving(greets(401), place / "server", port):
        _, error = found(party(place, port))
    assert isinstance(error, Refused) and "do not belong together" in str(error)


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        ("http://p:notaport", "HTTPS_PROXY in the environment is no address of a proxy"),
        ("http://[::1", "HTTPS_PROXY in the environment is no address of a proxy"),
    ],
)
def test_a_proxy_that_is_no_address_is_a_sentence(
    proxy: str, message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    _, error = found(party(place, 8000))
    assert message in str(error)


def test_a_proxy_that_speaks_no_http_is_a_sentence(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    with says(b"nonsense\r\n\r\n") as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        _, error = found(party(place, 8000))
    assert isinstance(error, Unreached) and "cannot be reached through the proxy" in str(error)


def test_a_name_that_no_machine_has_is_a_sentence(place: Path) -> None:
    _, error = found(party(place, 8000, "\u00fc" * 60 + ".example"))
    assert isinstance(error, Unreached) and "it is no name of a machine" in str(error)


class Tunnel:
    """An HTTPS proxy that notes whom it was asked for, and what it was shown."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port, self.asked = self.listening.getsockname()[1], b""
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self.listening.accept()
            while b"\r\n\r\n" not in self.asked:
                self.asked += client.recv(4096)
            port = int(self.asked.split()[1].rpartition(b":")[2])
            with socket.create_connection(("127.0.0.1", port)) as server:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=self.pipe, args=(server, client))
                back.start()
                self.pipe(client, server)
                back.join(10)

    @staticmethod
    def pipe(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_the_way_leads_through_an_https_proxy_where_the_environment_names_one(
    place: Path, open_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of Flower's node does: httpx reads the same variables."""
    tunnel = Tunnel()
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:pass%20word@127.0.0.1:{tunnel.port}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    steps, error = found(party(place, open_port))
    assert error is None and len(steps) == 6
    assert tunnel.asked.startswith(f"CONNECT localhost:{open_port} ".encode())
    assert b"Proxy-Authorization: Basic dXNlcjpwYXNzIHdvcmQ=" in tunnel.asked
    tunnel.thread.join(10)
    tunnel.listening.close()
    _, error = found(party(place, open_port))
    assert f"nothing listens at 127.0.0.1:{tunnel.port}" in str(error)
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert found(party(place, open_port))[1] is None


def test_a_reverse_proxy_that_passes_tls_through_is_not_noticed(
    place: Path, open_port: int
) -> None:
    """As nginx's `stream` and HAProxy's `mode tcp` do: bytes, unread."""
    listening = socket.create_server(("127.0.0.1", 0))

    def pass_through() -> None:
        client, _ = listening.accept()
        with client, socket.create_connection(("127.0.0.1", open_port)) as server:
            back = threading.Thread(target=Tunnel.pipe, args=(server, client))
            back.start()
            Tunnel.pipe(client, server)
            back.join(10)

    thread = threading.Thread(target=pass_through)
    thread.start()
    steps, error = found(party(place, listening.getsockname()[1]))
    thread.join(10)
    listening.close()
    assert error is None and len(steps) == 6


def test_a_lookout_says_what_has_changed_and_no_more(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    port = free_port()
    lookout = Lookout(party(place, port), Callbacks(info=said.append), OFF)

    def look(times: int = 2) -> list[str]:
        said.clear()
        for _ in range(times):
            lookout._next = 0.0
            lookout.look()
        return said

    assert len(look()) == 1 and "nothing listens" in said[0] and "keeps trying" in said[0]
    app = FleetProxy(free_port(), place / "server", place / "counts")
    with serving(app, place / "server", port, **SERVING):
        assert look() == ["the server answers"]
    assert len(look()) == 1 and "nothing listens" in said[0]
    with serving(app, place / "server", port, **SERVING):
        assert look() == ["the server answers again"]
    # an impostor after the server was met: said, and waited out
    init_federation(place.parent / "other", ["x"], "localhost:8000")
    with serving(greets(), place.parent / "other" / "server", port):
        assert len(look()) == 1 and "does not verify" in said[0]
    own = Lookout(party(place, port), Callbacks(info=said.append), OFF, greets=False)
    with serving(greets(404), place / "server", port):
        said.clear()
        own.look()
        assert said == [], "somebody else's SuperLink greets nobody"


def test_a_client_whose_key_is_changed_ends(place: Path) -> None:
    """With the key before, the server would take no reply of its process, and say so to nobody."""
    own = party(place, free_port())
    lookout = Lookout(own, Callbacks(), OFF)
    key = place / "a" / "client.key"
    before = key.read_bytes()
    key.unlink()
    assert lookout._key() == before, "it may be in the middle of a change"
    key.write_bytes((place / "b" / "client.key").read_bytes())
    with pytest.raises(CredentialError, match=r"a/client.key was changed while .* `fedsp join`"):
        lookout.look()


def test_a_name_server_that_does_not_answer_is_waited_for_so_long(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(60) and [])
    monkeypatch.setattr("fedsp.deployment.monitoring.connection.LEAST_FOR_NAMES", 0.6)
    steps, error = found(party(place, free_port()))
    answered.set()
    assert not steps and "no name server says within 0.6 s what 'localhost' is" in str(error)


def test_a_lookout_waits_between_looks(place: Path) -> None:
    said: list[str] = []
    lookout = Lookout(party(place, free_port()), Callbacks(info=said.append), OFF)
    lookout.look()
    before = lookout._next
    lookout.look()
    assert lookout._next == before and len(said) == 1


def test_a_ca_file_that_is_none_is_named(place: Path) -> None:
    (place / "a" / "ca.crt").write_text("nothing")
    with mute() as port:
        _, error = found(party(place, port))
    assert "is no certificate: get it again" in str(error)
