"""How clients come and go after a federation was made: a client makes its key itself and sends a
request, the server admits or revokes it, and its certificate is renewed.

A request is a small JSON file without secrets: the client's name, its public key, and a signature
by that key, so that nobody asks in the name of a key that is not theirs. That the request comes
from whom it names is for people to see: both commands print the key's fingerprint, to be compared
on the phone. A request that replaces a key is signed by the key before as well.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsp.config import NAME, PartyConfig
from fedsp.config_file import REGISTER, Member, read_members, read_party, template_of
from fedsp.deployment.parties.credentials import (
    CLIENT_KEY,
    MOST_ABOUT,
    SERVER_PUBLIC,
    Asked,
    client_signer,
    may_describe,
    new_client_key,
    read_request,
    server_public,
    write_request,
)
from fedsp.deployment.processes import host_and_port
from fedsp.errors import ConfigurationError, CredentialError
from fedsp.federation.chained_log import record_event
from fedsp.storage import locked, write_bytes

REQUEST, BEFORE = "request.json", f"{CLIENT_KEY}.before"


def require_name(name: str, where: str) -> None:
    """Raises ConfigurationError where no client can be called so."""
    if not re.fullmatch(NAME, name) or name in ("server", "ca.key"):
        raise ConfigurationError(
            f"{where}: {name!r} is not a valid name: use up to 64 letters, digits, dots, dashes and"
            " underscores, and not 'server' or 'ca.key'"
        )


def require_new(folder: Path) -> None:
    """Raises ConfigurationError where something is in a folder already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(
            f"{folder} is in use: give a new folder; keys are never written over"
        )


def write_party(folder: Path, name: str, server: str) -> None:
    """A commented `party.toml` in a client's folder."""
    settings = {
        "name": name,
        "server": server,
        "data": {"train": "questions.jsonl"},
        "package": {"sha256": "the digest that the owner of the model tells you"},
    }
    title = f"The configuration of {name}. File names are taken from this folder."
    write_bytes(folder / "party.toml", template_of(PartyConfig, settings, title).encode())


def init_party(folder: Path, name: str, server: str, about: str = "") -> str:
    """A client's own folder: its new private key, `party.toml`, and the request to be admitted,
    with what the client says of its text; returns the key's fingerprint.

    Raises:
        ConfigurationError: the folder is in use, or the name or the address cannot be used.
        StorageError: the disk did not take it.
    """
    require_name(name, "NAME")
    host_and_port(server, "--server")
    _require_about(about)
    require_new(folder)
    new_client_key(folder / CLIENT_KEY)
    write_party(folder, name, server)
    made = write_request(folder / REQUEST, name, folder / CLIENT_KEY, about=about)
    record_event(folder / "state", "key made", key=made)
    return made


def _require_about(about: str) -> None:
    if not may_describe(about):
        raise ConfigurationError(
            f"--about: write at most {MOST_ABOUT} characters in one line, without control"
            " characters"
        )


def rotate_key(config: Path, about: str = "") -> str:
    """Make a new key for the client of a `party.toml`, and the request to have it admitted in place
    of the one before, which is kept as `client.key.before`; returns its fingerprint. `about` is
    read where the client is admitted anew, after its key before was revoked.

    Raises:
        ConfigurationError: the configuration or `about` cannot be used, or a key before is still
            there.
        CredentialError: the client's key cannot be read.
        StorageError: the disk did not take it.
    """
    _require_about(about)
    party = read_party(config, package_known=False)
    key = Path(party.keys) / CLIENT_KEY
    before, new = key.with_name(BEFORE), key.with_name(f"{CLIENT_KEY}.new")
    if before.exists():
        raise ConfigurationError(
            f"{before} is there from a change of keys before: remove it once the server has"
            f" admitted that, or rename it to {CLIENT_KEY} to go back"
        )
    client_signer(key)  # it can be read
    new_client_key(new)
    made = write_request(key.with_name(REQUEST), party.name, new, about=about, before=key)
    record_event(Path(party.state), "key changed", key=made)
    key.rename(before)
    new.rename(key)
    return made


def admit(request: Path, server: Path, examples: int | None = None) -> tuple[Asked, bool]:
    """Enter a client's request into the register of a server's folder, with its number of examples;
    returns the request, and whether it has replaced a key.

    Raises:
        ConfigurationError: there is no register, or the name or the number cannot be used.
        CredentialError: the request is damaged, or is not signed by its key; its key is another
            client's; or another key stands under its name, which has not signed it.
    """
    asked = read_request(request)
    require_name(asked.name, str(request))
    if examples is not None and examples < 1:
        raise ConfigurationError(f"--examples: {examples} is no number of examples")
    with _register(server) as (path, members):
        for name, member in members.items():
            if name != asked.name and asked.is_of(member.public_key):
                raise CredentialError(
                    f"{request}: its key is that of {name!r}: each client makes one of its own"
                )
        known = members.get(asked.name)
        if known and examples is not None:
            raise ConfigurationError(
                f"--examples: {asked.name!r} is in the register with {known.examples}: change that"
                f" number in {path}"
            )
        if known and not asked.replaces(known.public_key):
            raise CredentialError(
                f"{request}: {asked.name!r} is in the register with another key, which has not"
                " signed this request: where the client has lost that key, `fedsp federation revoke"
                f" {asked.name}` first"
            )
        for revoked in sorted((server / "clients").glob("*.revoked")):
            if asked.is_of(revoked):
                raise CredentialError(
                    f"{request}: its key was revoked ({revoked.name}): the client makes a new one"
                    " with `fedsp party rotate` and sends the request that this writes"
                )
        longer = path.read_text(encoding="utf-8")
        if not known:
            longer = longer.rstrip("\n") + "\n" + entry(asked.name, examples or 1, asked.about)
            try:
                tomllib.loads(longer)
            except ValueError as error:
                raise ConfigurationError(
                    f"{path} is written otherwise than fedsp writes it, so no table can be put"
                    f" behind it ({error}): write each client as a table of its own, [clients.NAME]"
                ) from error
        own = server_public(server)
        event = "key replaced" if known else "admitted"
        record_event(server, event, client=asked.name, key=asked.fingerprint)
        write_bytes(
            known.public_key if known else server / "clients" / f"{asked.name}.pub", asked.public
        )
        write_bytes(path, longer.encode())
        write_bytes(server / SERVER_PUBLIC, own)
    return asked, known is not None


def entry(name: str, examples: int, about: str = "") -> str:
    """A client's table in the register."""
    # every text that JSON writes without a surrogate is one of TOML's
    described = f"about = {json.dumps(about, ensure_ascii=False)}\n" if about else ""
    key = f'public_key = "clients/{name}.pub"\n'
    return f'\n[clients."{name}"]\n{key}examples = {examples}\n{described}'


def revoke(name: str, server: Path) -> Member:
    """Take a client out of a server's register: its calls are refused from now on, also by a server
    that is running. Its public key is kept as `NAME.pub.revoked`. Returns what the register said of
    it.

    Raises:
        ConfigurationError: it is not in the register, or the register is written otherwise than
            fedsp writes it.
    """
    with _register(server) as (path, members):
        if name not in members:
            raise ConfigurationError(
                f"{path} has no client {name!r}; it has {', '.join(members) or 'none'}"
            )
        text = path.read_text(encoding="utf-8")
        table = re.compile(
            rf"""\n*^\[clients\.(["']?){re.escape(name)}\1\][^\n]*\n(?:[^\n\[#][^\n]*\n?)*""", re.M
        )
        shorter = table.sub("\n\n", text, count=1).rstrip("\n") + "\n"
        left = tomllib.loads(text).get("clients", {})
        del left[name]
        if tomllib.loads(shorter).get("clients", {}) != left:
            raise ConfigurationError(
                f"{path}: the table of {name!r} is not written as fedsp writes it: take it out by"
                " hand"
            )
        record_event(server, "revoked", client=name)
        public = members[name].public_key
        kept, number = public.with_name(f"{public.name}.revoked"), 1
        while kept.exists():  # an earlier key of this client
            number += 1
            kept = public.with_name(f"{public.name}.{number}.revoked")
        # before the register forgets it: a key that is not kept could be admitted again
        write_bytes(kept, public.read_bytes())
        write_bytes(path, shorter.encode())
        public.unlink()
        return members[name]


@contextmanager
def _register(server: Path) -> Iterator[tuple[Path, dict[str, Member]]]:
    """The register's path and its clients, while no other command changes it."""
    read_members(server)  # there is one
    with locked(server / f"{REGISTER}.lock", wait=True):
        yield server / REGISTER, read_members(server)
