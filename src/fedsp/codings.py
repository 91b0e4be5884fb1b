"""In which way numbers travel, by name: what `compression.up` and `compression.down` may say."""

from __future__ import annotations

import re
from dataclasses import dataclass

PLAIN = ("float32", "float16", "int8", "int4", "sign")
GRAMMAR = "float32, float16, int8, int4, sign, top_k(share) with a share up to 0.5, or low_rank(rank)"


@dataclass(frozen=True)
class Coding:
    """`float32` are the numbers themselves. All others say their difference from what both ends know: rounded (`float16`; `int8`, `int4`: whole
    multiples of one scale for each block; `sign`: one bit for each number, and the mean size of each block's), only the largest `share` of it, or its
    best approximation of a `rank`, the last two in int8."""

    kind: str
    share: float = 1.0
    rank: int = 0

    @property
    def exact(self) -> bool:
        """Whether nothing is left out."""
        return self.kind == "float32"

    def __str__(self) -> str:
        return {"top_k": "top_k(" + f"{self.share:.9f}".rstrip("0") + ")", "low_rank": f"low_rank({self.rank})"}.get(self.kind, self.kind)


FLOAT32 = Coding("float32")


def parse_coding(text: str) -> Coding:
    """The coding of this name.

    Raises:
        ValueError: there is none.
    """
    if text in PLAIN:
        return Coding(text)
    if (match := re.fullmatch(r"low_rank\(([1-9]\d{0,3})\)", text)) is not None:
        return Coding("low_rank", rank=int(match[1]))
    if (match := re.fullmatch(r"top_k\((0?\.\d{1,9})\)", text)) is not None and 0 < float(match[1]) <= 0.5:
        return Coding("top_k", share=float(match[1]))
    raise ValueError(f"there is no such coding: write {GRAMMAR}")
