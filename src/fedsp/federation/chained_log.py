"""Logs that show when they were changed: what has left a client, and what a server and a client did
for their security, a line of JSON for each.

Each line has the SHA-256 of itself behind the one before it, so a line that is changed, taken out
or put in shows. Lines that are cut off at the end do not: keep the last digest elsewhere, such as
in the minutes of the data officer.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsp.errors import StorageError, first_line
from fedsp.storage import locked, parse_json

SECURITY = "security.jsonl"
Entry = dict[str, Any]


class ChainedLog:
    """The log in a file, which one process writes.

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
            StorageError: the disk did not take it, or it could not be read again; so what it is
                about may not be done.
        """
        told = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry}
        try:
            chain = _chain(self._last, told)
            line = json.dumps({**told, "chain": chain}).encode() + b"\n"
            parse_json(line)
        except ValueError as error:
            raise StorageError(
                f"{self.path}: this cannot be written down, since it could not be read again"
                f" ({error}): nothing was done"
            ) from error
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                file.seek(0, os.SEEK_END)
                size = file.tell()
                file.seek(self._whole)
                if size < self._whole or b"\n" in file.read():
                    raise StorageError(
                        f"{self.path} was changed by another process: nothing was done; start"
                        " again, and one at a time"
                    )
                file.truncate(self._whole)  # behind it stands a line that a kill cut short
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written ({first_line(error)}): nothing was done"
            ) from error
        self._last, self._whole = chain, self._whole + len(line)


def record_event(folder: Path, event: str, **about: Any) -> None:
    """Add an event to the security log of a server's or a client's folder; several processes may.

    Raises:
        StorageError: the log was changed, or the disk did not take it.
    """
    path = folder / SECURITY
    with locked(path.with_name(f"{SECURITY}.lock"), wait=True):
        ChainedLog(path).write(event=event, **about)


def read_log(path: Path, what: str) -> list[Entry]:
    """The entries of a log; `what` is said of one that is not there.

    Raises:
        StorageError: there is none, it cannot be read, or its lines do not follow from each other.
    """
    if not path.exists():
        raise StorageError(f"there is no {path}: {what}")
    return _read(path)[0]


def cut_short(path: Path) -> int:
    """The bytes behind the last whole line of a log: of a line that a kill or a full disk, or
    somebody, has cut short. What they were is not known.

    Raises:
        StorageError: it cannot be read.
    """
    return len(_bytes_of(path).rpartition(b"\n")[2])


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {first_line(error)}") from error


def _read(path: Path) -> tuple[list[Entry], int]:
    """The entries, and the bytes that whole lines take."""
    whole = _bytes_of(path).rpartition(b"\n")[0]
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
                f"line {number} of {path} does not follow from those before it: the log was"
                " changed; compare it with a backup, and keep it"
            )
        entries.append({**entry, "chain": chain})
        last = chain
    return entries, len(whole) + 1 if whole else 0


def _chain(last: str, entry: Entry) -> str:
    return hashlib.sha256((last + json.dumps(entry, sort_keys=True)).encode()).hexdigest()
