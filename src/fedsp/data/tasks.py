"""The tasks: how a row becomes context and choices, exactly as lm-evaluation-harness renders them.

Each task reads its own schema on the Hugging Face hub, and the plain one `{context?, question,
choices, answer}` too. The user's own tasks are `multiple_choice` ("Question: ... Answer:"),
`continuation` (the question as it stands) and `completion` (`{prompt, completion}`). Word-boundary
spaces belong to the choices: every target starts with one, in training as in evaluation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedsp.data.files import Row, hub_rows, read_rows, whole_number
from fedsp.errors import DataError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Example:
    """A context, the choices that may follow it (each with its leading space), and the indices of
    those that are right."""

    id: str
    context: str
    choices: tuple[str, ...]
    gold: tuple[int, ...]

    @property
    def target(self) -> str:
        """The text that training asks for: the first right choice."""
        return self.choices[self.gold[0]]


class WrongType(TypeError):
    """A field that holds something else than what its place asks for; the message names types and
    no value."""


Render = Callable[[Row], tuple[str, list[str], list[int]]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task by name: its place on the hub, its splits there, how it renders a hub row and how a
    plain one, and what is measured."""

    name: str
    hub: tuple[str, str | None] | None
    splits: dict[str, str]
    render: Render
    plain: Render
    metric: Literal["accuracy", "exact_match"] = "accuracy"

    def example(self, row: Row, number: int) -> Example:
        """The example in a row.

        Raises:
            DataError: a field is missing or of another type, or the answer is out of range.
        """
        where = row.get("__where__", f"row {number}")
        plain = self.hub is None or isinstance(row.get("choices"), list)
        try:
            context, choices, gold = (self.plain if plain else self.render)(row)
        except KeyError as error:
            raise DataError(
                f"{where} has no field {error}: a {self.name} row"
                f" {_SCHEMA.get(self.name, _SCHEMA['multiple_choice'])}"
            ) from error
        except (
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            SyntaxError,
            RecursionError,
            MemoryError,
        ) as error:
            why = (
                error if isinstance(error, WrongType) else "a value is not one that it can have"
            )  # the others may quote the text
            schema = (
                _SCHEMA.get(self.name, _SCHEMA["multiple_choice"])
                if plain
                else (
                    f"has the fields of {self.hub[0] if self.hub else self.name}, or the plain ones"
                )
            )
            raise DataError(
                f"{where} cannot be read as a {self.name} row ({why}): it {schema}"
            ) from error
        if not choices or any(
            not isinstance(choice, str) or not choice.strip() for choice in choices
        ):
            raise DataError(
                f"{where} has no choices, or an empty one: each is a text with at least one letter"
            )
        if any(not 0 <= index < len(choices) for index in gold) or not gold:
            raise DataError(
                f"{where} has answer {gold[0] if gold else None} but {len(choices)} choices:"
                f" expected an index from 0 to {len(choices) - 1}"
            )
        return Example(
            id=_id(row, number, where),
            context=context,
            choices=tuple(f" {choice if self.hub else choice.lstrip()}" for choice in choices),
            gold=tuple(gold),
        )


def _id(row: Row, number: int, where: str) -> str:
    """The id of a row, or its number where it has none."""
    value = row.get("id", number)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"{where} has an id that is {_kind(value)}: expected a text or a whole number, or leave"
            " it out"
        )
    return str(value)


_SCHEMA = {
    "multiple_choice": (
        "needs question (text), choices (list of texts) and answer (index of the right one, from"
        " 0); context is optional"
    ),
    "completion": "needs prompt and completion (texts)",
}


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise WrongType(f"{key} is {_kind(value)}, not a text")
    return value


def _context(row: Row) -> str:
    return "" if row.get("context") is None else _text(row, "context")


def _texts(row: Row, key: str = "choices") -> list[str]:
    values = row[key]
    if not isinstance(values, list):
        raise WrongType(f"{key} is {_kind(values)}, not a list")
    for value in values:
        if not isinstance(value, str):
            raise WrongType(f"one of {key} is {_kind(value)}, not a text")
    return values


def _labelled(row: Row) -> tuple[list[str], list[str]]:
    """The texts of choices and their labels, as ARC and OpenBookQA have them on the hub."""
    choices = row["choices"]
    if not isinstance(choices, dict):
        raise WrongType(f"choices is {_kind(choices)}, not a table of text and label")
    return _texts(choices, "text"), _texts(choices, "label")


def _letter(row: Row) -> int:
    return ["A", "B", "C", "D"].index(_text(row, "answer"))


def _index(row: Row, key: str = "answer") -> int:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongType(f"{key} is {_kind(value)}, not an index")
    return value


def _label(row: Row) -> int:
    """The hub has labels as numbers in some splits and as texts in others."""
    return whole_number(row["label"]) if isinstance(row["label"], str) else _index(row, "label")


def _kind(value: object) -> str:
    """What a value is, in the words of JSON."""
    named = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return named.get(type(value), f"a {type(value).__name__}")


def _question(row: Row) -> tuple[str, list[str], list[int]]:
    context = _context(row)
    before = f"{context.lstrip()}\n" if context else ""
    return f"{before}Question: {_text(row, 'question')}\nAnswer:", _texts(row), [_index(row)]


def _continuation(row: Row) -> tuple[str, list[str], list[int]]:
    context = _context(row)
    before = f"{context}\n" if context else ""
    return f"{before}{_text(row, 'question')}", _texts(row), [_index(row)]


def _completion(row: Row) -> tuple[str, list[str], list[int]]:
    return _text(row, "prompt").rstrip(), [_text(row, "completion")], [0]


def _arc(row: Row) -> tuple[str, list[str], list[int]]:
    texts, labels = _labelled(row)
    return (
        f"Question: {_text(row, 'question')}\nAnswer:",
        texts,
        [labels.index(_text(row, "answerKey"))],
    )


def _openbookqa(row: Row) -> tuple[str, list[str], list[int]]:
    texts, labels = _labelled(row)
    return _text(row, "question_stem"), texts, [labels.index(_text(row, "answerKey").lstrip())]


def _piqa(row: Row) -> tuple[str, list[str], list[int]]:
    return (
        f"Question: {_text(row, 'goal')}\nAnswer:",
        [_text(row, "sol1"), _text(row, "sol2")],
        [_label(row)],
    )


def _sciq(row: Row) -> tuple[str, list[str], list[int]]:
    choices = [
        _text(row, key) for key in ("distractor1", "distractor2", "distractor3", "correct_answer")
    ]
    return (
        f"{_text(row, 'support').lstrip()}\nQuestion: {_text(row, 'question')}\nAnswer:",
        choices,
        [3],
    )


def _hellaswag(row: Row) -> tuple[str, list[str], list[int]]:
    context = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    return (
        _wikihow(f"{_text(row, 'activity_label')}: {context}"),
        [_wikihow(ending) for ending in _texts(row, "endings")],
        [_label(row)],
    )


def _wikihow(text: str) -> str:
    """Brackets are artefacts of the WikiHow part of HellaSwag."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _race(row: Row) -> tuple[str, list[str], list[int]]:
    """The article, its earlier questions with their answers, and the last question. A blank ends a
    question in `  _  .`.

    Training rows have one question each (`ehovy/race`: article, question, options, answer).
    """
    if "problems" not in row:
        return (
            f"Article: {_text(row, 'article')}\n\n{_text(row, 'question')}",
            _texts(row, "options"),
            [_letter(row)],
        )
    problems = ast.literal_eval(row["problems"])
    text = f"Article: {_text(row, 'article')}\n\n"
    for problem in problems[:-1]:
        answer, question = _texts(problem, "options")[_letter(problem)], _text(problem, "question")
        text += (
            f"{question[:-5]}{answer}\n"
            if question.endswith("  _  .")
            else f"Question: {question}\nAnswer: {answer}\n"
        )
    last = problems[-1]
    return (
        text + _text(last, "question"),
        [_texts(last, "options")[index] for index in range(4)],
        [_letter(last)],
    )


def _webqs(row: Row) -> tuple[str, list[str], list[int]]:
    """Every accepted answer is right; one that starts with another is dropped, since the shorter
    one is enough."""
    answers: list[str] = []
    for answer in sorted(_texts(row, "answers")):
        if not answers or not answer.startswith(answers[-1]):
            answers.append(answer)
    return f"Question: {_text(row, 'question')}\nAnswer:", answers, list(range(len(answers)))


_STANDARD = {"train": "train", "validation": "validation", "test": "test"}
TASKS: dict[str, Task] = {
    task.name: task
    for task in [
        Task(
            name="arc_easy",
            hub=("allenai/ai2_arc", "ARC-Easy"),
            splits=_STANDARD,
            render=_arc,
            plain=_question,
        ),
        Task(
            name="arc_challenge",
            hub=("allenai/ai2_arc", "ARC-Challenge"),
            splits=_STANDARD,
            render=_arc,
            plain=_question,
        ),
        Task(
            name="openbookqa",
            hub=("allenai/openbookqa", "main"),
            splits=_STANDARD,
            render=_openbookqa,
            plain=_continuation,
        ),
        Task(
            name="hellaswag",
            hub=("Rowan/hellaswag", None),
            splits={"train": "train", "test": "validation"},
            render=_hellaswag,
            plain=_continuation,
        ),
        Task(
            name="piqa",
            hub=("baber/piqa", None),
            splits={"train": "train", "test": "validation"},
            render=_piqa,
            plain=_question,
        ),
        Task(
            name="sciq", hub=("allenai/sciq", None), splits=_STANDARD, render=_sciq, plain=_question
        ),
        Task(
            name="race",
            hub=("EleutherAI/race", "high"),
            splits={"test": "test"},
            render=_race,
            plain=_continuation,
        ),
        Task(
            name="webqs",
            hub=("stanfordnlp/web_questions", None),
            splits={"train": "train", "test": "test"},
            render=_webqs,
            plain=_question,
            metric="exact_match",
        ),
        Task(name="multiple_choice", hub=None, splits={}, render=_question, plain=_question),
        Task(name="continuation", hub=None, splits={}, render=_continuation, plain=_continuation),
        Task(
            name="completion",
            hub=None,
            splits={},
            render=_completion,
            plain=_completion,
            metric="exact_match",
        ),
    ]
}


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        DataError: there is none.
    """
    if name not in TASKS:
        raise DataError(
            f"unknown task {name!r}{did_you_mean(name, TASKS) or '; known: ' + ', '.join(TASKS)}"
        )
    return TASKS[name]


def load_rows(task: Task, path: str | None, split: str) -> list[Row]:
    """The rows of a split: from `path` if given, else from the hub; none where the task has no such
    split there.

    Raises:
        DataError: the rows cannot be had, or the task is the user's own and no file is named.
    """
    if path:
        return read_rows(Path(path))
    if task.hub is None:
        if split == "train":
            raise DataError(
                f"data.train: the task {task.name!r} has no data set of its own, so name a JSONL or"
                " CSV file"
            )
        return []
    if split in task.splits:
        return hub_rows(*task.hub, task.splits[split])
    if split == "train":
        raise DataError(
            f"data.train: {task.hub[0]} has no train split on the hub: name a JSONL or CSV file"
        )
    return []


def examples_of(task: Task, rows: Iterable[Row]) -> list[Example]:
    """The examples in rows, in their order.

    Raises:
        DataError: a row cannot be used; the message says where it stands.
    """
    return [task.example(row, number) for number, row in enumerate(rows)]
