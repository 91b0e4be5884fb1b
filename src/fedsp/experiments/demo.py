"""The demo: what a federation is worth to those who join it, on the embedded model, by the public
functions of `fedsp.api`.

Ten offices hold facts about people, and each asks for one kind of fact on a form of its own, such
as "Guild roll, Navena:". The private model knows the facts but none of the forms; an office's text
teaches its own form and no other; the server has no labels. So whoever stays alone answers a tenth
of the questions, and the question is how much of what all together know reaches the global model.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from fedsp.config import RunConfig
from fedsp.config_file import make_config
from fedsp.data.dataset import load_dataset
from fedsp.data.files import Row
from fedsp.errors import require_installed
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import make_auxiliary, open_server, score_test
from fedsp.experiments.start import (
    Figures,
    in_this_process,
    in_workers,
    open_run,
    require_new,
    start_run,
)
from fedsp.experiments.study import merge
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.transport.workers import FORKS, in_parallel
from fedsp.storage import write_bytes

FORMS: dict[str, tuple[str, str]] = {
    "town": ("Parish register, {name}:", "Letter for {name}:"),
    "trade": ("Guild roll, {name}:", "Tax list, {name}:"),
    "animal": ("Stable book, {name}:", "Visit of the vet, {name}:"),
    "dish": ("Kitchen order, {name}:", "Table of {name}:"),
    "instrument": ("Band list, {name}:", "Concert of {name}:"),
}
"""The forms that offices ask on, two for each kind of fact, each known to one office alone."""

DEMO: Figures = {
    "model": {"name": "embedded", "device": "cpu"},
    "data": {"task": "continuation"},
    "partition": {"kind": "natural", "column": "owner", "server_share": 0.0},
    "distill": {"steps": 300, "text": [str(EMBEDDED / "public.txt")], "sequence_length": 64},
    "auxiliary": {"plan": "emulator(1, 3)"},
    "prompt": {"length": 16},
    "round": {"rounds": 20},
    "client": {"prompt_steps": 10},
    "validation": {"examples": 100, "every": 5, "patience": 1},
}
"""The configuration of the demo, less what its rows vary."""

PROMPT: Figures = {"messenger": {"kind": "prompt"}, "client": {"learning_rate": 0.1}}
ADAPTER: Figures = {
    "messenger": {"kind": "adapter", "rank": 64, "alpha": 128.0, "train_first": True},
    "client": {"learning_rate": 5e-3},
}
DEMO_ROWS: dict[str, Figures] = {
    "one office alone": ADAPTER,
    "prompt": PROMPT,
    "adapter": ADAPTER,
    "central": {
        "method": "lora",
        "partition": {"clients": 0, "server_share": 1.0, "kind": "even"},
        "lora": {"rank": 64, "alpha": 128.0},
        "server": {"steps": 50, "learning_rate": 5e-3},
    },
}


def demo_config(
    method: str, *, seed: int, folder: Path, auxiliary: Path | None, only: str | None = None
) -> RunConfig:
    """The configuration of one row of the demo's table; all rows share one auxiliary model. `only`:
    the office that is alone."""
    own: Figures = {
        "seed": seed,
        "output": str(folder / (f"{method}, {only}" if only else method).replace(" ", "-")),
        "data": {split: str(folder / f"{split}.jsonl") for split in SPLITS},
        "round": {"only": only} if only else {},
    }
    made = {"auxiliary": {"folder": str(auxiliary)}} if auxiliary else {}
    return make_config(merge(DEMO, own, made, DEMO_ROWS[method]), "the demo")


SPLITS = ("train", "validation", "test")


def write_forms(folder: Path) -> list[str]:
    """Write the embedded questions as the offices ask them; returns the offices. The other choices
    of a question are other facts about the same person, so one must know what a form asks for."""
    rng = random.Random(0)
    offices: set[str] = set()
    for split in SPLITS:
        lines = (EMBEDDED / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        facts: dict[str, dict[str, str]] = {}
        for row in map(json.loads, lines):
            name, _, kind = row["id"].rpartition("-")
            facts.setdefault(name, {})[kind] = row["choices"][row["answer"]]
        rows = list(_asked(facts, rng))
        offices |= {row["owner"] for row in rows}
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_bytes(folder / f"{split}.jsonl", text.encode())
    return sorted(offices)


def _asked(facts: dict[str, dict[str, str]], rng: random.Random) -> Iterable[Row]:
    for place, (name, own) in enumerate(facts.items()):
        for kind, value in own.items():
            form = place % 2
            others = [other for one, other in own.items() if one != kind]
            choices = [value, *rng.sample(others, 3)]
            rng.shuffle(choices)
            yield {
                "id": f"{name}-{kind}",
                "question": FORMS[kind][form].format(name=name),
                "choices": choices,
                "answer": choices.index(value),
                "owner": f"{kind}-{form + 1}",
            }


def demo(
    *, seed: int = 0, folder: str | Path | None = None, callbacks: Callbacks | None = None
) -> list[Figures]:
    """Tune the embedded model with ten offices that never see it, and without; one row of test
    figures each. The row of the adapter has the `benefit` of the federation: how much better all
    together answer than the best office alone, with a 95 % interval over questions.

    Every test question is about somebody that no office has a question about.

    Raises:
        RunError: the folder is in use.
        ConfigurationError: PEFT, which the row of one party with all text needs, is not installed.
    """
    require_installed("study", "the demo compares with LoRA, which needs", "peft")
    callbacks, workers = callbacks or Callbacks(), torch.get_num_threads() if FORKS else 1
    torch.set_num_threads(1)  # the model is so small that a second one costs more than it gives
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="fedsp-demo-") as temporary:
            return _rows(seed, Path(temporary), workers, callbacks)
    require_new(Path(folder))
    return _rows(seed, Path(folder), workers, callbacks)


def _rows(seed: int, folder: Path, workers: int, callbacks: Callbacks) -> list[Figures]:
    """The table; `workers` processes share the offices alone, and the clients of each round."""
    offices = write_forms(folder)
    auxiliary = folder / "auxiliary"
    config = demo_config("prompt", seed=seed, folder=folder, auxiliary=None)
    server = open_server(config, load_dataset(config))
    started = time.perf_counter()
    make_auxiliary(server, auxiliary, callbacks)
    callbacks.info(f"distilled in {time.perf_counter() - started:.0f} s")

    def run(method: str) -> Figures:
        callbacks.info(f"{method}:")
        engine = in_workers(workers) if workers > 1 else in_this_process
        config = demo_config(method, seed=seed, folder=folder, auxiliary=auxiliary)
        return _row(method, start_run(config, callbacks, engine))

    started = time.perf_counter()
    test = server.dataset.test
    figures, _ = score_test(server.model, None, test, server.tokenizer, server.max_tokens)
    seconds = time.perf_counter() - started
    rows: list[Figures] = [{"method": "zero-shot", **figures, "bytes": 0, "seconds": seconds}]
    started, alone = time.perf_counter(), []
    configs = [
        demo_config("one office alone", seed=seed, folder=folder, auxiliary=auxiliary, only=office)
        for office in offices
    ]
    runs = in_parallel(workers, start_run, configs) if workers > 1 else map(start_run, configs)
    for office, figures in zip(offices, runs, strict=True):
        alone.append(_row("one office alone", figures))
        callbacks.info(f"one office alone, {office}: {alone[-1]['accuracy']:.1%} of the questions")
    seconds = time.perf_counter() - started
    best = max(alone, key=lambda row: float(row["accuracy"]))
    rows.append(
        {
            **best,
            "method": "best office alone",
            "mean_accuracy": statistics.fmean(row["accuracy"] for row in alone),
            "seconds": seconds,
        }
    )
    rows += [run(method) for method in ("prompt", "adapter", "central")]
    adapter = rows[-2]
    adapter["benefit"] = _difference(adapter["folder"], best["folder"])
    opened = open_run(adapter["folder"])
    own = opened.score(opened.auxiliary_sides[0], test)
    rows.insert(-1, {"method": "its auxiliary model", **own, "bytes": 0, "seconds": 0.0})
    return rows


def _row(method: str, figures: Figures) -> Figures:
    return {
        "method": method,
        **figures["test"],
        "bytes": figures["bytes_up"] + figures["bytes_down"],
        "seconds": figures["seconds"],
        "folder": figures["folder"],
    }


def _difference(one: str, other: str) -> tuple[float, float, float]:
    """By how much more questions of the test one run answers rightly than the other, with the 95 %
    interval of a normal approximation over paired questions."""
    right = [
        {row["id"]: float(row["right"]) for row in RunDirectory.open(Path(folder)).scores()}
        for folder in (one, other)
    ]
    each = [right[0][key] - right[1][key] for key in right[0]]
    mean = statistics.fmean(each)
    half = 1.96 * statistics.stdev(each) / math.sqrt(len(each))
    return mean, mean - half, mean + half
