"""How clients come and go: requests, the register, and certificates."""

from __future__ import annotations

import base64
import json
import shutil
import stat
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsp.cli import main
from fedsp.config_file import REGISTER, read_members, read_register
from fedsp.deployment.parties import admission, credentials
from fedsp.deployment.parties.admission import admit, init_party, revoke, rotate_key
from fedsp.deployment.parties.credentials import client_keys, fingerprint, read_request, renew
from fedsp.deployment.parties.new_federation import init_federation
from fedsp.errors import ConfigurationError, CredentialError, StorageError
from fedsp.storage import locked, write_bytes


@pytest.fixture()
def server(tmp_path: Path) -> Path:
    init_federation(tmp_path / "federation", ["a", "b.c"], "localhost:8000")
    return tmp_path / "federation" / "server"


@pytest.fixture()
def asking(tmp_path: Path) -> Path:
    init_party(tmp_path / "new", "new", "localhost:8000")
    return tmp_path / "new"


def test_a_client_makes_its_key_itself_and_is_admitted(
    server: Path, asking: Path, tmp_path: Path
) -> None:
    assert stat.S_IMODE((asking / "client.key").stat().st_mode) == 0o600
    assert "PRIVATE" not in (asking / "request.json").read_text()
    before = (server / "register.toml").read_text()
    asked, replaced = admit(asking / "request.json", server, 7)
    assert (asked.name, replaced) == ("new", False)
    register = read_register(server)
    assert list(register) == ["a", "b.c", "new"] and register["new"].examples == 7
    assert (server / "register.toml").read_text().startswith(before), "what stood there stands"
    assert asked.is_of(register["new"].public_key) and len(client_keys(server)) == 3
    # what the client verifies packages by
    assert (server / "server.pub").read_bytes() == (server.parent / "a" / "server.pub").read_bytes()
    tomllib.loads((asking / "party.toml").read_text())
    # the same request again changes nothing
    assert admit(asking / "request.json", server)[1] and read_register(server) == register


@pytest.mark.parametrize(
    "about",
    ["Discharge letters, 2019 to 2024", 'a "quote" and a \\ and \u00fc \U0001f600', "[clients.x]"],
)
def test_what_a_client_says_of_its_text_is_in_the_register(
    about: str, server: Path, tmp_path: Path
) -> None:
    init_party(tmp_path / "new", "new", "localhost:8000", about)
    admit(tmp_path / "new" / "request.json", server)
    assert read_register(server)["new"].about == about
    revoke("new", server)
    assert list(read_register(server)) == ["a", "b.c"]


@pytest.mark.parametrize("about", ["x" * 301, "two\nlines"])
def test_it_says_so_in_a_sentence(about: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--about: write at most 300 characters"):
        init_party(tmp_path / "new", "new", "localhost:8000", about)
    assert not (tmp_path / "new").exists()


def test_the_fingerprint_is_that_of_ssh_keygen(asking: Path) -> None:
    public = read_request(asking / "request.json").public
    (asking / "key.pub").write_bytes(public)
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not installed")
    said = subprocess.run(
        ["ssh-keygen", "-lf", str(asking / "key.pub")], capture_output=True, text=True, check=True
    )
    assert fingerprint(public) in said.stdout.split()


def test_a_federation_may_begin_without_clients(tmp_path: Path, asking: Path) -> None:
    init_federation(tmp_path / "empty", [], "localhost:8000")
    server = tmp_path / "empty" / "server"
    assert read_members(server) == {}
    with pytest.raises(ConfigurationError, match="names no client: `fedsp federation admit`"):
        read_register(server)
    admit(asking / "request.json", server)
    assert list(read_register(server)) == ["new"]


def test_a_key_is_replaced_only_by_a_request_that_it_has_signed(
    server: Path, asking: Path, tmp_path: Path
) -> None:
    admit(asking / "request.json", server, 7)
    old = (asking / "client.key").read_bytes()
    made = rotate_key(asking / "party.toml")
    assert (
        (asking / "client.key.before").read_bytes() == old != (asking / "client.key").read_bytes()
    )
    assert stat.S_IMODE((asking / "client.key").stat().st_mode) == 0o600
    with pytest.raises(ConfigurationError, match=r"client.key.before is there"):
        rotate_key(asking / "party.toml")
    with pytest.raises(ConfigurationError, match="is in the register with 7: change that"):
        admit(asking / "request.json", server, 8)
    asked, replaced = admit(asking / "request.json", server)
    assert replaced and asked.fingerprint == made
    assert asked.is_of(read_register(server)["new"].public_key)
    assert read_register(server)["new"].examples == 7
    # somebody else who asks in its name
    init_party(tmp_path / "thief", "new", "localhost:8000")
    with pytest.raises(CredentialError, match="another key, which has not signed"):
        admit(tmp_path / "thief" / "request.json", server)
    assert asked.is_of(read_register(server)["new"].public_key)
    # who takes the signature of another request along
    stolen = json.loads((asking / "request.json").read_text())["signature_before"]
    forged = json.loads((tmp_path / "thief" / "request.json").read_text())
    (tmp_path / "forged.json").write_text(json.dumps({**forged, "signature_before": stolen}))
    with pytest.raises(CredentialError, match="has not signed"):
        admit(tmp_path / "forged.json", server)
    # after a loss: out, and in again
    assert revoke("new", server).examples == 7
    admit(tmp_path / "thief" / "request.json", server)
    assert list(read_register(server)) == ["a", "b.c", "new"]


def test_nobody_has_two_names(server: Path, tmp_path: Path, asking: Path) -> None:
    admit(asking / "request.json", server)
    credentials.write_request(asking / "again.json", "other", asking / "client.key")
    with pytest.raises(CredentialError, match="its key is that of 'new'"):
        admit(asking / "again.json", server)
    assert "other" not in read_register(server)


def test_a_key_that_was_revoked_does_not_come_back(server: Path, asking: Path) -> None:
    admit(asking / "request.json", server)
    revoke("new", server)
    with pytest.raises(CredentialError, match=r"its key was revoked \(new.pub.revoked\)"):
        admit(asking / "request.json", server)
    before = (asking / "request.json").read_bytes()
    with pytest.raises(ConfigurationError, match="--about: write at most"):
        rotate_key(asking / "party.toml", "two\nlines")
    rotate_key(asking / "party.toml", "letters")
    admit(asking / "request.json", server)
    assert revoke("new", server).about == "letters"
    for request in (before, (asking / "request.json").read_bytes()):
        (asking / "request.json").write_bytes(request)
        with pytest.raises(CredentialError, match="its key was revoked"):
            admit(asking / "request.json", server)


def test_a_key_whose_revocation_a_kill_cut_short_does_not_come_back(
    server: Path, asking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit(asking / "request.json", server)

    def killed(path: Path, data: bytes) -> None:
        write_bytes(path, data)
        if path.name == REGISTER:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(admission, "write_bytes", killed)
        revoke("new", server)
    with pytest.raises(CredentialError, match="its key was revoked"):
        admit(asking / "request.json", server)


def test_without_the_server_s_key_nobody_is_admitted(server: Path, asking: Path) -> None:
    (server / credentials.SIGNING).unlink()
    for _ in range(2):
        with pytest.raises(CredentialError):
            admit(asking / "request.json", server)
        assert "new" not in read_register(server)


def test_of_two_admissions_at_once_the_second_meets_the_first(server: Path, tmp_path: Path) -> None:
    """What a request is held against is read while nobody else writes."""
    for place in ("one", "two"):
        init_party(tmp_path / place, "same", "localhost:8000")
    with ThreadPoolExecutor(2) as pool:
        with locked(server / "register.toml.lock", wait=True):
            waiting = [
                pool.submit(admit, tmp_path / place / "request.json", server)
                for place in ("one", "two")
            ]
            done, _ = wait(waiting, timeout=0.5)
            assert not done
        faults = [future.exception() for future in waiting]
    assert sum(fault is None for fault in faults) == 1
    assert any("another key, which has not signed" in str(fault) for fault in faults)
    assert list(read_register(server)) == ["a", "b.c", "same"]


def test_what_cannot_be_written_down_is_not_done(server: Path, asking: Path) -> None:
    log = server / "security.jsonl"
    log.write_text(log.read_text().replace("localhost", "elsewhere"))
    before = {path.name: path.read_bytes() for path in server.glob("*.*")}
    for command in (
        lambda: admit(asking / "request.json", server),
        lambda: revoke("a", server),
        lambda: renew(server, server.parent / "ca.key"),
    ):
        with pytest.raises(StorageError, match="does not follow"):
            command()
    assert {path.name: path.read_bytes() for path in server.glob("*.*")} | {
        name: b"" for name in before if name.endswith(".lock")
    } == before | {path.name: b"" for path in server.glob("*.lock")}
    assert list(read_register(server)) == ["a", "b.c"]


@pytest.mark.parametrize("name", ["a", "b.c", "d"])
def test_who_is_revoked_is_out_and_nobody_else(server: Path, name: str) -> None:
    path = server / "register.toml"
    path.write_text(
        path.read_text() + '\n[clients.d] # by hand\npublic_key = "clients/a.pub"\n'
        "examples = 3  # of them\n"
    )
    shutil.copy(server / "clients" / "a.pub", server / "clients" / "d.pub")
    path.write_text(
        path.read_text().replace(
            '# by hand\npublic_key = "clients/a.pub"', '# by hand\npublic_key = "clients/d.pub"'
        )
    )
    before = read_register(server)
    revoke(name, server)
    assert read_register(server) == {
        other: member for other, member in before.items() if other != name
    }
    assert path.read_text().startswith("# The clients of this federation.")
    assert (server / "clients" / f"{name}.pub.revoked").exists()
    with pytest.raises(ConfigurationError, match=f"has no client '{name}'; it has"):
        revoke(name, server)


def test_the_last_client_can_be_revoked(server: Path) -> None:
    for name in ("a", "b.c"):
        revoke(name, server)
    assert read_members(server) == {} and client_keys(server) == {}


def test_a_register_that_is_written_otherwise_is_left_alone(server: Path, asking: Path) -> None:
    path = server / "register.toml"
    path.write_text('clients.a = { public_key = "clients/a.pub", examples = 1 }\n')
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="is not written as fedsp writes it"):
        revoke("a", server)
    path.write_text('clients = { a = { public_key = "clients/a.pub", examples = 1 } }\n')
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="written otherwise than fedsp writes it"):
        admit(asking / "request.json", server)
    assert path.read_bytes() == before and (server / "clients" / "a.pub").exists()


def test_a_key_in_a_form_that_is_not_read_is_no_key(asking: Path) -> None:
    """Its point is compressed, which the library says by NotImplementedError."""
    kind, blob = read_request(asking / "request.json").public.split()[:2]
    point = bytearray(base64.b64decode(blob))
    point[-97] = 2
    odd = kind + b" " + base64.b64encode(bytes(point))
    fields = json.loads((asking / "request.json").read_text())
    (asking / "odd.json").write_text(json.dumps({**fields, "public_key": odd.decode()}))
    (asking / "odd.pub").write_bytes(odd)
    with pytest.raises(CredentialError, match="is no request of a client"):
        read_request(asking / "odd.json")
    with pytest.raises(CredentialError, match="cannot read the client's public key"):
        credentials.client_key(asking / "odd.pub")
    with pytest.raises(CredentialError, match="cannot read the server's public key"):
        credentials.verify(b"", "", asking / "odd.pub")


FIELDS = st.one_of(
    st.none(), st.integers(), st.text(max_size=20), st.lists(st.integers(), max_size=2)
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_other_bytes_are_a_request(data: st.DataObject, tmp_path_factory: Any) -> None:
    place = tmp_path_factory.getbasetemp() / "requests"
    if not place.exists():
        init_party(place, "new", "localhost:8000")
    good = (place / "request.json").read_bytes()
    bad = place / "bad.json"
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(good) - 1))
        bad.write_bytes(good[:at] + data.draw(st.binary(max_size=4)) + good[at + 1 :])
    else:
        fields = json.loads(good)
        fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(FIELDS)
        bad.write_text(json.dumps(fields))
    try:
        asked = read_request(bad)
    except CredentialError:
        return
    # white space, or another signature by a key before, which is held against that key
    mine = read_request(place / "request.json")
    assert (asked.name, asked.public) == (mine.name, mine.public)


def test_a_certificate_is_renewed_for_the_same_names(server: Path) -> None:
    before = x509.load_pem_x509_certificate((server / "server.crt").read_bytes())
    root = (server / "ca.crt").read_bytes()
    until, with_authority = renew(server, server.parent / "ca.key")
    after = x509.load_pem_x509_certificate((server / "server.crt").read_bytes())
    name = x509.SubjectAlternativeName
    assert not with_authority and (server / "ca.crt").read_bytes() == root
    assert after.extensions.get_extension_for_class(name) == (
        before.extensions.get_extension_for_class(name)
    )
    assert after.subject == before.subject and after.serial_number != before.serial_number
    after.verify_directly_issued_by(x509.load_pem_x509_certificate(root))
    assert after.not_valid_after_utc == until
    assert credentials.days_left(server) > credentials.DAYS - 1
    assert stat.S_IMODE((server / "server.key").stat().st_mode) == 0o600


def test_an_authority_that_would_end_before_is_renewed_too(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = x509.load_pem_x509_certificate((server / "ca.crt").read_bytes())
    monkeypatch.setattr(credentials, "DAYS", credentials.AUTHORITY_DAYS + 10)
    _, with_authority = renew(server, server.parent / "ca.key")
    new = x509.load_pem_x509_certificate((server / "ca.crt").read_bytes())
    assert with_authority and new.public_key() == old.public_key() and new != old


def test_the_key_of_another_authority_renews_nothing(server: Path, tmp_path: Path) -> None:
    init_federation(tmp_path / "other", [], "localhost:8000")
    before = {path.name: path.read_bytes() for path in server.glob("server.*")}
    with pytest.raises(CredentialError, match="is not the key of"):
        renew(server, tmp_path / "other" / "ca.key")
    with pytest.raises(CredentialError, match="cannot read the authority's key"):
        renew(server, tmp_path / "nothing.key")
    assert before == {path.name: path.read_bytes() for path in server.glob("server.*")}


def test_the_commands_say_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def fedsp(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fedsp", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert ended.value.code in (0, 2)
        return f"{ended.value.code} {said.out}{said.err}"

    assert "fedsp federation admit" in fedsp("federation", "init", "f")
    said = fedsp("party", "init", "hospital", "--server", "model.example:8000")
    told = next(word for word in said.split() if word.startswith("SHA256:")).rstrip(",")
    monkeypatch.chdir(tmp_path / "f" / "server")
    request = "../../hospital/request.json"
    said = fedsp("federation", "admit", request, "--examples", "40")
    assert told in said and "it counts as 40 examples in the mean: register.toml has" in said
    assert "--examples: 0 is no number" in fedsp("federation", "admit", request, "--examples", "0")
    assert "valid until 20" in fedsp("federation", "renew")
    assert "its key opens nothing" in fedsp("federation", "revoke", "hospital")
    assert "2 fedsp: register.toml has no client 'hospital'; it has none" in fedsp(
        "federation", "revoke", "hospital"
    )
    assert fedsp("party", "rotate", "../../hospital/party.toml").startswith("0 send request.json")
    assert "is in use: give a new folder" in fedsp(
        "party", "init", "x", "--folder", "../../hospital"
    )
    for name in ("server", "../up", "ca.key", ""):
        assert "is not a valid name" in fedsp("party", "init", name)
    assert "2 fedsp: cannot read nothing.json" in fedsp("federation", "admit", "nothing.json")
    said = fedsp("federation", "events")
    assert [line.split()[1] for line in said.splitlines()[1:4]] == [
        "admitted:",
        "certificate",
        "revoked:",
    ]
    assert "key made: key SHA256" in fedsp("federation", "events", "../../hospital/state")
    (tmp_path / "elsewhere").mkdir()
    assert "there is no register" in fedsp(
        "federation", "admit", request, "--server", str(tmp_path / "elsewhere")
    )
