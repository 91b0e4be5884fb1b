"""A message on its way to a client or back. Nothing here needs more than Python, so that the
processes that only pass messages on start at once."""

from __future__ import annotations

from dataclasses import dataclass

HEADER = "header"
PAYLOAD = "prompt.values"
"""The name of the one tensor that travels: `fedsp.models.payload.PROMPT`, which those processes
must not import."""


@dataclass(frozen=True)
class Message:
    """A header, JSON text, and the payload's bytes, which may be empty."""

    header: str
    payload: bytes = b""

    def sizes(self) -> dict[str, int]:
        """Bytes of each part, by name."""
        return {
            HEADER: len(self.header.encode()),
            **({PAYLOAD: len(self.payload)} if self.payload else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a node answered to the message of this id: a message; or None with the `fault` of the
    client's process; or None alone if the node was lost."""

    message_id: str
    node: int
    message: Message | None
    fault: str = ""
