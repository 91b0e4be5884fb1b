"""In which way numbers travel, by name: what `compression.up` and `compression.down` may say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Codec:
    """`float32` are the numbers themselves. All others say their difference from what both ends
    know, rounded: `float16`; `int8`, `int4`: whole multiples of one scale for each block; `sign`:
    one bit for each number, and the mean size of each block's."""

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
