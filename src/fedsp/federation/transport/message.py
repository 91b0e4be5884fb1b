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
    """A node's answer to the message with this id. `message` is None if the client's process failed
    (`fault` says why) or if the reply was lost (`fault` is empty)."""

    message_id: str
    node: int
    message: Message | None
    fault: str = ""
