"""How a run stands, told by its folder alone: what `fedsp watch` shows, while the run goes on or
after it."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Any

from fedsp.experiments.run_directory import (
    ROUNDS,
    STATEMENT,
    RunDirectory,
    read_json,
    trained_rounds,
    validations,
)
from fedsp.federation.methods.registry import shown_method

Figures = dict[str, Any]
LATELY = 5
"""Rounds, the last ones, by whose seconds the time left is told."""


def progress(run: RunDirectory, now: float | None = None) -> Figures:
    """Of a run: `finished`, `round` of `rounds`, `validation` loss by round (those that have a
    finite one),
    the `best` one and its `best_round`; `seconds` of a round lately, `seconds_since` the last one
    ended, and `seconds_left` (None where that cannot be told); bytes; `epsilon`, promised so far;
    and `clients`: of each that was asked, how often it was `asked` and `answered`, and why it
    `failed` last.

    now: the time, seconds since the epoch.
    """
    records, config = run.records(), run.config
    method = shown_method(config.method)
    rounds = config.round.rounds if method.rounds else 0
    known = sorted(validations(records).items())
    last = records[-1] if records else None
    each = statistics.fmean([record["seconds"] for record in records[-LATELY:]]) if last else None
    done = len(trained_rounds(records))
    left = rounds - done
    asked, answered, failed = Counter[str](), Counter[str](), dict[str, str]()
    for record in records:
        asked.update(record["asked"])
        answered.update(record["answered"])
        failed |= record["failed"]
    statement = run.path / STATEMENT
    return {
        "folder": str(run.path),
        "method": method.title,
        "finished": run.finished,
        "round": done,
        "rounds": rounds,
        "validation": known,
        "best": min((loss for _, loss in known), default=None),
        "best_round": last["best_round"] if last else None,
        "seconds": each,
        "seconds_since": (
            max(0.0, (now or time.time()) - (run.path / ROUNDS).stat().st_mtime) if last else None
        ),
        "seconds_left": None if run.finished or each is None else left * each,
        "bytes_down": sum(record["bytes_down"] for record in records),
        "bytes_up": sum(record["bytes_up"] for record in records),
        "epsilon": read_json(statement, "epsilon")["epsilon"] if statement.exists() else None,
        "clients": {
            name: {
                "asked": asked[name],
                "answered": answered[name],
                "failed": failed.get(name),
            }
            for name in sorted(asked)
        },
    }
