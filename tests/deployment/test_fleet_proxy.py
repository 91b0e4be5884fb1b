"""The one open port of a deployment, as whoever can reach it meets it: nobody is authenticated yet,
and nobody may keep it from others."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import resource
import shutil
import socket
import ssl
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsp.deployment import fleet_proxy as proxy
from fedsp.deployment.parties.credentials import CA, CERTIFICATE, CLIENT_KEY, KEY
from fedsp.deployment.parties.new_federation import init_federation
from fedsp.deployment.processes import free_port
from fedsp.federation.chained_log import SECURITY, read_log
from support.clock import Clock
from support.tls_server import serving


def signed(key: Any, time: str = "2026-01-01T00:00:00+00:00") -> dict[str, str]:
    """The headers of a call, as Flower's node signs it."""
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    signature = key.sign(time.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": base64.b64encode(public).decode(),
        "flwr-signature": base64.b64encode(signature).decode(),
        "flwr-timestamp": time,
    }


def lines(headers: dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()


class Upstream:
    """What stands for the SuperLink: it notes what reaches it, and answers with the length of the
    body."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.headers: dict[str, str] = {}
        self.proxy: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        self.seen.append((scope["path"], len(body)))
        self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        status = 503 if body == b"busy" else 200
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"X-Said", b"Yes"), (b"content-encoding", b"identity")],
            }
        )
        await send({"type": "http.response.body", "body": str(len(body)).encode()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("proxy") / "federation"
    init_federation(place, ["a", "b"], "127.0.0.1:8000")
    return place / "server"


@pytest.fixture(scope="module")
def headers(folder: Path) -> dict[str, dict[str, str]]:
    """What each registered client's calls carry."""
    keys = {
        name: serialization.load_ssh_private_key(
            (folder.parent / name / CLIENT_KEY).read_bytes(), None
        )
        for name in ("a", "b")
    }
    return {name: signed(key) for name, key in keys.items()}


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[tuple[str, Upstream, ssl.SSLContext]]:
    upstream, inner, outer = Upstream(), free_port(), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy, "HEADERS_WITHIN", 2.0)
        patch.setattr(proxy, "BODY_WITHIN", 3.0)
        patch.setattr(proxy, "EACH", 8)
        patch.setattr(proxy, "HELD", 10 << 20)
        upstream.proxy = proxy.FleetProxy(inner, folder, folder / "counts")
        with (
            serving(upstream, folder, inner),
            serving(upstream.proxy, folder, outer, proxy.listen, **proxy.SERVING),
        ):
            yield (
                f"https://127.0.0.1:{outer}",
                upstream,
                ssl.create_default_context(cafile=str(folder / CA)),
            )


@pytest.fixture()
def opened(running: tuple[str, Upstream, ssl.SSLContext]) -> tuple[str, Upstream, ssl.SSLContext]:
    until(lambda: not proxy.Listening.open)  # connections of the test before
    running[1].seen.clear()
    return running


def until(there: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def dial(url: str, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5),
        server_hostname="127.0.0.1",
    )


def closed(connection: ssl.SSLSocket, seconds: float = 12.0) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def test_a_node_that_is_not_registered_hears_what_flower_says() -> None:
    from flwr.supercore.error import ApiErrorCode
    from flwr.supercore.error.catalog import API_ERROR_MAP

    said = API_ERROR_MAP[ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED]
    assert said.http_status_code == 412 and json.loads(proxy.UNKNOWN_NODE) == {
        "code": ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED,
        "detail": said.public_message,
    }


def test_a_signed_call_is_passed_on(opened: Any, headers: Any) -> None:
    url, upstream, context = opened
    reply = httpx.post(
        f"{url}/v1/fleet/pull-messages", content=b"x" * 1000, headers=headers["a"], verify=context
    )
    assert (reply.status_code, reply.text, upstream.seen) == (
        200,
        "1000",
        [("/v1/fleet/pull-messages", 1000)],
    )


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("GET", "/v1/fleet/pull"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("POST", "/v1/fleet/%00"),
        ("POST", "/v1/fleet/a%2Fb"),
        ("POST", "/v1/fleet//control"),
        ("POST", "/v1/fleet/pull?x=1"),
        ("POST", "/v1/fleet/"),
    ],
)
def test_nothing_else_is(method: str, path: str, opened: Any, headers: Any) -> None:
    url, upstream, context = opened
    connection = dial(url, context)
    connection.sendall(
        f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n".encode()
        + b"connection: close\r\n"
        + lines(headers["a"])
        + b"\r\n"
    )
    assert connection.recv(4096).startswith(b"HTTP/1.1 404 ")
    assert not upstream.seen


@pytest.mark.parametrize(
    "wrong",
    [
        "nothing",
        "a header less",
        "an unknown key",
        "another's signature",
        "another time",
        "no base64",
        "no signature",
    ],
)
def test_a_body_is_not_waited_for_unless_a_registered_client_has_signed(
    wrong: str, opened: Any, headers: Any
) -> None:
    url, upstream, context = opened
    call = dict(headers["a"])
    if wrong == "nothing":
        call = {}
    elif wrong == "a header less":
        del call["flwr-timestamp"]
    elif wrong == "an unknown key":
        call = signed(ec.generate_private_key(ec.SECP384R1()))
    elif wrong == "another's signature":
        call["flwr-signature"] = headers["b"]["flwr-signature"]
    elif wrong == "another time":
        call["flwr-timestamp"] = "2026-01-01T00:00:01+00:00"
    elif wrong == "no base64":
        call["flwr-public-key"] = "?"
    else:
        call["flwr-signature"] = base64.b64encode(b"x").decode()
    connection = dial(url, context)
    connection.sendall(
        b"POST /v1/fleet/pull HTTP/1.1\r\nhost: x\r\ncontent-length: 8000000\r\n"
        + lines(call)
        + b"\r\n"
    )
    assert connection.recv(4096).startswith(
        b"HTTP/1.1 412 " if wrong == "an unknown key" else b"HTTP/1.1 401 "
    )
    assert not upstream.seen


def test_what_belongs_to_the_call_is_passed_on_and_what_belongs_to_the_connection_is_not(
    opened: Any, headers: Any
) -> None:
    url, upstream, context = opened
    more = {
        "content-type": "application/protobuf",
        "te": "trailers",
        "Keep-Alive": "timeout=5",
        "x-of-ours": "1",
    }
    reply = httpx.post(
        f"{url}/v1/fleet/pull", content=b"abc", headers={**headers["a"], **more}, verify=context
    )
    assert (
        upstream.headers.items()
        >= {
            **headers["a"],
            "content-type": "application/protobuf",
            "x-of-ours": "1",
        }.items()
    )
    assert (
        "te" not in upstream.headers
        and "keep-alive" not in upstream.headers
        and upstream.headers["host"] != httpx.URL(url).netloc.decode()
    )
    assert (
        reply.headers["x-said"] == "Yes"
        and "content-encoding" not in reply.headers
        and reply.text == "3"
    )
    assert (
        httpx.post(
            f"{url}/v1/fleet/pull", content=b"busy", headers=headers["a"], verify=context
        ).status_code
        == 503
    )


def test_what_was_passed_on_is_counted_when_the_proxy_stops(
    folder: Path, headers: Any, tmp_path: Path
) -> None:
    upstream, inner, outer = Upstream(), free_port(), free_port()
    url, context = (
        f"https://127.0.0.1:{outer}/v1/fleet",
        ssl.create_default_context(cafile=str(folder / CA)),
    )
    counts = tmp_path / "counts"
    for more in (True, False):
        with (
            serving(upstream, folder, inner),
            serving(
                proxy.FleetProxy(inner, folder, counts),
                folder,
                outer,
                proxy.listen,
                **proxy.SERVING,
            ),
        ):
            for path, body in (
                (
                    ("pull", b"x" * 10),
                    ("pull", b"x" * 7),
                    ("push/object", b"x" * 1000),
                    ("pull", b"busy"),
                )
                if more
                else ()
            ):
                httpx.post(f"{url}/{path}", content=body, headers=headers["a"], verify=context)
            httpx.post(f"{url}/pull", content=b"x", verify=context)
        assert [json.loads(line) for line in counts.read_text().splitlines()] == [
            {"pull": [2, 17, 3], "push/object": [1, 1000, 4]}
        ], "one line, no refusals"


def test_an_upstream_that_is_gone_is_no_fault_of_the_proxy(
    folder: Path, headers: Any, tmp_path: Path
) -> None:
    outer = free_port()
    with serving(
        proxy.FleetProxy(free_port(), folder, tmp_path / "counts"),
        folder,
        outer,
        proxy.listen,
        **proxy.SERVING,
    ):
        context = ssl.create_default_context(cafile=str(folder / CA))
        assert (
            httpx.post(
                f"https://127.0.0.1:{outer}/v1/fleet/pull",
                content=b"x",
                headers=headers["a"],
                verify=context,
            ).status_code
            == 503
        )
    assert not (tmp_path / "counts").exists()


def test_requests_above_an_address_s_share_are_told_so(
    opened: Any, headers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over connections that were there before: each request counts while it is answered, and not
    longer."""
    url, upstream, context = opened
    with httpx.Client(verify=context) as client:
        assert (
            client.post(f"{url}/v1/fleet/pull", content=b"x", headers=headers["a"]).status_code
            == 200
        )
        monkeypatch.setattr(proxy, "EACH", 0)
        assert (
            client.post(f"{url}/v1/fleet/pull", content=b"x", headers=headers["a"]).status_code
            == 429
        )
        monkeypatch.setattr(proxy, "EACH", 1)
        for _ in range(3):
            assert (
                client.post(f"{url}/v1/fleet/pull", content=b"x", headers=headers["a"]).status_code
                == 200
            )
    assert len(upstream.seen) == 4


def test_a_body_that_comes_slowly_or_is_too_large_ends(opened: Any, headers: Any) -> None:
    url, upstream, context = opened
    slow = dial(url, context)
    slow.sendall(
        b"POST /v1/fleet/pull HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
        + lines(headers["a"])
        + b"\r\n"
    )
    slow.settimeout(0.5)
    until, said = time.monotonic() + 15, b""
    while not said and time.monotonic() < until:  # each piece in time, the whole not
        with contextlib.suppress(TimeoutError):
            slow.sendall(b"x")
            said = slow.recv(4096)
    assert said.startswith(b"HTTP/1.1 408 ")
    reply = httpx.post(
        f"{url}/v1/fleet/push",
        content=b"x" * (proxy.LARGEST + 1),
        headers=headers["a"],
        verify=context,
    )
    assert reply.status_code == 413 and not upstream.seen


def test_one_client_cannot_take_the_memory_of_others(opened: Any, headers: Any) -> None:
    url, upstream, context = opened
    first = dial(url, context)
    first.sendall(
        b"POST /v1/fleet/push HTTP/1.1\r\nhost: x\r\ncontent-length: 8000000\r\n"
        + lines(headers["a"])
        + b"\r\n"
        + b"x" * 7_900_000
    )
    until(lambda: sum(upstream.proxy._held.values()) == 7_900_000)
    refused = httpx.post(
        f"{url}/v1/fleet/push", content=b"x" * 7_000_000, headers=headers["a"], verify=context
    )
    other = httpx.post(
        f"{url}/v1/fleet/push", content=b"x" * 7_000_000, headers=headers["b"], verify=context
    )
    assert (refused.status_code, other.status_code, upstream.seen) == (
        503,
        200,
        [("/v1/fleet/push", 7_000_000)],
    )
    first.sendall(b"x" * 100_000)
    assert first.recv(4096).startswith(b"HTTP/1.1 200 ")
    again = httpx.post(
        f"{url}/v1/fleet/push", content=b"x" * 7_000_000, headers=headers["a"], verify=context
    )
    assert again.status_code == 200, "the share of a client is not given back"


def test_headers_without_end_or_that_do_not_come_are_cut_off(opened: Any) -> None:
    url, upstream, context = opened
    large = dial(url, context)
    with contextlib.suppress(OSError):
        large.sendall(
            b"POST /v1/fleet/pull HTTP/1.1\r\nhost: x\r\n"
            + b"".join(b"x-%d: %s\r\n" % (n, b"y" * 1000) for n in range(200))
        )
    assert closed(large)
    silent = dial(url, context)
    trickle = dial(url, context)
    trickle.sendall(b"POST /v1/fleet/pull HTT")
    assert closed(silent) and closed(trickle)
    assert not upstream.seen


def test_the_headers_of_a_later_request_have_their_time_as_well(opened: Any) -> None:
    url, _, context = opened
    connection = dial(url, context)
    connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 404")
    connection.sendall(b"POST /v1/fleet/pull HTT")
    assert closed(connection)


def test_connections_that_never_speak_tls_count_as_well(opened: Any, headers: Any) -> None:
    """Else one machine takes all that the process may have open."""
    url, _, context = opened
    port = int(url.rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(3 * proxy.EACH)]
    until(lambda: proxy.Listening.open["127.0.0.1"] == proxy.EACH)
    for connection in silent[proxy.EACH :]:
        connection.settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b"", "it was hung up on"
    other = socket.create_connection(("127.0.0.1", port), 5, source_address=("127.0.0.2", 0))
    with context.wrap_socket(other, server_hostname="127.0.0.1") as secure:
        secure.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert secure.recv(4096).startswith(b"HTTP/1.1 404")
    for connection in silent:
        connection.close()
    until(lambda: not proxy.Listening.open)


@pytest.mark.parametrize("name", ["flwr-public-key", "flwr-signature", "flwr-timestamp"])
def test_a_header_that_says_who_calls_stands_once(
    name: str, app: proxy.FleetProxy, headers: Any
) -> None:
    """Flower reads the first of two, and who reads the last lets a revoked client in."""
    call = Call(app, headers["a"])
    call.headers = [(name.encode(), headers["b"][name].encode()), *call.headers]
    assert asyncio.run(call(part(1)))[0] == 400 and not call.passed


def test_one_address_cannot_keep_the_proxy_from_others(opened: Any, headers: Any) -> None:
    """Connections above its share are cut, and those that it has wait for nobody else's body."""
    url, upstream, context = opened
    held = []
    for _ in range(proxy.EACH - 1):
        held.append(connection := dial(url, context))
        connection.sendall(
            b"POST /v1/fleet/pull HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
            + lines(headers["a"])
            + b"\r\nx"
        )
    reply = httpx.post(f"{url}/v1/fleet/pull", content=b"x", headers=headers["a"], verify=context)
    assert reply.status_code == 200 and upstream.seen == [("/v1/fleet/pull", 1)]
    port, call = (
        int(url.rpartition(":")[2]),
        b"POST /v1/fleet/pull HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n"
        + lines(headers["a"])
        + b"\r\nx",
    )
    elsewhere = [
        socket.create_connection(("127.0.0.1", port), 5, source_address=("127.0.0.2", 0))
        for _ in range(proxy.EACH)
    ]
    for connection in [context.wrap_socket(one, server_hostname="127.0.0.1") for one in elsewhere]:
        connection.sendall(call)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 "), (
            "another address has a share of its own, all of it"
        )
        connection.close()
    more = []
    for _ in range(6):
        with contextlib.suppress(OSError):
            more.append(dial(url, context))
    cut = sum(closed(connection, 2.0) for connection in more[1:])
    assert cut == len(more[1:]), "the first may have been within the share"
    for connection in held:
        connection.close()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if (
                httpx.post(
                    f"{url}/v1/fleet/pull", content=b"x", headers=headers["a"], verify=context
                ).status_code
                == 200
            ):
                return
        time.sleep(0.1)
    pytest.fail("the share of an address is not given back")


class Call:
    """One request as an ASGI server hands it to the proxy, and what came back; what stands for the
    SuperLink answers with `reply`."""

    def __init__(
        self, app: proxy.FleetProxy, headers: dict[str, str], reply: httpx.Response | None = None
    ) -> None:
        self.app, self.passed = app, list[httpx.Request]()
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]

        def answer(request: httpx.Request) -> httpx.Response:
            self.passed.append(request)
            return reply or httpx.Response(200, content=b"yes")

        app._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))

    async def __call__(
        self,
        *events: dict[str, Any],
        client: tuple[str, int] | None = ("10.0.0.1", 1),
        **scope: Any,
    ) -> tuple[int, list[Any], bytes]:
        told: list[Any] = []
        coming = iter(events)

        async def receive() -> dict[str, Any]:
            event = next(coming)
            if "wait" in event:
                await event["wait"]
                event = next(coming)
            return event

        async def send(event: Any) -> None:
            told.append(event)

        path = "/v1/fleet/pull"
        whole = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": self.headers,
            "client": client,
        }
        await self.app({**whole, **scope}, receive, send)
        start, body = told
        assert (start["type"], body["type"]) == ("http.response.start", "http.response.body")
        return start["status"], start["headers"], body["body"]


def part(size: int, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


@pytest.fixture()
def app(folder: Path, tmp_path: Path) -> proxy.FleetProxy:
    return proxy.FleetProxy(1, folder, tmp_path / "counts")


def test_bounds_are_met_exactly(
    app: proxy.FleetProxy, headers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "LARGEST", 100)
    monkeypatch.setattr(proxy, "HELD", 150)
    call = Call(app, headers["a"])
    assert (
        asyncio.run(call(part(60, more=True), part(40)))[0] == 200
        and len(call.passed[0].content) == 100
    )
    assert asyncio.run(call(part(60, more=True), part(41))) == (413, [], b"")
    assert (
        asyncio.run(call({"type": "http.request", "more_body": True}, part(5)))[0] == 200
        and len(call.passed[1].content) == 5
    )
    assert asyncio.run(call({"type": "http.request"}))[0] == 200 and call.passed[2].content == b""
    assert asyncio.run(call(part(60, more=True), {"type": "http.disconnect"})) == (400, [], b"")

    async def two(second: int) -> list[tuple[int, list[Any], bytes]]:
        gone_on = asyncio.Event()
        first = asyncio.ensure_future(call(part(90, more=True), {"wait": gone_on.wait()}, part(0)))
        await asyncio.sleep(0)
        answers = [await call(part(second))]
        gone_on.set()
        return [await first, *answers]

    assert [status for status, _, _ in asyncio.run(two(60))] == [200, 200]
    assert [status for status, _, _ in asyncio.run(two(61))] == [200, 503]
    assert not any(app._held.values()), "what was held is given back, of refused calls too"


def test_requests_are_counted_by_address_while_they_are_answered(
    app: proxy.FleetProxy, headers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "EACH", 2)
    call = Call(app, headers["a"])

    async def crowd() -> list[int]:
        gone_on = asyncio.Event()
        held = [
            asyncio.ensure_future(call(part(1, more=True), {"wait": gone_on.wait()}, part(1)))
            for _ in range(2)
        ]
        await asyncio.sleep(0)
        found = [
            (await call(part(1)))[0],
            (await call(part(1), client=("10.0.0.2", 1)))[0],
            (await call(part(1), client=None))[0],
        ]
        assert app._of_address == {"10.0.0.1": 2}
        gone_on.set()
        return found + [(await one)[0] for one in held] + [(await call(part(1)))[0]]

    assert asyncio.run(crowd()) == [429, 200, 200, 200, 200, 200]
    assert not app._of_address, "addresses that have none are forgotten"


@pytest.mark.parametrize(
    ("status", "counted"), [(200, True), (399, True), (400, False), (503, False)]
)
def test_only_what_was_answered_is_counted(
    status: int, counted: bool, app: proxy.FleetProxy, headers: Any
) -> None:
    said = httpx.Response(
        status,
        headers={"Connection": "close", "X-One": "1", "Content-Encoding": "identity"},
        content=b"what is said",
    )
    found, kept, body = asyncio.run(Call(app, headers["a"], said)(part(7)))
    assert (found, kept, body) == (status, [(b"x-one", b"1")], b"what is said")
    assert app._counts == ({"pull": [1, 7, 12]} if counted else {})


def test_an_upstream_s_fault_is_an_empty_answer_and_is_not_counted(
    app: proxy.FleetProxy, headers: Any
) -> None:
    call = Call(app, headers["a"])

    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("gone")

    app._client = httpx.AsyncClient(transport=httpx.MockTransport(broken))
    assert asyncio.run(call(part(7))) == (503, [], b"") and not app._counts


def test_the_proxy_says_when_it_has_started_and_stopped(app: proxy.FleetProxy) -> None:
    told: list[Any] = []
    events = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(events)

    async def send(event: Any) -> None:
        told.append(event)

    asyncio.run(app({"type": "lifespan"}, receive, send))
    assert told == [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]


def test_a_signature_with_what_is_no_base64_is_none(app: proxy.FleetProxy, headers: Any) -> None:
    call = Call(app, {**headers["a"], "flwr-signature": headers["a"]["flwr-signature"] + "\n!"})
    assert asyncio.run(call(part(7))) == (401, [], b"") and not call.passed


def test_what_is_refused_is_refused_without_a_word(
    app: proxy.FleetProxy, headers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Call(app, headers["a"])
    assert asyncio.run(call(part(7), method="GET")) == (404, [], b"")
    monkeypatch.setattr(proxy, "BODY_WITHIN", 0.0)

    async def stalled() -> tuple[int, list[Any], bytes]:
        return await call(part(7, more=True), {"wait": asyncio.Event().wait()})

    assert asyncio.run(stalled()) == (408, [], b"") and not call.passed


def test_the_proxy_is_served_as_it_is_meant_to_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS with the server's certificate, our own protocol with its patience and its bound on
    headers, and no log of requests."""
    served: list[Any] = []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: served.extend([self.config, sockets])
    )
    configured = uvicorn.Config

    def config_of(app: Any, **how: Any) -> uvicorn.Config:
        served.append(how)
        return configured(app, **how)

    monkeypatch.setattr(uvicorn, "Config", config_of)
    port = free_port()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        proxy.main("127.0.0.1", port, 9000, folder, tmp_path / "counts")
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limit[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    how, config, (listening,) = served
    assert type(listening) is proxy.Listening and listening.getsockname() == ("127.0.0.1", port)
    listening.close()
    app = config.app
    assert (
        type(app) is proxy.FleetProxy
        and app._url == "https://127.0.0.1:9000"
        and app._file == tmp_path / "counts"
    )
    assert how == {
        "host": "127.0.0.1",
        "port": port,
        "ssl_certfile": folder / CERTIFICATE,
        "ssl_keyfile": folder / KEY,
        "log_level": "warning",
        "timeout_graceful_shutdown": 3,
        **proxy.SERVING,
    }
    assert {
        "http": proxy.Patient,
        "loop": "asyncio",
        "h11_max_incomplete_event_size": proxy.LONGEST_HEADERS,
        "access_log": False,
    } == proxy.SERVING
    assert (app._client.timeout, app._client._transport._pool._max_connections) == (  # type: ignore[attr-defined]
        httpx.Timeout(120.0),
        256,
    )


def test_the_security_log_says_once_who_came_and_who_was_refused(
    folder: Path, headers: Any, app: proxy.FleetProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / SECURITY).unlink(missing_ok=True)
    app._noted.clear()

    def call(values: dict[str, str]) -> None:
        app._signer({name.encode(): value.encode() for name, value in values.items()})

    stranger = signed(ec.generate_private_key(ec.SECP384R1()))
    for _ in range(3):
        call(headers["a"])
        call(stranger)
        call({**headers["b"], "flwr-timestamp": "2026-01-01T00:00:01+00:00"})
    told = read_log(folder / SECURITY, "")
    assert [event["event"] for event in told] == ["connected", "key refused", "signature refused"]
    assert (told[0]["client"], told[2]["client"]) == ("a", "b")
    public = base64.b64decode(stranger["flwr-public-key"])
    assert told[1]["sha256"] == hashlib.sha256(public).hexdigest()
    monkeypatch.setattr(proxy, "MOST_STRANGERS", 2)
    for _ in range(4):
        call(signed(ec.generate_private_key(ec.SECP384R1())))
    call(headers["b"])
    told = read_log(folder / SECURITY, "")[3:]
    assert [event["event"] for event in told] == [
        "key refused",
        "more keys refused",
        "connected",
    ], "strangers neither fill the disk nor hide who is known"


def test_a_register_that_stays_unreadable_lets_nobody_in(
    folder: Path, headers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Path(shutil.copytree(folder, tmp_path / "server"))
    app = proxy.FleetProxy(free_port(), server, tmp_path / "counts")
    clock = Clock(monkeypatch)
    clock.now = 100.0

    def allowed() -> bool:
        call = {name.encode(): value.encode() for name, value in headers["a"].items()}
        return isinstance(app._signer(call), bytes)

    whole = (server / "register.toml").read_text()
    (server / "register.toml").write_text("[clients")
    assert allowed(), "it may be being written"
    clock.now += proxy.UNREAD_FOR + 1
    assert not allowed()
    (server / "register.toml").write_text(whole)
    assert allowed()


def test_a_register_that_is_older_than_its_keys_is_read(
    folder: Path, headers: Any, tmp_path: Path
) -> None:
    """As `cp -p` puts it in place."""
    server = Path(shutil.copytree(folder, tmp_path / "server"))
    app = proxy.FleetProxy(free_port(), server, tmp_path / "counts")
    path = server / "register.toml"
    keys = server / "clients"
    os.utime(path, ns=(1, (keys.stat().st_mtime_ns) - 10**9))
    app._registered()
    left = tomllib.loads(path.read_text())["clients"]["a"]
    path.write_text(f'[clients.a]\npublic_key = "{left["public_key"]}"\nexamples = 1\n')
    os.utime(path, ns=(1, (keys.stat().st_mtime_ns) - 10**6))
    assert [name for name, _ in app._registered().values()] == ["a"]
