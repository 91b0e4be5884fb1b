"""A deployment: `fedsp serve` at the owner of the model, `fedsp join` at each owner of text. Both hold what is private in their own
process, and start Flower's processes, which carry messages, on a leash beside it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedsp.clients import Clients, agreement_of, make_client, make_method
from fedsp.config import NAME, FederationSection, PartyConfig, RunConfig
from fedsp.config_file import PRESETS, template_of
from fedsp.credentials import (
    CA,
    CERTIFICATE,
    CLIENT_KEY,
    KEY,
    REGISTER,
    SERVER_PUBLIC,
    SIGNING,
    Member,
    make_client_credentials,
    make_server_credentials,
    read_register,
)
from fedsp.data.encoding import encode_targets
from fedsp.data.files import read_rows
from fedsp.data.tasks import examples_of, find_task
from fedsp.engines.answering import answer
from fedsp.engines.channel import SOCKET, DistantWire, Socket
from fedsp.engines.flower import require_pinning
from fedsp.engines.remote import Patience, remote
from fedsp.errors import AuxiliaryError, ConfigurationError, CredentialError, DeploymentError, PayloadError, PolicyError, first_line
from fedsp.experiment import run_experiment
from fedsp.frames import Frame
from fedsp.loading import choose_device
from fedsp.package import hold_against_policy, open_package, read_agreement
from fedsp.parties import Party, Rest
from fedsp.payload import check
from fedsp.prompts import PromptSpec
from fedsp.rounds import Exchange, Request
from fedsp.runs import GATE_COUNTS, RunDirectory
from fedsp.server import Watcher
from fedsp.storage import write_bytes, write_json
from fedsp.wire import END

APP = Path(__file__).parent / "app"
LINK = "fedsp"
"""The name of our SuperLink in Flower's configuration."""

START = 120.0
"""Seconds that Flower's processes may take to start."""

FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
}


class Processes:
    """Flower's processes of one party, each on a leash and with a log of its own."""

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self.environment = {**os.environ, **FLOWER, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}", **environment}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._since: dict[str, int] = {}

    def start(self, name: str, *command: str) -> None:
        """Start a command; it ends when this process does, however that ends."""
        path = self._logs / f"{name}.log"
        self._since[name] = path.stat().st_size if path.exists() else 0
        with open(path, "ab") as log:
            leash = [sys.executable, "-m", "fedsp.engines.leash", *command]
            self._running[name] = subprocess.Popen(leash, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self.environment)

    def once(self, *command: str) -> str:
        """Run a command to its end; returns what it printed.

        Raises:
            DeploymentError: it failed.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=START, check=False)
        if done.returncode:
            raise DeploymentError(f"`{' '.join(command[:3])} ...` failed: {(done.stdout + done.stderr).strip()[-300:]}")
        return done.stdout

    def check(self) -> None:
        """See that every process is running.

        Raises:
            CredentialError: a client's has ended since the server does not know its key.
            DeploymentError: one has ended for any other reason.
        """
        for name in filter(self.ended, self._running):
            log = self._logs / f"{name}.log"
            if "Failed to activate SuperNode" in self.said(name):
                raise CredentialError("the server refuses this client: its key is not in the server's register; ask the owner of the model")
            raise DeploymentError(f"Flower's {name} has ended with code {self._running[name].returncode}; its log, {log}, says why")

    def ended(self, name: str) -> bool:
        """Whether a process was started and has ended."""
        return name in self._running and self._running[name].poll() is not None

    def said(self, name: str) -> str:
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


def serve(run: RunDirectory, watcher: Watcher) -> dict[str, Any]:
    """Run, or go on with, a run whose clients are elsewhere; returns the figures of `result.json`.

    With FEDSP_SOCKET set, no process of Flower's is started: a SuperLink of one's own runs the app with the same variable.

    Raises:
        FedspError: whatever cannot be done; what was done before stands and can be resumed.
    """
    section = _server_section(run.config)
    register = read_register(Path(section.folder))
    torch.set_num_threads(run.threads)
    with ExitStack() as stack:
        listening = Socket(os.environ.get(SOCKET))
        stack.callback(listening.close)
        processes = Processes(run.path / "flower", {"FLWR_HOME": str((run.path / "flower" / "home").resolve()), SOCKET: listening.path})
        stack.callback(processes.stop)
        if SOCKET in os.environ:
            node_of = _registered_elsewhere(register)
            watcher.say(f"waiting at {listening.path} for the app that `flwr run {APP}` starts")
        else:
            node_of = _start_superlink(section, register, run.path / "flower", processes, watcher)
        channel = listening.accept(processes.check)
        stack.callback(channel.close)
        wire = DistantWire(channel)

        def engine(clients: Clients) -> Exchange:
            return remote(wire, node_of, Patience(section.wait_seconds, section.reply_seconds, section.again_seconds), run.log_traffic, watcher.say)

        figures = run_experiment(run, engine, watcher, {name: member.examples for name, member in register.items()})
        _say_goodbye(wire, node_of)
    return figures


def _server_section(config: RunConfig) -> FederationSection:
    """Raises ConfigurationError or AuxiliaryError where a deployment cannot start from this configuration."""
    if config.federation is None:
        raise ConfigurationError(
            "the configuration has no [federation] section, so it runs in one place: `fedsp run` does that; `fedsp federation init` writes one that serves"
        )
    folder = Path(config.federation.folder)
    for name in (CA, CERTIFICATE, KEY, SIGNING):
        if not (folder / name).is_file():
            raise ConfigurationError(f"federation.folder: there is no {folder / name}; `fedsp federation init` makes it")
    _host_and_port(config.federation.listen, "federation.listen")
    if not config.auxiliary.folder:
        raise ConfigurationError(
            "auxiliary.folder: a deployment needs the package that its clients have: make it with `fedsp distill`, hand it to them, and name it here"
        )
    agreed = read_agreement(Path(config.auxiliary.folder))
    now = agreement_of(config, agreed.max_tokens)
    differing = [name for name, value in agreed.model_dump().items() if now.model_dump()[name] != value]
    if differing:
        raise AuxiliaryError(
            f"the package {config.auxiliary.folder} was signed for another agreement ({', '.join(differing)}): clients will do what it says, so bring the configuration back or make a new package"
        )
    return config.federation


def _registered_elsewhere(register: Mapping[str, Member]) -> dict[str, int]:
    nodes = {name: member.node for name, member in register.items()}
    unknown = sorted(name for name, node in nodes.items() if not isinstance(node, int))
    if unknown:
        raise ConfigurationError(
            f"register.toml, client {unknown[0]!r}: with a SuperLink of your own each client needs `node = ...`, which `flwr supernode register` prints"
        )
    return {name: node for name, node in nodes.items() if node is not None}


def _start_superlink(section: FederationSection, register: dict[str, Member], place: Path, processes: Processes, watcher: Watcher) -> dict[str, int]:
    """Start the SuperLink and the gate before it, register the clients' keys, submit the app; returns each client's node."""
    folder = Path(section.folder)
    host, port = _host_and_port(section.listen, "federation.listen")
    inner = free_port()
    processes.start("superlink", *superlink_command(folder, inner))
    home = Path(processes.environment["FLWR_HOME"])
    link = f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\naddress = "127.0.0.1:{inner}"\nroot-certificates = "{(folder / CA).resolve()}"\n'
    write_bytes(home / "config.toml", link.encode())
    _wait_for_port(inner, "superlink", processes)
    node_of = {name: _register(processes, member.public_key) for name, member in register.items()}
    processes.start("gate", *gate_command(host, port, inner, folder, place / GATE_COUNTS))  # only now: a key that is not registered yet is turned away for good
    _wait_for_port(port, "gate", processes)
    bundle = place / "app"
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(APP, bundle, ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
    processes.once("flwr", "run", str(bundle), LINK)
    watcher.say(f"listening on {section.listen} for {', '.join(sorted(register))}; start `fedsp join party.toml` at each")
    return node_of


def superlink_command(folder: Path, port: int) -> list[str]:
    """Flower's own command for a SuperLink that only this machine reaches."""
    tls = ["--ssl-certfile", str(folder / CERTIFICATE), "--ssl-keyfile", str(folder / KEY), "--ssl-ca-certfile", str(folder / CA)]
    return ["flower-superlink", "--host", "127.0.0.1", "--port", str(port), *tls, "--enable-supernode-auth", "--disable-runtime-dependency-installation"]


def gate_command(host: str, port: int, superlink: int, folder: Path, counts: Path) -> list[str]:
    """The command of the gate between clients and the SuperLink."""
    return [sys.executable, "-m", "fedsp.engines.gate", host, str(port), str(superlink), str(folder), str(counts.resolve())]


def supernode_command(party: PartyConfig, port: int) -> list[str]:
    """Flower's own command for a client's SuperNode."""
    keys = Path(party.keys)
    tls = ["--root-certificates", str(keys / CA), "--auth-supernode-private-key", str(keys / CLIENT_KEY)]
    return ["flower-supernode", "--superlink", party.server, *tls, "--host", "127.0.0.1", "--port", str(port)]


def _register(processes: Processes, public_key: Path) -> int:
    printed = processes.once("flwr", "supernode", "register", str(public_key.resolve()), LINK, "--format", "json")
    try:
        return int(json.loads(printed[printed.index("{") :])["node-id"])
    except (ValueError, KeyError) as error:
        raise DeploymentError(f"Flower did not register {public_key.name}: {printed.strip()[-300:]}") from error


def _say_goodbye(wire: DistantWire, node_of: Mapping[str, int]) -> None:
    """Tell the clients that are there that the run is finished; those that are not will find the server gone."""
    here = sorted(wire.nodes() & set(node_of.values()))
    left = wire.push([(node, END) for node in here], "end", 60.0) if here else []
    until = time.monotonic() + 20
    while left and time.monotonic() < until:
        answered = {found.message for found in wire.pull(left)}
        left = [message for message in left if message not in answered]
        time.sleep(0.2)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _host_and_port(text: str, key: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigurationError(f"{key}: {text!r} is no host:port, such as 0.0.0.0:8000")
    return host, int(port)


def _wait_for_port(port: int, name: str, processes: Processes) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        processes.check()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise DeploymentError(f"Flower's {name} does not listen on port {port} after {START:g} s")


def init_federation(folder: Path, clients: list[str], address: str) -> None:
    """Write a folder for each party: keys, certificates, register, and a commented configuration each. See `fedsp.credentials`.

    Raises:
        ConfigurationError: the folder is in use, or a name or the address cannot be used.
        StorageError: the disk did not take it.
    """
    host, port = _host_and_port(address, "--address")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} is in use: give a new folder; keys are never written over")
    for name in clients:
        if not re.fullmatch(NAME, name) or name == "server":
            raise ConfigurationError(
                f"--clients: {name!r} is no name for a client: use up to 64 letters, digits, dots, dashes and underscores, and not 'server'"
            )
    if len(set(clients)) != len(clients) or not clients:
        raise ConfigurationError("--clients: give each client once, separated by commas")
    server = folder / "server"
    make_server_credentials(server, host)
    for name in clients:
        make_client_credentials(folder / name, server, name)
        settings = {
            "name": name,
            "server": address,
            "data": {"train": "questions.jsonl"},
            "package": {"sha256": "the digest that the owner of the model tells you"},
        }
        write_bytes(
            folder / name / "party.toml", template_of(PartyConfig, settings, f"The configuration of {name}. File names are taken from this folder.").encode()
        )
    entries = "".join(f'\n[clients.{name}]\npublic_key = "clients/{name}.pub"\nexamples = 1\n' for name in clients)
    write_bytes(server / REGISTER, f"# The clients of this federation. examples: how much a client's prompt weighs in the mean.\n{entries}".encode())
    preset = PRESETS["messenger"]
    values = {
        **preset,
        "preset": "messenger",
        "auxiliary": {**preset["auxiliary"], "folder": "package"},
        "federation": {"folder": ".", "listen": f"0.0.0.0:{port}"},
    }
    write_bytes(server / "run.toml", template_of(RunConfig, values, "The run of a federation. File names are taken from this folder, but for output.").encode())


class Client:
    """An owner of text: its rows, the package it was given, its policy, and what it remembers of what it has answered.

    Raises:
        FedspError: the data, the package or its signature cannot be used, or the policy refuses what the package asks.
    """

    def __init__(self, party: PartyConfig, watcher: Watcher) -> None:
        self.party = party
        self._say = watcher.say
        examples = examples_of(find_task(party.data.task), read_rows(Path(party.data.train)))
        device = choose_device(party.device)
        self.auxiliary, self.agreement = open_package(party.package, Path(party.keys) / SERVER_PUBLIC, device)
        hold_against_policy(party.policy, self.agreement, self.auxiliary, len(examples))
        self.rows = encode_targets(self.auxiliary.tokenizer, examples, self.agreement.max_tokens)
        self._method = make_method(self.agreement, self.auxiliary)
        self._state = Path(party.state) / party.package.sha256[:16]
        self._last: tuple[Frame, Frame] | None = None
        self.answered = 0

    def respond(self, frame: Frame) -> Frame:
        """The answer to a frame; the same frame again gets the same answer again, without training again. What is no request gets an empty frame."""
        if self._last is None or self._last[0] != frame:
            try:
                reply = answer(frame, self._method, partial(self._open, frame), allow=self._allow, log=self._log)
            except PayloadError as error:
                self._say(f"received {_amount(frame)} that are no request: {error}")
                return Frame("")
            self._last = frame, reply
            self.answered += 1
        reply = self._last[1]
        said = json.loads(reply.header)
        what = said.get("losses") or said.get("code") or ""
        self._say(
            f"round {said['round']}: received {_amount(frame)}, sent {_amount(reply)}: {said['kind']} {what if isinstance(what, str) else _figures(what)}"
        )
        return reply

    def _open(self, frame: Frame, client: str) -> Party:
        rest = Rest(self._state / str(json.loads(frame.header)["run"]))
        return make_client(client, self.agreement, self.auxiliary, self.rows, rest)

    def _allow(self, request: Request) -> None:
        """Raises PolicyError or PayloadError for a request outside the package's agreement or the client's own floor."""
        if request.client != self.party.name:
            raise PolicyError("the request is for another client")
        if not re.fullmatch(r"[0-9a-f]{1,32}", request.run):
            raise PolicyError("the request's run has no usable identity")
        if not 1 <= request.round <= self.agreement.rounds + (not request.train):
            raise PolicyError(f"round {request.round} is not one of the {self.agreement.rounds} that the package speaks of")
        check(request.payload, PromptSpec(self.agreement.prompt.space, self.agreement.prompt.length, self.auxiliary.prompt_shape).shape)
        path = self._state / "rounds.json"
        answered = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        this = f"{request.run} {request.round}"
        if this in answered:
            return
        if len(answered) >= self.party.policy.max_rounds:
            raise PolicyError(f"{len(answered)} rounds were answered under this package, policy.max_rounds allows no more")
        write_json(path, [*answered, this])

    def _log(self, request: Request, error: Exception) -> None:
        """What is said of a fault on this machine: whole sentences of fedsp's, and of anything else only its kind, since its text may hold yours."""
        what = first_line(error) if isinstance(error, PolicyError | PayloadError) else type(error).__name__
        self._say(f"round {request.round}: not done: {what}")


def join(party: PartyConfig, watcher: Watcher) -> int:
    """Answer the server's requests until it says that the run is finished; returns the number of requests answered.

    With FEDSP_SOCKET set, no process of Flower's is started: a SuperNode of one's own runs with the same variable.

    Raises:
        FedspError: the client cannot take part, or Flower's process on this machine has ended.
    """
    client = Client(party, watcher)
    host, port = _host_and_port(party.server, "server")
    for name in (CA, CLIENT_KEY, SERVER_PUBLIC):
        if not (Path(party.keys) / name).is_file():
            raise ConfigurationError(f"keys: there is no {Path(party.keys) / name}; it comes with the folder that `fedsp federation init` made for this client")
    require_pinning()
    with ExitStack() as stack:
        listening = Socket(os.environ.get(SOCKET))
        stack.callback(listening.close)
        place = Path(party.state) / "flower"
        own = _own_client_app(place)
        processes = Processes(place, {"FLWR_HOME": str((place / "home").resolve()), SOCKET: listening.path})
        processes.environment["PATH"] = f"{own}{os.pathsep}{processes.environment['PATH']}"
        stack.callback(processes.stop)
        start = partial(processes.start, "supernode", *supernode_command(party, free_port()))
        if SOCKET not in os.environ:
            start()
        watcher.say(f"{party.name} joins {party.server} with {len(client.rows)} examples; Flower's log is {place / 'supernode.log'}")
        look = Lookout(host, port, Path(party.keys) / CA, watcher)

        def check() -> None:
            look.out()
            if processes.ended("supernode") and "SuperNode ID" in processes.said("supernode"):
                start()  # it was in, and the server that knew it is gone: the one that comes after will know it anew
            processes.check()

        while True:
            channel = listening.accept(check)
            with contextlib.suppress(DeploymentError, OSError):
                _, (frame,) = channel.receive()
                channel.send(None, [END if frame == END else client.respond(frame)])
                if frame == END:
                    time.sleep(GOODBYE)
                    return client.answered
            channel.close()


GOODBYE = 4.0
"""Seconds in which Flower's node hands the last answer over."""


class Lookout:
    """Looks now and then whether the server can be reached, and says so when that changes."""

    def __init__(self, host: str, port: int, authority: Path, watcher: Watcher, every: float = 5.0) -> None:
        self._address, self._every, self._say = (host, port), every, watcher.say
        self._context = ssl.create_default_context(cafile=str(authority))
        self._next, self._reached = 0.0, True

    def out(self) -> None:
        """Look, if it is time to.

        Raises:
            CredentialError: what answers there is not the server that `ca.crt` vouches for.
        """
        if time.monotonic() < self._next:
            return
        try:
            with socket.create_connection(self._address, 2) as plain, self._context.wrap_socket(plain, server_hostname=self._address[0]):
                reached = True
        except ssl.SSLCertVerificationError as error:
            raise CredentialError(
                f"what answers at {self._address[0]}:{self._address[1]} is not the server that ca.crt vouches for ({error.verify_message}): check `server` and `keys`, and ask the owner of the model"
            ) from error
        except OSError:
            reached = False
        if reached != self._reached:
            self._say(
                "the server answers again" if reached else f"the server does not answer at {self._address[0]}:{self._address[1]}; this client keeps trying"
            )
        self._reached, self._next = reached, time.monotonic() + self._every


def _own_client_app(place: Path) -> Path:
    """A folder with our own `flwr-clientapp`, which runs this installation's app and never the bundle that the server sends."""
    folder = place / "bin"
    script = folder / "flwr-clientapp"
    write_bytes(script, f"#!{sys.executable}\nfrom fedsp.engines.flower import run_pinned_client_app\n\nrun_pinned_client_app()\n".encode())
    script.chmod(0o700)
    return folder.resolve()


def _amount(frame: Frame) -> str:
    return f"{sum(frame.sizes().values()):,} bytes"


def _figures(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} loss {loss:.3f}" for name, loss in losses.items())
