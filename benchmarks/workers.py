"""Clients of a round in several processes against one process with as many threads: a table of
docs/results/performance.md.

    python benchmarks/workers.py [--workers 1,2] [--rounds 6] [--repeats 3]

The demo's ten offices and adapters. Seconds are those of all rounds but the first, in which
workers are forked, with the server's mean and validation; ways in turn, since a shared machine
changes its speed. All ways of one thread end with the same bits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from spread import median

from fedsp import api as commands
from fedsp.cli import quiet_libraries
from fedsp.config_file import make_config
from fedsp.experiments import demo
from fedsp.experiments.start import make_package
from fedsp.experiments.study import merge
from fedsp.storage import read_tensors, tensors_digest


def one(folder: Path, rounds: int, threads: int, workers: int | None) -> tuple[float, str]:
    """Seconds of the rounds, and the digest of what they end with."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        config = demo.demo_config(
            "adapter", seed=0, folder=folder, auxiliary=folder / "auxiliary"
        ).model_dump()
        changes = {"output": f"{inside}/run", "round": {"rounds": rounds}}
        commands.run(make_config(merge(config, changes)), workers=workers)
        run = Path(inside) / "run"
        lines = (run / "rounds.jsonl").read_text().splitlines()
        digest = tensors_digest(read_tensors(run / "best.safetensors")[0])
        return sum(json.loads(line)["seconds"] for line in lines[1:]), digest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    quiet_libraries()
    counts = [int(count) for count in given.workers.split(",")]
    ways: dict[str, tuple[int, int | None]] = {"one process, one thread": (1, None)}
    ways |= {f"one process, {count} threads": (count, None) for count in counts if count > 1}
    ways |= {f"{count} worker{'s' if count > 1 else ''}": (1, count) for count in counts}
    with tempfile.TemporaryDirectory() as inside:
        folder = Path(inside)
        demo.write_forms(folder)
        torch.set_num_threads(1)
        make_package(
            demo.demo_config("adapter", seed=0, folder=folder, auxiliary=None), folder / "auxiliary"
        )
        turns = [
            {way: one(folder, given.rounds, *settings) for way, settings in ways.items()}
            for _ in range(given.repeats)
        ]
    print("| way | seconds a round | faster than one thread by | the same bits |")
    print("|---|---|---|---|")
    base = next(iter(ways))
    for way in ways:
        seconds = [turn[way][0] / (given.rounds - 1) for turn in turns]
        gains = [turn[base][0] / turn[way][0] for turn in turns]
        same = all(turn[way][1] == turn[base][1] for turn in turns)
        row = f"| {way} | {median(seconds, '.2f')} | {median(gains, '.2f')} |"
        print(f"{row} {'yes' if same else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
