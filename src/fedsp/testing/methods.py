"""What a method of your own must do."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fedsp.api import resume, run
from fedsp.data.installed import Register
from fedsp.errors import ConfigurationError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.methods import registry as methods
from fedsp.federation.methods.registry import MethodEntry
from fedsp.models.messengers.registry import MessengerEntry
from fedsp.storage import read_tensors, tensors_digest
from fedsp.testing.faults import require, require_kind

Entry = TypeVar("Entry", MethodEntry, MessengerEntry)


def check_method(entry: MethodEntry, **changes: Any) -> None:
    """A method runs two rounds of three clients on the embedded model, twice to the same bits, and
    a run that was interrupted between them is resumed to the same bits too. A few seconds.

    changes: sections of the configuration that the method needs, such as `lora={"rank": 4}`.

    Raises:
        Nonconforming: what is missing.
    """
    require_kind(entry, MethodEntry)
    with known(entry, methods._ENTRIES):
        require(f"the method {entry.name!r}", run_faults(entry, changes))


@contextmanager
def known(entry: Entry, register: Register[Entry]) -> Iterator[None]:
    """What an entry's name means within the check; a register is as it was behind it."""
    what = register.what
    try:
        found, added = register.find(entry.name), False
    except ConfigurationError:
        found, added = register.add(entry), True
    if found is not entry:
        require(f"the {what} {entry.name!r}", [f"another {what} is registered under its name"])
    try:
        yield
    finally:
        if added:
            del register[entry.name]


def run_faults(entry: MethodEntry, changes: Mapping[str, Any]) -> list[str]:
    """What is wrong with two runs of a method with one seed, and with one that is interrupted."""
    digests = []
    with tempfile.TemporaryDirectory() as place:
        for name in ("once", "again"):
            try:
                folder = Path(run(small_run(entry, Path(place) / name, changes))["folder"])
            except Exception as error:  # a method raises what it likes
                return [f"a run of two rounds fails: {error!r}"]
            digests.append(tensors_digest(read_tensors(folder / "best.safetensors")[0]))
        if digests[0] != digests[1]:
            return ["two runs with one seed differ: draw from the request's seed only"]
        stopped = small_run(entry, Path(place) / "stopped", changes)
        fault = _resumes(stopped, digests[0]) if entry.rounds else None
    return [fault] if fault else []


def small_run(entry: MethodEntry, folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run of seconds into a folder; its sections may be changed."""
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
