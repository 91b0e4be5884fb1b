"""The codecs of payloads, by name: the values of `compression.up` and `compression.down`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Codec:
    """`float32` sends the values as they are. The others send the difference from a payload that
    both ends have, rounded: to `float16`; to `int8` or `int4` multiples of one scale per block; to
    its `sign`, one bit per value, with the mean absolute value of each block."""

    kind: str

    @property
    def exact(self) -> bool:
        """Whether nothing is left out."""
        return self.kind == "float32"

    def __str__(self) -> str:
        return self.kind


FLOAT32 = Codec("float32")
KNOWN = ("float32", "float16", "int8", "int4", "sign")


def parse_codec(text: str) -> Codec:
    """The codec of this name.

    Raises:
        ValueError: there is none.
    """
    if text not in KNOWN:
        raise ValueError(f"there is no such codec: write {', '.join(KNOWN[:-1])} or {KNOWN[-1]}")
    return Codec(text)
