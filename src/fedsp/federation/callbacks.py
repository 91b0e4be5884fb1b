"""Progress callbacks of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedsp.federation.messages import RoundRecord


@dataclass(kw_only=True)
class Callbacks:
    """Progress callbacks: a message, a distillation step (step, steps, loss), a finished round
    (record, rounds), a finished part of a study (part, parts, name, seconds)."""

    info: Callable[[str], None] = lambda text: None
    distilled: Callable[[int, int, float], None] = lambda step, steps, loss: None
    round_done: Callable[[RoundRecord, int], None] = lambda record, rounds: None
    part_done: Callable[[int, int, str, float], None] = lambda part, parts, name, seconds: None
