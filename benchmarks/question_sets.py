"""Five question sets in one file, each row with the task that it is of, for the studies of
configs/studies/question-sets.toml.

    python benchmarks/question_sets.py FOLDER --reference FOLDER [--train 2000] [--validation 50]
    [--test 100]

Writes train.jsonl, validation.jsonl and test.jsonl with as many questions of each set, or all that
it has. PIQA has no public test labels: its validation file is the test here, and validation is held
out of its training file.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from material import add_reference, question_rows

from fedsp.data.files import Row

SETS = ("arc_easy", "arc_challenge", "sciq", "piqa", "hellaswag")


def splits_of(reference: Path | None, name: str, held_out: int) -> dict[str, list[Row]]:
    train = question_rows(reference, name, "train")
    if name == "piqa":
        test = question_rows(reference, name, "validation")
        random.Random(0).shuffle(train)
        return {"train": train[held_out:], "validation": train[:held_out], "test": test}
    return {"train": train} | {
        split: question_rows(reference, name, split) for split in ("validation", "test")
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    add_reference(parser)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--validation", type=int, default=50)
    parser.add_argument("--test", type=int, default=100)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name in SETS:
        for split, found in splits_of(given.reference, name, given.validation).items():
            drawn = random.Random(0).sample(found, min(getattr(given, split), len(found)))
            for row in drawn:
                own = {key: value for key, value in row.items() if key != "__where__"}
                rows[split].append(json.dumps(own | {"task": name}))
    for split, lines in rows.items():
        (given.folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{split}: {len(lines)} questions")


if __name__ == "__main__":
    main()
