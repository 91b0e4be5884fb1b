"""Clients that are elsewhere: late, silent, lost and back, speaking twice or for others. The wire
here is a list in memory; time is a counter."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedsp import api as commands
from fedsp.config_file import make_config
from fedsp.deployment.ipc import Socket, SocketLink, carry, connect
from fedsp.deployment.parties.credentials import has_signed
from fedsp.errors import DeploymentError, TooFewClients
from fedsp.experiments.run import run_experiment
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.clients import Clients
from fedsp.federation.codecs import parse_codec
from fedsp.federation.compression import write_values
from fedsp.federation.messages import Failure, Request, Transport, Update
from fedsp.federation.transport.message import Answer, Message
from fedsp.federation.transport.remote import Timeouts, remote
from fedsp.federation.transport.request_handler import answer
from fedsp.federation.transport.wire import (
    CannotRead,
    read_request,
    sign_reply,
    write_refusal,
    write_update,
)
from fedsp.models.payload import PROMPT, Payload, pack
from support.clock import Clock
from support.killed import end_of
from support.serve_driver import BOUNDARIES, arm
from support.small_runs import experiment_tensors, prompt_bits, settings

Respond = Callable[[int, Message], "Message | str | None"]


class ListLink:
    """A wire in memory. `respond` gives a frame, "lost", "crashed", or None for silence;
    `connected` says who is there at each look. What is longer than was said is not read."""

    def __init__(self, respond: Respond, connected: Callable[[], set[int]]) -> None:
        self.respond, self.connected = respond, connected
        self.sent: list[tuple[int, Message]] = []
        self.longest = 0

    def nodes(self) -> set[int]:
        return self.connected()

    def push(
        self, sends: list[tuple[int, Message]], group: str, seconds: float, longest: int
    ) -> list[str]:
        self.longest = max(self.longest, longest)
        start = len(self.sent)
        self.sent += sends
        return [str(number) for number in range(start, len(self.sent))]

    def pull(self, message_ids: list[str]) -> list[Answer]:
        answers = []
        for message_id in message_ids:
            node, message = self.sent[int(message_id)]
            reply = self.respond(node, message)
            if isinstance(reply, Message):
                reply = reply if len(reply.payload) <= self.longest else Message("")
                answers.append(Answer(message_id=message_id, node=node, message=reply))
            elif reply:
                answers.append(
                    Answer(
                        message_id=message_id,
                        node=node,
                        message=None,
                        fault=(
                            "the client's process ended before it answered"
                            if reply == "crashed"
                            else ""
                        ),
                    )
                )
        return answers


NODES = {"a": 11, "b": 22, "c": 33}
SENT = {PROMPT: torch.zeros(2, 3, 4)}
REQUESTS = [Request(run="ab", round=1, client=client, seed=7, payload=SENT) for client in NODES]
QUIET: Any = lambda *_: None


def replied(request: Request, payload: Payload) -> Message:
    return write_update(
        Update(round=request.round, client=request.client, payload=payload), pack(payload)
    )


def good(node: int, message: Message) -> Message:
    request = read_request(message)
    return replied(request, {PROMPT: request.payload[PROMPT] + node / 1000})


def outcome(link: ListLink, **timeouts: float) -> dict[str, str]:
    """Each client's fate: "ok" or the reason."""
    replies = list(remote(link, NODES, Timeouts(**timeouts), QUIET, QUIET)(REQUESTS))
    assert len(replies) == len({reply.client for reply in replies}) == 3, (
        "every client is accounted for once"
    )
    return {reply.client: reply.reason if isinstance(reply, Failure) else "ok" for reply in replies}


ALL = {11, 22, 33}


def test_everybody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    assert outcome(ListLink(good, lambda: ALL)) == {"a": "ok", "b": "ok", "c": "ok"}


def test_a_reply_counts_only_with_its_client_s_signature_over_the_request_that_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever else speaks from the node that was asked, another registered client or the server's
    own machine, is not the client."""
    Clock(monkeypatch)
    secrets = {client: ec.generate_private_key(ec.SECP384R1()) for client in NODES}

    def signer(client: str) -> Callable[[bytes], bytes]:
        return lambda statement: secrets[client].sign(statement, ec.ECDSA(hashes.SHA256()))

    keys = {client: partial(has_signed, secret.public_key()) for client, secret in secrets.items()}
    answered: dict[str, Message] = {}

    def speak(node: int, message: Message) -> Message:
        client = read_request(message).client
        answered[client] = sign_reply(
            good(node, message), message, signer("a" if client == "b" else client)
        )
        return good(node, message) if client == "c" else answered[client]

    replies = {
        reply.client: reply
        for reply in remote(
            ListLink(speak, lambda: ALL), NODES, Timeouts(), QUIET, QUIET, "", keys
        )(REQUESTS)
    }
    assert isinstance(replies["a"], Update)
    for client in "bc":
        reply = replies[client]
        assert (
            isinstance(reply, Failure)
            and reply.reason.startswith("the reply is not signed with the client's key")
            and ("earlier versions" in reply.reason) == (client == "c")
            and reply.bytes_up
        )
    again = [replace(request, seed=8) for request in REQUESTS]
    other = {
        reply.client: reply
        for reply in remote(
            ListLink(lambda node, message: answered["a"], lambda: ALL),
            NODES,
            Timeouts(),
            QUIET,
            QUIET,
            "",
            keys,
        )(again)
    }
    assert all(isinstance(reply, Failure) for reply in other.values()), (
        "a signed reply is of one request: it cannot be played again"
    )


def test_a_client_that_comes_late_is_waited_for_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    said: list[str] = []
    link = ListLink(
        lambda node, message: good(node, message) if node != 33 or clock.now > 32 else None,
        lambda: ALL if clock.now > 30 else {11, 22},
    )
    replies = list(remote(link, NODES, Timeouts(connect=60), QUIET, said.append)(REQUESTS))
    assert all(isinstance(reply, Update) for reply in replies)
    assert said == ["round 1: waiting for c to connect", "round 1: every asked client is connected"]


def test_a_client_that_stays_away_fails_after_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert outcome(ListLink(good, lambda: {11, 22}), connect=60.0) == {
        "a": "ok",
        "b": "ok",
        "c": "not connected for 60 s",
    }
    assert 60 < clock.now < 61


def test_whoever_is_revoked_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    transport = remote(
        ListLink(good, lambda: {11, 22}),
        NODES,
        Timeouts(connect=60),
        QUIET,
        QUIET,
        members=lambda: {"a"} if clock.now > 20 else {"a", "b", "c"},
    )
    replies = transport(REQUESTS)
    fates = {one.client: one.reason if isinstance(one, Failure) else "ok" for one in replies}
    assert fates == {"a": "ok", "b": "ok", "c": "its key is revoked"}, "b is there, and answers"
    assert 20 < clock.now < 22


def test_a_client_that_is_silent_fails_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    link = ListLink(lambda node, message: None if node == 22 else good(node, message), lambda: ALL)
    assert outcome(link, reply=100.0, retry=1000.0) == {
        "a": "ok",
        "b": "no reply within 100 s",
        "c": "ok",
    }


def test_a_network_cut_of_a_minute_is_bridged(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def cut() -> bool:
        return 5 < clock.now < 65

    def respond(node: int, message: Message) -> Message | str | None:
        if node == 33 and cut():
            return "lost"
        return good(node, message) if node != 33 or clock.now >= 65 else None

    link = ListLink(respond, lambda: {11, 22} if cut() else ALL)
    assert outcome(link, connect=120.0) == {"a": "ok", "b": "ok", "c": "ok"}
    asked = [message for node, message in link.sent if node == 33]
    assert len(asked) == 2 and asked[0] == asked[1], "asked again, with the very same request"


def test_a_client_that_is_lost_again_and_again_fails_in_its_time_and_is_not_asked_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error in place of a reply, each time at once: by Flower, when a message has expired, or by
    a client that means it."""
    clock = Clock(monkeypatch)
    link = ListLink(
        lambda node, message: "lost" if node == 22 else good(node, message), lambda: ALL
    )
    assert outcome(link, reply=1000.0) == {
        "a": "ok",
        "b": "its replies were lost 11 times",
        "c": "ok",
    }
    assert clock.now < 60 and [node for node, _ in link.sent].count(22) == 11


def test_a_client_that_was_restarted_is_asked_again_and_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first request died with it; of the later ones every one is answered, and one counts."""
    clock = Clock(monkeypatch)
    link = ListLink(
        lambda node, message: good(node, message) if node != 22 or clock.now > 40 else None,
        lambda: ALL,
    )
    assert outcome(link, retry=10.0) == {"a": "ok", "b": "ok", "c": "ok"}
    assert [node for node, _ in link.sent].count(22) == 3, "at 0, 10 and 30 seconds"


def test_a_client_whose_process_ends_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    link = ListLink(
        lambda node, message: "crashed" if node == 11 else good(node, message), lambda: ALL
    )
    assert outcome(link) == {
        "a": "the client's process ended before it answered",
        "b": "ok",
        "c": "ok",
    }
    assert clock.now < 1


def test_a_reply_from_another_node_or_to_no_message_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Clock(monkeypatch)

    class Confused(ListLink):
        def pull(self, message_ids: list[str]) -> list[Answer]:
            answers = super().pull(message_ids)
            return [replace(found, node=22) if found.node == 11 else found for found in answers] + [
                Answer(message_id="99", node=11, message=Message("{}")),
                *answers,
            ]

    assert outcome(Confused(good, lambda: ALL)) == {
        "a": "the reply came from another node",
        "b": "ok",
        "c": "ok",
    }


def engine_over(
    wire_of: Callable[[Clients], ListLink], nodes: Callable[[Clients], dict[str, int]]
) -> Callable[[Clients], Transport]:
    return lambda clients: remote(
        wire_of(clients), nodes(clients), Timeouts(connect=5, reply=5), QUIET, QUIET
    )


def numbered(clients: Clients) -> dict[str, int]:
    return {client: 100 + index for index, client in enumerate(sorted(clients.register))}


def answering(
    clients: Clients,
    spoil: Callable[[int, Request, Message], Message | str | None] = lambda node, request, reply: (
        reply
    ),
) -> ListLink:
    """Simulated clients behind a wire; `spoil` may put something else in a reply's place. Each
    keeps the last broadcast, but for the one of node 101."""
    kept: dict[int, dict[tuple[str, int], Payload]] = {}

    def respond(node: int, message: Message) -> Message | str | None:
        known = lambda *which: kept.get(node, {}).get(which)
        with contextlib.suppress(CannotRead):
            request = read_request(message, known)
            reply = answer(message, clients.method, clients.party, known=known)
            kept[node] = {(request.run, request.round): request.payload} if node != 101 else {}
            return spoil(node, request, reply)
        return answer(message, clients.method, clients.party, known=known)

    return ListLink(respond, lambda: set(numbered(clients).values()))


@pytest.mark.study
@pytest.mark.parametrize("kind", ["prompt", "adapter", "prompt+adapter"])
def test_over_a_wire_a_run_has_the_bits_of_a_run_in_one_place(tmp_path: Path, kind: str) -> None:
    changes = {
        "server": {"steps": 2, "batch_size": 4},
        "validation": {"by": "clients"},
        "messenger": {"kind": kind, "rank": 2},
    }
    commands.run(settings(tmp_path / "local", **changes))
    run = RunDirectory.create(make_config(settings(tmp_path / "wire", **changes)))
    run_experiment(run, engine_over(answering, numbered), Callbacks())
    one, other = (
        [experiment_tensors(path) for path in sorted((tmp_path / place / "run").rglob("*.saf*"))]
        for place in ("local", "wire")
    )
    assert len(one) == len(other) > 1
    for mine, theirs in zip(one, other, strict=True):
        assert sorted(mine) == sorted(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.study
def test_a_server_killed_at_every_boundary_ends_with_the_bits_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    """kill -9 of a process of its own at each boundary in turn, resumed after each. Changes travel
    in codes: a resumed server does not know what its clients hold, and sends whole prompts."""
    changes = {"compression": {"up": "sign", "down": "int8"}, "round": {"rounds": 3}}
    whole = RunDirectory.create(make_config(settings(tmp_path / "whole", **changes)))
    run_experiment(whole, engine_over(answering, numbered), Callbacks())
    killed = RunDirectory.create(make_config(settings(tmp_path / "killed", **changes)))

    def go_on() -> None:
        run_experiment(killed, engine_over(answering, numbered), Callbacks())

    for boundary, round in zip(BOUNDARIES, (1, 1, 2, 2, 2), strict=True):

        def until_the_boundary(boundary: str = boundary, round: int = round) -> None:
            arm(boundary, round, ListLink)
            go_on()

        assert end_of(until_the_boundary) == -signal.SIGKILL, boundary
    go_on()
    assert prompt_bits(killed.path) == prompt_bits(whole.path)
    assert [record["round"] for record in killed.records()] == [1, 2, 3]


@pytest.mark.study
@pytest.mark.parametrize("up", ["int8", "sign"])
def test_with_codings_too_and_a_client_that_has_lost_a_broadcast_gets_it_whole(
    tmp_path: Path, up: str
) -> None:
    changes = {"compression": {"up": up, "down": "int4"}, "validation": {"by": "clients"}}
    commands.run(settings(tmp_path / "local", **changes))
    run = RunDirectory.create(make_config(settings(tmp_path / "wire", **changes)))
    run_experiment(run, engine_over(answering, numbered), Callbacks())
    assert prompt_bits(tmp_path / "local" / "run") == prompt_bits(tmp_path / "wire" / "run")
    assert not any(record["failed"] for record in run.records())
    first, second, third, _ = (record["bytes_down"] for record in run.records())
    assert second < first / 2 and third < first / 2, "two of three get a change, and the third both"


@pytest.mark.study
@pytest.mark.parametrize("knows", [True, False])
def test_adapters_begin_alike_so_that_the_first_broadcast_is_no_more_than_that(
    tmp_path: Path, knows: bool
) -> None:
    """A client that does not know what it begins with says so, and gets the whole."""
    changes = {
        "compression": {"up": "int8", "down": "sign"},
        "messenger": {"kind": "adapter", "rank": 4, "layers": "all"},
    }
    commands.run(settings(tmp_path / "local", **changes))
    here = RunDirectory.open(tmp_path / "local" / "run").records()
    assert here[0]["bytes_down"] < here[1]["bytes_down"]
    run = RunDirectory.create(make_config(settings(tmp_path / "wire", **changes)))
    begins: dict[str, Payload] = {}

    def clients_that(clients: Clients) -> ListLink:
        def respond(_node: int, message: Message) -> Message | str | None:
            client = json.loads(message.header)["client"]
            if knows and not begins:
                begins["all"] = clients.party(client).messenger.payload()
            known = lambda run, round: None if round else begins.get("all")
            return answer(message, clients.method, clients.party, known=known)

        return ListLink(respond, lambda: set(numbered(clients).values()))

    run_experiment(run, engine_over(clients_that, numbered), Callbacks())
    assert prompt_bits(tmp_path / "local" / "run") == prompt_bits(run.path)
    first, whole, _ = (record["bytes_down"] for record in run.records())
    if knows:
        assert first == here[0]["bytes_down"]
    else:
        assert first > whole / 2


def test_two_copies_of_a_change_that_a_restarted_client_cannot_read_are_one_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both were waiting for it; it says twice that it lacks the broadcast before, is sent the whole
    once, and counts."""
    clock = Clock(monkeypatch)
    int8 = parse_codec("int8")
    kept: dict[int, Payload] = {}

    def respond(node: int, message: Message) -> Message | str | None:
        if node == 22 and clock.now < 100 and json.loads(message.header)["round"] == 2:
            return None
        known = lambda run, round: kept.get(node) if not (node == 22 and clock.now > 100) else None
        try:
            request = read_request(message, known)
        except CannotRead as error:
            return write_refusal(error.request, error.code)
        kept[node] = request.payload
        return replied(request, request.payload)

    link = ListLink(respond, lambda: ALL)
    transport = remote(link, NODES, Timeouts(connect=600, reply=600, retry=30), QUIET, QUIET)
    assert all(isinstance(reply, Update) for reply in transport(REQUESTS))
    sent = {PROMPT: SENT[PROMPT] + 1}
    second = [
        replace(request, round=2, payload=sent, change=write_values(sent, SENT, int8), sent_in=int8)
        for request in REQUESTS
    ]
    replies = list(transport(second))
    assert all(isinstance(reply, Update) for reply in replies), replies
    asked = [
        json.loads(message.header)["codec"]
        for node, message in link.sent
        if node == 22 and json.loads(message.header)["round"] == 2
    ]
    assert asked.count("int8") >= 2 and asked.count("float32") == 1


def without_losses(request: Request) -> Message:
    return replied(request, request.payload)


def test_a_client_that_tells_no_losses_does_not_stop_the_round(tmp_path: Path) -> None:
    run = RunDirectory.create(make_config(settings(tmp_path)))
    spoil = lambda node, request, reply: without_losses(request) if node == 101 else reply
    run_experiment(
        run, engine_over(lambda clients: answering(clients, spoil), numbered), Callbacks()
    )
    assert [len(record["answered"]) for record in run.records()] == [3, 3, 3] and all(
        "prompt" in record["client_losses"] for record in run.records()
    )


BAD: dict[str, Callable[[Request], Message]] = {
    "another round": lambda request: replied(
        replace(request, round=request.round - 1), request.payload
    ),
    "wrong shape": lambda request: replied(request, {PROMPT: torch.zeros(3)}),
    "NaN": lambda request: replied(request, {PROMPT: request.payload[PROMPT] * float("nan")}),
    "Inf": lambda request: replied(request, {PROMPT: request.payload[PROMPT] + float("inf")}),
    "1e38": lambda request: replied(request, {PROMPT: request.payload[PROMPT] + 1e38}),
    "empty": lambda request: Message(""),
    "huge": lambda request: Message(replied(request, request.payload).header, bytes(50_000_000)),
}


def test_one_bad_client_costs_its_own_reply_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault a round, from the second on. What the others do is what it would be if the bad client
    had not been there in those rounds."""
    Clock(monkeypatch)
    faults = dict(enumerate(BAD.values(), 2))

    def gone(node: int, request: Request, reply: Message) -> Message | str:
        return "crashed" if node == 101 and request.round in faults else reply

    def spoil(node: int, request: Request, reply: Message) -> Message:
        bad = node == 101 and request.round in faults
        return faults[request.round](request) if bad else reply

    bits = []
    for name, respond in {"gone": gone, "spoilt": spoil}.items():
        changes = {"rounds": len(BAD) + 2}
        run = RunDirectory.create(make_config(settings(tmp_path / name, round=changes)))
        engine = engine_over(partial(answering, spoil=respond), numbered)
        run_experiment(run, engine, Callbacks())
        bits.append(prompt_bits(run.path))
    failed = {record["round"]: list(record["failed"]) for record in run.records()}
    assert failed == {number: ["client-1"] * (number in faults) for number in failed}
    assert len(failed) == len(BAD) + 2 and bits[0] == bits[1]


def test_three_of_ten_killed_in_a_round_and_it_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)

    def spoil(node: int, request: Request, reply: Message) -> Message | str:
        return "crashed" if request.round == 2 and node in (100, 104, 109) else reply

    run = RunDirectory.create(
        make_config(
            settings(tmp_path, partition={"clients": 10}, round={"rounds": 3, "min_clients": 7})
        )
    )
    run_experiment(
        run, engine_over(lambda clients: answering(clients, spoil), numbered), Callbacks()
    )
    assert [len(record["answered"]) for record in run.records()] == [10, 7, 10]
    assert sorted(run.records()[1]["failed"]) == ["client-0", "client-4", "client-9"]


@pytest.mark.study
def test_too_few_stops_cleanly_and_a_resumed_run_has_the_bits_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    changes = {"round": {"rounds": 3, "min_clients": 2}}
    whole = RunDirectory.create(make_config(settings(tmp_path / "whole", **changes)))
    run_experiment(whole, engine_over(answering, numbered), Callbacks())

    def spoil(node: int, request: Request, reply: Message) -> Message | None:
        return None if request.round == 2 and node != 100 else reply

    run = RunDirectory.create(make_config(settings(tmp_path / "stopped", **changes)))
    with pytest.raises(
        TooFewClients,
        match=(
            r"round 2 has 1 accepted updates of 3 asked.*client-1: no reply within 5 s.*stands"
            r" after round 1 and can be resumed"
        ),
    ):
        run_experiment(
            run, engine_over(lambda clients: answering(clients, spoil), numbered), Callbacks()
        )
    run_experiment(RunDirectory.open(run.path), engine_over(answering, numbered), Callbacks())
    assert prompt_bits(run.path) == prompt_bits(whole.path)
    assert [record["round"] for record in run.records()] == [1, 2, 3]


def test_frames_pass_a_local_socket_unchanged() -> None:
    import threading

    listening = Socket()
    try:
        link = ListLink(good, lambda: ALL)
        other = threading.Thread(target=lambda: carry(link, connect(listening.path)))
        other.start()
        channel = listening.accept(lambda: None)
        distant = SocketLink(channel)
        assert distant.nodes() == ALL
        message = Message(json.dumps({"é": 2**62}), bytes(range(256)) * 1000)
        assert distant.push([(11, message), (22, Message("empty"))], "1", 60.0, 256_000) == [
            "0",
            "1",
        ]
        assert link.sent == [(11, message), (22, Message("empty"))]
        link.respond = lambda node, asked: asked if node == 11 else "crashed"
        assert distant.pull(["0", "1"]) == [
            Answer(message_id="0", node=11, message=message),
            Answer(
                message_id="1",
                node=22,
                message=None,
                fault="the client's process ended before it answered",
            ),
        ]
        channel.close()
        other.join(10)
        assert not other.is_alive()
    finally:
        listening.close()
    with pytest.raises(DeploymentError, match="nobody listens"):
        connect(listening.path)
