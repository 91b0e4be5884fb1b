"""Scoring against lm-evaluation-harness's own HFLM: a table of docs/results/performance.md.

    python benchmarks/evaluation.py [--reference FOLDER] [--tasks hellaswag,sciq,clinc150]
    [--documents 100] [--batches 1,4,8,16,32,64] [--repeats 3] [--threads 2]

The reference's small model, and on a fifth of the documents random weights in the shape of GPT-2,
on the first validation questions of each task, no prompt in front, as HFLM has none; HFLM at each
of several batch sizes, with everything it does to a list of requests, fedsp just before each time,
since a shared machine changes its speed; the same log-likelihoods to 1e-3. With a reference also
`clinc150`: which of its 150 intents a request has, every intent a choice, on a tenth of the
documents.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from material import add_reference, model_name, questions, random_gpt2
from spread import median

from fedsp.cli import quiet_libraries
from fedsp.data.files import read_rows
from fedsp.data.tasks import Example
from fedsp.models.loading import load_model, load_tokenizer
from fedsp.training.evaluation import score


def intents(reference: Path) -> list[Example]:
    """Requests, each with the names of all intents as choices."""
    folder = reference / "data" / "intents" / "clinc150"
    rows = {split: read_rows(folder / f"{split}.jsonl.gz") for split in ("train", "test")}
    labels = sorted({row["completion"] for row in rows["train"]})
    return [
        Example(
            id=row["id"],
            context=row["prompt"],
            choices=tuple(f" {label}" for label in labels),
            gold=(labels.index(row["completion"]),),
        )
        for row in rows["test"]
    ]


def seconds_of(work: Callable[[], list[float]]) -> tuple[float, list[float]]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def compare(
    name: str, path: str, task: str, examples: list[Example], given: argparse.Namespace
) -> None:
    """A row of the table for each batch size: the log-likelihoods of all choices, in turn by
    both."""
    model, tokenizer = load_model(path, device="cpu"), load_tokenizer(path)

    def ours() -> list[float]:
        return [
            likelihood
            for row in score(model, None, examples, tokenizer, max_tokens=model.max_positions)[0]
            for likelihood in row.log_likelihoods
        ]

    for batch in map(int, given.batches.split(",")):
        harness = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=batch)

        def theirs(harness: HFLM = harness) -> list[float]:
            requests = [
                Instance("loglikelihood", {}, (example.context, choice), index)
                for example in examples
                for index, choice in enumerate(example.choices)
            ]
            return [
                likelihood for likelihood, _ in harness.loglikelihood(requests, disable_tqdm=True)
            ]

        pairs = [(seconds_of(ours), seconds_of(theirs)) for _ in range(given.repeats)]
        (_, found), (_, expected) = pairs[0]
        ratios = [other / mine for (mine, _), (other, _) in pairs]
        speeds = [len(examples) / min(pair[side][0] for pair in pairs) for side in (0, 1)]
        off = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        print(
            f"| {name} | {task} | {batch} | {speeds[1]:.1f} | {speeds[0]:.1f} |"
            f" {median(ratios, '.2f')} | {off:.1e} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_reference(parser)
    parser.add_argument("--tasks", default="hellaswag,sciq,clinc150")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--batches", default="1,4,8,16,32,64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(given.threads)
    small = model_name(given.reference)
    print(
        "| model | task | HFLM's batch size | documents per second, HFLM | fedsp | fedsp is faster"
        " by | largest difference, nats |\n" + "|---" * 7 + "|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        large = random_gpt2(folder, load_tokenizer(small))
        for task in given.tasks.split(","):
            if task == "clinc150":
                if given.reference:
                    some = intents(given.reference)[: max(1, given.documents // 10)]
                    compare(Path(small).name, small, task, some, given)
                continue
            examples = questions(given.reference, task, "validation")[: given.documents]
            compare(Path(small).name, small, task, examples, given)
            compare("GPT-2, random", large, task, examples[: given.documents // 5], given)


if __name__ == "__main__":
    main()
