"""The codecs of payloads, by name: the values of `compression.up` and `compression.down`.

`float32` sends the values as they are. The others send the difference from a payload that both ends
have, rounded: to `float16`; to `int8` or `int4` multiples of one scale per block; to its `sign`,
one bit per value, with the mean absolute value of each block.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

Codec = Literal["float32", "float16", "int8", "int4", "sign"]

FLOAT32: Codec = "float32"
KNOWN: tuple[str, ...] = get_args(Codec)


def parse_codec(text: str) -> Codec:
    """The codec of this name, which somebody else wrote.

    Raises:
        ValueError: there is none.
    """
    if text not in KNOWN:
        raise ValueError(f"there is no such codec: write {', '.join(KNOWN[:-1])} or {KNOWN[-1]}")
    return cast(Codec, text)
