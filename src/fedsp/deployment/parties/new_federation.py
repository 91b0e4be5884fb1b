"""The folders of a new federation, one for each party: keys, certificates and configurations."""

from __future__ import annotations

from pathlib import Path

from fedsp.config import RunConfig
from fedsp.config_file import PRESETS, REGISTER, template_of
from fedsp.deployment.parties import credentials
from fedsp.deployment.parties.admission import entry, require_name, require_new, write_party
from fedsp.deployment.processes import host_and_port, written
from fedsp.errors import ConfigurationError
from fedsp.federation.chained_log import record_event
from fedsp.storage import write_bytes


def init_federation(folder: Path, clients: list[str], address: str) -> None:
    """Write a folder for each party: keys, certificates, register, and a commented configuration
    each. See `fedsp.deployment.parties.credentials`.

    Raises:
        ConfigurationError: the folder is in use, or a name or the address cannot be used.
        StorageError: the disk did not take it.
    """
    host, port = host_and_port(address, "--address")
    if host in ("0.0.0.0", "::"):
        raise ConfigurationError(
            f"--address: {address!r} is an address to listen on, not one that clients can reach:"
            " give the server's host name"
        )
    if not host.isascii():
        raise ConfigurationError(
            f"--address: {host!r} has letters that a certificate cannot: write the name in its"
            " ASCII form, xn--..."
        )
    require_new(folder)
    for name in clients:
        require_name(name, "--clients")
    if len(set(clients)) != len(clients):
        raise ConfigurationError("--clients: give each client once, separated by commas")
    server = folder / "server"
    credentials.make_server_credentials(server, host)
    register = (
        "# The clients of this federation. examples: how much a client's prompt weighs in the"
        " mean.\n"
    )
    for name in clients:
        register += entry(name, 1)
        credentials.make_client_credentials(folder / name, server, name)
        write_party(folder / name, name, address)
    write_bytes(server / REGISTER, register.encode())
    record_event(server, "federation made", clients=clients, address=address)
    values = {
        "preset": "messenger",
        "auxiliary": {"folder": "package"},
        "federation": {"folder": ".", "listen": written("::" if ":" in host else "0.0.0.0", port)},
    }
    title = "The run of a federation. File names are taken from this folder, but for output."
    run = template_of(RunConfig, values, title, PRESETS["messenger"])
    write_bytes(server / "run.toml", run.encode())
