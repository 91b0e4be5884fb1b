"""How long it takes until something happens: a table of docs/results/performance.md.

    python benchmarks/startup.py

Whole processes, the median of five after one that warms the disk's cache: `import fedsp`, `fedsp
--help`, `fedsp init`, and a run of the embedded model up to its first finished round; beside them
what `import torch` and `import transformers` alone take, below which no run can start.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST_ROUND = """
import sys, time
from fedsp import api as commands
from fedsp.experiments.embedded import EMBEDDED
from fedsp.federation.callbacks import Callbacks
class Done(Exception): pass
def stop(*_): raise Done
rows = {split: str(EMBEDDED / f"{split}.jsonl") for split in ("train", "validation")}
try:
    commands.run({
        "preset": "prompt",
        "output": sys.argv[1],
        "model": {"name": "embedded"},
        "data": {"task": "continuation", **rows},
        "partition": {"clients": 1},
        "distill": {"steps": 0, "text": [str(EMBEDDED / "public.txt")]},
        "prompt": {"length": 8},
        "round": {"rounds": 1},
        "client": {"prompt_steps": 1, "batch_size": 2},
        "validation": {"by": "none"},
    }, callbacks=Callbacks(round_done=stop))
except Done:
    pass
"""
WAYS = {
    "import torch": ["-c", "import torch"],
    "import torch and transformers' GPT-2": [
        "-c",
        "import torch; from transformers import AutoModelForCausalLM, GPT2LMHeadModel",
    ],
    "import fedsp": ["-c", "import fedsp"],
    "fedsp --help": ["-m", "fedsp", "--help"],
    "fedsp init": ["-m", "fedsp", "init"],
    "a run's first round": ["-c", FIRST_ROUND],
}


def seconds(arguments: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        extra = {
            "init": [str(Path(folder) / "run.toml")],
            FIRST_ROUND: [str(Path(folder) / "run")],
        }.get(arguments[-1], [])
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments, *extra], check=True, capture_output=True)
        return time.perf_counter() - started


def main() -> None:
    print("| | seconds |\n|---|---|")
    for name, arguments in WAYS.items():
        seconds(arguments)
        print(
            f"| {name} | {statistics.median(seconds(arguments) for _ in range(5)):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
