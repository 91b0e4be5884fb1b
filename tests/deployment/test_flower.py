"""Frames as Flower's messages. The Grid here is in memory; real ones are in test_deployment.py."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower comes with the flower extra")

from flwr.app import ConfigRecord, Error, RecordDict
from flwr.app import Message as FlowerMessage

from fedsp.config import PackageSection, PartyConfig, PartyDataSection
from fedsp.deployment.fleet_proxy import UNKNOWN_NODE
from fedsp.deployment.grid import FETCHES, LONGEST_HEADER, GridLink, from_record, to_record
from fedsp.deployment.join import REFUSED, supernode_command
from fedsp.deployment.parties.credentials import KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER
from fedsp.deployment.restricted_executor import REPLACED
from fedsp.deployment.serve import superlink_command
from fedsp.federation.transport.message import Answer, Message

identity: Any = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
identity.run_id, identity.node_id, identity.task_id = (
    7,
    1,
    7,
)  # a Message asks for them when it is made

SENT = Message('{"kind": "train"}', b"prompt" * 1000)
Reply = Callable[[FlowerMessage], FlowerMessage]


class MemoryGrid:
    """What a Grid does, with one way to answer for each node."""

    def __init__(self, replies: dict[int, Reply]) -> None:
        self.replies, self.message_ids = replies, dict[str, FlowerMessage]()

    def get_node_ids(self) -> list[int]:
        return list(self.replies)

    def push_messages(self, message_ids: list[FlowerMessage]) -> list[str]:
        for flower_message in message_ids:
            flower_message.metadata.__dict__["_message_id"] = f"m{len(self.message_ids)}"
            self.message_ids[flower_message.metadata.message_id] = flower_message
        return [flower_message.metadata.message_id for flower_message in message_ids]

    def pull_messages(self, names: list[str]) -> list[FlowerMessage]:
        return [
            self.replies[self.message_ids[name].metadata.dst_node_id](self.message_ids[name])
            for name in names
        ]


def echo(flower_message: FlowerMessage) -> FlowerMessage:
    return FlowerMessage(content=flower_message.content, reply_to=flower_message)


def pulled(replies: dict[int, Reply], looks: int = 20) -> dict[int, Answer]:
    """What comes back from each node that answers within some looks."""
    link = GridLink(MemoryGrid(replies))  # type: ignore[arg-type]
    names = dict(
        zip(
            link.push([(node, SENT) for node in replies], "1", 60.0, len(SENT.payload)),
            replies,
            strict=True,
        )
    )
    found: dict[int, Answer] = {}
    for _ in range(looks):
        for answer in link.pull([name for name, node in names.items() if node not in found]):
            found[names[answer.message_id]] = answer
        if len(found) == len(replies):
            break
    return found


@pytest.mark.parametrize(
    "message", [SENT, Message("header alone"), Message("é" * 100, bytes(range(256)))]
)
def test_a_frame_survives_flower_s_records(message: Message) -> None:
    assert from_record(to_record(message)) == message


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"header": ConfigRecord({"header": 3})}),
        RecordDict({"payload": ConfigRecord({})}),
    ],
)
def test_content_that_is_no_frame_becomes_an_empty_one(record: RecordDict) -> None:
    assert from_record(record) == Message("")


def test_every_node_s_answer_comes_back_under_its_message() -> None:
    found = pulled({11: echo, 22: echo})
    assert {node: (answer.message, answer.fault) for node, answer in found.items()} == {
        11: (SENT, ""),
        22: (SENT, ""),
    }


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (3, ""),
        (4, ""),
        (5, ""),
        (2, "the client's process ended before it answered"),
        (8, "the client's process ended before it answered"),
    ],
)
def test_flower_s_errors_are_a_loss_or_a_fault_and_their_text_is_not_read(
    code: int, fault: str
) -> None:
    found = pulled(
        {
            11: lambda flower_message: FlowerMessage(
                Error(code=code, reason="the patient Jane Doe"), reply_to=flower_message
            )
        }
    )
    assert (found[11].message, found[11].fault) == (None, fault)


@pytest.mark.parametrize(
    "message",
    [
        Message(SENT.header, bytes(len(SENT.payload) + 1)),
        Message("x" * (LONGEST_HEADER + 1), SENT.payload),
    ],
)
def test_a_reply_that_is_too_long_is_not_passed_on(message: Message) -> None:
    found = pulled(
        {
            11: lambda flower_message: FlowerMessage(
                content=to_record(message), reply_to=flower_message
            )
        }
    )
    assert found[11].message == Message("")


def test_a_reply_that_cannot_be_read_or_never_ends_holds_up_no_other() -> None:
    released = threading.Event()

    def unreadable(flower_message: FlowerMessage) -> FlowerMessage:
        raise ValueError("no message at all")

    def stalled(flower_message: FlowerMessage) -> FlowerMessage:
        released.wait(30)
        return echo(flower_message)

    try:
        found = pulled({11: stalled, 22: unreadable, 33: echo}, looks=3)
    finally:
        released.set()
    assert set(found) == {33}


def test_a_client_that_was_killed_while_it_uploaded_is_heard_when_it_is_asked_again() -> None:
    released, answers = threading.Event(), iter(range(3))

    def stalled_first(flower_message: FlowerMessage) -> FlowerMessage:
        if next(answers) == 0:
            released.wait(30)
        return echo(flower_message)

    link = GridLink(MemoryGrid({11: stalled_first}))  # type: ignore[arg-type]
    first = link.push([(11, SENT)], "1", 60.0, len(SENT.payload))
    try:
        assert link.pull(first) == []
        again = link.push([(11, SENT)], "1", 60.0, len(SENT.payload))
        found: list[Answer] = []
        while not found:
            found = link.pull(first + again)
        assert [answer.message_id for answer in found] == again
    finally:
        released.set()


def test_a_node_that_never_ends_an_answer_takes_a_few_threads_alone() -> None:
    released = threading.Event()
    waiting: list[int] = []

    def stalled(flower_message: FlowerMessage) -> FlowerMessage:
        waiting.append(1)
        released.wait(30)
        return echo(flower_message)

    link = GridLink(MemoryGrid({11: stalled}))  # type: ignore[arg-type]
    names = [link.push([(11, SENT)], "1", 60.0, 9)[0] for _ in range(3 * FETCHES)]
    try:
        for _ in range(3):
            assert link.pull(names) == []
        assert len(waiting) == FETCHES
    finally:
        released.set()


def test_our_answer_reaches_the_app_that_flower_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsp.deployment.grid import handle_client_message
    from fedsp.deployment.ipc import SOCKET, Socket

    listening = Socket()
    monkeypatch.setenv(SOCKET, listening.path)
    context: Any = None
    replies: list[Message] = []
    thread = threading.Thread(target=lambda: replies.append(handle_client_message(SENT, context)))
    thread.start()
    channel = listening.accept(lambda: None, 30.0)
    value, messages = channel.receive()
    channel.send(value, [Message("the answer")])
    thread.join(30)
    listening.close()
    assert messages == [SENT] and replies == [Message("the answer")]


INSIDE = {
    "flwr.common.constant": ("TIMESTAMP_TOLERANCE", "SYSTEM_TIME_TOLERANCE", "TIMESTAMP_HEADER"),
    "flwr.supercore.constant": ("FLEET_HTTP_PUBLIC_KEY_HEADER", "FLEET_HTTP_SIGNATURE_HEADER"),
    **REPLACED,
}
"""What fedsp relies on that is no part of Flower's documented interface; besides it, what its
commands are called and take, and what they say in two places."""


@pytest.mark.parametrize("module", INSIDE)
def test_what_we_rely_on_inside_of_flower_is_there(module: str) -> None:
    """A release that fails here needs a look at each place that is named."""
    found = importlib.import_module(module)
    lacking = [name for name in INSIDE[module] if not hasattr(found, name)]
    assert not lacking


def test_flower_names_the_headers_and_the_refusal_as_our_proxy_does() -> None:
    from flwr.common import constant
    from flwr.supercore import constant as inner
    from flwr.supercore.error import base, catalog

    assert (
        inner.FLEET_HTTP_PUBLIC_KEY_HEADER,
        inner.FLEET_HTTP_SIGNATURE_HEADER,
        constant.TIMESTAMP_HEADER,
    ) == (KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER)
    told = json.loads(UNKNOWN_NODE)
    assert told["code"] == base.ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
    said = Path(str(catalog.__file__)).read_text()
    assert told["detail"] in said and REFUSED in said


@pytest.mark.parametrize(
    "command",
    [
        superlink_command(Path("server"), 1),
        supernode_command(
            PartyConfig(
                name="a",
                server="localhost:1",
                data=PartyDataSection(train="x"),
                package=PackageSection(sha256="0" * 64),
            ),
            1,
            Path("secret"),
        ),
    ],
    ids=["superlink", "supernode"],
)
def test_flower_s_commands_take_the_options_that_we_give(command: list[str]) -> None:
    program = Path(sys.executable).with_name(command[0])
    told = subprocess.run(
        [program, "--help"], capture_output=True, text=True, check=False, timeout=60
    )
    assert told.returncode == 0
    lacking = [part for part in command if part.startswith("--") and part not in told.stdout]
    assert not lacking


def test_a_simulated_client_may_wait_a_day_for_a_core_and_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that is asked again trains again, and takes the core from those that wait."""
    from types import SimpleNamespace

    from fedsp.deployment import simulation
    from fedsp.federation.transport.remote import Timeouts

    found: list[Timeouts] = []

    def remote(link: GridLink, node_of: Any, timeouts: Timeouts, *others: Any) -> Any:
        found.append(timeouts)

    monkeypatch.setattr(simulation, "remote", remote)
    clients: Any = SimpleNamespace(register={"a": 1})
    simulation.over_grid(
        MemoryGrid({11: echo}),  # type: ignore[arg-type]
        SimpleNamespace(log_traffic=None),  # type: ignore[arg-type]
        clients,
    )
    day = 24 * 3600.0
    assert found[0].retry > day and found[0].reply > day
