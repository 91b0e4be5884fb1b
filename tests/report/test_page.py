"""The page of a report."""

from __future__ import annotations

from fedsp.report.page import _best
from fedsp.report.tables import Entry, Table


def test_all_that_read_like_the_best_are_marked() -> None:
    rows = [
        [Entry("40.0 %", 0.4), Entry("-")],
        [Entry("47.2 %", 0.4716), Entry("50.0 %", 0.5)],
        [Entry("47.2 %", 0.4724), Entry("-")],
    ]
    marked = _best(Table("accuracy", "Accuracy", ["ARC", "mean"], rows, "", []))
    told = [
        (entry.text, number)
        for number, row in enumerate(rows)
        for entry in row
        if id(entry) in marked
    ]
    assert told == [("47.2 %", 1), ("47.2 %", 2)], "and of one entry alone none is"
