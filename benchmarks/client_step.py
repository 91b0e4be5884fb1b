"""A client's step with a shallow package against the global model's: the table "A client's step" of
docs/results/performance.md.

    python benchmarks/client_step.py [--shape smollm2] [--threads 1] [--tokens 24,60]

Random weights in the shape of SmolLM2-135M (30 layers, hidden size 576) or GPT-2; random texts of
24 tokens (as CLINC150's requests) or 60, three of them answered; adapters of rank 16 in all linear
modules of the layers that the messenger lives in, batches of 16, by the functions of a run
(`fedsp.training.stage.train_stage`). Seconds of a step, the ways in turn, the median of the rounds
after the first (lowest to highest); a round reads each of 64 texts once. In "read once" what the
frozen layers make of them was kept in the first round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from step import MODELS
from transformers import AutoModelForCausalLM, LlamaConfig

from fedsp.cli import quiet_libraries
from fedsp.data.encoding import Encoded
from fedsp.experiments.embedded import EMBEDDED
from fedsp.models.adapter import Adapter, AdapterSettings, global_blocks
from fedsp.models.auxiliary import build_auxiliary, parse_plan
from fedsp.models.loading import load_tokenizer
from fedsp.models.messengers.making import Which, blocks_of
from fedsp.models.prompted_lm import PromptedLM
from fedsp.training.loop import Optimisation
from fedsp.training.stage import Stage, train_stage

SHAPES = {
    "gpt2": MODELS["gpt2"],
    "smollm2": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
}
PLANS: list[tuple[str, Which]] = [
    ("emulator(1, 7)", "all"),
    ("emulator(2, 5)", "all"),
    ("emulator(2, 8)", "all"),
    ("tail(2, 7)", "verbatim"),
    ("tail(4, 8)", "verbatim"),
]
BATCH, TEXTS, RANK = 16, 64, 16


def model_of(shape: str) -> PromptedLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.float32)
    return PromptedLM(model.requires_grad_(False), shape)


def rounds(model: PromptedLM, messenger: Adapter, texts: list[Encoded], reads: int) -> float:
    """Seconds of a step, the mean of one pass over the texts."""
    stage = Stage(
        name="prompt",
        seed_label="speak",
        steps=TEXTS // BATCH,
        batch_size=BATCH,
        optimisation=Optimisation(learning_rate=1e-4),
        reads=reads,
    )
    started = time.perf_counter()
    train_stage(
        stage, messenger, model, messenger, texts, received=messenger.payload(), round=1, seed=1
    )
    return (time.perf_counter() - started) / stage.steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", default="24,60")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(given.threads)
    tokenizer = load_tokenizer(str(EMBEDDED / "model"))
    settings = AdapterSettings(rank=RANK, alpha=2.0 * RANK, train_first=True)
    for length in map(int, given.tokens.split(",")):
        drawn = torch.randint(3, 2000, (TEXTS, length), generator=torch.Generator().manual_seed(1))
        texts = [Encoded(tuple(row), length - 3) for row in drawn.tolist()]
        ways: dict[str, Callable[[], float]] = {}
        model = model_of(given.shape)
        layers = model.shape.layers
        packages = {
            plan: build_auxiliary(model, parse_plan(plan, layers), tokenizer) for plan, _ in PLANS
        }
        whole = Adapter(model, global_blocks(range(layers)), settings, seed=0)
        ways["the global model, adapters in all layers"] = partial(rounds, model, whole, texts, 0)
        for plan, which in PLANS:
            package = packages[plan]
            messenger = Adapter(package, blocks_of(package.plan, which), settings, seed=0)
            ways[f"`{plan}`, adapters in {which} layers"] = partial(
                rounds, package, messenger, texts, 0
            )
            if messenger.first_depth:
                ways[f"`{plan}`, adapters in {which} layers, texts read once"] = partial(
                    rounds, package, messenger, texts, 2 * TEXTS
                )
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(given.repeats + 1):
            for name, way in ways.items():
                seconds[name].append(way())
        reference = seconds["the global model, adapters in all layers"][1:]
        print(
            f"\n{given.shape}, texts of {length} tokens, {given.threads} thread(s)\n\n"
            "| way | seconds a step | share of the global model's | first pass |\n|---|---|---|---|"
        )
        for name, (first, *rest) in seconds.items():
            shares = [one / other for one, other in zip(rest, reference, strict=True)]
            print(
                f"| {name} | {statistics.median(rest):.3f} ({min(rest):.3f} to {max(rest):.3f}) |"
                f" {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) |"
                f" {first:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
