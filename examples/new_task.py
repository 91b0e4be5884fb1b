"""Your own task: statements that are true or false.

A task turns a row of your file into a context, the choices that may follow it, and the indices of
the right ones. Every choice starts with a space, which fedsp adds. Run it:
`python examples/new_task.py`
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import fedsp
from fedsp.experiments.embedded import EMBEDDED


def render(row: dict[str, Any]) -> tuple[str, list[str], list[int]]:
    statement, true = row["statement"], row["true"]
    if not isinstance(statement, str) or not isinstance(true, bool):
        raise TypeError  # fedsp then says where the row stands, and the schema
    return f"{statement} True or false?", ["true", "false"], [0 if true else 1]


fedsp.register_task(
    fedsp.Task(
        name="true_or_false",
        plain=render,
        schema="needs statement (text) and true (true or false)",
    )
)


def statements(split: str, count: int) -> list[dict[str, Any]]:
    """Each question of the embedded data, completed with its right answer and with a wrong one."""
    rows = [json.loads(line) for line in (EMBEDDED / f"{split}.jsonl").read_text().splitlines()]
    return [
        {"statement": f"{row['question']} {choice}", "true": index == row["answer"]}
        for row in rows[:count]
        for index, choice in enumerate(row["choices"])
    ]


def main(folder: Path) -> list[dict[str, Any]]:
    """Tune a prompt for the task, and return the test figures without and with it."""
    files = {}
    for split, count in (("train", 60), ("validation", 10), ("test", 20)):
        files[split] = str(folder / f"{split}.jsonl")
        lines = [json.dumps(row) for row in statements(split, count)]
        Path(files[split]).write_text("\n".join(lines) + "\n")
    result = fedsp.run(
        {
            "output": str(folder / "run"),
            "model": {"name": "embedded", "device": "cpu"},
            "data": {"task": "true_or_false", **files},
            "partition": {"clients": 3, "server_share": 0.2},
            "distill": {"steps": 10, "sequence_length": 64, "text": [str(EMBEDDED / "public.txt")]},
            "round": {"rounds": 2},
            "server": {"steps": 5},
        }
    )
    rows: list[dict[str, Any]] = fedsp.evaluate(result["folder"])
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for row in main(Path(temporary)):
            print(f"{row['prompt']}: accuracy {row['accuracy']:.1%}, loss {row['answer_loss']:.3f}")
