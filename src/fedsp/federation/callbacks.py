"""Progress callbacks of a run: what a terminal, a tracker or a user's own code is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedsp.federation.messages import RoundRecord


@dataclass(kw_only=True)
class Callbacks:
    """What is called as a run goes on; each is optional, and its result is not looked at.

    info: a message. distilled: a distillation step (step, steps, loss). round_done: a finished
    round (record, rounds), once its checkpoint is on the disk. part_done: a finished part of a
    study (part, parts, name, seconds). finished: the run's figures, as in `result.json`; it is also
    told when a run that was finished before is resumed. failed: what ended the run instead,
    KeyboardInterrupt among them. What a callback raises ends the run, which can be resumed.
    """

    info: Callable[[str], None] = lambda text: None
    distilled: Callable[[int, int, float], None] = lambda step, steps, loss: None
    round_done: Callable[[RoundRecord, int], None] = lambda record, rounds: None
    part_done: Callable[[int, int, str, float], None] = lambda part, parts, name, seconds: None
    finished: Callable[[Mapping[str, Any]], None] = lambda figures: None
    failed: Callable[[BaseException], None] = lambda error: None


def together(*several: Callbacks) -> Callbacks:
    """Callbacks that call each of several, in their order."""

    def each(name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            for callbacks in several:
                getattr(callbacks, name)(*arguments)

        return call

    return Callbacks(**{field.name: each(field.name) for field in fields(Callbacks)})
