"""Release by hand (`policy.release = "ask"`): an update waits in the client's state folder until a
person has looked at its figures and released or withheld it.

state/release/NAME.json       an update that waits: its figures, never its numbers
state/release/NAME.decided    what was decided, by whom and when; kept, so that the same update is
                              not asked about again after a restart
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

from fedsp.errors import DeploymentError, StorageError, first_line
from fedsp.federation.chained_log import record_event
from fedsp.storage import locked, parse_json, write_json

FOLDER = "release"
LOOKS_EVERY = 1.0
"""Seconds from one look for a decision to the next."""


def wait_for_release(
    state: Path,
    figures: Mapping[str, Any],
    seconds: float,
    stopping: Event,
    info: Callable[[str], None],
) -> bool:
    """Wait until a person has decided on an update with these figures, at most so many seconds;
    returns whether it was released. What nobody has decided on by then is withheld.

    Raises:
        DeploymentError: the client ends before anybody has decided.
        StorageError: the state folder cannot be written or read.
    """
    told = json.dumps(dict(figures), sort_keys=True)
    name = f"{figures['run']}-{figures['round']}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
    waiting, decided = state / FOLDER / f"{name}.json", state / FOLDER / f"{name}.decided"
    if not decided.exists():
        for before in waiting.parent.glob(f"{figures['run']}-{figures['round']}-*.json"):
            before.unlink()  # another try of this round, which will not be sent
        write_json(waiting, dict(figures))
        info(
            f"round {figures['round']}: an update of {figures['bytes']:,} bytes waits to be"
            " released by hand: `fedsp egress release party.toml`"
        )
    until = time.monotonic() + seconds
    while not decided.exists():
        if stopping.wait(LOOKS_EVERY):
            raise DeploymentError("the client ends before its update was released")
        if time.monotonic() > until:
            with _deciding(state):
                if decided.exists():
                    break
                _record(state, name, figures, "withheld", "nobody, in time")
                waiting.unlink(missing_ok=True)
                return False
    waiting.unlink(missing_ok=True)
    return bool(_read(decided, "released")["released"])


def waiting(state: Path) -> dict[str, dict[str, Any]]:
    """The updates that nobody has decided on, by name: their figures.

    Raises:
        StorageError: a file of them is damaged.
    """
    found = sorted((state / FOLDER).glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {
        path.stem: _read(path, "run", "round", "bytes")
        for path in found
        if not path.with_suffix(".decided").exists()
    }


def decide(state: Path, name: str, *, released: bool) -> None:
    """Release or withhold an update that waits, in the name of whoever is logged in; the security
    log of the client keeps it.

    Raises:
        StorageError: it does not wait, or the state folder cannot be written.
    """
    with _deciding(state):
        figures = waiting(state).get(name)
        if figures is None:
            raise StorageError(f"no update {name} waits in {state / FOLDER}")
        who = _user()
        _record(state, name, figures, "released" if released else "withheld", who)
        decision = {"released": released, "who": who, "time": datetime.now(UTC).isoformat()}
        write_json(state / FOLDER / f"{name}.decided", decision)


@contextmanager
def _deciding(state: Path) -> Iterator[None]:
    """One decision at a time, by a person or because time is over."""
    with locked(state / FOLDER / ".lock", wait=True):
        yield


def _record(state: Path, name: str, figures: Mapping[str, Any], event: str, who: str) -> None:
    record_event(state, event, who=who, run=figures["run"], round=figures["round"], update=name)


def _user() -> str:
    """Who is logged in, by the system's own books: an environment variable says what one likes."""
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except (ImportError, KeyError, AttributeError):
        return f"user {os.getuid()}" if hasattr(os, "getuid") else "unknown"


def _read(path: Path, *needed: str) -> dict[str, Any]:
    try:
        found = parse_json(path.read_bytes())
        if not set(needed) <= set(found):
            raise ValueError("it lacks what fedsp writes")
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(
            f"{path} cannot be read ({first_line(error)}): remove it, and the update is asked about"
            " again"
        ) from error
    read: dict[str, Any] = found
    return read
