"""Seed derivation: each random draw of a run has its own seed, so that its result does not depend
on the order of the draws or on the engine."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed: a hash of the run's seed and of `parts`, which identify the draw."""
    text = "\0".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
