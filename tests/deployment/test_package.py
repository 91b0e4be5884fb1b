"""The folder that a client gets, its signature, and the client's own floor. No process is started
here."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import ipaddress
import json
import os
import pwd
import resource
import shutil
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedsp import api as commands
from fedsp.cli import app, main
from fedsp.config import PartyConfig
from fedsp.config_file import read_config, read_register
from fedsp.data.dataset import load_dataset
from fedsp.data.seeding import derive_seed
from fedsp.deployment import join as joining
from fedsp.deployment import restricted_executor as pinned
from fedsp.deployment.join import Client, Node, supernode_command
from fedsp.deployment.package import (
    hold_against_policy,
    package_digest,
    read_agreement,
    seal_package,
)
from fedsp.deployment.package_check import require_harmless
from fedsp.deployment.parties import release
from fedsp.deployment.parties.credentials import (
    CERTIFICATE,
    client_key,
    has_signed,
    renew,
    sign,
    verify,
)
from fedsp.deployment.parties.new_federation import init_federation
from fedsp.deployment.parties.release import decide, waiting
from fedsp.deployment.processes import host_and_port, written
from fedsp.deployment.serve import proxy_command, superlink_command
from fedsp.errors import (
    AuxiliaryError,
    ConfigurationError,
    CredentialError,
    DeploymentError,
    FedspError,
    PolicyError,
    RunError,
    StorageError,
)
from fedsp.experiments import start
from fedsp.experiments.build import open_clients
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.chained_log import read_log, record_event
from fedsp.federation.codecs import parse_codec
from fedsp.federation.egress import EGRESS, read_egress
from fedsp.federation.messages import Failure, Request, Update
from fedsp.federation.state_store import StateStore
from fedsp.federation.transport.message import Message
from fedsp.federation.transport.request_handler import take_back
from fedsp.federation.transport.wire import END, REFUSALS, read_reply, signed_reply, write_request
from fedsp.models.auxiliary import load_auxiliary
from fedsp.models.payload import PROMPT
from fedsp.models.soft_prompt import read_prompt
from fedsp.privacy import LEDGER, Ledger
from support.clock import Clock
from support.deployed import until
from support.small_federation import make_federation, party_of
from support.tiny_families import tiny_causal_lm


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Path]:
    torch.set_num_threads(1)
    return make_federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture()
def place(federation: tuple[RunDirectory, Path], tmp_path: Path) -> Path:
    """A copy of the federation to spoil."""
    return Path(
        shutil.copytree(
            federation[1], tmp_path / "federation", ignore=shutil.ignore_patterns("state")
        )
    )


def test_each_party_has_what_it_needs_and_no_more(federation: tuple[RunDirectory, Path]) -> None:
    place = federation[1]
    assert {path.name for path in place.iterdir()} == {
        "ca.key",
        "server",
        "client-0",
        "client-1",
        "client-2",
    }
    for client in ("client-0", "client-1", "client-2"):
        assert {path.name for path in (place / client).iterdir()} >= {
            "ca.crt",
            "client.key",
            "server.pub",
            "party.toml",
        }
        assert not list((place / client).rglob("*signing*")) and not list(
            (place / client).rglob("server.key")
        )
    assert not list((place / "server").rglob("client.key"))
    private = [
        place / "ca.key",
        place / "server" / "server.key",
        place / "server" / "signing.key",
        place / "client-0" / "client.key",
    ]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private)
    keys = {
        (place / client / "client.key").read_bytes()
        for client in ("client-0", "client-1", "client-2")
    }
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.0.0.0:8000", ("0.0.0.0", 8000)),
        ("server.example.org:1", ("server.example.org", 1)),
        ("[::1]:8000", ("::1", 8000)),
        ("[::]:65535", ("::", 65535)),
        ("[fe80::1]:80", ("fe80::1", 80)),
    ],
)
def test_addresses_of_both_kinds_are_read_and_written(text: str, expected: tuple[str, int]) -> None:
    assert host_and_port(text, "listen") == expected and written(*expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "::1:8000",
        "[::1]",
        "[::1]:",
        "[localhost]:80",
        "[::1:80",
        "::1]:80",
        "[]:80",
        "[1.2.3.4]:80",
        "host",
        ":80",
        "host:0",
        "host:65536",
        'h"ost:80',
        "ho st:80",
        "user@host:80",
        "*.x.org:80",
        "-x:80",
        "x-:80",
        "a..b:80",
        "256.1.1.1:80",
        "1.2.3:80",
        "a" * 64 + ":80",
        "host\nmore:80",
        "host:0000099999999",
        "host:" + "9" * 5000,
    ],
)
def test_what_is_no_address_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigurationError, match="listen: .* is not a valid host:port"):
        host_and_port(text, "listen")


def test_a_federation_at_an_ipv6_address_has_its_certificate_and_listens_there(
    tmp_path: Path,
) -> None:
    commands.init_federation(tmp_path / "federation", ["a"], "[::1]:8443")
    server = tmp_path / "federation" / "server"
    names = (
        x509.load_pem_x509_certificate((server / CERTIFICATE).read_bytes())
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    assert ipaddress.ip_address("::1") in names.get_values_for_type(x509.IPAddress)
    assert 'listen = "[::]:8443"' in (server / "run.toml").read_text()
    assert 'server = "[::1]:8443"' in (tmp_path / "federation" / "a" / "party.toml").read_text()


def test_the_certificate_is_for_the_server_s_name_and_chains_to_the_authority(
    federation: tuple[RunDirectory, Path], tmp_path: Path
) -> None:
    server = federation[1] / "server"
    certificate = x509.load_pem_x509_certificate((server / "server.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((server / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    ssl.create_default_context(cafile=str(server / "ca.crt")).set_ciphers("DEFAULT")
    init_federation(tmp_path / "by-number", ["a"], "192.0.2.7:8000")
    numbered = x509.load_pem_x509_certificate(
        (tmp_path / "by-number" / "server" / "server.crt").read_bytes()
    )
    addresses = numbered.extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    ).value.get_values_for_type(x509.IPAddress)
    assert [str(address) for address in addresses] == ["192.0.2.7", "127.0.0.1"]


def test_the_server_s_template_is_a_configuration_once_it_names_a_model(tmp_path: Path) -> None:
    init_federation(tmp_path / "new", ["a", "b"], "localhost:8000")
    read = read_config(
        tmp_path / "new" / "server" / "run.toml",
        ["model.name=embedded", f"distill.text=['{tmp_path}']"],
    )
    assert read.federation and read.auxiliary.folder == "package" and read.server_share == 1.0
    assert sorted(read_register(tmp_path / "new" / "server")) == ["a", "b"]


def test_flower_s_own_commands_are_the_documented_ones(place: Path) -> None:
    assert "--enable-supernode-auth" in superlink_command(
        place, 1
    ) and "127.0.0.1" in superlink_command(place, 1)
    node = supernode_command(party_of(place), 1, place)
    assert node[node.index("--isolation") + 1] == "process", (
        "else the node would run what the server sends"
    )
    assert "--insecure" not in [
        *superlink_command(place, 1),
        *supernode_command(party_of(place), 1, place),
        *proxy_command("h", 1, 2, place, place),
    ]


def test_the_package_holds_no_file_name_of_the_server_s(
    federation: tuple[RunDirectory, Path],
) -> None:
    text = (federation[1] / "server" / "package" / "agreement.json").read_text()
    assert str(federation[1]) not in text and "public.txt" not in text


def test_every_answer_is_in_the_journal_of_what_has_left_before_it_leaves(
    federation: tuple[RunDirectory, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Updates, refusals and what is sent again; and where it cannot be written, nothing leaves."""
    local, place = federation
    party = party_of(place).model_copy(update={"state": str(tmp_path / "state")})
    client = Client(party, Callbacks())
    first = read_prompt(local.path / "prompts" / "round-00001.safetensors").values()
    seed = derive_seed(0, "client", "client-0", 2)
    asked = Request(run="ab", round=2, client="client-0", seed=seed, payload={PROMPT: first})
    message = write_request(asked, party.package.sha256)
    stranger = write_request(replace(asked, client="client-1"), party.package.sha256)
    replies = [client.respond(one) for one in (message, message, stranger)]
    entries = read_egress(tmp_path / "state" / EGRESS)
    assert [entry["kind"] for entry in entries] == ["update", "update", "refusal"]
    for entry, reply in zip(entries, replies, strict=True):
        sent = reply.header.encode() + reply.payload
        assert entry["bytes"] == len(sent)
        assert entry["sha256"] == hashlib.sha256(sent).hexdigest()
        assert (entry["run"], entry["round"], entry["package"]) == ("ab", 2, party.package.sha256)
    update = read_reply(unsigned(client, message), asked)
    assert isinstance(update, Update)
    assert entries[0]["norm"] == pytest.approx(
        float((update.payload[PROMPT] - first.detach()).norm())
    )
    assert entries[0]["codec"] == "float32" and entries[2]["norm"] is None
    (tmp_path / "party.toml").write_text((place / "client-0" / "party.toml").read_text())
    told = CliRunner().invoke(app, ["egress", "report", str(tmp_path / "party.toml")])
    assert told.exit_code == 0, told.output
    assert "3 updates (1 of them different, the others sent again)" in told.output
    assert "4 messages" in told.output and "and 1 refusals" in told.output
    assert "1 update left without differential privacy" in told.output
    assert "The journal is whole; its last line has the digest" in told.output
    journal = Path(party.state) / EGRESS
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])
    told = CliRunner().invoke(app, ["egress", "report", str(tmp_path / "party.toml")])
    behind = len(whole) - 20 - whole[:-1].rfind(b"\n") - 1
    assert f"The last {behind} bytes of the journal are a line that was cut short" in told.output
    assert "3 messages" in told.output and "The journal is whole" not in told.output
    journal.write_bytes(whole)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    other = write_request(replace(asked, round=1), party.package.sha256)
    with pytest.raises(StorageError, match="no space left on device"):
        client.respond(other)


def test_a_client_opens_and_answers_with_the_bits_of_the_run_in_one_place(
    federation: tuple[RunDirectory, Path],
) -> None:
    local, place = federation
    said: list[str] = []
    client = Client(party_of(place), Callbacks(info=said.append))
    first = read_prompt(local.path / "prompts" / "round-00001.safetensors").values()
    request = Request(
        run="ab",
        round=2,
        client="client-0",
        seed=derive_seed(0, "client", "client-0", 2),
        payload={PROMPT: first},
    )
    message = write_request(request, client.party.package.sha256)
    reply = read_reply(unsigned(client, message), request)
    assert isinstance(reply, Update), reply
    assert client.respond(message) == client.respond(message), "asked again, it says the same"
    assert json.loads(
        (
            place / "client-0" / "state" / client.party.package.sha256[:16] / "rounds.json"
        ).read_text()
    ).keys() == {"ab 2"}
    assert (
        len(said) == 3
        and "received 16,7" in said[0]
        and "prompt loss" in said[0]
        and said[1] == "round 2: asked again, sent the same update"
    )
    assert not any(word in line for line in said for word in ("town of", "trade of", "animal of"))


def unsigned(client: Client, request: Message) -> Message:
    """A client's reply, once its signature was held against the key in the server's register."""
    registered = client_key(
        Path(client.party.keys).parent / "server" / "clients" / f"{client.party.name}.pub"
    )
    return signed_reply(client.respond(request), request, partial(has_signed, registered))


def test_a_client_answers_with_the_bits_of_an_adapters_run_and_takes_no_other_tensor(
    tmp_path: Path,
) -> None:
    changes = {"kind": "adapter", "rank": 2, "targets": ["c_attn"]}
    local, place = make_federation(tmp_path, messenger=changes)
    client = Client(party_of(place), Callbacks())
    start = {name: torch.zeros(shape) for name, shape in client._shapes.items()}
    assert list(start) == [f"layers.{layer:03d}.attn.c_attn.B" for layer in (0, 1, 6, 7)]
    seed = derive_seed(0, "client", "client-0", 1)
    request = Request(run="ab", round=1, client="client-0", seed=seed, payload=start)
    reply = read_reply(
        unsigned(client, write_request(request, client.party.package.sha256)), request
    )
    again = open_clients(
        local.config,
        load_auxiliary(local.package, device=torch.device("cpu"), positions="hugging_face"),
        load_dataset(local.config, local.partition()),
        local,
    )
    here = again.method.client_update(again.party("client-0"), request)
    assert isinstance(reply, Update) and list(reply.payload) == list(start)
    assert all(torch.equal(reply.payload[name], here.payload[name]) for name in start)
    assert any(bool(tensor.any()) for tensor in reply.payload.values())
    *three, (last, values) = start.items()
    for wrong in (dict(three), {**dict(three), f"{last}.weight": values}):
        assert respond(client, round=2, payload=wrong)[0] == REFUSALS["request"]


def respond(client: Client, /, **changes: Any) -> tuple[str, list[str]]:
    """The sentence at the server, and what was said at the client, for a request that differs in
    something."""
    values: dict[str, Any] = {
        "run": "ab",
        "round": 1,
        "client": "client-0",
        "seed": 1,
        "payload": {PROMPT: torch.zeros(4, 8, 128)},
    } | changes
    request = Request(**values)
    said: list[str] = []
    client._info = said.append
    reply = read_reply(
        unsigned(client, write_request(request, client.party.package.sha256)), request
    )
    return getattr(reply, "reason", "answered"), said


@pytest.mark.parametrize(
    ("changes", "code", "here"),
    [
        ({"client": "client-1"}, "policy", "for another client"),
        ({"run": "../../etc"}, "policy", "run id is not 1 to 32"),
        ({"round": 0}, "policy", "round 0 is not one of the 3"),
        ({"round": 4}, "policy", "round 4 is not one of the 3"),
        ({"round": 2, "train": False}, "policy", "round 2 is not one of the 3"),
        ({"round": 4, "train": False}, "policy", "round 4 is not one of the 3"),
        (
            {"answer_in": parse_codec("int8")},
            "policy",
            "asks for an answer in int8, the package allows float32",
        ),
        ({"payload": {PROMPT: torch.zeros(4, 8, 127)}}, "request", "expected"),
        ({"payload": {PROMPT: torch.full((4, 8, 128), float("nan"))}}, "request", "not finite"),
    ],
)
def test_a_request_outside_the_agreement_is_refused_and_says_so(
    place: Path, changes: dict[str, Any], code: str, here: str
) -> None:
    reason, said = respond(Client(party_of(place), Callbacks()), **changes)
    assert reason == REFUSALS[code] and here in said[0]


def answering(client: Client, message: Message) -> tuple[threading.Thread, list[Any]]:
    """A client that answers in a thread of its own, as `fedsp join` lets it."""
    answers: list[Any] = []

    def work() -> None:
        try:
            answers.append(client.respond(message))
        except DeploymentError as error:
            answers.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, answers


def test_a_decision_and_the_end_of_its_time_do_not_both_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever decides while it is being withheld hears that nothing waits any more."""
    figures = {"run": "ab", "round": 1, "bytes": 9}
    said = list[BaseException]()

    def person(name: str) -> None:
        try:
            release.decide(tmp_path, name, released=True)
        except StorageError as error:
            said.append(error)

    def slow(state: Path, event: str, **about: Any) -> None:
        if about["who"] == "nobody, in time":
            deciding.append(threading.Thread(target=person, args=[about["update"]]))
            deciding[0].start()
            deciding[0].join(0.2)
        record_event(state, event, **about)

    deciding: list[threading.Thread] = []
    monkeypatch.setattr("fedsp.deployment.parties.release.record_event", slow)
    monkeypatch.setattr(release, "LOOKS_EVERY", 0.01)
    assert not release.wait_for_release(tmp_path, figures, 0.0, threading.Event(), lambda _: None)
    deciding[0].join(20)
    assert len(said) == 1 and "waits in" in str(said[0])
    assert [event["event"] for event in read_log(tmp_path / "security.jsonl", "")] == ["withheld"]


def test_who_decides_in_the_last_moment_has_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = release._deciding

    @contextlib.contextmanager
    def after_a_person(state: Path) -> Iterator[None]:
        monkeypatch.setattr(release, "_deciding", alone)
        for name in waiting(state):
            decide(state, name, released=True)
        with alone(state):
            yield

    monkeypatch.setattr(release, "_deciding", after_a_person)
    monkeypatch.setattr(release, "LOOKS_EVERY", 0.01)
    figures = {"run": "ab", "round": 1, "bytes": 9}
    assert release.wait_for_release(tmp_path, figures, 0.0, threading.Event(), lambda _: None)
    assert [event["event"] for event in read_log(tmp_path / "security.jsonl", "")] == ["released"]


def test_what_was_withheld_is_no_part_of_what_is_sent_later(tmp_path: Path) -> None:
    """A lossy codec adds what a round's answer left out to the next one's."""
    store = StateStore(tmp_path)
    store.save(1, {"residual/prompt": torch.ones(3), "answer": torch.zeros(2)})
    store.save(2, {"residual/prompt": torch.full((3,), 2.0), "answer": torch.ones(2)})
    take_back(store, 2)
    left = store.load(before=3)
    assert left["residual/prompt"].tolist() == [1.0] * 3 and left["answer"].tolist() == [1.0] * 2
    take_back(store, 1)
    assert store.at(1)["residual/prompt"].tolist() == [0.0] * 3
    take_back(store, 3)
    assert store.rounds() == [1, 2], "where nothing was left out nothing is written"


def test_an_update_waits_until_a_person_has_decided(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsp.deployment.parties.release.LOOKS_EVERY", 0.01)
    monkeypatch.setenv("LOGNAME", "data-officer")
    taken_back: list[int] = []
    monkeypatch.setattr(joining, "take_back", lambda store, round: taken_back.append(round))
    party = party_of(place, policy={"release": "ask"})
    state = Path(party.state)

    def asked(round: int) -> tuple[Request, Message]:
        request = Request(
            run="ab",
            round=round,
            client="client-0",
            seed=1,
            payload={PROMPT: torch.zeros(4, 8, 128)},
        )
        return request, write_request(request, party.package.sha256)

    def decided(client: Client, round: int, answer: str) -> Any:
        request, message = asked(round)
        thread, answers = answering(client, message)
        until(lambda: bool(waiting(state)))
        left = CliRunner().invoke(
            app, ["egress", "release", str(place / "client-0" / "party.toml")], input=""
        )
        assert isinstance(left.exception, RunError) and "waits on" in str(left.exception)
        assert (not answers and not (state / "egress.jsonl").exists()) or round > 1
        told = CliRunner().invoke(
            app, ["egress", "release", str(place / "client-0" / "party.toml")], input=answer
        )
        assert told.exit_code == 0, told.output
        assert (
            f"round {round}: 16,472 bytes" in told.output and "length of the change" in told.output
        )
        thread.join(20)
        return read_reply(signed_reply(answers[0], message, lambda *_: True), request)

    client = Client(party, Callbacks())
    assert isinstance(decided(client, 1, "y\n"), Update)
    withheld = decided(client, 2, "\n")
    assert isinstance(withheld, Failure) and withheld.reason == REFUSALS["withheld"]
    # after a restart the same update is not asked about again
    request, message = asked(2)
    thread, answers = answering(Client(party, Callbacks()), message)
    thread.join(20)
    again = read_reply(signed_reply(answers[0], message, lambda *_: True), request)
    assert isinstance(again, Failure) and again.reason == REFUSALS["withheld"]
    assert [entry["kind"] for entry in read_egress(state / "egress.jsonl")] == [
        "update",
        "refusal",
        "refusal",
    ], "what was withheld never left"
    events = read_log(state / "security.jsonl", "")
    assert [event["event"] for event in events] == ["released", "withheld"]
    assert events[0]["who"] == pwd.getpwuid(os.getuid()).pw_name, "whatever LOGNAME says"
    # nobody has decided in time
    hasty = party_of(place, policy={"release": "ask", "release_seconds": 0.05})
    request, message = asked(3)
    thread, answers = answering(Client(hasty, Callbacks()), message)
    thread.join(20)
    late = read_reply(signed_reply(answers[0], message, lambda *_: True), request)
    assert isinstance(late, Failure) and late.reason == REFUSALS["withheld"] and not waiting(state)
    assert read_log(state / "security.jsonl", "")[-1]["who"] == "nobody, in time"
    assert taken_back == [2, 2, 3]
    # who ends the client does not wait for anybody
    client = Client(party, Callbacks())
    thread, answers = answering(client, asked(3)[1])
    until(lambda: bool(waiting(state)))
    client.stopping.set()
    thread.join(20)
    assert isinstance(answers[0], DeploymentError)
    with pytest.raises(StorageError, match="no update nothing waits"):
        decide(state, "nothing", released=True)


def test_a_disk_that_is_full_at_a_client_is_told_on_both_sides(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        raise StorageError(f"{path} cannot be written: no space left on device")

    client = Client(party_of(place), Callbacks())
    with monkeypatch.context() as patch:
        patch.setattr("fedsp.deployment.join.write_json", full)
        reason, said = respond(client)
    assert reason == REFUSALS["storage"]
    assert "rounds.json cannot be written: no space left on device" in said[0]
    assert list(client.undone) == [1]
    assert respond(client)[0] == "answered" and not client.undone, "there was room again"


def test_the_client_counts_rounds_over_restarts_and_stops_at_its_own_limit(place: Path) -> None:
    party = party_of(place, policy={"max_rounds": 3})
    for round in (1, 2, 2):
        assert respond(Client(party, Callbacks()), round=round)[0] == "answered"
    assert respond(Client(party, Callbacks()), run="cd", round=1)[0] == "answered"
    reason, said = respond(Client(party, Callbacks()), run="cd", round=2)
    assert reason == REFUSALS["policy"] and "3 rounds were answered" in said[0]
    (event,) = read_log(Path(party.state) / "security.jsonl", "")
    assert event["event"] == "request refused" and "3 rounds were answered" in event["why"]


def test_a_client_answers_as_many_runs_as_the_package_speaks_of(place: Path) -> None:
    """Over restarts too: an identity is the server's invention, and each run has a budget of its
    own."""
    party = party_of(place)
    assert [respond(Client(party, Callbacks()), run=run)[0] for run in ("ab", "cd", "ab")] == [
        "answered"
    ] * 3
    reason, said = respond(Client(party, Callbacks()), run="ef")
    assert (
        reason == REFUSALS["policy"]
        and "the package allows 2 runs, and as many were answered" in said[0]
    )


def test_a_round_is_answered_once_and_again_only_to_the_very_same_request(place: Path) -> None:
    """Else a server could ask for as many prompts as it likes under one round's name."""
    party = party_of(place)
    assert [respond(Client(party, Callbacks()), round=1)[0] for _ in range(2)] == [
        "answered",
        "answered",
    ]
    for other in ({"seed": 2}, {"payload": {PROMPT: torch.ones(4, 8, 128)}}):
        reason, said = respond(Client(party, Callbacks()), round=1, **other)
        assert reason == REFUSALS["policy"] and "answered already, to another request" in said[0]


@pytest.mark.recipe
def test_a_private_client_keeps_its_own_ledger_and_its_own_limit(tmp_path: Path) -> None:
    _, place = make_federation(tmp_path, privacy={"unit": "example", "epsilon": 6.0})
    party = party_of(place, policy={"require_differential_privacy": True, "max_epsilon": 6.0})
    for run, round in (("ab", 1), ("ab", 1), ("ab", 2), ("ab", 3)):
        client = Client(party, Callbacks())
        request = Request(
            run=run,
            round=round,
            client="client-0",
            seed=1,
            payload={PROMPT: torch.zeros(4, 8, 128)},
        )
        said = json.loads(unsigned(client, write_request(request, party.package.sha256)).header)
        assert (said["kind"], said["losses"], said["seconds"], said["shortened"]) == (
            "update",
            {},
            0.0,
            0,
        )
    ledger = Ledger(Path(party.state) / LEDGER)
    assert (
        sum(release.count for release in ledger.releases()) == 6 and 5 < ledger.epsilon(1e-5) <= 6.0
    )
    reason, here = respond(Client(party, Callbacks()), run="cd", round=1)
    assert (
        reason == REFUSALS["policy"] and "more than this client's budget of epsilon = 6 " in here[0]
    )
    patient = party_of(place, state=str(tmp_path / "state"))
    answered = {
        run: [
            respond(Client(patient, Callbacks()), run=f"{run:x}", round=round)[0]
            for round in (1, 2, 3)
        ]
        for run in range(6)
    }
    assert [run for run, said_of in answered.items() if "answered" in said_of] == [0, 1]
    asked = write_request(
        Request(
            run="0", round=1, client="client-0", seed=1, payload={PROMPT: torch.zeros(4, 8, 128)}
        ),
        patient.package.sha256,
    )
    opened = Client(patient, Callbacks())
    assert (
        opened._open(asked, "client-0").max_epsilon == 12.0
        and Client(party, Callbacks())._open(asked, "client-0").max_epsilon == 6.0
    )
    opened.agreement = opened.agreement.model_copy(
        update={
            "privacy": opened.agreement.privacy.model_copy(
                update={"epsilon": None, "noise_multiplier": 4.0}
            )
        }
    )
    assert 0 < opened._open(asked, "client-0").max_epsilon < 12.0, (
        "by noise alone: what both runs cost with it"
    )
    assert Ledger(Path(patient.state) / LEDGER).epsilon(1e-5) <= 12.0, (
        "what was signed, for each of two runs, whatever a server invents"
    )
    for policy, sentence in (
        ({"max_epsilon": 3.0}, "the run may cost epsilon = 6, policy.max_epsilon allows 3"),
        ({"max_delta": 1e-6}, "at delta = 1e-05, policy.max_delta allows 1e-06"),
    ):
        with pytest.raises(PolicyError, match=sentence):
            Client(party_of(place, policy=policy), Callbacks())


def test_a_limit_on_epsilon_needs_a_promise(place: Path) -> None:
    with pytest.raises(
        PolicyError, match="so no epsilon holds, and policy.max_epsilon = 3 asks for one"
    ):
        Client(party_of(place, policy={"max_epsilon": 3.0}), Callbacks())


@pytest.mark.parametrize(("header", "payload"), [(5000, 0), (0, 4 * 4 * 8 * 128 + 1025)])
def test_a_message_larger_than_a_request_is_not_even_read(
    header: int, payload: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    client = Client(party_of(place), Callbacks(info=said.append))
    monkeypatch.setattr(joining, "answer", lambda *_, **__: pytest.fail("it was read"))
    assert (
        client.respond(Message("x" * header, b"x" * payload)) == Message("")
        and "the message is larger than what may travel" in said[0]
    )


def test_what_is_no_request_is_not_trained_on_and_does_not_end_the_client(place: Path) -> None:
    said: list[str] = []
    client = Client(party_of(place), Callbacks(info=said.append))
    for message in (
        Message(""),
        Message("{}"),
        Message(END.header + " "),
        Message(
            write_request(
                Request(
                    run="ab", round=1, client="client-0", seed=1, payload={PROMPT: torch.zeros(2)}
                )
            ).header,
            b"pickle",
        ),
    ):
        assert client.respond(message) == Message("")
    assert client.answered == 0 and all("not a valid request" in line for line in said)
    assert respond(client)[0] == "answered"


@pytest.fixture()
def unpinned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Flower's modules as they are; what a test pins is put back."""
    for module, names in pinned.REPLACED.items():
        for name in names:
            monkeypatch.setattr(
                importlib.import_module(module),
                name,
                getattr(importlib.import_module(module), name),
            )
    plugin = importlib.import_module("flwr.supercore.superexec.run_superexec").AutoExecPlugin
    monkeypatch.setattr(plugin, "supported_task_types", plugin.supported_task_types)
    return monkeypatch


def test_a_bundle_that_the_server_sends_is_never_installed_or_loaded(unpinned: Any) -> None:
    pinned.pin_client_app()
    runner: Any = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    assert runner.install_from_fab(b"hostile", skip_prompt=True) is None
    assert (
        type(
            runner.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)(
                "id", "1", "hash"
            )
        ).__name__
        == "ClientApp"
    )


def test_no_kind_of_task_but_our_client_app_is_ever_started(unpinned: Any) -> None:
    """Flower can run agents, models and more at a client, each of which would install what the
    server sends."""
    started: list[list[str]] = []
    unpinned.setattr(subprocess, "Popen", started.append)
    pinned.pin_executor()
    module: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")
    kinds = list(importlib.import_module("flwr.supercore.constant").TaskType)
    specification = importlib.import_module("flwr.supercore.superexec.executor").ExecutionSpec
    executor = module.get_executor("subprocess")
    assert executor.get_eligible_capacity(set(kinds)) == (
        {"flwr-clientapp"},
        set(),
    ) and module.AutoExecPlugin.supported_task_types == {"flwr-clientapp"}
    for kind in kinds:
        result = executor.launch(
            specification(kind, "127.0.0.1:1", "token", True, None, False, 1, False, 7, None)
        )
        assert (result.status == "accepted") == (kind == "flwr-clientapp")
    assert [command[:5] for command in started] == [
        [sys.executable, "-P", "-m", "fedsp.deployment.restricted_executor", "clientapp"]
    ]


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, names in pinned.REPLACED.items() for name in names],
)
def test_a_flower_that_cannot_be_pinned_is_refused(unpinned: Any, module: str, name: str) -> None:
    unpinned.delattr(importlib.import_module(module), name)
    with pytest.raises(DeploymentError, match="cannot be kept from running code"):
        pinned.require_pinning()


def test_a_request_about_another_package_is_refused(place: Path) -> None:
    client = Client(party_of(place), Callbacks())
    request = Request(
        run="ab", round=1, client="client-0", seed=1, payload={PROMPT: torch.zeros(4, 8, 128)}
    )
    reply = read_reply(unsigned(client, write_request(request, "0" * 64)), request)
    assert getattr(reply, "reason", "") == REFUSALS["policy"]


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ({"max_rounds": 2}, "the run has 3 rounds, policy.max_rounds allows 2"),
        ({"min_examples": 500}, "policy.min_examples asks for 500"),
        ({"methods": ["other"]}, "the run's method is 'fedsp', policy.methods allows"),
        ({"plans": ["shared(0)", [0, 3, 5]]}, "policy.plans allows"),
        ({"plans": ["chosen(3)"]}, "names no layers, so no package"),
        ({"require_differential_privacy": True}, "no differential privacy"),
    ],
)
def test_a_client_does_not_join_what_its_policy_forbids(
    place: Path, policy: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PolicyError, match=sentence.replace("(", r"\(")):
        Client(party_of(place, policy=policy), Callbacks())


def test_a_client_joins_what_its_policy_allows(place: Path) -> None:
    Client(
        party_of(
            place, policy={"plans": ["shared(0)", "ends(2)"], "min_examples": 16, "max_rounds": 3}
        ),
        Callbacks(),
    )


def spoil_weights(package: Path) -> None:
    path = package / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


SPOILED: dict[str, tuple[Any, type[FedspError], str]] = {
    "weights": (spoil_weights, AuxiliaryError, "package.sha256 says"),
    "agreement": (
        lambda package: (package / "agreement.json").write_text("{}"),
        AuxiliaryError,
        "package.sha256 says",
    ),
    "one file more": (
        lambda package: (package / "code.py").write_text(""),
        AuxiliaryError,
        "package.sha256 says",
    ),
    "a link": (
        lambda package: (package / "link").symlink_to("/etc/passwd"),
        AuxiliaryError,
        "link, which is no plain file",
    ),
    "no signature": (
        lambda package: (package / "signature").unlink(),
        CredentialError,
        "is not signed",
    ),
    "another signature": (
        lambda package: (package / "signature").write_text("00" * 64),
        CredentialError,
        "is refused",
    ),
    "no hexadecimal": (
        lambda package: (package / "signature").write_text("zz"),
        CredentialError,
        "is refused",
    ),
    "gone": (shutil.rmtree, AuxiliaryError, "there is no package"),
}


@pytest.mark.parametrize("how", sorted(SPOILED))
def test_any_other_package_is_refused(how: str, place: Path) -> None:
    spoil, kind, sentence = SPOILED[how]
    spoil(place / "client-0" / "package")
    with pytest.raises(kind, match=sentence):
        Client(party_of(place), Callbacks())


def signed_again(place: Path, spoil: Callable[[Path], Any]) -> PartyConfig:
    """A client whose package the owner of the model has spoiled, signed and told the digest of."""
    package = place / "client-0" / "package"
    spoil(package)
    digest = package_digest(package)
    (package / "signature").write_text(
        sign(f"fedsp package 1\n{digest}\n".encode(), place / "server" / "signing.key")
    )
    return party_of(place, package={"sha256": digest})


def changed(name: str, **values: Any) -> Callable[[Path], Any]:
    def spoil(package: Path) -> None:
        known = json.loads((package / name).read_text())
        (package / name).write_text(json.dumps({**known, **values}))

    return spoil


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code of its own": (
        changed("config.json", model_type="vit", auto_map={"AutoModelForCausalLM": "code--Model"}),
        "the model type 'vit'",
    ),
    "code by a known type": (
        changed("config.json", auto_map={"AutoModelForCausalLM": "code--Model"}),
        "has the key 'auto_map'",
    ),
    "code of a tokenizer": (
        changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["code--T", None]}),
        "refers to custom code",
    ),
    "a file of code": (
        lambda package: (package / "modeling.py").write_text("raise SystemExit"),
        "holds 'modeling.py', which is not allowed",
    ),
    "a pickle": (
        lambda package: (package / "pytorch_model.bin").write_bytes(b""),
        "holds 'pytorch_model.bin', which is not allowed",
    ),
    "kernels": (
        changed("config.json", attn_implementation="kernels-community/flash-attn"),
        "has the key 'attn_implementation'",
    ),
    "kernels inside": (
        changed("config.json", activation_function="kernels-community/gelu"),
        "activation_function is too long or names a kernel",
    ),
    "other weights": (
        changed("config.json", quantization_config={"load_in_8bit": True}),
        "has the key 'quantization_config'",
    ),
    "a compiler": (
        changed("config.json", model_type="rwkv"),
        "the model type 'rwkv', which is not allowed",
    ),
    "a terabyte": (
        changed("config.json", n_positions=2**40),
        "n_positions is larger than any model needs",
    ),
    "more than its file": (
        changed("config.json", n_positions=2**24),
        "has other weights than its configuration: transformer.wpe.weight",
    ),
    "a billion layers": (
        changed("config.json", n_layer=2**23),
        "does not have the 8 layers of its plan",
    ),
    "a long list": (
        changed("config.json", architectures=["x"] * 200_000),
        "architectures has 200000 entries",
    ),
    "no type": (changed("config.json", model_type=7), "has the model type 7"),
    "not JSON": (
        lambda package: (package / "config.json").write_text("[" * 100_000),
        "nested too deeply",
    ),
    "another shape of prompt": (
        changed("auxiliary.json", prompt_shape={"layers": "x"}),
        "cannot be used",
    ),
    "no plan": (changed("auxiliary.json", plan=None), "cannot be used"),
    "a plan of words": (
        changed(
            "auxiliary.json",
            plan={"sources": ["a"], "groups": [], "frozen": 3, "prompt_layers": {}},
        ),
        "cannot be used",
    ),
}


@pytest.mark.parametrize("how", sorted(HOSTILE))
def test_a_signed_package_runs_no_code_and_takes_no_memory_of_its_own(
    how: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run code"))
    spoil, sentence = HOSTILE[how]
    party = signed_again(place, spoil)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FedspError, match=sentence):
        Client(party, Callbacks())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10, "KiB"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@hypothesis_settings(max_examples=120, deadline=None)
@given(data=st.data())
@pytest.mark.recipe
def test_whatever_an_owner_writes_into_a_package_is_a_sentence(
    data: st.DataObject,
    federation: tuple[RunDirectory, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    place = tmp_path_factory.mktemp("spoiled") / "federation"
    (place / "client-0").mkdir(parents=True)
    shutil.copytree(
        federation[1] / "server", place / "server", ignore=shutil.ignore_patterns("package", "run")
    )
    for entry in (federation[1] / "client-0").iterdir():
        if entry.name != "state":
            (shutil.copytree if entry.is_dir() else shutil.copy)(
                entry, place / "client-0" / entry.name
            )
    name = data.draw(
        st.sampled_from(
            ["config.json", "auxiliary.json", "agreement.json", "tokenizer_config.json"]
        )
    )
    known = json.loads((place / "client-0" / "package" / name).read_text())
    key = data.draw(st.sampled_from(sorted(known)))
    inner = (
        known[key]
        if isinstance(known[key], dict) and known[key] and data.draw(st.booleans())
        else None
    )
    if inner is None:
        spoil = changed(name, **{key: data.draw(JSON)})
    else:
        spoil = changed(
            name, **{key: {**inner, data.draw(st.sampled_from(sorted(inner))): data.draw(JSON)}}
        )
    party = signed_again(place, spoil)
    with contextlib.suppress(FedspError):
        Client(party, Callbacks())


def test_a_large_base_of_rotations_is_no_size(tmp_path: Path) -> None:
    tiny_causal_lm(
        "llama", rope_parameters={"rope_type": "default", "rope_theta": 50_000_000}
    ).config.save_pretrained(tmp_path)
    require_harmless(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["rope_parameters"]["factor"] = 2**40
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(AuxiliaryError, match="factor is larger than any model needs"):
        require_harmless(tmp_path)


def test_a_package_that_clients_would_refuse_is_not_sealed(place: Path) -> None:
    package = place / "server" / "package"
    (package / "notes.txt").write_text("x")
    with pytest.raises(AuxiliaryError, match=r"holds 'notes.txt', which is not allowed"):
        seal_package(package, read_agreement(package), place / "server" / "signing.key")


def test_a_private_run_within_a_policy_is_joined_to_the_last_digit(place: Path) -> None:
    agreement = read_agreement(place / "server" / "package")
    private = agreement.model_copy(
        update={
            "privacy": agreement.privacy.model_copy(
                update={"unit": "example", "epsilon": 6.0, "delta": 1e-5}
            )
        }
    )
    policy = party_of(place).policy.model_copy(
        update={
            "require_differential_privacy": True,
            "max_epsilon": 6.0,
            "max_delta": 1e-5,
            "max_rounds": private.rounds,
            "min_examples": 9,
        }
    )
    nobody: Any = None  # no plans are asked for
    hold_against_policy(policy, private, nobody, 9)
    for change, examples in (
        ({"max_epsilon": 5.99}, 9),
        ({"max_delta": 0.99e-5}, 9),
        ({"max_rounds": private.rounds - 1}, 9),
        ({}, 8),
    ):
        with pytest.raises(PolicyError, match=f"policy.{next(iter(change), 'min_examples')}"):
            hold_against_policy(policy.model_copy(update=change), private, nobody, examples)


def test_an_agreement_that_says_something_else_is_named_by_its_file(place: Path) -> None:
    path = place / "server" / "package" / "agreement.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rounds": -1, "more": 1}))
    with pytest.raises(ConfigurationError, match=r"server/package/agreement\.json has 2 faults"):
        read_agreement(place / "server" / "package")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"messenger": {"kind": "pigeon"}}, "there is no messenger 'pigeon'; choose prompt, ad"),
        ({"messenger": {"kind": "layers", "layers": "all"}}, "messenger.layers: 'all' is for"),
        (
            {
                "messenger": {"kind": "layers"},
                "privacy": {"unit": "example", "noise_multiplier": 1.0},
            },
            "'layers' does not give; take 'prompt'",
        ),
    ],
)
def test_a_client_says_which_messenger_it_cannot_make(
    place: Path, changes: dict[str, Any], said: str
) -> None:
    party = signed_again(place, changed("agreement.json", **changes))
    with pytest.raises(ConfigurationError) as refused:
        Client(party, Callbacks())
    assert said in str(refused.value)
    assert "client-0/package asks for what cannot be done here: messenger." in str(refused.value)
    assert "must be installed at the server and at every client" in str(refused.value)


def test_a_key_that_cannot_sign_is_found_out_before_the_distillation(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "server" / "signing.key").unlink()
    monkeypatch.setattr(start, "make_auxiliary", lambda *_: pytest.fail("it was distilled first"))
    with pytest.raises(CredentialError, match="cannot read the signing key"):
        commands.distill(read_config(place / "server" / "run.toml"), place / "server" / "again")


def test_a_package_of_another_owner_is_refused(place: Path, tmp_path: Path) -> None:
    init_federation(tmp_path / "other", ["x"], "localhost:8000")
    shutil.copy(tmp_path / "other" / "x" / "server.pub", place / "client-0" / "server.pub")
    with pytest.raises(CredentialError, match="is refused: the signature is not valid for"):
        Client(party_of(place), Callbacks())
    shutil.copy(place / "server" / "clients" / "client-1.pub", place / "client-0" / "server.pub")
    with pytest.raises(CredentialError, match="no Ed25519 key"):
        Client(party_of(place), Callbacks())


def test_a_signature_is_of_one_statement_and_one_key(place: Path) -> None:
    signature = sign(b"statement", place / "server" / "signing.key")
    verify(b"statement", signature, place / "client-0" / "server.pub")
    with pytest.raises(CredentialError):
        verify(b"another", signature, place / "client-0" / "server.pub")
    with pytest.raises(CredentialError, match="cannot read the signing key"):
        sign(b"statement", place / "nothing.key")


REGISTERS = {
    "[clients.a]\nexamples = 3\n": "client 'a': expected exactly public_key and examples",
    '[clients.a]\npublic_key = "clients/client-0.pub"\nexamples = 0\n': (
        "examples is 0, expected a whole number of at least 1"
    ),
    '[clients.a]\npublic_key = "clients/a.pub"\nexamples = 1\n': "there is no public key",
    "": "names no client",
    "clients = 3": "clients is no table",
    "[[clients]]": "clients is no table",
    "[clients": "is not a TOML file",
}


@pytest.mark.parametrize("text", list(REGISTERS))
def test_a_register_that_cannot_be_used_says_where(place: Path, text: str) -> None:
    (place / "server" / "register.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=REGISTERS[text]):
        read_register(place / "server")


WRONG: dict[str, tuple[list[str], Any, str]] = {
    "no section": (
        ["serve", "run.toml"],
        lambda server: (server / "run.toml").write_text(
            'model.name = "embedded"\n[distill]\ntext = ["run.toml"]\n'
        ),
        "has no [federation] section",
    ),
    "run in one place": (["run", "run.toml"], lambda server: None, "run it with `fedsp serve`"),
    "a key is gone": (
        ["serve", "run.toml"],
        lambda server: (server / "server.key").unlink(),
        "server.key; `fedsp federation init` makes it",
    ),
    "another agreement": (
        ["serve", "run.toml", "client.prompt_steps=9"],
        lambda server: None,
        "signed for another agreement (client)",
    ),
    "a bare auxiliary": (
        ["serve", "run.toml"],
        lambda server: (server / "package" / "agreement.json").unlink(),
        "is not a valid package",
    ),
    "an address": (
        ["serve", "run.toml", "federation.listen=nowhere"],
        lambda server: None,
        "'nowhere' is not a valid host:port",
    ),
    "an address with its scheme": (
        ["federation", "init", "new", "--clients", "a", "--address", "https://lab.org:8443/x"],
        lambda server: None,
        "such as localhost:8000: leave https:// and what stands behind the port out",
    ),
    "fewer clients than a round needs": (
        ["serve", "run.toml", "round.min_clients=9"],
        lambda server: None,
        "round.min_clients: a round needs 9 updates but asks 3 of the 3 clients in the register",
    ),
    "a folder as a party": (
        ["join", ".."],
        lambda server: None,
        "fedsp: .. cannot be read as a TOML file: Is a directory\n",
    ),
    "a digest": (
        ["join", "../client-0/party.toml"],
        lambda server: (party := server.parent / "client-0" / "party.toml").write_text(
            party.read_text().replace('sha256 = "', 'sha256 = "g')
        ),
        "package.sha256: expected a SHA-256 digest, 64 digits and letters from a to f, not 'g",
    ),
    "an engine": (
        ["run", "run.toml", "--engine", "cloud"],
        lambda server: None,
        "unknown engine 'cloud'",
    ),
    "federation again": (
        ["federation", "init", "..", "--clients", "a"],
        lambda server: None,
        "is in use: give a new folder; keys are never written over",
    ),
    "a client's name": (
        ["federation", "init", "new", "--clients", "a,../b"],
        lambda server: None,
        "'../b' is not a valid name",
    ),
    "a reserved name": (
        ["federation", "init", "new", "--clients", "ca.key"],
        lambda server: None,
        "'ca.key' is not a valid name",
    ),
    "a name in no ASCII": (
        ["federation", "init", "new", "--clients", "a", "--address", "münchen.de:8000"],
        lambda server: None,
        "has letters that a certificate cannot",
    ),
    "a port in no ASCII": (
        ["federation", "init", "new", "--clients", "a", "--address", "localhost:²"],
        lambda server: None,
        "is not a valid host:port",
    ),
    "a certificate": (
        ["join", "../client-0/party.toml"],
        lambda server: (server.parent / "client-0" / "ca.crt").write_text("no"),
        "is no certificate",
    ),
    "a client twice": (
        ["federation", "init", "new", "--clients", "a,a"],
        lambda server: None,
        "give each client once",
    ),
    "no party": (
        ["join", "nothing.toml"],
        lambda server: None,
        "there is no file nothing.toml; `fedsp federation init`",
    ),
    "a party's key": (
        ["join", "../client-0/party.toml"],
        lambda server: (server.parent / "client-0" / "client.key").unlink(),
        "client.key; `fedsp party init` made it here, or it came with the folder",
    ),
    "a party's digest": (
        ["join", "../client-0/party.toml"],
        lambda server: (server.parent / "client-0" / "party.toml").write_text(
            (server.parent / "client-0" / "party.toml")
            .read_text()
            .replace("sha256 = ", "sha265 = ")
        ),
        "package.sha265: unknown key; did you mean 'sha256'?",
    ),
    "a party's text": (
        ["join", "../client-0/party.toml"],
        lambda server: (server.parent / "client-0" / "questions.jsonl").unlink(),
        "there is no file",
    ),
    "no traffic": (["audit", "traffic", "../../local"], lambda server: None, "holds no run"),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_wrong_input_gets_one_sentence_and_code_2(
    what: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, spoil, sentence = WRONG[what]
    spoil(place / "server")
    monkeypatch.chdir(place / "server")
    monkeypatch.setattr(sys, "argv", ["fedsp", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in said, said
    assert said.startswith("fedsp: ") and not (place / "server" / "run" / "rounds.jsonl").exists()


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (61.5, ""),
        (59.5, "the server's certificate expires in 59 days: `fedsp federation renew` makes a new"),
        (0, "has expired, and no client would take it: `fedsp federation renew` makes a new one"),
    ],
)
def test_a_server_says_weeks_before_that_its_certificate_expires(
    days: float,
    said: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fedsp.deployment.parties.credentials.DAYS", days)
    renew(place / "server", place / "ca.key")
    monkeypatch.chdir(place / "server")
    arguments = ["serve", "run.toml", "round.min_clients=9"]
    monkeypatch.setattr(sys, "argv", ["fedsp", *arguments])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr()
    heard = (told.out + told.err).replace("\n", " ")
    assert said in heard
    assert ("round.min_clients: a round needs 9" in heard) == (days > 0)
    assert ("`fedsp federation renew`" in heard) == bool(said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "run.toml", "--engine", "flower"],
        ["serve", "run.toml"],
        ["join", "../client-0/party.toml"],
        ["federation", "init", "x", "--clients", "a"],
    ],
)
def test_without_the_extra_there_is_a_sentence(
    arguments: list[str],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = place / "server" / "run.toml"
    if arguments[0] == "run":
        path.write_text(path.read_text().split("[federation]")[0])
    monkeypatch.setattr("fedsp.errors.find_spec", lambda name: None)
    monkeypatch.chdir(place / "server")
    monkeypatch.setattr(sys, "argv", ["fedsp", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (
        stopped.value.code == 2 and "need `pip install 'fedsp[flower]'`" in capsys.readouterr().err
    )


class StandIn:
    """Processes that are never started."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.down: set[str] = set()
        self.log = ""

    def start(self, name: str, *command: str) -> None:
        self.started.append(name)
        self.down.discard(name)

    def ended(self, name: str) -> bool:
        return name in self.down

    def log_of(self, name: str) -> str:
        return self.log

    def stop(self) -> None:
        self.down.clear()


def node_of(place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Node, StandIn, list[str], Clock]:
    (place / "flower").mkdir()
    processes, said = StandIn(), list[str]()
    clock = Clock(monkeypatch)
    clock.now = 1000.0
    return (
        Node(party_of(place), place / "flower", processes, Callbacks(info=said.append)),  # type: ignore[arg-type]
        processes,
        said,
        clock,
    )


@pytest.mark.parametrize("name", ["supernode", "executor"])
def test_a_node_or_its_executor_that_ends_alone_is_started_again_with_the_other_after_a_pause(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, processes, _, clock = node_of(place, monkeypatch)
    for _ in range(3):
        node.keep_running()
    assert (
        processes.started == ["supernode", "executor"]
        and stat.S_IMODE((place / "flower" / "executor.secret").stat().st_mode) == 0o600
    )
    processes.down = {name}
    clock.now += 1
    node.keep_running()
    assert len(processes.started) == 2, "not at once"
    clock.now += 3
    node.keep_running()
    assert processes.started == ["supernode", "executor"] * 2


def test_a_refusal_is_believed_after_a_minute_and_a_half_and_a_node_that_keeps_ending_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, processes, said, clock = node_of(place, monkeypatch)
    node.keep_running()
    processes.log = "Failed to activate SuperNode."
    with pytest.raises(CredentialError, match="another process is connected by that key"):
        for _ in range(200):
            processes.down = {"supernode"}
            clock.now += 0.5
            node.keep_running()
    assert 90 <= clock.now - 1000 <= 93 and len(said) == 1 and "clock" in said[0]
