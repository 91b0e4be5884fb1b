"""The server of a deployment: `fedsp federation init` and `fedsp serve`. Only this process holds
the global model; separate Flower processes transport the messages."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from fedsp.config import FederationSection, RunConfig
from fedsp.config_file import Member, read_members, read_register
from fedsp.deployment.ipc import SOCKET, Socket, SocketLink
from fedsp.deployment.monitoring.health import Health
from fedsp.deployment.package import package_digest, read_agreement
from fedsp.deployment.parties import credentials
from fedsp.deployment.processes import (
    START,
    Processes,
    free_port,
    host_and_port,
    options,
    require_free,
    wait_for_port,
)
from fedsp.errors import (
    AuxiliaryError,
    ConfigurationError,
    CredentialError,
    DeploymentError,
    FedspError,
)
from fedsp.experiments.run import run_experiment
from fedsp.experiments.run_directory import PROXY_COUNTS, RunDirectory
from fedsp.federation.agreement import agreement_of
from fedsp.federation.callbacks import Callbacks, together
from fedsp.federation.chained_log import record_event
from fedsp.federation.transport.remote import Timeouts, remote
from fedsp.federation.transport.wire import END
from fedsp.storage import write_bytes

APP = Path(__file__).parent / "app"
COMES_BACK = 60.0
"""Seconds in which a client that is there connects to a server that was started again."""

LINK = "fedsp"
"""The name of our SuperLink in Flower's configuration."""


def serve(run: RunDirectory, callbacks: Callbacks) -> dict[str, Any]:
    """Run, or go on with, a run whose clients are elsewhere; returns the figures of `result.json`.

    With FEDSP_SOCKET set, no process of Flower's is started: a SuperLink of one's own runs the app
    with the same variable.

    Raises:
        FedspError: whatever cannot be done; what was done before stands and can be resumed.
    """
    section = _server_section(run.config)
    left = credentials.days_left(Path(section.folder))
    if left < credentials.SOON:
        callbacks.info(
            f"the server's certificate expires in {left:.0f} days: `fedsp federation renew` makes a"
            " new one"
        )
    register = read_register(Path(section.folder))
    round = run.config.round
    if (asked := round.asked(len(register))) < round.min_clients and not run.records():
        raise ConfigurationError(
            f"round.min_clients: a round needs {round.min_clients} updates but asks {asked} of the"
            f" {len(register)} clients in the register: admit more of them, or set it to {asked} at"
            " most"
        )
    keys = {
        name: partial(credentials.has_signed, credentials.client_key(member.public_key))
        for name, member in register.items()
    }
    with ExitStack() as stack:
        health = stack.enter_context(Health(section.health, "federation.health", "server"))
        callbacks = together(callbacks, health.callbacks())
        listening = Socket(os.environ.get(SOCKET))
        stack.callback(listening.close)
        processes = Processes(run.path / "flower", listening.path)
        stack.callback(processes.stop)
        if SOCKET in os.environ:
            node_of = _registered_elsewhere(register)
            callbacks.info(f"waiting at {listening.path} for the app that `flwr run {APP}` starts")
        else:
            node_of = _start_superlink(section, register, run.path / "flower", processes, callbacks)

        def check() -> None:
            try:
                processes.check()
            except DeploymentError as error:
                raise DeploymentError(
                    f"{error}; `fedsp serve --resume {run.path}` goes on where the run stood"
                ) from error

        channel = listening.accept(check, None if SOCKET in os.environ else START)
        stack.callback(channel.close)
        link = SocketLink(channel, check)
        package = package_digest(Path(str(run.config.auxiliary.folder)))
        timeouts = Timeouts(
            connect=section.connect_seconds,
            reply=section.reply_seconds,
            retry=section.retry_seconds,
        )
        transport = remote(
            link,
            node_of,
            timeouts,
            run.log_traffic,
            callbacks.info,
            package,
            keys,
            partial(_members, Path(section.folder), register),
        )
        if run.finished:
            _wait_for_nodes(link, node_of)
        begun = {"run": run.identity, "package": package, "clients": sorted(register)}
        record_event(Path(section.folder), "serving", **begun)
        examples = {name: member.examples for name, member in register.items()}
        figures = run_experiment(run, lambda clients: transport, callbacks, examples)
        record_event(Path(section.folder), "finished", run=run.identity)
        # the run is finished, whether its clients hear of it or not
        with contextlib.suppress(DeploymentError):
            _say_goodbye(link, node_of)
    return figures


def _members(folder: Path, before: Mapping[str, Member]) -> Collection[str]:
    """Who is in the register now; while it cannot be read, those that were before."""
    try:
        return read_members(folder)
    except FedspError:
        return before


def _server_section(config: RunConfig) -> FederationSection:
    """Raises ConfigurationError or AuxiliaryError where a deployment cannot start from this
    configuration."""
    assert config.federation is not None
    folder = Path(config.federation.folder)
    for name in (credentials.CA, credentials.CERTIFICATE, credentials.KEY, credentials.SIGNING):
        if not (folder / name).is_file():
            raise ConfigurationError(
                f"federation.folder: there is no {folder / name}; `fedsp federation init` makes it"
            )
    host_and_port(config.federation.listen, "federation.listen")
    if credentials.days_left(folder) <= 0:
        raise CredentialError(
            f"federation.folder: the certificate in {folder} has expired, and no client would take"
            " it: `fedsp federation renew` makes a new one"
        )
    if not config.auxiliary.folder:
        raise ConfigurationError(
            "auxiliary.folder: a deployment needs a package (auxiliary model, signed agreement):"
            " make it with `fedsp distill`, give it to the clients, and set its folder here"
        )
    agreed = read_agreement(Path(config.auxiliary.folder))
    now = agreement_of(config, agreed.max_tokens).model_dump()
    differing = [name for name, value in agreed.model_dump().items() if now[name] != value]
    if differing:
        raise AuxiliaryError(
            f"the package {config.auxiliary.folder} was signed for another agreement"
            f" ({', '.join(differing)}), which clients enforce: restore the configuration, or make"
            " a new package with `fedsp distill`"
        )
    return config.federation


def _registered_elsewhere(register: Mapping[str, Member]) -> dict[str, int]:
    nodes = {name: member.node for name, member in register.items()}
    unknown = sorted(name for name, node in nodes.items() if not isinstance(node, int))
    if unknown:
        raise ConfigurationError(
            f"register.toml, client {unknown[0]!r}: with a SuperLink of your own each client needs"
            " `node = ...`, which `flwr supernode register` prints"
        )
    return {name: node for name, node in nodes.items() if node is not None}


def _start_superlink(
    section: FederationSection,
    register: dict[str, Member],
    place: Path,
    processes: Processes,
    callbacks: Callbacks,
) -> dict[str, int]:
    """Start the SuperLink and the proxy in front of it, register the clients' keys, submit the app;
    returns each client's node."""
    folder = Path(section.folder)
    host, port = host_and_port(section.listen, "federation.listen")
    require_free(host, port, "federation.listen")
    inner = free_port()
    processes.start("superlink", *superlink_command(folder, inner))
    link = (
        f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\naddress ='
        f' "127.0.0.1:{inner}"\nroot-certificates = "{(folder / credentials.CA).resolve()}"\n'
    )
    write_bytes(place / "home" / "config.toml", link.encode())
    wait_for_port("127.0.0.1", inner, "superlink", processes)
    node_of = {name: _register(processes, member.public_key) for name, member in register.items()}
    # only now: a key that is not registered yet is turned away for good
    processes.start("proxy", *proxy_command(host, port, inner, folder, place / PROXY_COUNTS))
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    wait_for_port(here, port, "proxy", processes)
    bundle = place / "app"
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(APP, bundle, ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
    processes.once("flwr", "run", str(bundle), LINK)
    callbacks.info(
        f"listening on {section.listen} for"
        f" {', '.join(f'{name} ({one.examples:,})' for name, one in sorted(register.items()))},"
        " with their examples in the register; start `fedsp join party.toml` at each"
    )
    return node_of


def superlink_command(folder: Path, port: int) -> list[str]:
    """Flower's own command for a SuperLink that only this machine reaches."""
    return [
        "flower-superlink",
        *options(
            host="127.0.0.1",
            port=port,
            ssl_certfile=folder / credentials.CERTIFICATE,
            ssl_keyfile=folder / credentials.KEY,
            ssl_ca_certfile=folder / credentials.CA,
            enable_supernode_auth=True,
            disable_runtime_dependency_installation=True,
        ),
    ]


def proxy_command(host: str, port: int, superlink: int, folder: Path, counts: Path) -> list[str]:
    """The command of the proxy between clients and the SuperLink."""
    arguments = [host, str(port), str(superlink), str(folder), str(counts.resolve())]
    return [sys.executable, "-P", "-m", "fedsp.deployment.fleet_proxy", *arguments]


def _register(processes: Processes, public_key: Path) -> int:
    printed = processes.once(
        "flwr", "supernode", "register", str(public_key.resolve()), LINK, "--format", "json"
    )
    try:
        return int(json.loads(printed[printed.index("{") :])["node-id"])
    except (ValueError, KeyError) as error:
        raise DeploymentError(
            f"Flower did not register {public_key.name}: {printed.strip()[-300:]}"
        ) from error


def _wait_for_nodes(link: SocketLink, node_of: Mapping[str, int]) -> None:
    """Give clients of a run that is finished the time to come back and hear of it."""
    until = time.monotonic() + COMES_BACK
    while set(node_of.values()) - link.nodes() and time.monotonic() < until:
        time.sleep(0.5)


def _say_goodbye(link: SocketLink, node_of: Mapping[str, int]) -> None:
    """Tell the clients that are there that the run is finished; those that are not will find the
    server gone."""
    here = sorted(link.nodes() & set(node_of.values()))
    left = link.push([(node, END) for node in here], "end", 60.0, 0) if here else []
    until = time.monotonic() + 20
    while left and time.monotonic() < until:
        answered = {found.message_id for found in link.pull(left)}
        left = [message_id for message_id in left if message_id not in answered]
        time.sleep(0.2)
