"""Tables in a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from fedsp.report.console import rows_table


def test_nothing_of_a_table_is_cut_off_at_80_columns() -> None:
    row = {
        "folder": "/home/somebody/federations/tickets",
        "method": "fedsp, messenger",
        "model": "embedded",
        "task": "multiple_choice",
        "rounds": "3/3",
        "validation_loss": 12.3456,
        "shortened_examples": 12,
    }
    console = Console(file=io.StringIO(), width=80)
    console.print(rows_table("Runs", [row]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    lines = [re.split("[│┃]", line)[1:-1] for line in shown.splitlines() if line[:1] in "│┃"]
    columns = ["".join(cell.strip() for cell in column) for column in zip(*lines, strict=True)]
    for value, column in zip(row.values(), columns, strict=True):
        assert str(value).replace(" ", "") in column.replace(" ", "")
