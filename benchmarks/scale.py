"""Rounds with ten thousand clients on one machine: memory, disk, and what the loop costs beside
training. The table of docs/results/performance.md.

    python benchmarks/scale.py OUTPUT [--clients 10000] [--rounds 20]

The embedded model, four questions for each client, five steps on them for each client that is
asked. A round is timed from the end of one to the end of the next, and training is gradient steps
alone; loop time is all else: sampling, opening clients and writing what they keep, messages packed
and unpacked, admission, aggregation, prompts, journal and checkpoint. Each run is a process of its
own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fedsp import api as commands
from fedsp.cli import quiet_libraries
from fedsp.experiments.embedded import EMBEDDED
from fedsp.federation.callbacks import Callbacks
from fedsp.training import loop as fitting

ASKED = (25, 50, 100, 200)


def settings(folder: Path, clients: int, asked: int, rounds: int, **changes: Any) -> dict[str, Any]:
    folder.mkdir(parents=True)
    rows = [json.loads(line) for line in (EMBEDDED / "train.jsonl").read_text().splitlines()]
    questions = [{**rows[index % len(rows)], "id": str(index)} for index in range(4 * clients)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return {
        "preset": "prompt",
        "output": str(folder / "run"),
        "model": {"name": "embedded", "device": "cpu"},
        "data": {
            "task": "continuation",
            "train": str(folder / "train.jsonl"),
            "max_tokens": 64,
            "holdout": 0.0,
        },
        "partition": {"clients": clients, "server_share": 0.0},
        "distill": {"steps": 2, "text": [str(EMBEDDED / "public.txt")], "sequence_length": 32},
        "prompt": {"length": 16},
        "round": {"rounds": rounds, "clients": asked},
        "client": {"prompt_steps": 5, "batch_size": 4},
        "validation": {"by": "none"},
        **changes,
    }


def resident() -> float:
    """Memory of this process, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(folder: Path, clients: int, asked: int, rounds: int, **changes: Any) -> dict[str, Any]:
    memory: list[float] = []
    ends: list[float] = []
    training: list[float] = []
    trained, optimize = 0.0, fitting.optimize

    def timed(*given: Any, **named: Any) -> Any:
        nonlocal trained
        begun = time.perf_counter()
        done = optimize(*given, **named)
        trained += time.perf_counter() - begun
        return done

    def round_done(*_: object) -> None:
        memory.append(resident())
        ends.append(time.perf_counter())
        training.append(trained)

    started = time.perf_counter()
    fitting.optimize = timed
    commands.run(
        settings(folder, clients, asked, rounds, **changes),
        callbacks=Callbacks(round_done=round_done),
    )
    # all rounds but the first
    whole = [after - before for before, after in itertools.pairwise(ends)]
    loop = [
        seconds - (after - before)
        for seconds, (before, after) in zip(whole, itertools.pairwise(training), strict=True)
    ]
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    return {
        "registered": clients,
        "asked": asked,
        "rounds": rounds,
        "seconds of a round": statistics.median(whole),
        "loop, share of training": sum(loop) / (sum(whole) - sum(loop)),
        "loop, ms for each client asked": 1000 * statistics.median(loop) / asked,
        "MiB after round 2": memory[1],
        "MiB after the last": memory[-1],
        "files": len(files),
        "disk, MiB": sum(path.stat().st_size for path in files) / 2**20,
        "start, first round and end, seconds": time.perf_counter() - started - sum(whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    kept = {
        "client": {"prompt_steps": 5, "batch_size": 4, "keep_optimizer": True},
        "compression": {"up": "sign", "down": "int8"},
    }
    adapters = {
        "preset": "messenger",
        "messenger": {"kind": "adapter", "rank": 64, "alpha": 128.0},
        "prompt": {},
    }
    runs: dict[str, tuple[int, int, int, dict[str, Any]]] = {
        "whole": (given.clients, 100, given.rounds, {}),
        "resting": (given.clients, 100, given.rounds, kept),
        "adapters": (given.clients, 100, given.rounds, adapters),
        "adapters, resting": (given.clients, 100, given.rounds, adapters | kept),
        **{f"asked-{asked}": (given.clients, asked, 4, {}) for asked in ASKED},
        "few": (200, 100, 4, {}),
    }
    if given.run:
        clients, asked, rounds, changes = runs[given.run]
        print(
            json.dumps(
                {
                    "run": given.run,
                    **measure(given.output / given.run, clients, asked, rounds, **changes),
                }
            )
        )
        return
    found = []
    for name in runs:
        command = [sys.executable, __file__, *sys.argv[1:], "--run", name]
        found.append(
            json.loads(
                subprocess.run(
                    command, check=True, capture_output=True, text=True
                ).stdout.splitlines()[-1]
            )
        )
        print(json.dumps(found[-1]), flush=True)
    names = list(found[0])
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in found:
        print(
            "| "
            + " | ".join(
                f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()
            )
            + " |"
        )


if __name__ == "__main__":
    main()
