"""The tasks: how a row becomes context and choices, exactly as lm-evaluation-harness renders them.

Each task reads its own schema on the Hugging Face hub, and the plain one `{context?, question,
choices, answer}` too. The user's own tasks are `multiple_choice` ("Question: ... Answer:"),
`continuation` (the question as it stands) and `completion` (`{prompt, completion}`). Word-boundary
spaces belong to the choices: every target starts with one, in training as in evaluation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from fedsp.data import installed
from fedsp.data.files import ClassName, Row, hub_rows, read_rows, whole_number
from fedsp.data.installed import installed_names, load_installed
from fedsp.errors import ConfigurationError, DataError, did_you_mean

LABELLED = "classification"
"""The task that chooses among labels that all of its examples have in common."""
COMPLETION = "completion"
Metric = Literal["accuracy", "exact_match"]
Turn = tuple[str, str]
"""A message of a conversation: who writes, and what."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A context, the choices that may follow it (each with its leading space), and the indices of
    those that are right.

    turns: of a conversation, its messages, which the model's chat template renders; `context` then
        is all but the last answer, in plain words, and the answer the only choice.
    given: how many of the first messages are read and never trained, even the assistant's.
    ends: whether training asks for the tokenizer's end token behind the answer.
    task, metric: the name of its task, and what that measures.
    where: the file and line that it comes from, for messages.
    """

    id: str
    context: str
    choices: tuple[str, ...]
    gold: tuple[int, ...]
    turns: tuple[Turn, ...] = ()
    given: int = 0
    ends: bool = False
    task: str = ""
    metric: Metric = "accuracy"
    where: str = field(default="", compare=False)

    @property
    def target(self) -> str:
        """The text that training asks for: the first right choice."""
        return self.choices[self.gold[0]]


class WrongType(TypeError):
    """A field of a row has the wrong type; the message names types, never the value."""


Render = Callable[[Row], tuple[str, list[str], list[int]]]
"""From a row to its context, the choices that may follow it, and the indices of the right ones."""

SCHEMA = (
    "needs question (string), choices (list of strings) and answer (index of the right one, from"
    " 0); context is optional"
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: how rows become examples, and what is measured.

    name: value of the key `data.task`.
    plain: renders the rows of a user's file; `schema` says in words what such a row needs.
    metric: accuracy of the likeliest choice, or exact match of the greedy continuation.
    placeholder: stands for the label in a row of a user's file, where only its question counts.
    turns: reads a row as a conversation, if the task is one; `given` says how many of its first
        messages are read and never trained; none: none are.
    hub, splits: the data set on the Hugging Face hub and its splits, if there is one; `render`
        renders its rows.
    """

    name: str
    plain: Render
    schema: str = SCHEMA
    metric: Metric = "accuracy"
    placeholder: Mapping[str, Any] = field(default_factory=lambda: {"answer": 0})
    hub: tuple[str, str | None] | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    render: Render | None = None
    turns: Callable[[Row], list[Turn]] | None = None
    given: Callable[[Row], int] | None = None

    def question(self, row: Row, number: int) -> Example:
        """The question in a row, whose label, if it has one, is not read: `gold` is no answer.

        Raises:
            DataError: as `example`.
        """
        plain = self.render is None or isinstance(row.get("choices"), list)
        asked = {**row, **self.placeholder} if plain else {**_any_answer(row), **row}
        messages, answer = row.get("messages"), {"role": "assistant", "content": "?"}
        if self.turns and isinstance(messages, list) and not _answered(messages):
            asked["messages"] = [*messages, answer]
        elif self.turns and isinstance(row.get("prompt"), list):
            asked["completion"] = [answer]
        return replace(
            self.example(asked, number, without=set(self.placeholder) - set(row)), gold=(0,)
        )

    def example(self, row: Row, number: int, *, without: Collection[str] = ()) -> Example:
        """The example in a row; `without` fields that are not its own.

        Raises:
            DataError: a field is missing or of another type, or the answer is out of range.
        """
        where = row.get("__where__", f"row {number}")
        render = None if isinstance(row.get("choices"), list) else self.render
        try:
            turns = self.turns(row) if self.turns else []
            given = self.given(row) if self.given else 0
            context, choices, gold = (render or self.plain)(row)
        except KeyError as error:
            names = [name for name in row if name != "__where__" and name not in without]
            few = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            unread = f" ({', '.join(sorted(without))} is not read here)" if without else ""
            raise DataError(
                f"{where} has no field {error}: a {self.name} row {self.schema}{unread}; it has"
                f" {few or 'none'}"
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
            known = isinstance(error, WrongType)  # other messages may quote the text
            why = error if known else "a field has an invalid value"
            hub = f"has the fields of {self.hub[0]}, or the plain ones" if self.hub else ""
            raise DataError(
                f"{where} cannot be read as a {self.name} row ({why}): it"
                f" {hub if render else self.schema}"
            ) from error
        if not choices or any(
            not isinstance(choice, str) or not choice.strip() for choice in choices
        ):
            answer = next(iter(self.placeholder), "")
            if not turns and not str(row.get(answer, "?")).strip():
                raise DataError(
                    f"{where} has no answer: {answer} is empty; fill it in (of merged cells the"
                    " first alone has the text), or take the row out"
                )
            raise DataError(
                f"{where} has no choices, or an empty one: each must be a non-blank string"
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
            turns=tuple(turns),
            given=given,
            task=self.name,
            metric=self.metric,
            where=where,
        )


def _id(row: Row, number: int, where: str) -> str:
    """The id of a row, or its number where it has none."""
    value = row.get("id", number)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"{where} has an id that is {_kind(value)}: expected a string or an integer, or leave"
            " it out"
        )
    return str(value)


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise WrongType(f"{key} is {_kind(value)}, not a string")
    return value


def _context(row: Row) -> str:
    return "" if row.get("context") is None else _text(row, "context")


def _texts(row: Row, key: str = "choices") -> list[str]:
    values = row[key]
    if not isinstance(values, list):
        raise WrongType(f"{key} is {_kind(values)}, not a list")
    for value in values:
        if not isinstance(value, str):
            raise WrongType(f"one of {key} is {_kind(value)}, not a string")
    return values


def _labelled(row: Row) -> tuple[list[str], list[str]]:
    """The texts of choices and their labels, as ARC and OpenBookQA have them on the hub."""
    choices = row["choices"]
    if not isinstance(choices, dict):
        raise WrongType(f"choices is {_kind(choices)}, not a table of text and label")
    return _texts(choices, "text"), _texts(choices, "label")


def _any_answer(row: Row) -> Row:
    """An answer to a row as the hub has it, under the name that any of its data sets has for it."""
    choices = row.get("choices")
    labels = choices.get("label") if isinstance(choices, dict) else None
    key = labels[0] if isinstance(labels, list) and labels else "A"
    return {"label": 0, "answer": "A", "answers": ["?"], "answerKey": key}


def _letter(row: Row) -> int:
    return ["A", "B", "C", "D"].index(_text(row, "answer"))


def _index(row: Row, key: str = "answer") -> int:
    value = row[key]
    if isinstance(value, ClassName):
        return value.number
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
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return named.get(type(value), f"a {type(value).__name__}")


def _asked(row: Row, key: str = "question") -> str:
    return f"Question: {_text(row, key)}\nAnswer:"


def _question(row: Row) -> tuple[str, list[str], list[int]]:
    context = _context(row)
    before = f"{context.lstrip()}\n" if context else ""
    return f"{before}{_asked(row)}", _texts(row), [_index(row)]


def _continuation(row: Row, form: str = "{}\n") -> tuple[str, list[str], list[int]]:
    """The question as it stands, behind its context, if it has one, in that form."""
    context = _context(row)
    before = form.format(context) if context else ""
    return f"{before}{_text(row, 'question')}", _texts(row), [_index(row)]


def _completion(row: Row) -> tuple[str, list[str], list[int]]:
    return _text(row, "prompt").rstrip(), [_text(row, "completion")], [0]


def _arc(row: Row) -> tuple[str, list[str], list[int]]:
    texts, labels = _labelled(row)
    return _asked(row), texts, [labels.index(_text(row, "answerKey"))]


def _openbookqa(row: Row) -> tuple[str, list[str], list[int]]:
    texts, labels = _labelled(row)
    return _text(row, "question_stem"), texts, [labels.index(_text(row, "answerKey").lstrip())]


def _piqa(row: Row) -> tuple[str, list[str], list[int]]:
    return _asked(row, "goal"), [_text(row, "sol1"), _text(row, "sol2")], [_label(row)]


def _sciq(row: Row) -> tuple[str, list[str], list[int]]:
    choices = [
        _text(row, key) for key in ("distractor1", "distractor2", "distractor3", "correct_answer")
    ]
    return f"{_text(row, 'support').lstrip()}\n{_asked(row)}", choices, [3]


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
    return _asked(row), answers, list(range(len(answers)))


TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Make a task known under its name; returns it.

    Raises:
        ConfigurationError: another task has that name.
    """
    if TASKS.setdefault(task.name, task) is not task:
        raise ConfigurationError(
            f"data.task: a task named {task.name!r} is registered already; give yours another name"
        )
    return task


def _hub_task(
    name: str,
    hub: tuple[str, str | None],
    splits: str,
    render: Render,
    plain: Render,
    metric: Metric = "accuracy",
) -> None:
    """Register a task of the hub; `splits` are train, validation and test there, - for none."""
    found = zip(("train", "validation", "test"), splits.split(), strict=True)
    register_task(
        Task(
            name=name,
            plain=plain,
            metric=metric,
            hub=hub,
            splits={ours: theirs for ours, theirs in found if theirs != "-"},
            render=render,
        )
    )


ALL = "train validation test"
_hub_task("arc_easy", ("allenai/ai2_arc", "ARC-Easy"), ALL, _arc, _question)
_hub_task("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge"), ALL, _arc, _question)
_hub_task("openbookqa", ("allenai/openbookqa", "main"), ALL, _openbookqa, _continuation)
_hub_task("hellaswag", ("Rowan/hellaswag", None), "train - validation", _hellaswag, _continuation)
_hub_task("piqa", ("baber/piqa", None), "train - validation", _piqa, _question)
_hub_task("sciq", ("allenai/sciq", None), ALL, _sciq, _question)
_article = partial(_continuation, form="Article: {}\n\n")
_hub_task("race", ("EleutherAI/race", "high"), "- - test", _race, _article)
_webqs_hub = ("stanfordnlp/web_questions", None)
_hub_task("webqs", _webqs_hub, "train - test", _webqs, _question, "exact_match")
register_task(Task(name="multiple_choice", plain=_question))
register_task(Task(name="continuation", plain=_continuation))
_COMPLETION = "needs prompt and completion (strings)"
register_task(
    Task(
        name=COMPLETION,
        plain=_completion,
        schema=_COMPLETION,
        metric="exact_match",
        placeholder={"completion": "?"},
    )
)


def _answered(messages: list[Any]) -> bool:
    last = messages[-1] if messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def _filled(row: Row, key: str) -> bool:
    """Whether a row has a value there; an empty cell of a table is none."""
    return row.get(key) not in (None, "")


def _conversation(row: Row) -> list[Turn]:
    """`messages`, or a question and its answer, behind the text of `system`, if there is one."""
    before = [("system", _text(row, "system"))] if _filled(row, "system") else []
    if _filled(row, "messages"):
        turns = [_message(message) for message in _list(row, "messages")]
    elif _filled(row, "instruction"):
        more = f"\n\n{_text(row, 'input')}" if _filled(row, "input") else ""
        question = f"{_text(row, 'instruction')}{more}"
        turns = [("user", question), ("assistant", _text(row, "output"))]
    elif "instruction" in row and not _filled(row, "prompt"):
        raise WrongType("instruction is empty")
    elif isinstance(row["prompt"], list):
        asked, answers = _list(row, "prompt"), _list(row, "completion")
        if not answers:
            raise WrongType("completion is empty")
        turns = [_message(message) for message in [*asked, *answers]]
    else:
        turns = [("user", _text(row, "prompt")), ("assistant", _text(row, "completion"))]
    if not turns:
        raise WrongType("messages is empty")
    if before and turns[0][0] == "system":
        raise WrongType("it has a system message twice, in system and among its messages")
    return [*before, *turns]


def _given(row: Row) -> int:
    """Where messages stand in `prompt` and `completion`, the former are given."""
    alone = not (_filled(row, "messages") or _filled(row, "instruction"))
    if not (alone and isinstance(row.get("prompt"), list)):
        return 0
    return len(row["prompt"]) + _filled(row, "system")


def _list(row: Row, key: str) -> list[Any]:
    values = row[key]
    if not isinstance(values, list):
        raise WrongType(f"{key} is {_kind(values)}, not a list")
    return values


def _message(message: object) -> Turn:
    if not isinstance(message, dict):
        raise WrongType(f"one of messages is {_kind(message)}, not an object")
    if message.get("tool_calls"):
        raise WrongType("one of messages has tool_calls, which are not trained")
    return _text(message, "role"), _text(message, "content")


def _last_answer(row: Row) -> tuple[str, list[str], list[int]]:
    *before, (role, answer) = _conversation(row)
    if role != "assistant":
        raise WrongType("the last message is not the assistant's")
    if not before or before[0][0] == "assistant":
        raise WrongType("nothing stands before the assistant's first message")
    return "\n".join(f"{who}: {what}" for who, what in before), [answer], [0]


register_task(
    Task(
        name="chat",
        plain=_last_answer,
        schema=(
            "needs messages (a list of {role, content}, the last one the assistant's), or"
            " instruction and output (input is optional), or prompt and completion (texts, or lists"
            " of messages, of which those in completion are trained)"
        ),
        metric="exact_match",
        placeholder={"output": "?", "completion": "?"},
        turns=_conversation,
        given=_given,
    )
)


def classification(
    template: str, label: str, labels: Sequence[str] = (), *, listed: bool = False
) -> Task:
    """The task of choosing a label for what `template` makes of a row's columns. Without `labels`
    a row's own one is its only choice, which is all that training needs. Where they are `listed` in
    the configuration and none is a number, a row's whole number is its label's place there.

    Raises:
        ConfigurationError: the template names no column, or cannot be read.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigurationError(
            f"data.template: {template!r} cannot be read ({error}): write the names of columns in"
            " braces, such as {text}, and braces of the text itself twice"
        ) from error
    columns = [name for _, name, _, _ in parts if name is not None]
    if not columns or any(form or turned for _, _, form, turned in parts):
        raise ConfigurationError(
            f"data.template: {template!r} must name a column in braces, such as {{text}}, and"
            " nothing else there"
        )
    known = {name: index for index, name in enumerate(labels)}
    places = listed and not any(_is_whole(name) for name in labels)

    def render(row: Row) -> tuple[str, list[str], list[int]]:
        context = "".join(
            before + (_text(row, name) if name is not None else "") for before, name, _, _ in parts
        )
        value = row[label]
        if isinstance(value, bool) or not isinstance(value, str | int):
            kind = "a number with a point" if isinstance(value, float) else _kind(value)
            raise WrongType(f"{label} is {kind}, not a text or a whole number")
        own = str(value).strip()
        if not labels:
            return context.rstrip(), [own], [0]
        if own in known:
            return context.rstrip(), list(labels), [known[own]]
        counted = int(own) if _is_whole(own) else None
        place = value.number if isinstance(value, ClassName) else counted
        if not places or place is None:
            raise WrongType(f"its label is not one of the {len(labels)} to choose from")
        if place >= len(labels):
            raise WrongType(f"its label is a place, but there are {len(labels)} labels, from 0")
        return context.rstrip(), list(labels), [place]

    needed = ", ".join(dict.fromkeys(columns))
    return Task(
        name=LABELLED,
        plain=render,
        schema=f"needs {needed} (strings) and {label} (a string, or a whole number)",
        placeholder={label: labels[0] if labels else "?"},
    )


def _is_whole(name: str) -> bool:
    return name.isdecimal() and name.isascii()


register_task(classification("{text}\nLabel:", "label"))


def find_task(name: str) -> Task:
    """The task of this name, registered or brought by an installed package.

    Raises:
        DataError: there is none.
        ConfigurationError: as `load_installed`.
    """
    if brought := load_installed(installed.TASKS, name, Task):
        register_task(brought)
    if name not in TASKS:
        known = [*TASKS, *installed_names(installed.TASKS)]
        raise DataError(
            f"unknown task {name!r}{did_you_mean(name, known) or '; known: ' + ', '.join(known)}"
        )
    return TASKS[name]


def load_rows(
    task: Task, path: str | None, split: str, columns: Mapping[str, str] | None = None
) -> list[Row]:
    """The rows of a split: from `path` if given, else from the hub; none where the task has no such
    split there. `columns`: of files, as `read_rows`.

    Raises:
        DataError: the rows cannot be had, or the task is the user's own and no file is named.
    """
    if path:
        return read_rows(Path(path), columns)
    if task.hub and split in task.splits:
        return hub_rows(*task.hub, task.splits[split])
    if split != "train":
        return []
    why = (
        f"{task.hub[0]} has no train split on the hub:"
        if task.hub
        else f"the task {task.name!r} has no data set of its own, so"
    )
    raise DataError(f"data.train: {why} name a JSONL or CSV file")


def examples_of(task: Task, rows: Iterable[Row]) -> list[Example]:
    """The examples in rows, in their order.

    Raises:
        DataError: a row cannot be used; the message says where it stands.
    """
    return [task.example(row, number) for number, row in enumerate(rows)]
