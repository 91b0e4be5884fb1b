"""Frames as Flower's messages. The Grid here is in memory; real ones are in test_deployment.py."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower comes with the flower extra")

from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedsp.deployment.grid import SPARE, GridLink, from_record, to_record
from fedsp.federation.transport.frames import Answer, Frame

identity: Any = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
identity.run_id, identity.node_id, identity.task_id = 7, 1, 7  # a Message asks for them when it is made

SENT = Frame('{"kind": "train"}', b"prompt" * 1000)
Reply = Callable[[Message], Message]


class MemoryGrid:
    """What a Grid does, with one way to answer for each node."""

    def __init__(self, replies: dict[int, Reply]) -> None:
        self.replies, self.messages = replies, dict[str, Message]()

    def get_node_ids(self) -> list[int]:
        return list(self.replies)

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.messages)}"
            self.messages[message.metadata.message_id] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, names: list[str]) -> list[Message]:
        return [self.replies[self.messages[name].metadata.dst_node_id](self.messages[name]) for name in names]


def echo(message: Message) -> Message:
    return Message(content=message.content, reply_to=message)


def pulled(replies: dict[int, Reply], looks: int = 20) -> dict[int, Answer]:
    """What comes back from each node that answers within some looks."""
    wire = GridLink(MemoryGrid(replies))  # type: ignore[arg-type]
    names = dict(zip(wire.push([(node, SENT) for node in replies], "1", 60.0), replies, strict=True))
    found: dict[int, Answer] = {}
    for _ in range(looks):
        for answer in wire.pull([name for name, node in names.items() if node not in found]):
            found[names[answer.message]] = answer
        if len(found) == len(replies):
            break
    return found


@pytest.mark.parametrize("frame", [SENT, Frame("header alone"), Frame("é" * 100, bytes(range(256)))])
def test_a_frame_survives_flower_s_records(frame: Frame) -> None:
    assert from_record(to_record(frame)) == frame


@pytest.mark.parametrize("record", [RecordDict(), RecordDict({"header": ConfigRecord({"header": 3})}), RecordDict({"payload": ConfigRecord({})})])
def test_content_that_is_no_frame_becomes_an_empty_one(record: RecordDict) -> None:
    assert from_record(record) == Frame("")


def test_every_node_s_answer_comes_back_under_its_message() -> None:
    found = pulled({11: echo, 22: echo})
    assert {node: (answer.frame, answer.fault) for node, answer in found.items()} == {11: (SENT, ""), 22: (SENT, "")}


@pytest.mark.parametrize(
    ("code", "fault"), [(3, ""), (4, ""), (5, ""), (2, "the client's process ended before it answered"), (8, "the client's process ended before it answered")]
)
def test_flower_s_errors_are_a_loss_or_a_fault_and_their_text_is_not_read(code: int, fault: str) -> None:
    found = pulled({11: lambda message: Message(Error(code=code, reason="the patient Jane Doe"), reply_to=message)})
    assert (found[11].frame, found[11].fault) == (None, fault)


@pytest.mark.parametrize("frame", [Frame(SENT.header, bytes(len(SENT.payload) + SPARE + 1)), Frame("x" * (SPARE + 1), SENT.payload)])
def test_a_reply_that_is_too_long_is_not_passed_on(frame: Frame) -> None:
    found = pulled({11: lambda message: Message(content=to_record(frame), reply_to=message)})
    assert found[11].frame == Frame("")


def test_a_reply_that_cannot_be_read_or_never_ends_holds_up_no_other() -> None:
    released = threading.Event()

    def unreadable(message: Message) -> Message:
        raise ValueError("no message at all")

    def stalled(message: Message) -> Message:
        released.wait(30)
        return echo(message)

    try:
        found = pulled({11: stalled, 22: unreadable, 33: echo}, looks=3)
    finally:
        released.set()
    assert set(found) == {33}


def test_our_answer_reaches_the_app_that_flower_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsp.deployment.grid import follow
    from fedsp.deployment.ipc import SOCKET, Socket

    listening = Socket()
    monkeypatch.setenv(SOCKET, listening.path)
    context: Any = None
    replies: list[Frame] = []
    thread = threading.Thread(target=lambda: replies.append(follow(SENT, context)))
    thread.start()
    channel = listening.accept(lambda: None, 30.0)
    value, frames = channel.receive()
    channel.send(value, [Frame("the answer")])
    thread.join(30)
    listening.close()
    assert frames == [SENT] and replies == [Frame("the answer")]
