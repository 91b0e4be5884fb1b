"""The most that several clients could gain by sharing a batch: the time of a step for each example,
by the number of examples in it. A table of docs/results/performance.md.

    python benchmarks/together.py [--reference FOLDER] [--threads 1]

Ten clients with batches of two would share one of twenty. No padding is counted, which unlike texts
of ten clients would need, so this is a bound.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from material import add_reference, model_name
from transformers import AutoModelForCausalLM, GPT2Config

from fedsp.cli import quiet_libraries
from fedsp.data.encoding import Encoded, collate
from fedsp.experiments.embedded import EMBEDDED
from fedsp.models.loading import load_model
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.training.loop import answer_loss

LENGTH, TOKENS, BATCHES, SECONDS = 20, 45, (2, 4, 8, 20), 4.0


def per_example(model: PromptedLM, batch_size: int) -> float:
    """Milliseconds, the least of several steps."""
    rng = random.Random(0)
    spec = PromptSpec(space="residual", length=LENGTH, model=model.shape)
    prompt = SoftPrompt(spec, torch.randn(spec.shape) * 0.02)
    batch = collate(
        [
            Encoded(tuple(rng.randrange(900) for _ in range(TOKENS)), TOKENS - 4)
            for _ in range(batch_size)
        ]
    )
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        answer_loss(model, prompt.prefix(model), batch).backward()  # type: ignore[no-untyped-call]
        best = min(best, time.perf_counter() - started)
    return 1000 * best / batch_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_reference(parser)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    models = {"embedded, 1.7 M": load_model(str(EMBEDDED / "model"), device="cpu")}
    if given.reference:
        models["tiny-science, 8.7 M"] = load_model(model_name(given.reference), device="cpu")
    models["GPT-2, 124 M, random"] = PromptedLM(
        AutoModelForCausalLM.from_config(GPT2Config()).requires_grad_(False), "gpt2"
    )
    print(
        "| model | "
        + " | ".join(f"{size} examples" for size in BATCHES)
        + " | the most that ten clients of two can gain |\n"
        + "|---" * (len(BATCHES) + 2)
        + "|"
    )
    for name, model in models.items():
        found = [per_example(model, size) for size in BATCHES]
        print(
            f"| {name} | "
            + " | ".join(f"{value:.1f} ms" for value in found)
            + f" | {found[0] / found[-1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
