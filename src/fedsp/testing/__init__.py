"""What a task, a method or an aggregation rule of your own must do, as checks for your tests: each
raises `Nonconforming`, whose message says everything that is missing.

from fedsp.testing import check_task

def test_it_is_a_task():
    check_task(TRUE_OR_FALSE, [{"statement": "Water is wet.", "true": True}])
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsp.api import resume, run
from fedsp.data.tasks import Task
from fedsp.errors import DataError, FedspError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.federation.aggregation.registry import Rule
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.methods.registry import MethodEntry, find_method, register_method
from fedsp.storage import read_tensors, tensors_digest


class Nonconforming(AssertionError):
    """Something does not do what fedsp relies on; `faults` are sentences."""

    def __init__(self, what: str, faults: Sequence[str]) -> None:
        super().__init__(f"{what}:\n" + "\n".join(f"- {fault}" for fault in faults))
        self.faults = list(faults)


def _require(what: str, faults: Sequence[str]) -> None:
    if faults:
        raise Nonconforming(what, faults)


def check_task(task: Task, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of a file become examples, the same each time, with a context that leaves the space to
    the choices; the row is unchanged; and a row without fields, or with numbers in their place, is
    refused as a `DataError`.

    rows: good rows as they are read from a file, at least one.

    Raises:
        Nonconforming: what is missing.
    """
    faults = []
    if not rows:
        faults.append("give at least one row")
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
    if rows and not faults:
        faults += _refusals(task, dict(rows[0]))
    _require(f"the task {task.name!r}", faults)


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


def check_rule(rule: Rule, *, dimensions: int = 6) -> None:
    """An aggregation rule gives one finite change (d,) in the type of the rows (n, d), whatever
    their order; is exact where all agree; moves as they move; leaves them unchanged; and with f of
    2 f + 5 rows far away stays where the others are.

    Raises:
        Nonconforming: what is missing.
    """
    faults: list[str] = []
    drawn = torch.Generator().manual_seed(0)

    def apply(rows: Tensor, f: int, what: str) -> Tensor | None:
        before = rows.clone()
        try:
            found = rule(rows, f)
        except Exception as error:  # a rule raises what it likes
            faults.append(f"{what}: {error!r} is raised")
            return None
        if not torch.equal(rows, before):
            faults.append(f"{what}: the rows are changed")
            return None
        if not isinstance(found, Tensor) or found.shape != (dimensions,):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            faults.append(f"{what}: {shape} is returned, expected a tensor ({dimensions},)")
            return None
        if found.dtype != rows.dtype or not torch.isfinite(found).all():
            faults.append(f"{what}: the change is {found.dtype} or not finite")
            return None
        return found

    for f in (0, 1, 3):
        count = 2 * f + 5
        rows = torch.randn(count, dimensions, generator=drawn, dtype=torch.float64)
        what = f"{count} rows, f = {f}"
        found = apply(rows, f, what)
        if found is None:
            continue
        shift = torch.full((dimensions,), 5.0, dtype=rows.dtype)
        turned = apply(rows.flip(0), f, f"{what}, in another order")
        moved = apply(rows + shift, f, f"{what}, all moved")
        same = apply(rows[:1].repeat(count, 1), f, f"{what}, all the same")
        for other, expected, fault in (
            (turned, found, "the order of the rows matters"),
            (moved, found + shift, "it does not move as the rows do"),
            (same, rows[0], "it is not the row where all are the same"),
        ):
            if other is not None and not torch.allclose(other, expected, rtol=1e-5, atol=1e-5):
                faults.append(f"{what}: {fault}")
        far = rows.clone()
        far[count - f :] = 1e6
        resistant = apply(far, f, f"{what}, f of them far away")
        if f and resistant is not None:
            honest = far[: count - f]
            reach = 4 * float((honest - honest.mean(dim=0)).norm(dim=1).max())
            if float((resistant - honest.mean(dim=0)).norm()) > reach:
                faults.append(f"{what}: {f} rows that are far away carry it off")
    _require("the aggregation rule", faults)


def check_method(entry: MethodEntry, **changes: Any) -> None:
    """A method runs two rounds of three clients on the embedded model, twice to the same bits, and
    a run that was interrupted between them is resumed to the same bits too. A few seconds.

    changes: sections of the configuration that the method needs, such as `lora={"rank": 4}`.

    Raises:
        Nonconforming: what is missing.
    """
    faults: list[str] = []
    try:
        if find_method(entry.name) is not entry:
            faults.append("another method is registered under its name")
    except FedspError:
        register_method(entry)
    with tempfile.TemporaryDirectory() as place:
        digests = {}
        for name in ("once", "again"):
            try:
                folder = Path(run(_small(entry, Path(place) / name, changes))["folder"])
            except Exception as error:  # a method raises what it likes
                faults.append(f"a run of two rounds fails: {error!r}")
                break
            digests[name] = tensors_digest(read_tensors(folder / "best.safetensors")[0])
        if len(digests) == 2:
            if digests["once"] != digests["again"]:
                faults.append("two runs with one seed differ: draw from the request's seed only")
            stopped = _small(entry, Path(place) / "stopped", changes)
            if entry.rounds and (fault := _resumes(stopped, digests["once"])):
                faults.append(fault)
    _require(f"the method {entry.name!r}", faults)


def _small(entry: MethodEntry, folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "method": entry.name,
        "output": str(folder),
        "model": {"name": "embedded", "device": "cpu"},
        "data": {
            "task": "continuation",
            "train": str(EMBEDDED / "train.jsonl"),
            "validation": str(EMBEDDED / "validation.jsonl"),
            "test": str(EMBEDDED / "validation.jsonl"),
            "test_examples": 8,
        },
        "partition": {"clients": 3, "server_share": 0.1},
        "distill": {"steps": 2, "sequence_length": 32, "text": [str(EMBEDDED / "public.txt")]},
        "round": {"rounds": 2},
        "client": {"prompt_steps": 2, "batch_size": 4},
        "server": {"steps": 1},
        "validation": {"examples": 8},
    }
    return {
        key: {**values.get(key, {}), **changes.get(key, {})}
        if isinstance(values.get(key, changes.get(key)), Mapping)
        else changes.get(key, values.get(key))
        for key in {**values, **changes}
    }


class _Interrupted(Exception):
    pass


def _resumes(values: Mapping[str, Any], expected: str) -> str | None:
    """What is wrong with a run that is interrupted after its first round and resumed."""

    def interrupt(record: object, rounds: int) -> None:
        raise _Interrupted

    try:
        with suppress(_Interrupted):
            run(values, callbacks=Callbacks(round_done=interrupt))
        folder = Path(resume(values["output"])["folder"])
    except Exception as error:  # as above
        return f"a run that was interrupted after a round cannot be resumed: {error!r}"
    if tensors_digest(read_tensors(folder / "best.safetensors")[0]) != expected:
        return "a resumed run has other bits: keep what lasts from round to round in party state"
    return None
