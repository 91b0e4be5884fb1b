"""Distillation with the teacher's states kept, in memory and on the disk, against reading every text again: a table of docs/results/performance.md.

    python benchmarks/distillation.py [--passes 5] [--texts 32] [--threads 2]

A GPT-2 with random weights, texts of 128 random tokens, so many passes over them in batches of 8; the same losses, to the last bit, in each way.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from fedsp import distill
from fedsp.auxiliary import build_auxiliary, parse_plan
from fedsp.display import quiet_libraries
from fedsp.fitting import Optimisation
from fedsp.loading import load_tokenizer
from fedsp.models import PromptedLM
from fedsp.server import EMBEDDED

PLANS = ("shared(0)", "ends(2)", "ends(1, 2)", "every(6)")
WAYS = ("read again", "kept in memory", "kept on disk")
BATCH, TOKENS = 8, 128


def one(given: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    teacher = PromptedLM(AutoModelForCausalLM.from_config(GPT2Config()).requires_grad_(False), "gpt2")
    auxiliary = build_auxiliary(teacher, parse_plan(given.plan, teacher.shape.layers), load_tokenizer(str(EMBEDDED / "model")))
    texts = torch.randint(0, 50257, (given.texts, TOKENS)).tolist()
    if given.way == "kept on disk":
        distill.IN_MEMORY = 0
    if given.way == "read again":
        distill.Kept.get = lambda self, indices, read: read(indices)
    how = distill.Distillation(given.passes * given.texts // BATCH, BATCH, Optimisation(1e-4))
    started = time.perf_counter()
    losses = distill.distill(auxiliary, teacher, texts, how, seed=0)
    return {
        "seconds": time.perf_counter() - started,
        "loss": losses[-1],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plan", default="")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(given.threads)
    if given.way:
        print(json.dumps(one(given)))
        return
    print(
        "| auxiliary model | teacher's states | seconds | faster than reading again by | last loss | peak memory, MiB |\n|---|---|---|---|---|---|", flush=True
    )
    for plan in [given.plan] if given.plan else PLANS:
        again = 0.0
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--plan", plan, "--way", way]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            again = again or found["seconds"]
            print(f"| {plan} | {way} | {found['seconds']:.1f} | {again / found['seconds']:.2f} | {found['loss']!r} | {found['memory']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
