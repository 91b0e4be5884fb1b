"""A first federation of a real language model: five offices that tell their own tickets apart.

Each office of a company sorts the requests that it gets into four kinds (`tickets.py`), and knows
nothing of the others'. The company's model, SmolLM2-135M-Instruct, may not leave its server. It
hands out a small model made of 12 of its 30 layers, distilled on public text (fedsp's own
documentation); the offices tune low-rank adapters through that, and only adapters travel. The
server takes their mean one to three times, whichever reads its twenty tickets best. Then the model
is asked to put new requests, of all offices, under one of all twenty labels. Run it with
`make smollm2`, or: `python examples/smollm2.py MODEL.gguf`
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fedsp
from fedsp.cli import quiet_libraries
from fedsp.federation.callbacks import Callbacks
from tickets import TICKETS

Settings = dict[str, Any]
HERE = Path(__file__).parent
SENTENCES = {"train": slice(0, 6), "validation": slice(6, 7), "test": slice(7, 10)}
"""Of the ten sentences of a kind, those that offices train on, and the others."""
ADAPTER: Settings = {"kind": "adapter", "layers": "all", "rank": 16, "alpha": 32.0}
EVERYTHING = "one party with all tickets and the model"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_tickets(folder: Path) -> dict[str, str]:
    """Write the tickets as JSONL files; returns their names by split."""
    names = {}
    for split, part in SENTENCES.items():
        rows = [
            {"office": office, "label": label, "text": text}
            for office, kinds in TICKETS.items()
            for label, texts in kinds.items()
            for text in texts[part]
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names[split] = str(folder / f"{split}.jsonl")
    return names


def settings_of(model: Path, folder: Path, plan: str, distill: int, rounds: int) -> Settings:
    """What all rows of the table have in common."""
    docs = HERE.parent / "docs"
    return {
        "model": {"name": str(model), "device": "cpu"},
        "data": {
            "task": "classification",
            "template": "Request: {text}\nKind:",
            **write_tickets(folder),
        },
        "partition": {"kind": "natural", "column": "office", "server_share": 0.0},
        "auxiliary": {"plan": plan},
        "distill": {
            "steps": distill,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "sequence_length": 64,
            "text": [str(path) for path in sorted(docs.rglob("*.md"))],
        },
        "messenger": ADAPTER,
        "round": {"rounds": rounds, "optimizer": "line_search"},
        "client": {"prompt_steps": 6, "batch_size": 8, "learning_rate": 2e-3},
        "validation": {"every": 2, "patience": 1},
    }


def rows_of(
    given: Settings, folder: Path, workers: int | None, callbacks: Callbacks
) -> list[Settings]:
    """The rows of the table. `workers` processes share the clients of the federation, and then what
    it is compared with; None: one after another in this one."""
    from fedsp.federation.transport.workers import in_parallel

    def settings(name: str, **changes: Any) -> Settings:
        merged = dict(given) | {"output": str(folder / name)}
        for section, change in changes.items():
            whole = isinstance(change, Mapping) and isinstance(merged.get(section), Mapping)
            merged[section] = {**merged[section], **change} if whole else change
        return {section: value for section, value in merged.items() if value is not None}

    def row(name: str, test: Mapping[str, float], figures: Mapping[str, Any] | None) -> Settings:
        kept = {key: test[key] for key in ("accuracy", "macro_f1", "answer_loss")}
        sent = (figures["bytes_up"] + figures["bytes_down"]) / 1e6 if figures else 0.0
        seconds = figures and figures["seconds"]
        return {"who trains": name, **kept, "traffic, MB": sent, "seconds": seconds}

    package = str(folder / "package")
    made = fedsp.distill(given | {"output": str(folder / "none")}, package, callbacks=callbacks)
    auxiliary = {"plan": given["auxiliary"]["plan"], "folder": package}
    callbacks.info("all offices:")
    together = settings("all-offices", auxiliary=auxiliary)
    federated = fedsp.run(together, workers=workers, callbacks=callbacks)
    runs = {
        EVERYTHING: settings(
            "central",
            method="lora",
            lora={"rank": 16, "alpha": 32.0, "targets": MODULES},
            partition={"kind": "even", "column": None, "clients": 0, "server_share": 1.0},
            messenger=None,
            auxiliary=None,
            round={"optimizer": "none"},
            server={"steps": 12, "batch_size": 8, "learning_rate": 1e-3},
        )
    } | {
        office: settings(office, auxiliary=auxiliary, round={"only": office}) for office in TICKETS
    }
    callbacks.info("one party with all tickets, and each office alone:")
    each = list(runs.values())
    done = in_parallel(workers, fedsp.run, each) if workers else map(fedsp.run, each)
    others = {}
    for name, figures in zip(runs, done, strict=True):
        callbacks.info(f"{name}: {figures['test']['accuracy']:.1%}")
        others[name] = figures
    best = max(TICKETS, key=lambda office: float(others[office]["test"]["accuracy"]))
    with_package = {**federated, "seconds": federated["seconds"] + made["seconds"]}
    return [
        row("nobody", federated["zero_shot"], None),
        row(f"the best office alone: {best}", others[best]["test"], others[best]),
        row("all offices: adapters travel", federated["test"], with_package),
        row("  ... in the small model itself", federated["auxiliary_test"], None),
        row(EVERYTHING, others[EVERYTHING]["test"], others[EVERYTHING]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the model's .gguf file, or a folder")
    parser.add_argument("--plan", default="emulator(2, [2, 8, 10, 11, 21, 22, 24, 27])")
    parser.add_argument("--distill", type=int, default=120, help="steps of distillation")
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    quiet_libraries()
    import torch

    from fedsp.federation.transport.workers import FORKS
    from fedsp.report.console import Display, rows_table

    with tempfile.TemporaryDirectory() as temporary, Display() as display:
        folder = Path(temporary)
        settings = settings_of(given.model, folder, given.plan, given.distill, given.rounds)
        workers = torch.get_num_threads() if FORKS else None
        rows = rows_of(settings, folder, workers, display.callbacks())
        display.print(rows_table("New requests put under one of twenty labels", rows))


if __name__ == "__main__":
    main()
