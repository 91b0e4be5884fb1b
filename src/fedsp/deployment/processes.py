"""Flower's processes of one party: started under a watchdog, and ended with the party's own."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from fedsp.deployment.ipc import SOCKET
from fedsp.errors import ConfigurationError, DeploymentError

START = 120.0
"""Seconds that Flower's processes may take to start."""

FLOWER = {
    "OMP_NUM_THREADS": "1",  # the cores are left to those that compute
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "NO_COLOR": "1",
    # without it Python looks for modules in the working directory first, which others may write to
    "PYTHONSAFEPATH": "1",
}


class Processes:
    """Flower's processes of one party, each under a watchdog and with a log of its own in `place`;
    `socket` leads to the party's own process."""

    def __init__(self, place: Path, socket: str) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self._logs = place
        self._environment = {
            **os.environ,
            **FLOWER,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str((place / "home").resolve()),
            SOCKET: socket,
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._since: dict[str, int] = {}

    def start(self, name: str, *command: str) -> None:
        """Start a command; it ends when this process does, however that ends."""
        path = self._logs / f"{name}.log"
        self._since[name] = path.stat().st_size if path.exists() else 0
        with open(path, "ab") as log:
            watched = [sys.executable, "-P", "-m", "fedsp.deployment.watchdog", *command]
            self._running[name] = subprocess.Popen(
                watched, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self._environment
            )

    def once(self, *command: str) -> str:
        """Run a command to its end; returns what it printed.

        Raises:
            DeploymentError: it failed.
        """
        try:
            done = subprocess.run(
                command, env=self._environment, capture_output=True, text=True, timeout=START
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeploymentError(f"`{' '.join(command[:3])} ...` failed: {error}") from error
        if done.returncode:
            said = (done.stdout + done.stderr).strip()[-300:]
            raise DeploymentError(f"`{' '.join(command[:3])} ...` failed: {said}")
        return done.stdout

    def check(self) -> None:
        """See that every process is running.

        Raises:
            DeploymentError: one has ended.
        """
        for name in filter(self.ended, self._running):
            raise DeploymentError(
                f"Flower's {name} has ended with code {self._running[name].returncode}; its log,"
                f" {self._logs / f'{name}.log'}, says why"
            )

    def ended(self, name: str) -> bool:
        """Whether a process was started and has ended."""
        return name in self._running and self._running[name].poll() is not None

    def log_of(self, name: str) -> str:
        """What a process has written to its log since it was started last."""
        with open(self._logs / f"{name}.log", "rb") as log:
            log.seek(self._since[name])
            return log.read().decode(errors="replace")

    def stop(self) -> None:
        """End them all and wait until they are gone."""
        for process in self._running.values():
            assert process.stdin
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        self._running.clear()


def options(**values: object) -> list[str]:
    """Options of a command: `--a-name value` for a_name=value, `--a-name` for a_name=True; what is
    False or None is left out."""
    given = {name: value for name, value in values.items() if value not in (False, None)}
    return [
        part
        for name, value in given.items()
        for part in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def host_and_port(text: str, key: str) -> tuple[str, int]:
    """The two parts of host:port.

    Raises:
        ConfigurationError: it is not valid; `key` is the setting that the message names.
    """
    scheme, found, _ = text.partition("://")
    if found:
        raise ConfigurationError(
            f"{key}: {text[:80]!r} is not a valid host:port, such as localhost:8000: leave"
            f" {scheme[:20]}:// and what stands behind the port out"
        )
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ConfigurationError(
            f"{key}: {text[:80]!r} is not a valid host:port, such as 0.0.0.0:8000 or [::]:8000"
        )
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    if bracketed != (":" in host) or (bracketed and not _is_ip(bare.partition("%")[0])):
        raise ConfigurationError(
            f"{key}: {text!r} is not a valid host:port: write an IPv6 address in brackets, such as"
            " [::1]:8000"
        )
    if not bracketed and not (
        re.fullmatch(HOST, host)
        and len(host) <= 253
        and (not host.rpartition(".")[2].isdecimal() or _is_ip(host))
    ):
        raise ConfigurationError(
            f"{key}: {text[:80]!r} is not a valid host:port: {host[:60]!r} is neither a name of"
            " letters, digits, dashes and dots nor an IP address"
        )
    return bare, int(port)


HOST = r"(?!-)[\w-]{1,63}(?<!-)(\.(?!-)[\w-]{1,63}(?<!-))*\.?"
"""The name of a machine; letters of any script, which a certificate may still refuse."""


def _is_ip(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def written(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def require_free(host: str, port: int, key: str) -> None:
    """See that nobody listens there.

    Raises:
        ConfigurationError: somebody does, or this machine has no such address.
    """
    try:
        socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ).close()
    except OSError as error:
        raise ConfigurationError(
            f"{key}: cannot listen on {written(host, port)} ({error.strerror}): end what listens"
            " there, or choose another"
        ) from error


def wait_for_port(host: str, port: int, name: str, processes: Processes) -> None:
    """Wait until a started process listens.

    Raises:
        DeploymentError: it has ended, or does not listen in time.
    """
    until = time.monotonic() + START
    while time.monotonic() < until:
        processes.check()
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
            return
        time.sleep(0.1)
    raise DeploymentError(f"Flower's {name} does not listen on port {port} after {START:g} s")
