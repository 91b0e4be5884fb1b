"""What travels in one message, and what comes back. Nothing here needs more than Python, so the processes that only carry start at once."""

from __future__ import annotations

from dataclasses import dataclass

HEADER = "header"
PAYLOAD = "prompt.values"
"""The one tensor that travels; `fedsp.models.payload.PROMPT`, which the processes that only carry must not import."""


@dataclass(frozen=True)
class Frame:
    """The header, JSON text, and the payload's bytes, empty where there is none."""

    header: str
    payload: bytes = b""

    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {HEADER: len(self.header.encode()), **({PAYLOAD: len(self.payload)} if self.payload else {})}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back to a message: a frame; or a fault of the client's own process; or neither, where the node was lost before it answered."""

    message: str
    node: int
    frame: Frame | None
    fault: str = ""
