"""A client's way to the server, looked at step by step, so that whatever is in the way is named by
itself: the server's name, its port, TLS and the certificate, this client's key, its clock, and the
version of fedsp at both ends.

The last three are asked of the server's proxy, which answers a signed `POST /v1/fedsp/greeting` by
itself (`fedsp.deployment.fleet_proxy`). Where the environment names an HTTPS proxy (HTTPS_PROXY,
NO_PROXY), the way leads through it, as that of Flower's node does.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import queue
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fedsp
from fedsp.config import PartyConfig
from fedsp.deployment.monitoring.health import Health
from fedsp.deployment.parties.credentials import (
    CA,
    CLIENT_KEY,
    SOON,
    signed_headers,
)
from fedsp.deployment.processes import host_and_port, written
from fedsp.errors import ConfigurationError, CredentialError, DeploymentError, first_line
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.chained_log import record_event
from fedsp.storage import parse_json

GREETING = "/v1/fedsp/greeting"
VERSION_HEADER = "fedsp-version"

BEHIND, AHEAD = 300.0, 5.0
"""Seconds by which a client's clock may be behind and ahead of the server's: Flower refuses calls
whose time is further off (TIMESTAMP_TOLERANCE, SYSTEM_TIME_TOLERANCE of flwr.common.constant)."""

EXPIRED, NOT_YET_VALID, OTHER_HOST, OTHER_ADDRESS = 10, 9, 62, 64
"""OpenSSL's numbers of what is wrong with a certificate (X509_V_ERR_...)."""

LEAST_FOR_NAMES = 10.0
"""Seconds that a name may take, more than the system's own wait for a first name server."""

LOOKS_EVERY = 5.0
"""Seconds from one look of a client that takes part to the next."""


class Unreached(DeploymentError):
    """The server is not there, or not now; trying again may help."""


class Refused(CredentialError):
    """The server itself, whose certificate was verified, does not take this client."""


@dataclass(frozen=True)
class Step:
    """What was looked at, and what was found to be right."""

    name: str
    found: str


def check_connection(party: PartyConfig, *, seconds: float = 5.0) -> Iterator[Step]:
    """Each step to the server as it is taken; every wait is for at most so many seconds, that
    for the server's name for at least ten: a first name server that is dead is asked for five.

    Raises:
        ConfigurationError: `server` is no host:port, or HTTPS_PROXY no address.
        Unreached: the name, the port or TLS fails, or this machine's clock is wrong.
        CredentialError: the certificate does not verify, or this client's own key cannot be read.
        Refused: the server does not know the key, or is of another version.
    """
    host, port = host_and_port(party.server, "server")
    authority = Path(party.keys) / CA
    if not authority.is_file():
        raise CredentialError(f"there is no {authority}: get it from the owner of the model")
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except (OSError, ssl.SSLError) as error:
        raise CredentialError(
            f"{authority} is no certificate: get it again from the owner of the model"
        ) from error
    connection, through = _towards(host, port, seconds)
    where = written(host, port)
    next_hop = written(connection.host, connection.port)
    try:
        found = _addresses(connection, max(seconds, LEAST_FOR_NAMES))
    except TimeoutError as error:
        raise Unreached(
            f"no name server says within {max(seconds, LEAST_FOR_NAMES):g} s what"
            f" {connection.host[:80]!r} is: check this machine's network and DNS"
        ) from error
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no name of a machine"
        raise Unreached(
            f"this machine does not know the name {connection.host[:80]!r} ({why}): check"
            f" {through or '`server`'}, and this machine's network and DNS"
        ) from error
    yield Step("name", f"{connection.host} is {', '.join(found)}")
    with contextlib.closing(connection):
        started, way = time.perf_counter(), f" through {through}" if through else ""
        try:
            connection.connect()
        except ConnectionRefusedError as error:
            raise Unreached(
                f"nothing listens at {next_hop}: the server is not started, or listens on another"
                " port"
            ) from error
        except TimeoutError as error:
            raise Unreached(
                f"{next_hop} does not answer within {seconds:g} s: that machine is off, or a"
                " firewall drops what is sent there"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise Unreached(
                f"{where} cannot be reached{way} ({first_line(error)}): check this machine's"
                " network, and what stands between it and the server"
            ) from error
        took = 1000 * (time.perf_counter() - started)
        yield Step("port", f"{where} is open{way} ({took:.0f} ms)")
        yield _shake_hands(connection, context, host, where)
        yield from _greet(connection, where, Path(party.keys) / CLIENT_KEY, party.name)


def _addresses(connection: http.client.HTTPConnection, seconds: float) -> list[str]:
    """The addresses of a connection's host. Raises TimeoutError where no name server answers in
    time, for which the system's own call may wait a minute, and what that call raises."""
    found: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            known = socket.getaddrinfo(connection.host, connection.port, type=socket.SOCK_STREAM)
            found.put(list(dict.fromkeys(str(one[4][0]) for one in known)))
        except Exception as error:  # raised again by whoever waits
            found.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = found.get(timeout=seconds)
    except queue.Empty as error:
        raise TimeoutError from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _towards(host: str, port: int, seconds: float) -> tuple[http.client.HTTPConnection, str | None]:
    """A connection that is not opened yet, and the HTTPS proxy that it will lead through."""
    proxy = urllib.request.getproxies().get("https")
    if not proxy or urllib.request.proxy_bypass(host):
        return http.client.HTTPConnection(host, port, timeout=seconds), None
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        connection = http.client.HTTPConnection(
            parts.hostname or "", parts.port or 80, timeout=seconds
        )
    except (ValueError, http.client.HTTPException) as error:
        raise ConfigurationError(
            f"HTTPS_PROXY in the environment is no address of a proxy ({error}): expected"
            " http://host:port"
        ) from error
    headers = {}
    if parts.username:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode()}"
    connection.set_tunnel(host, port, headers)
    return connection, f"the proxy {written(connection.host, connection.port)} of HTTPS_PROXY"


def _shake_hands(
    connection: http.client.HTTPConnection, context: ssl.SSLContext, host: str, where: str
) -> Step:
    try:
        wrapped = context.wrap_socket(connection.sock, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raise CredentialError(_wrong_certificate(error, where)) from error
    except TimeoutError as error:
        raise Unreached(
            f"{where} takes the connection and then says nothing: what listens there is not"
            " fedsp's server, or something between holds the connection back"
        ) from error
    except ssl.SSLEOFError as error:
        raise Unreached(
            f"{where} closes the connection before TLS has begun: what listens there is not"
            " fedsp's server, or something between cuts it"
        ) from error
    except ssl.SSLError as error:
        raise Unreached(
            f"what listens at {where} does not speak TLS ({error.reason}), as a plain HTTP server:"
            " check the port in `server`"
        ) from error
    except OSError as error:
        raise Unreached(f"{where} cut the connection ({error.strerror or error})") from error
    connection.sock = wrapped
    until = ssl.cert_time_to_seconds(str((wrapped.getpeercert() or {})["notAfter"]))
    left = (until - time.time()) / 86400
    soon = " - soon: the owner of the model runs `fedsp federation renew`" if left < SOON else ""
    return Step("TLS", f"{wrapped.version()}, certificate until {_day(until)}{soon}")


def _wrong_certificate(error: ssl.SSLCertVerificationError, where: str) -> str:
    now = f"this machine's clock says {_day(time.time())}"
    if error.verify_code == EXPIRED:
        return (
            f"the certificate of the server at {where}, or ca.crt itself, has expired ({now}): the"
            " owner of the model makes a new one with `fedsp federation renew`"
        )
    if error.verify_code == NOT_YET_VALID:
        return f"the certificate of the server at {where} is not valid yet: {now}, set it right"
    if error.verify_code in (OTHER_HOST, OTHER_ADDRESS):
        return (
            f"the certificate of the server at {where} is made out for another name"
            f" ({error.verify_message}): write the name that the owner of the model gave as"
            " --address in `server`"
        )
    return (
        f"the certificate of the server at {where} does not verify against ca.crt"
        f" ({error.verify_message}): check `server` and `keys`, and ask the owner of the model"
    )


def _greet(
    connection: http.client.HTTPConnection, where: str, key: Path, name: str
) -> Iterator[Step]:
    own = str(fedsp.__version__)
    headers = {**signed_headers(key), VERSION_HEADER: own, "Content-Length": "0"}
    sent = time.time()
    try:
        connection.request("POST", GREETING, headers=headers)
        reply = connection.getresponse()
        body = reply.read(4096)
    except (OSError, http.client.HTTPException) as error:
        raise Unreached(
            f"{where} speaks TLS but does not answer fedsp's greeting ({first_line(error)})"
        ) from error
    if reply.status == 412:
        raise Refused(
            f"the server at {where} does not know this client: its key is not in the server's"
            " register, or came into it after the server was started; send the owner of the model"
            f" the request that `fedsp party init` wrote, or take the {key.name} that was made for"
            " this client"
        )
    if reply.status == 401:
        raise Refused(
            f"the server at {where} knows the key's owner but not its signature: {key.name} and the"
            " public key in the server's register do not belong together"
        )
    if reply.status == 429 or reply.status >= 500:
        raise Unreached(f"the server at {where} is busy (code {reply.status})")
    try:
        if reply.status != 200:
            raise ValueError
        told = parse_json(body)
        theirs, now = str(told["fedsp"])[:40], float(told["time"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise Refused(
            f"the server at {where} answers fedsp's greeting with code {reply.status}: it is an"
            f" earlier version than this client's fedsp {own}, or no server of fedsp's; use one"
            " version at all parties"
        ) from error
    known = told.get("client", name)
    if known != name:
        raise Refused(
            f"the server at {where} knows this key as {str(known)[:64]!r}, and `name` says"
            f" {name!r}: write the name that the server has in its register"
        )
    yield Step("key", f"the server knows this client's key, as {name}")
    # the server's clock stood somewhere between the moments of asking and of hearing
    ahead = max(sent - now, 0.0) or min(time.time() - now, 0.0)
    if not -BEHIND < ahead < AHEAD:
        raise Unreached(
            f"this machine's clock is {_apart(ahead)} that of the server, which takes calls of at"
            f" most {AHEAD:g} s ahead and {BEHIND:g} s behind: set both by NTP"
        )
    yield Step("clock", f"{_apart(ahead)} that of the server")
    if series(theirs) != series(own):
        raise Refused(
            f"the server has fedsp {theirs}, this client fedsp {own}: their messages differ; use"
            " one version at all parties"
        )
    yield Step("version", f"fedsp {theirs} at the server, {own} here")


def series(version: str) -> tuple[str, ...]:
    """The part of a version within which messages are understood: 0.2 of 0.2.1."""
    return tuple(version.split(".")[:2])


def _apart(seconds: float) -> str:
    return f"{abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'}"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


class Lookout:
    """Looks every few seconds whether the way to the server is open, and says when that, or what is
    in the way, has changed.

    `greets`: also whether the server knows this client; not where the connection is somebody else's
    SuperLink, which has no proxy of ours."""

    def __init__(
        self, party: PartyConfig, callbacks: Callbacks, health: Health, *, greets: bool = True
    ) -> None:
        self._party, self._info, self._greets = party, callbacks.info, greets
        self._health = health
        self._next, self._once = 0.0, False
        self._own_key = b""
        self._own_key = self._key()
        self._fault: tuple[int, type[Exception]] | None = None
        """How many steps were taken, and what stopped the last look."""

    def look(self) -> None:
        """Look, if it is time to.

        Raises:
            CredentialError: what answers there, the first time, is not the server that `ca.crt`
                vouches for; or that server does not take this client; or the client's key is
                another than at the start, with which no reply of this process would be taken.
        """
        if time.monotonic() < self._next:
            return
        if self._key() != self._own_key:
            raise CredentialError(
                f"{Path(self._party.keys) / CLIENT_KEY} was changed while this client ran with the"
                " key before: start `fedsp join` again"
            )
        met, taken, wrong = self._once, 0, ""
        fault: tuple[int, type[Exception]] | None = None
        try:
            for step in check_connection(self._party, seconds=2.0):
                taken += 1
                if step.name == "TLS":
                    if not self._once and "soon" in step.found:
                        self._info(f"the server's {step.found}")
                    self._once = True
                    if not self._greets:
                        break
        except Refused:
            raise
        except CredentialError as error:
            if not met:
                raise
            fault, wrong = (taken, type(error)), str(error)
            if fault != self._fault:
                state = Path(self._party.state)
                record_event(state, "not connected", server=self._party.server, why=wrong)
        except Unreached as error:
            fault, wrong = (taken, type(error)), str(error)
        if fault != self._fault:
            answers = "the server answers again" if met else "the server answers"
            self._info(f"{wrong}; this client keeps trying" if fault else answers)
        self._health.wrong = wrong
        self._health.set("fedsp_server_reached", not wrong)
        self._fault, self._next = fault, time.monotonic() + LOOKS_EVERY

    def _key(self) -> bytes:
        """The client's key as it is on the disk; the one before where it cannot be read now."""
        with contextlib.suppress(OSError):
            return (Path(self._party.keys) / CLIENT_KEY).read_bytes()
        return self._own_key
