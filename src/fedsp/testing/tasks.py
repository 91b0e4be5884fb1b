"""What a task of your own must do."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from fedsp.data.tasks import Task
from fedsp.errors import DataError
from fedsp.testing.faults import require, require_kind


def check_task(task: Task, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of a file become examples, the same each time, with a context that leaves the space to
    the choices; the row is unchanged; and a row without fields, or with numbers in their place, is
    refused as a `DataError`.

    rows: good rows as they are read from a file, at least one.

    Raises:
        Nonconforming: what is missing.
    """
    require_kind(task, Task)
    faults = []
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        require(f"the task {task.name!r}", ["give a list of one row at least, each a dictionary"])
    if not task.schema:
        faults.append("schema is empty: say in words what a row needs")
    for number, given in enumerate(rows):
        row = dict(copy.deepcopy(given))
        try:
            found, again = task.example(row, number), task.example(row, number)
        except Exception as error:  # a renderer raises what it likes
            faults.append(f"row {number} is refused: {error!r}")
            continue
        if row != dict(given):
            faults.append(f"row {number} is changed by rendering it")
        if found != again:
            faults.append(f"row {number} is rendered differently a second time")
        if not found.context and not found.turns:
            faults.append(f"row {number} has an empty context")
        if found.context != found.context.rstrip():
            faults.append(
                f"row {number}: the context ends in white space, which belongs to choices"
            )
    if not faults:
        faults += _refusals(task, dict(rows[0]))
    require(f"the task {task.name!r}", faults)


def _refusals(task: Task, row: dict[str, Any]) -> list[str]:
    for damaged, what in (({}, "a row without fields"), (dict.fromkeys(row, 0.5), "numbers")):
        try:
            task.example(dict(damaged), 0)
        except DataError:
            continue
        except Exception as error:  # as above
            return [
                f"{what}: {error!r} is raised, expected a DataError; let KeyError and TypeError out"
            ]
        return [f"{what} instead of the schema's is taken for an example"]
    return []
