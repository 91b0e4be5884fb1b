"""The randomness of a run: each draw has a seed of its own, so that neither order nor engine
changes any other."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed from the run's seed and what it is for, so that neither order nor engine
    changes any draw.

    >>> derive_seed(0, "client", "a", 1) == derive_seed(0, "client", "a", 1)
    True
    """
    text = "\0".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
