"""The folders of a new federation, one for each party: keys, certificates and configurations."""

from __future__ import annotations

import re
from pathlib import Path

from fedsp.config import NAME, PartyConfig, RunConfig
from fedsp.config_file import PRESETS, REGISTER, template_of
from fedsp.deployment import credentials
from fedsp.deployment.processes import host_and_port, written
from fedsp.errors import ConfigurationError
from fedsp.storage import write_bytes


def init_federation(folder: Path, clients: list[str], address: str) -> None:
    """Write a folder for each party: keys, certificates, register, and a commented configuration
    each. See `fedsp.deployment.credentials`.

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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(
            f"{folder} is in use: give a new folder; keys are never written over"
        )
    for name in clients:
        if not re.fullmatch(NAME, name) or name in ("server", "ca.key"):
            raise ConfigurationError(
                f"--clients: {name!r} is not a valid name: use up to 64 letters, digits, dots,"
                " dashes and underscores, and not 'server' or 'ca.key'"
            )
    if len(set(clients)) != len(clients) or not clients:
        raise ConfigurationError("--clients: give each client once, separated by commas")
    server = folder / "server"
    credentials.make_server_credentials(server, host)
    register = (
        "# The clients of this federation. examples: how much a client's prompt weighs in the"
        " mean.\n"
    )
    for name in clients:
        register += f'\n[clients."{name}"]\npublic_key = "clients/{name}.pub"\nexamples = 1\n'
        credentials.make_client_credentials(folder / name, server, name)
        settings = {
            "name": name,
            "server": address,
            "data": {"train": "questions.jsonl"},
            "package": {"sha256": "the digest that the owner of the model tells you"},
        }
        title = f"The configuration of {name}. File names are taken from this folder."
        party = template_of(PartyConfig, settings, title)
        write_bytes(folder / name / "party.toml", party.encode())
    write_bytes(server / REGISTER, register.encode())
    values = {
        "preset": "messenger",
        "auxiliary": {"folder": "package"},
        "federation": {"folder": ".", "listen": written("::" if ":" in host else "0.0.0.0", port)},
    }
    title = "The run of a federation. File names are taken from this folder, but for output."
    run = template_of(RunConfig, values, title, PRESETS["messenger"])
    write_bytes(server / "run.toml", run.encode())
