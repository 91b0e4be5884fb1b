"""Runs of seconds on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fedsp.experiments.embedded import EMBEDDED
from fedsp.storage import tensors_digest

ROWS = [json.loads(line) for line in (EMBEDDED / "train.jsonl").read_text().splitlines()]


def questions(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def public_text(folder: Path) -> str:
    """The start of the embedded public text, too short for any of it to be held out."""
    path = folder / "public.txt"
    path.write_text((EMBEDDED / "public.txt").read_text("utf-8")[:4000], "utf-8")
    return str(path)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of seconds of a soft prompt: three clients, three rounds."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "preset": "prompt",
        "output": str(folder / "run"),
        "model": {"name": "embedded", "device": "cpu"},
        "data": {
            "train": questions(folder, "train", ROWS[:60]),
            "validation": questions(folder, "validation", ROWS[100:112]),
            "test": questions(folder, "test", ROWS[200:212]),
        },
        "partition": {"clients": 3, "server_share": 0.2},
        "distill": {
            "steps": 2,
            "batch_size": 2,
            "sequence_length": 32,
            "text": [public_text(folder)],
        },
        "prompt": {"length": 4},
        "round": {"rounds": 3},
        "client": {"prompt_steps": 2, "batch_size": 4},
    }
    for section, change in changes.items():
        values[section] = (
            {**values.get(section, {}), **change} if isinstance(change, dict) else change
        )
    return values


def distilled(folder: Path, **changes: Any) -> dict[str, Any]:
    """The same, distilled on all of the embedded public text, of which a part is held out."""
    values = settings(folder, **changes)
    values["distill"]["text"] = [str(EMBEDDED / "public.txt")]
    return values


PAPER: dict[str, Any] = {
    "preset": "paper",
    "client": {"auxiliary_steps": 2, "prompt_steps": 2, "batch_size": 4},
    "server": {"steps": 2, "batch_size": 4},
    "prompt": {"length": 4, "projection": 8},
}


def prompt_bits(folder: Path) -> str:
    """The digest of everything a run concludes: its last checkpoint, where it keeps one, and its
    best messenger."""
    last = sorted((folder / "checkpoint").glob("*.safetensors"))[-1:]
    files = [*last, folder / "best.safetensors"]
    return "".join(tensors_digest(experiment_tensors(path)) for path in files)


def experiment_tensors(path: Path) -> dict[str, torch.Tensor]:
    from fedsp.storage import read_tensors

    return read_tensors(path)[0]
