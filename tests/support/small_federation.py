"""A federation on the disk, as its parties hold it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tomli_w

from fedsp import api as commands
from fedsp.config import PartyConfig
from fedsp.config_file import make_config, read_config, read_party
from fedsp.deployment.parties.new_federation import init_federation
from fedsp.experiments.run_directory import RunDirectory
from support.small_runs import ROWS, questions, settings


def make_federation(
    folder: Path,
    port: int = 8000,
    host: str = "localhost",
    listen: str = "127.0.0.1",
    runs: int = 2,
    **changes: Any,
) -> tuple[RunDirectory, Path]:
    """A run in one place, and a federation whose parties hold on disk what they hold in that run,
    ready to be started."""
    changes = {"server": {"steps": 2, "batch_size": 4}, **changes}
    commands.run(make_config(settings(folder / "local", **changes)))
    local = RunDirectory.open(folder / "local" / "run")
    partition = local.partition()
    assert partition
    place = folder / "federation"
    init_federation(place, sorted(partition["clients"]), f"{host}:{port}")
    server, rows = place / "server", ROWS[:60]
    questions(server, "train", [rows[index] for index in partition["server"]])
    register = (server / "register.toml").read_text()
    for client, owned in partition["clients"].items():
        questions(place / client, "questions", [rows[index] for index in owned])
        register = register.replace(
            f'"clients/{client}.pub"\nexamples = 1\n',
            f'"clients/{client}.pub"\nexamples = {len(owned)}\n',
        )
    (server / "register.toml").write_text(register)
    values = settings(folder / "files", **changes)
    del values["partition"]
    values["data"]["train"] = "train.jsonl"
    values |= {
        "output": str(server / "run"),
        "auxiliary": {"folder": "package"},
        "federation": {
            "folder": ".",
            "listen": f"{listen}:{port}",
            "connect_seconds": 60.0,
            "retry_seconds": 5.0,
            "runs": runs,
        },
    }
    (server / "run.toml").write_text(tomli_w.dumps(values))
    made = commands.distill(read_config(server / "run.toml"), server / "package")
    for client in partition["clients"]:
        shutil.copytree(server / "package", place / client / "package")
        party = (place / client / "party.toml").read_text()
        (place / client / "party.toml").write_text(
            party.replace("the digest that the owner of the model tells you", made["sha256"])
        )
    return local, place


def party_of(place: Path, client: str = "client-0", **changes: Any) -> PartyConfig:
    party = read_party(place / client / "party.toml")
    return party.model_copy(
        update={
            name: (
                getattr(party, name).model_copy(update=value) if isinstance(value, dict) else value
            )
            for name, value in changes.items()
        }
    )
