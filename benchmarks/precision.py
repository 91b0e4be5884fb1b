"""Frozen weights in fewer bits, at the server or at the clients: what it costs in answer loss, and
saves in memory. Tables of docs/results/performance.md.

    python benchmarks/precision.py REFERENCE OUTPUT [--seeds 0,1,2]      # runs that are finished
                                  are not done again;
                                  REFERENCE holds models/ and
                                  data/

Five clients on ARC-Easy, clients only, five rounds of four steps of 16 examples, one float32
package for each seed. Answer loss of the best prompt on 300 test questions through the global
model, as the server holds it. Memory is that of the weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from material import random_gpt2
from spread import mean

from fedsp import api as commands
from fedsp.cli import quiet_libraries
from fedsp.experiments.run_directory import RunDirectory
from fedsp.models.loading import Precision, load_model, load_tokenizer

FEWER = [precision for precision in get_args(Precision) if precision not in ("auto", "float32")]
SIDES = [
    ("float32", "float32"),
    *((precision, "float32") for precision in FEWER),
    *(("float32", precision) for precision in FEWER),
]
"""Precision at the server, and at the clients."""


def settings(reference: Path, folder: Path, seed: int, server: str, clients: str) -> dict[str, Any]:
    data = reference / "data" / "qa" / "arc_easy"
    books = ("openstax-physics", "openstax-chemistry-bundle", "openstax-microbiology")
    return {
        "preset": "prompt",
        "seed": seed,
        "output": str(folder / f"{server}-{clients}-{seed}"),
        "model": {
            "name": str(reference / "models" / "tiny-science"),
            "device": "cpu",
            "precision": server,
        },
        "auxiliary": {"folder": str(folder / f"package-{seed}"), "precision": clients},
        "data": {
            "task": "arc_easy",
            "max_tokens": 128,
            "test_examples": 300,
            **{split: str(data / f"{split}.jsonl.gz") for split in ("train", "validation", "test")},
        },
        "partition": {"clients": 5, "server_share": 0.0},
        "distill": {
            "steps": 120,
            "sequence_length": 64,
            "text": [str(reference / "data" / "text" / f"{book}.txt.gz") for book in books],
        },
        "round": {"rounds": 5},
        "client": {"prompt_steps": 4, "batch_size": 16},
        "validation": {"examples": 100, "every": 5},
    }


def run(values: dict[str, Any]) -> dict[str, float]:
    """The figures of a run on the test questions, with those of no prompt at all; done before, or
    now."""
    folder, package = Path(values["output"]), Path(values["auxiliary"]["folder"])
    if not package.exists():
        commands.distill(commands.as_config({**values, "auxiliary": {}}), package)
    if not (folder.exists() and RunDirectory.open(folder).finished):
        if folder.exists():
            commands.resume(folder)
        else:
            commands.run(values)
    without, tuned = commands.evaluate(folder)
    return {
        "zero-shot": without["answer_loss"],
        "tuned": tuned["answer_loss"],
        "accuracy": tuned["accuracy"],
    }


def mebibytes(path: str, precision: Precision) -> float:
    return (
        float(
            sum(
                parameter.numel() * parameter.element_size()
                for parameter in load_model(
                    path, device="cpu", precision=precision
                ).model.parameters()
            )
        )
        / 2**20
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    reference, output = given.reference.resolve(), given.output.resolve()
    found = {
        federation: [run(settings(reference, output, seed, *federation)) for seed in seeds]
        for federation in SIDES
    }
    print(
        "| server | clients | zero-shot | tuned | against float32, same seed | accuracy"
        " |\n|---|---|---|---|---|---|"
    )
    for (server, clients), rows in found.items():
        tuned = [row["tuned"] for row in rows]
        against = [mine - row["tuned"] for mine, row in zip(tuned, found[SIDES[0]], strict=True)]
        accuracy = [row["accuracy"] for row in rows]
        print(
            f"| {server} | {clients} | {rows[0]['zero-shot']:.3f} | {mean(tuned, '.3f')} |"
            f" {mean(against, '+.3f')} | {statistics.fmean(accuracy):.1%} |"
        )
    small = str(reference / "models" / "tiny-science")
    with tempfile.TemporaryDirectory() as folder:
        large = random_gpt2(folder, load_tokenizer(small))
        print("\n| weights | 8.7 M parameters, MiB | GPT-2, MiB |\n|---|---|---|")
        for precision in ("float32", *FEWER):
            print(
                f"| {precision} | {mebibytes(small, precision):.1f} |"
                f" {mebibytes(large, precision):.0f} |"
            )


if __name__ == "__main__":
    main()
