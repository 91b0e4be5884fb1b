"""What has left a client, as evidence for whoever answers for its text: a line of JSON for each
message, written before the message is sent.

Each line has the SHA-256 of itself behind the one before it, so a line that is changed, taken out
or put in shows. Lines that are cut off at the end do not: keep the last digest elsewhere, such as
in the minutes of the data officer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsp.errors import StorageError, first_line
from fedsp.storage import parse_json

EGRESS = "egress.jsonl"
Entry = dict[str, Any]


class EgressJournal:
    """The journal in a file.

    Raises:
        StorageError: it cannot be read, or its lines do not follow from each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        entries, whole = _read(path)
        self._last = entries[-1]["chain"] if entries else ""
        self._whole = whole

    def write(self, **entry: Any) -> None:
        """Add an entry, with the time; returns when it is on the disk.

        Raises:
            StorageError: the disk did not take it, so nothing may be sent.
        """
        told = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry}
        chain = _chain(self._last, told)
        line = json.dumps({**told, "chain": chain}).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                file.seek(0, os.SEEK_END)
                size = file.tell()
                file.seek(self._whole)
                if size < self._whole or b"\n" in file.read():
                    raise StorageError(
                        f"{self.path} was changed by another process: nothing was sent; start"
                        " again, and one at a time"
                    )
                file.truncate(self._whole)  # behind it stands a line that a kill cut short
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written ({first_line(error)}): nothing was sent"
            ) from error
        self._last, self._whole = chain, self._whole + len(line)


def read_egress(path: Path) -> list[Entry]:
    """The entries of a journal.

    Raises:
        StorageError: there is none, it cannot be read, or its lines do not follow from each other.
    """
    if not path.exists():
        raise StorageError(f"there is no {path}: nothing has left this client yet")
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Entry], int]:
    """The entries, and the bytes that whole lines take."""
    try:
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {first_line(error)}") from error
    entries: list[Entry] = []
    last = ""
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = parse_json(line)
            chain = entry.pop("chain")
            follows = chain == _chain(last, entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            follows = False
        if not follows:
            raise StorageError(
                f"line {number} of {path} does not follow from those before it: the journal was"
                " changed; compare it with a backup, and keep it"
            )
        entries.append({**entry, "chain": chain})
        last = chain
    return entries, len(whole) + 1 if whole else 0


def _chain(last: str, entry: Entry) -> str:
    return hashlib.sha256((last + json.dumps(entry, sort_keys=True)).encode()).hexdigest()


def egress_figures(entries: Sequence[Entry]) -> dict[str, Any]:
    """What a journal says in sum: `messages` by kind, `runs`, the `first` and the `last` time,
    `bytes`, the largest `norm` of a change, `unprotected` updates, those without differential
    privacy, the largest `epsilon` that was counted with its `delta`, and the `chain`, the digest of
    the last line."""
    norms = [entry["norm"] for entry in entries if entry.get("norm") is not None]
    spent = [
        (entry["epsilon"], entry["delta"]) for entry in entries if entry.get("epsilon") is not None
    ]
    epsilon, delta = max(spent, default=(None, None))
    return {
        "messages": dict(Counter(entry["kind"] for entry in entries)),
        "runs": sorted({entry["run"] for entry in entries}),
        "first": entries[0]["time"] if entries else None,
        "last": entries[-1]["time"] if entries else None,
        "bytes": sum(entry["bytes"] for entry in entries),
        "largest_norm": max(norms, default=None),
        "unprotected": sum(
            entry["kind"] == "update" and entry.get("epsilon") is None for entry in entries
        ),
        "epsilon": epsilon,
        "delta": delta,
        "chain": entries[-1]["chain"] if entries else "",
    }
