"""Scoring against lm-evaluation-harness's own HFLM: a table of docs/results/performance.md.

    python benchmarks/evaluation.py [--reference FOLDER] [--tasks hellaswag,sciq] [--documents 100] [--threads 2]

The reference's small model, and on a fifth of the documents random weights in the shape of GPT-2, on the first validation questions of each task, no prompt in
front, as HFLM has none; HFLM at each of several batch sizes, of which the fastest counts, with everything it does to a list of requests; the same
log-likelihoods to 1e-3.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from material import add_reference, model_name, questions, random_gpt2

from fedsp.data.tasks import Example
from fedsp.display import quiet_libraries
from fedsp.evaluation import score
from fedsp.loading import load_model, load_tokenizer

BATCHES = (1, 4, 8, 16, 32, 64)
REPEATS = 2


def harness(path: str, examples: list[Example], batch: int) -> tuple[float, list[float]]:
    """Seconds, the best of a few, and log-likelihoods of all choices."""
    model = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=batch)
    best, found = float("inf"), []
    for _ in range(REPEATS):
        requests = [Instance("loglikelihood", {}, (example.context, choice), index) for example in examples for index, choice in enumerate(example.choices)]
        started = time.perf_counter()
        found = [likelihood for likelihood, _ in model.loglikelihood(requests, disable_tqdm=True)]
        best = min(best, time.perf_counter() - started)
    return best, found


def compare(name: str, path: str, task: str, examples: list[Example]) -> None:
    """Rows of the table, one for each way."""
    model, tokenizer = load_model(path, device="cpu"), load_tokenizer(path)
    ours = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        scored, _ = score(model, None, examples, tokenizer, max_tokens=model.max_positions)
        ours = min(ours, time.perf_counter() - started)
    mine = [likelihood for row in scored for likelihood in row.log_likelihoods]
    print(f"| {name} | {task} | fedsp | {len(examples) / ours:.1f} | 1 | - |", flush=True)
    for batch in BATCHES:
        seconds, found = harness(path, examples, batch)
        off = max(abs(a - b) for a, b in zip(mine, found, strict=True))
        print(f"| {name} | {task} | HFLM, batch size {batch} | {len(examples) / seconds:.1f} | {seconds / ours:.2f} | {off:.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_reference(parser)
    parser.add_argument("--tasks", default="hellaswag,sciq")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(given.threads)
    small = model_name(given.reference)
    print("| model | task | way | documents per second | fedsp is faster by | largest difference, nats |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        large = random_gpt2(folder, load_tokenizer(small))
        for task in given.tasks.split(","):
            examples = questions(given.reference, task, "validation")[: given.documents]
            compare(Path(small).name, small, task, examples)
            compare("GPT-2, random", large, task, examples[: given.documents // 5])


if __name__ == "__main__":
    main()
