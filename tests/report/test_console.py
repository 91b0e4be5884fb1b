"""Tables in a terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsp.report.console import progress_view, rows_table

ROW = {
    "folder": "/home/somebody/federations/tickets",
    "method": "fedsp, messenger",
    "model": "embedded",
    "task": "multiple_choice",
    "rounds": "3/3",
    "validation_loss": 12.3456,
    "shortened_examples": 12,
}


def shown(width: int, what: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    lines: list[str] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return lines


def test_no_word_of_a_table_is_cut_at_80_columns_or_any_other_width() -> None:
    """Where the longest words do not fit beside each other, rows are lists."""
    for width in (60, 80, 100, 140, 200):
        lines = shown(width, rows_table("Runs", [ROW, ROW | {"folder": "other"}]))
        assert max(map(len, lines)) <= width
        words = re.findall(r"[^\s│┃]+", "\n".join(lines))
        for name, value in ROW.items():
            assert set(name.split("_")) <= set(words) or width >= 100
            assert all(str(part) in words for part in str(value).split()), (width, value)
    assert len(shown(80, rows_table("Runs", [ROW]))) > len(shown(200, rows_table("Runs", [ROW])))


def test_the_curve_of_a_long_run_stays_on_its_line(tmp_path: Path) -> None:
    figures = {
        **{"folder": "runs/tickets", "method": "FedSP", "finished": False, "round": 300},
        **{"rounds": 300, "seconds_since": 3.0, "seconds": 2.0, "seconds_left": 9.0},
        **{"validation": [(round, 3.0 - round / 200) for round in range(300)], "best": 1.5},
        **{"best_round": 299, "bytes_down": 1, "bytes_up": 1, "epsilon": None},
        "clients": {"hospital-a": {"asked": 300, "answered": 300, "failed": None}},
    }
    (curve,) = [line for line in shown(80, progress_view(figures)) if "█" in line]
    assert "validation loss" in curve and curve.count("█") + curve.count("▁") > 2
