"""What has left a client, as evidence for whoever answers for its text: an entry for each message,
written before the message is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsp.federation.chained_log import Entry, read_log

EGRESS = "egress.jsonl"


def read_egress(path: Path) -> list[Entry]:
    """The entries of a client's journal.

    Raises:
        StorageError: there is none, it cannot be read, or its lines do not follow from each other.
    """
    return read_log(path, "nothing has left this client yet")


def egress_figures(entries: Sequence[Entry]) -> dict[str, Any]:
    """What a journal says in sum: `messages` by kind, `runs`, the `first` and the `last` time,
    `bytes`, the largest `norm` of a change, `updates`, each counted once however often it was sent,
    and the `unprotected` of them, without differential privacy; the last `epsilon` that was
    counted, which is of all that was sent, with its `delta`, and the `chain`, the digest of the
    last line."""
    norms = [entry["norm"] for entry in entries if entry.get("norm") is not None]
    spent = [
        (entry["epsilon"], entry["delta"]) for entry in entries if entry.get("epsilon") is not None
    ]
    epsilon, delta = spent[-1] if spent else (None, None)
    updates = {_which(entry): entry for entry in entries if entry["kind"] == "update"}
    return {
        "messages": dict(Counter(entry["kind"] for entry in entries)),
        "runs": sorted({entry["run"] for entry in entries}),
        "first": entries[0]["time"] if entries else None,
        "last": entries[-1]["time"] if entries else None,
        "bytes": sum(entry["bytes"] for entry in entries),
        "largest_norm": max(norms, default=None),
        "updates": len(updates),
        "unprotected": sum(entry.get("epsilon") is None for entry in updates.values()),
        "epsilon": epsilon,
        "delta": delta,
        "chain": entries[-1]["chain"] if entries else "",
    }


def _which(entry: Entry) -> tuple[object, ...]:
    """What is the same for an update however often it was signed and sent. Journals of earlier
    versions have no digest of the payload."""
    digest = entry.get("payload", entry.get("sha256", entry["chain"]))
    return entry["run"], entry["round"], digest
