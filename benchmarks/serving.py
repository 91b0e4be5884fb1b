"""Texts that are answered together against one after another, by the engine of `fedsp serve-model`:
the table of docs/how-to/serve.md.

    python benchmarks/serving.py [--model gpt2] [--texts 16] [--tokens 32] [--repeats 3]

The same texts, of different lengths, at temperature 0; ways in turn, since a shared machine
changes its speed. Both ways write the same tokens, or it says how many differ.
"""

from __future__ import annotations

import argparse
import threading
import time
from statistics import median

import torch

from fedsp.cli import quiet_libraries
from fedsp.deployment.model_server.engine import End, Engine, Wanted
from fedsp.experiments.embedded import EMBEDDED
from fedsp.models.loading import load_model, load_tokenizer
from fedsp.training.answers import Side

NAME = "base"


def written(engine: Engine, texts: list[list[int]], most: int) -> tuple[float, list[list[int]]]:
    """Seconds until all texts are written, and their tokens."""
    found: list[list[int]] = [[] for _ in texts]
    left, done = len(texts), threading.Event()

    def hears(row: int, told: int | End) -> None:
        nonlocal left
        if isinstance(told, int):
            found[row].append(told)
            return
        left -= 1
        if not left:
            done.set()

    begun = time.perf_counter()
    engine.ask(
        *(
            Wanted(
                model=NAME,
                ids=tuple(ids),
                most=most,
                ends=(),
                choose=lambda scores: int(scores.argmax()),
                told=lambda told, row=row: hears(row, told),  # type: ignore[misc]
            )
            for row, ids in enumerate(texts)
        )
    )
    done.wait()
    return time.perf_counter() - begun, found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(EMBEDDED / "model"))
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(given.threads)
    model = load_model(given.model, device="cpu", precision="float32")
    words = (EMBEDDED / "public.txt").read_text().split()
    tokenizer = load_tokenizer(given.model)
    texts = [
        tokenizer(" ".join(words[7 * row : 7 * row + 6 + 3 * row]))["input_ids"]
        for row in range(given.texts)
    ]
    engines = [Engine({NAME: Side(model, lambda: None)}) for _ in range(2)]
    together = engines[1].at_once[NAME]
    engines[0].at_once[NAME] = 1
    for engine in engines:
        engine.start()
    seconds: dict[int, list[float]] = {1: [], together: []}
    tokens: dict[int, list[list[int]]] = {}
    for _ in range(given.repeats):
        for engine, (at_once, times) in zip(engines, seconds.items(), strict=True):
            took, tokens[at_once] = written(engine, texts, given.tokens)
            times.append(took)
    for engine in engines:
        engine.stop()
    differing = sum(one != other for one, other in zip(*tokens.values(), strict=True))
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    count = given.texts * given.tokens
    print(
        "| texts | tokens each | one after another | together | times as fast | texts that differ |"
    )
    print("|---|---|---|---|---|---|")
    print(
        f"| {given.texts} | {given.tokens} | {count / median(seconds[1]):.0f} tokens/s |"
        f" {count / median(seconds[together]):.0f} tokens/s | {median(ratios):.2f}"
        f" ({min(ratios):.2f} to {max(ratios):.2f}) | {differing} |"
    )


if __name__ == "__main__":
    main()
