"""The Flower transport: messages, and the two apps. https://flower.ai/docs/framework/

In a deployment Flower's processes only transport messages: the ServerApp and the ClientApp forward
them through a local socket to `fedsp serve`, which holds the global model, and to `fedsp join`,
which holds the text. Both start for every message or run, so nothing heavy is imported here. In a
simulation the apps compute themselves; see `fedsp.deployment.simulation`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedsp.deployment.ipc import SOCKET, carry, connect
from fedsp.errors import DeploymentError
from fedsp.federation.transport.message import HEADER, PAYLOAD, Answer, Message

LOST = (3, 4, 5)
"""Flower's error codes of a message, a reply or a node that is not there any more; the others are
of an app that raised or crashed."""

LONGEST_HEADER = 4096
FETCHES = 4
"""Replies of one node that are waited for at a time: one whose upload stalls, as that of a client
that was killed meanwhile does for an hour and more, does not hold up those behind it."""

MEMORY = 8 << 30
"""Limit of the address space, in bytes, of a process that only forwards messages: what it receives
may decode to any size."""


def to_record(message: Message) -> RecordDict:
    """A message as Flower's content: the header in a ConfigRecord, the payload's bytes as one
    Array, which Flower cuts into pieces."""
    record = RecordDict({HEADER: ConfigRecord({HEADER: message.header})})
    if message.payload:
        array = Array(
            dtype="uint8", shape=(len(message.payload),), stype="safetensors", data=message.payload
        )
        record["payload"] = ArrayRecord({PAYLOAD: array})
    return record


def from_record(record: RecordDict) -> Message:
    """The message in Flower's content; anything else becomes an empty message, which no reader
    accepts."""
    header = record.config_records[HEADER].get(HEADER) if HEADER in record.config_records else None
    arrays = record.array_records.get("payload")
    array = arrays.get(PAYLOAD) if arrays else None
    return Message(header if isinstance(header, str) else "", array.data if array else b"")


class GridLink:
    """A link over Flower's Grid. See `fedsp.federation.transport.remote.NodeLink`.

    Each reply is fetched by a thread of its own, so one that Flower cannot read, or whose upload
    stalls, holds up no other. A reply that is longer than was said when its request was sent is
    not read.
    """

    def __init__(self, grid: Grid, workers: int = 256) -> None:
        self._grid = grid
        self._workers = ThreadPoolExecutor(workers)
        self._fetching: dict[str, Future[list[Answer]]] = {}
        self._node_of: dict[str, int] = {}
        self._longest = 0

    def nodes(self) -> set[int]:
        return set(self._grid.get_node_ids())

    def push(
        self, sends: list[tuple[int, Message]], group: str, seconds: float, longest: int
    ) -> list[str]:
        self._longest = max(self._longest, longest)
        names = []
        for node, message in sends:
            content = to_record(message)
            sent = FlowerMessage(content, node, "train", group_id=group, ttl=seconds)
            names.append(next(iter(self._grid.push_messages([sent]))))
            self._node_of[names[-1]] = node
        return names

    def pull(self, message_ids: list[str]) -> list[Answer]:
        """Flower's own error messages are answers without a message; what they say of the client is
        not read."""
        waiting = Counter(self._node_of[message_id] for message_id in self._fetching)
        for message_id in message_ids:
            node = self._node_of[message_id]
            if message_id not in self._fetching and waiting[node] < FETCHES:
                self._fetching[message_id] = self._workers.submit(self._fetch, message_id)
                waiting[node] += 1
        wait([self._fetching[name] for name in message_ids if name in self._fetching], timeout=0.1)
        done = [name for name, fetched in self._fetching.items() if fetched.done()]
        return [answer for name in done for answer in self._fetching.pop(name).result()]

    def _fetch(self, message_id: str) -> list[Answer]:
        try:
            return [self._answer(reply) for reply in self._grid.pull_messages([message_id])]
        except Exception:
            # whatever a client has sent instead of a message; Flower calls it lost from now on
            return []

    def _answer(self, flower_message: FlowerMessage) -> Answer:
        message: Message | None = None
        fault = ""
        if flower_message.has_content():
            message = from_record(flower_message.content)
            if len(message.payload) > self._longest or len(message.header) > LONGEST_HEADER:
                message = Message("")
        elif flower_message.error.code not in LOST:
            fault = "the client's process ended before it answered"
        metadata = flower_message.metadata
        return Answer(
            message_id=metadata.reply_to_message_id,
            node=metadata.src_node_id,
            message=message,
            fault=fault,
        )


def make_client_app(respond: Callable[[Message, Context], Message]) -> ClientApp:
    """A ClientApp that hands each message to `respond`, and its answer back."""
    app = ClientApp()

    @app.train()
    def train(flower_message: FlowerMessage, context: Context) -> FlowerMessage:
        reply = respond(from_record(flower_message.content), context)
        return FlowerMessage(to_record(reply), reply_to=flower_message)

    return app


def server_main(grid: Grid, context: Context) -> None:
    """The ServerApp of a deployment: carry for the `fedsp serve` that listens on this machine."""
    limit_memory()
    carry(GridLink(grid), connect(os.environ[SOCKET]))


def handle_client_message(message: Message, context: Context) -> Message:
    """The ClientApp of a deployment: ask the `fedsp join` that listens on this machine, and wait
    for one that is being started again.

    Raises:
        RuntimeError: there is none. Flower sends the text of what is raised here to the server, so
            it says nothing else.
    """
    for _ in range(60):
        with contextlib.suppress(DeploymentError, ValueError):
            channel = connect(os.environ[SOCKET])
            channel.send(None, [message])
            _, (reply,) = channel.receive()
            return reply
        time.sleep(1.0)
    raise RuntimeError("no fedsp join is running at this client")


def limit_memory() -> None:
    """Keep this process from taking the machine's memory, whatever it is sent."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
