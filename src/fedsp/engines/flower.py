"""Flower underneath: frames as Messages, and the two apps. https://flower.ai/docs/framework/

In a deployment Flower's processes carry and fedsp's compute: the ServerApp and the ClientApp pass frames through a local socket to
`fedsp serve`, which holds the global model, and to `fedsp join`, which holds the text. Both start for every message or run, so nothing
heavy is imported here. In a simulation the apps compute themselves; see `fedsp.engines.simulation`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsp.engines.channel import SOCKET, carry, connect
from fedsp.errors import DeploymentError
from fedsp.frames import HEADER, PAYLOAD, Answer, Frame

KIND = "train"
"""Flower's type of all our messages; what is asked stands in the header."""

LOST = (3, 4, 5)
"""Flower's error codes of a message, a reply or a node that is not there any more; the others are of an app that raised or crashed."""

PINNED = ("install_from_fab", "get_project_dir", "get_load_client_app_fn")
"""What of Flower's client runner is put out of service by `run_pinned_client_app`."""


def to_record(frame: Frame) -> RecordDict:
    """A frame as Flower's content: the header in a ConfigRecord, the payload's bytes as one Array, which Flower cuts into pieces."""
    record = RecordDict({HEADER: ConfigRecord({HEADER: frame.header})})
    if frame.payload:
        array = Array(dtype="uint8", shape=(len(frame.payload),), stype="safetensors", data=frame.payload)
        record["payload"] = ArrayRecord({PAYLOAD: array})
    return record


def from_record(record: RecordDict) -> Frame:
    """The frame in Flower's content; what is none becomes an empty frame, which no reader accepts."""
    header = record.config_records[HEADER].get(HEADER) if HEADER in record.config_records else None
    arrays = record.array_records.get("payload")
    array = arrays.get(PAYLOAD) if arrays else None
    return Frame(header if isinstance(header, str) else "", array.data if array else b"")


class GridWire:
    """A wire over Flower's Grid. See `fedsp.engines.remote.Wire`."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> set[int]:
        """See `Wire.nodes`."""
        return set(self._grid.get_node_ids())

    def push(self, sends: list[tuple[int, Frame]], group: str, seconds: float) -> list[str]:
        """See `Wire.push`."""
        return [
            next(iter(self._grid.push_messages([Message(content=to_record(frame), dst_node_id=node, message_type=KIND, group_id=group, ttl=seconds)])))
            for node, frame in sends
        ]

    def pull(self, messages: list[str]) -> list[Answer]:
        """See `Wire.pull`. Flower's own error messages are answers without a frame; what they say of the client is not read."""
        return [_answer(message) for message in self._grid.pull_messages(messages)]


def _answer(message: Message) -> Answer:
    metadata = message.metadata
    if message.has_content():
        return Answer(metadata.reply_to_message_id, metadata.src_node_id, from_record(message.content))
    fault = "" if message.error.code in LOST else "the client's process ended before it answered"
    return Answer(metadata.reply_to_message_id, metadata.src_node_id, None, fault)


def make_client_app(respond: Callable[[Frame, Context], Frame]) -> ClientApp:
    """A ClientApp that hands each frame to `respond`, and its answer back."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(content=to_record(respond(from_record(message.content), context)), reply_to=message)

    return app


def lead(grid: Grid, context: Context) -> None:
    """The ServerApp of a deployment: carry for the `fedsp serve` that listens on this machine."""
    carry(GridWire(grid), connect(os.environ[SOCKET]))


def follow(frame: Frame, context: Context) -> Frame:
    """The ClientApp of a deployment: ask the `fedsp join` that listens on this machine."""
    channel = connect(os.environ[SOCKET])
    channel.send(None, [frame])
    _, (reply,) = channel.receive()
    return reply


def require_pinning() -> None:
    """See that this release of Flower can be kept from running code that the server sends.

    Raises:
        DeploymentError: it is built in another way, so this client would have to trust the server with its machine.
    """
    from flwr.supernode.runtime import run_clientapp

    if not all(hasattr(run_clientapp, name) for name in PINNED):
        raise DeploymentError("this release of Flower cannot be kept from running code that the server sends: install flwr 1.41")


def run_pinned_client_app() -> None:
    """Flower's `flwr-clientapp` with this module's app in place of whatever bundle came from the server: a client runs no code of the server's.

    Raises:
        DeploymentError: this release of Flower is built in another way; nothing is run.
    """
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    require_pinning()
    replacements = (lambda *_, **__: None, lambda *_, **__: Path(), lambda **_: lambda *__: make_client_app(follow))
    for name, replacement in zip(PINNED, replacements, strict=True):
        setattr(run_clientapp, name, replacement)
    flwr_clientapp()
