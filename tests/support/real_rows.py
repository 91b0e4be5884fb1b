"""Real questions, and how the hub writes them."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from support.reference import REFERENCE


def real_rows(task: str, count: int) -> list[dict[str, Any]]:
    path = (
        REFERENCE
        / "data"
        / "qa"
        / task
        / ("validation.jsonl.gz" if task == "piqa" else "test.jsonl.gz")
    )
    if not path.exists():
        pytest.skip(f"the real questions are not here: {path}")
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    return sorted(
        rows,
        key=lambda row: len(row["context"]) + len(row["question"]) + len("".join(row["choices"])),
    )[:count]


def hub_schema(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A plain row as the hub has it."""
    if task == "arc_easy":
        letters = "ABCDE"[: len(row["choices"])]
        return {
            "question": row["question"],
            "choices": {"text": row["choices"], "label": list(letters)},
            "answerKey": letters[row["answer"]],
        }
    if task == "piqa":
        return {
            "goal": row["question"],
            "sol1": row["choices"][0],
            "sol2": row["choices"][1],
            "label": row["answer"],
        }
    wrong = [choice for index, choice in enumerate(row["choices"]) if index != row["answer"]]
    return {
        "support": row["context"],
        "question": row["question"],
        "distractor1": wrong[0],
        "distractor2": wrong[1],
        "distractor3": wrong[2],
        "correct_answer": row["choices"][row["answer"]],
    }
