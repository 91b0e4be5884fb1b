"""Distillation with the teacher's states kept, in memory and on the disk, against reading every
text again: tables of docs/results/performance.md.

    python benchmarks/distillation.py [--passes 5] [--repeats 3] [--threads 2]

First the time: a GPT-2 with random weights, 16 texts of 64 random tokens, so many passes over them
in batches of 8; the median, the least and the most of a few whole distillations, the ways in turn.
Then the memory: two passes, a teacher 64 wide, and so many texts that their states are larger than
fedsp keeps in memory; the most that the process itself holds once the models are there, pages of
files aside.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from spread import median
from transformers import AutoModelForCausalLM, GPT2Config

from fedsp.cli import quiet_libraries
from fedsp.experiments.embedded import EMBEDDED
from fedsp.models.auxiliary import build_auxiliary, parse_plan
from fedsp.models.loading import load_tokenizer
from fedsp.models.prompted_lm import PromptedLM
from fedsp.training import distillation as distill
from fedsp.training.distillation import Distillation
from fedsp.training.loop import Optimisation

PLANS = ("shared(0)", "every(6)")  # as deep as the teacher; a sixth of its layers
WAYS = ("read again", "kept in memory", "kept on disk")
SMALL = (8, 16, 64, GPT2Config())
"""Batch size, texts, their tokens, and the teacher's shape."""
LARGE = (256, 33_000, 128, GPT2Config(n_embd=64, n_head=2, n_layer=3, vocab_size=1000))


def one(given: argparse.Namespace) -> dict[str, float]:
    """A whole distillation in this process: seconds, its last loss, and the size of the teacher's
    states and of what is held at most, MiB."""
    torch.manual_seed(0)
    batch, count, tokens, config = LARGE if given.large else SMALL
    teacher = PromptedLM(AutoModelForCausalLM.from_config(config).requires_grad_(False), "gpt2")
    auxiliary = build_auxiliary(
        teacher,
        parse_plan(given.plan, teacher.shape.layers),
        load_tokenizer(str(EMBEDDED / "model")),
    )
    texts = torch.randint(0, config.vocab_size, (count, tokens)).tolist()
    if given.way == "kept in memory":
        distill.IN_MEMORY = 1 << 62
    if given.way == "kept on disk":
        distill.IN_MEMORY = 0
    if given.way == "read again":
        setattr(distill.TeacherStates, "get", lambda self, indices, read: read(indices))
    before = held()
    most = before

    def watch(step: int, loss: float) -> None:
        nonlocal most
        most = max(most, held())

    started = time.perf_counter()
    losses = distill.distill(
        auxiliary,
        teacher,
        texts,
        Distillation(
            steps=given.passes * count // batch,
            batch_size=batch,
            optimisation=Optimisation(learning_rate=1e-4),
        ),
        seed=0,
        progress=watch,
    )
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "loss": losses[-1],
        "states": count * tokens * config.n_embd * 4 / 2**20,
        "memory": most - before,
    }


def held() -> float:
    """Resident memory of this process that is no page of a file, MiB."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon:")
    )
    return int(line.split()[1]) / 1024


def measured(given: argparse.Namespace, plan: str, way: str, *more: str) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--passes",
        str(given.passes),
        "--threads",
        str(given.threads),
        "--plan",
        plan,
        "--way",
        way,
        *more,
    ]
    found: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plan", default="", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--large", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(given.threads)
    if given.way:
        print(json.dumps(one(given)))
        return
    print(
        "| auxiliary model | teacher's states | seconds | faster than reading again by | last loss"
        " |\n|---|---|---|---|---|",
        flush=True,
    )
    for plan in PLANS:
        turns = [{way: measured(given, plan, way) for way in WAYS} for _ in range(given.repeats)]
        for way in WAYS:
            times = [turn[way]["seconds"] for turn in turns]
            gains = [turn["read again"]["seconds"] / turn[way]["seconds"] for turn in turns]
            print(
                f"| {plan} | {way} | {median(times, '.1f')} | {median(gains, '.2f')} |"
                f" {turns[0][way]['loss']:.6g} |",
                flush=True,
            )
    print(
        "\n| teacher's states | their size, MiB | seconds | held at most beyond the models, MiB"
        " |\n|---|---|---|---|",
        flush=True,
    )
    for way in ("kept in memory", "as fedsp chooses"):
        large = measured(given, "ends(1, 1)", way, "--large", "--passes", "2")
        print(
            f"| {way} | {large['states']:.0f} | {large['seconds']:.0f} | {large['memory']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
