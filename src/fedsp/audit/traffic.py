"""What travelled in a run, by client, direction and name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsp.errors import RunError
from fedsp.experiments.run_directory import RunDirectory


def traffic(folder: str | Path) -> list[dict[str, Any]]:
    """What travelled in a run: messages and bytes by client, direction and name; in a deployment
    also what Flower's own calls came to.

    The calls carry the messages, so their bytes hold those above; those of a server that was killed
    are not known.

    Raises:
        RunError: there is no run, or its clients were in one process.
    """
    directory = RunDirectory.open(Path(folder))
    messages = directory.traffic()
    if not messages:
        raise RunError(
            f"nothing of the run in {folder} travelled: its clients were in this process;"
            " rounds.jsonl has the bytes as serialised"
        )
    sums: dict[tuple[str, str, str], list[int]] = {}
    for message in messages:
        for name, size in message["bytes"].items():
            entry = sums.setdefault((message["client"], message["direction"], name), [0, 0])
            entry[0], entry[1] = entry[0] + 1, entry[1] + size
    for counts in directory.proxy_counts():
        for call, (requests, up, down) in counts.items():
            for way, size in (("up", up), ("down", down)):
                entry = sums.setdefault(("(all clients)", way, f"Flower's {call}"), [0, 0])
                entry[0], entry[1] = entry[0] + requests, entry[1] + size
    return [
        {"client": client, "direction": way, "name": name, "messages": count, "bytes": size}
        for (client, way, name), (count, size) in sorted(sums.items())
    ]
