"""What is told of a run while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedsp.federation.messages import RoundRecord


@dataclass(kw_only=True)
class Callbacks:
    """Whoever looks on: a sentence, a distillation step (step, of, loss), a finished round (record,
    of), a finished part of a study (part, of, name, seconds)."""

    say: Callable[[str], None] = lambda text: None
    distilled: Callable[[int, int, float], None] = lambda step, steps, loss: None
    round_done: Callable[[RoundRecord, int], None] = lambda record, rounds: None
    part_done: Callable[[int, int, str, float], None] = lambda part, parts, name, seconds: None
