"""What is in a file of examples, before anybody trains on it: how it is read, what rows hold, how
long they are, which are there twice, and what in them looks like a person's."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsp.config import TaskSection
from fedsp.data.files import Row, fields_of, how_it_is_read, read_rows
from fedsp.data.rendering import Rendering
from fedsp.data.tasks import LABELLED, Example
from fedsp.errors import DataError

if TYPE_CHECKING:
    from fedsp.data.encoding import Tokenizer

Figures = dict[str, Any]
SHOWN = 3
"""Rendered examples that are shown."""
REPEATED = 2
"""How often answers stand there on average, at least, where they are taken for labels."""
LIKELY: dict[str, list[tuple[str, ...]]] = {
    "chat": [("messages",), ("instruction", "output")],
    "completion": [("prompt", "completion")],
    "multiple_choice": [("question", "choices", "answer")],
    "classification": [("text", "label")],
}
"""Tasks by the fields that tell them."""


def _iban(text: str) -> bool:
    """By its check digits (ISO 13616)."""
    plain = re.sub(r"\s", "", text)
    moved = "".join(str(int(letter, 36)) for letter in plain[4:] + plain[:4])
    return int(moved) % 97 == 1


def _card(text: str) -> bool:
    """By the check digit of Luhn (ISO/IEC 7812)."""
    digits = [int(letter) for letter in reversed(text) if letter.isdigit()]
    doubled = (
        digit if place % 2 == 0 else sum(divmod(2 * digit, 10))
        for place, digit in enumerate(digits)
    )
    return sum(doubled) % 10 == 0


@dataclass(frozen=True)
class Identifier:
    """What looks like an identifier of a person: a pattern, and a check of what it finds."""

    pattern: re.Pattern[str]
    holds: Callable[[str], bool] = lambda text: True

    def found(self, text: str) -> Iterator[str]:
        """Whatever looks like one in a text."""
        return (one[0] for one in self.pattern.finditer(text) if self.holds(one[0]))

    def replaced(self, text: str, by: str) -> str:
        """The text with something else in their place."""
        return self.pattern.sub(lambda one: by if self.holds(one[0]) else one[0], text)


IDENTIFIERS = {
    "e-mail addresses": Identifier(re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")),
    "phone numbers": Identifier(
        re.compile(r"(?<![\w.])(?:\+|00?)[1-9](?:[ ()/.-]{0,2}\d){7,13}(?![\w.])")
    ),
    "account numbers (IBAN)": Identifier(
        re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b"), _iban
    ),
    "card numbers": Identifier(re.compile(r"\b\d(?:[ -]?\d){12,18}\b"), _card),
    "social security numbers": Identifier(
        re.compile(r"\b(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}\b")
    ),
    "insurance numbers (a letter and nine digits)": Identifier(re.compile(r"\b[A-Z]\d{9}\b")),
    "Internet addresses of machines": Identifier(
        re.compile(r"\b(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)\b")
    ),
}
"""Kinds of identifiers that a pattern can find. Names, addresses and dates of birth are none."""


def check_files(
    paths: Sequence[Path],
    rendering: Rendering | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    tokenizer: Tokenizer | None = None,
    max_tokens: int | None = None,
) -> Figures:
    """Figures of files of examples, one by one under `files`, and under `shared` how many examples
    of each file stand in an earlier one too. Without a `rendering` the rows are of the task whose
    fields the first one has.

    Of each file: how it is `read`; its `rows`; `fields`, with the share of rows that has a value;
    `unusable` rows, and the first `fault`; `repeated` examples; `labels` by frequency;
    `identifiers` by kind, with the rows that hold one and where the first stands, never the
    identifier itself; `preview`, rendered as a model reads them. With a tokenizer also lengths in
    `tokens`, and how many examples `max_tokens` cuts, if it is given.

    Raises:
        DataError: a file is missing or cannot be read at all.
    """
    files, known, shared = [], Counter[str](), []
    for path in paths:
        rows = read_rows(path, columns)
        rendering = rendering or Rendering.of(TaskSection(task=_likely_task(rows[0], path)))
        examples, faults = _examples(rows, rendering)
        lengths: list[int] = []
        if tokenizer is not None:
            examples, lengths, refused = _lengths_of(examples, tokenizer)
            faults += refused
        texts = [_text_of(example) for example in examples]
        both = sum(text in known for text in texts)
        if known:
            shared.append({"file": str(path), "examples": both})
        known.update(texts)
        figures: Figures = {
            "file": str(path),
            "read": how_it_is_read(path),
            "rows": len(rows),
            "fields": _fields(rows),
            "tasks": dict(Counter(example.task for example in examples)),
            "unusable": len(faults),
            "fault": faults[0] if faults else None,
            "repeated": len(texts) - len(set(texts)),
            "identifiers": _identifiers(rows),
            "preview": [
                {"context": _masked(example.context), "answer": _masked(example.target)}
                for example in examples[:SHOWN]
            ],
        }
        if labels := _labels(examples):
            masked = Counter[str]()
            for label, count in labels.items():
                masked[_masked(label)] += count
            figures["labels"] = dict(masked.most_common())
        if lengths:
            figures["tokens"] = _summary(lengths, max_tokens)
        files.append(figures)
    return {"files": files, "shared": shared}


def _likely_task(row: Row, path: Path) -> str:
    """The task whose fields a row has.

    Raises:
        DataError: it has those of none.
    """
    if isinstance(row.get("prompt"), list):
        return "chat"
    for task, fields in LIKELY.items():
        if any(set(needed) <= set(row) for needed in fields):
            return task
    raise DataError(
        f"{path} has the fields {sorted(fields_of(row))}, by which no task can be told:"
        " name it with --task, or give a run's file with --config"
    )


def _examples(rows: Sequence[Row], rendering: Rendering) -> tuple[list[Example], list[str]]:
    """Those that can be made, and why the others cannot."""
    examples, faults = [], []
    for number, row in enumerate(rows):
        try:
            examples.append(rendering.example(row, number))
        except DataError as error:
            faults.append(str(error))
    return examples, faults


def _lengths_of(
    examples: Sequence[Example], tokenizer: Tokenizer
) -> tuple[list[Example], list[int], list[str]]:
    """Those that the tokenizer makes tokens of, how many for each, and why it makes none of the
    others, such as where its chat template refuses them."""
    from fedsp.data.encoding import encode_targets

    taken, lengths, faults = [], [], []
    for example in examples:
        try:
            (row,) = encode_targets(tokenizer, [example], 1 << 30)
        except DataError as error:
            faults.append(str(error))
        else:
            taken.append(example)
            lengths.append(len(row.ids))
    return taken, lengths, faults


def _text_of(example: Example) -> str:
    return "\0".join([example.context, *example.choices])


def _fields(rows: Sequence[Row]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in fields_of(row))
    return {
        name: sum(row.get(name) not in (None, "", []) for row in rows) / len(rows) for name in names
    }


def _identifiers(rows: Sequence[Row]) -> Figures:
    found: Figures = {}
    for row in rows:
        text = "\n".join(_strings(fields_of(row)))
        for kind, identifier in IDENTIFIERS.items():
            if any(True for _ in identifier.found(text)):
                about = found.setdefault(kind, {"rows": 0, "first": row["__where__"]})
                about["rows"] += 1
    return found


def _labels(examples: Sequence[Example]) -> Counter[str]:
    """How often each label stands there; completions are labels where they repeat."""
    labels, completions = (
        Counter(example.target.strip() for example in examples if example.task == task)
        for task in (LABELLED, "completion")
    )
    repeat = REPEATED * len(completions) <= completions.total()
    return labels + completions if repeat else labels


def _masked(text: str) -> str:
    """A text with what looks like an identifier replaced by its kind."""
    for kind in sorted(IDENTIFIERS, key="phone numbers".__eq__):  # part of many other numbers
        text = IDENTIFIERS[kind].replaced(text, f"[{kind}]")
    return text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))


def _summary(lengths: Sequence[int], max_tokens: int | None) -> dict[str, float]:
    ordered = sorted(lengths)
    cut = {"cut": sum(length > max_tokens for length in ordered)} if max_tokens else {}
    return {
        "median": statistics.median(ordered),
        "of 95 % at most": ordered[max(0, -(-95 * len(ordered) // 100) - 1)],
        "longest": ordered[-1],
        **cut,
    }
