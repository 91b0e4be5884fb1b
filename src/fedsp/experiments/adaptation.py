"""Adaptation of a finished run's global model to what its auxiliary model has learned, without
labels (`fedsp.training.server_adaptation`)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsp.data.chat import end_of_turn
from fedsp.data.encoding import Encoded, encode_contexts, encode_pairs, ended
from fedsp.data.files import read_rows
from fedsp.data.seeding import derive_seed
from fedsp.data.tasks import Example, find_task
from fedsp.errors import ConfigurationError, DataError
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import validation_sample
from fedsp.experiments.start import OpenRun, answers_of, open_run, require_new
from fedsp.federation.callbacks import Callbacks
from fedsp.models.adapter import Adapter, AdapterSettings, global_blocks
from fedsp.training.answers import Answering, Answers, Side
from fedsp.training.generation import write
from fedsp.training.server_adaptation import Adaptation, adapt, distance, lessons

TEACHERS: tuple[Answering, ...] = ("mean", "proxy", "auxiliary")
FEWEST = 10
"""Questions that an adaptation needs; a tenth of them is held out."""
LONGEST_ANSWER = 8
"""Tokens of an answer that the teacher writes, where a question has no choices."""


def adapt_run(
    folder: str | Path,
    questions: str | Path,
    to: str | Path,
    settings: Adaptation,
    *,
    answers: Answering | None = None,
    weight: float = 1.0,
    callbacks: Callbacks | None = None,
) -> dict[str, Any]:
    """Train low-rank adapters in all layers of a run's global model to answer `questions`, a file
    in the form of the run's task whose labels are not used, as a teacher answers them; write them
    to `to` as a PEFT LoRA adapter if they are better than what the run tuned. Better means a lower
    loss on the run's validation questions, which are left out of `questions`, or, where it has
    none, answers closer to the teacher's on a tenth of the questions, held out.

    `answers` is the teacher; None: the one with the lowest loss on those validation questions or,
    where there are none, the mean of both models. Returns who it was, whether the adapters were
    `kept`, that `measure` `before` and `after`, and the figures of the test questions, if the run
    has any: with what it tuned, by the teacher, and after.

    Raises:
        RunError: there is no run, it has no auxiliary model, or `to` is in use.
        ConfigurationError: the teacher would be the global model alone.
        DataError: there are too few questions, or one cannot be used.
        TrainingDiverged: a loss is not finite.
    """
    require_new(Path(to))
    if answers == "global":
        raise ConfigurationError(
            "answers = 'global': the global model is its own teacher; choose mean, proxy or"
            " auxiliary"
        )
    callbacks = callbacks or Callbacks()
    data = RunDirectory.open(Path(folder)).config.data
    unread = {*find_task(data.task).placeholder, data.label}
    named = {field: name for field, name in data.columns.items() if field not in unread}
    rows = read_rows(Path(questions), named)
    run = open_run(folder)
    dataset, seed = run.server.dataset, run.directory.config.seed
    validation = validation_sample(run.server)
    known = {example.context for example in [*validation, *dataset.test]}
    asked = dataset.rendering.questions(rows)
    asked = [example for example in asked if example.context not in known]
    tuned, (taught_by, teacher) = run.side(), _teacher(run, answers, weight, validation)
    random.Random(derive_seed(seed, "adaptation, held out")).shuffle(asked)
    apart = 0 if validation else len(asked) // 10
    held_out, taught = (
        lessons(teacher, _answered(run, some, teacher), settings.temperature)
        for some in (asked[:apart], asked[apart:])
    )
    if len(asked) < FEWEST or not taught or not (validation or held_out):
        raise DataError(
            f"{questions} has {len(asked)} questions that are none of the run's own for validation"
            f" or its test, and the teacher answers {len(held_out) + len(taught)} times: give at"
            f" least {FEWEST} that it answers"
        )
    callbacks.info(f"the teacher has answered {len(asked)} questions")

    def measure(answering: Side) -> float:
        if validation:
            return float(run.score(answering, validation)["answer_loss"])
        return distance(answering, held_out, settings.temperature)

    def test(answering: Answers) -> dict[str, float]:
        return run.score(answering, dataset.test) if dataset.test else {}

    before, test_before, test_teacher = measure(tuned), test(tuned), test(teacher)
    student = _student(run)
    adapt(run.model, student, taught, settings, seed=seed)
    adapted = Side(run.model, lambda: None)
    after = measure(adapted)
    if after < before:
        student.export(run.model, Path(to))
    return {
        "teacher": taught_by,
        "kept": after < before,
        "measure": "validation loss" if validation else "divergence from the teacher",
        "before": before,
        "after": after,
        "test_before": test_before,
        "test_teacher": test_teacher,
        "test_after": test(adapted),
        "questions": len(asked),
    }


def _teacher(
    run: OpenRun, answers: Answering | None, weight: float, validation: list[Example]
) -> tuple[Answering, Answers]:
    """The teacher, and what it is called."""
    if answers or not validation:
        named = answers or "mean"
        return named, answers_of(run, named, weight)

    def loss(named: Answering) -> float:
        return float(run.score(answers_of(run, named, weight), validation)["answer_loss"])

    best = min(TEACHERS, key=loss)
    return best, answers_of(run, best, weight)


def _answered(run: OpenRun, asked: Sequence[Example], teacher: Answers) -> list[Encoded]:
    """Every choice of the questions or, where they have none, what the teacher writes behind
    them; with the end token behind those that the run trains with one, or that the teacher ends."""
    tokenizer, most = run.server.tokenizer, run.server.max_tokens
    stop = end_of_turn(tokenizer)
    end = min(stop, default=None)  # which one stands there is not read
    chosen = [example for example in asked if example.metric == "accuracy"]
    pairs = [(example.context, choice) for example in chosen for choice in example.choices]
    ends = [example.ends for example in chosen for _ in example.choices]
    room = min(teacher.room(), most) - LONGEST_ANSWER
    written = [example for example in asked if example.metric != "accuracy"]
    texts = [tuple(ids[-room:]) for ids in encode_contexts(tokenizer, written)]
    answered = [
        row for row in write(teacher, texts, LONGEST_ANSWER, stop) if len(row.ids) > row.start
    ]
    stopped = [len(row.ids) - row.start < LONGEST_ANSWER for row in answered]
    return [
        ended(row, end, most) if end is not None and to_its_end else row
        for row, to_its_end in zip(
            [*encode_pairs(tokenizer, pairs, most), *answered], [*ends, *stopped], strict=True
        )
    ]


def _student(run: OpenRun) -> Adapter:
    """Adapters in all layers of the global model, which is as it was before the run; where the run
    tuned adapters, they begin with those numbers."""
    run.prefix(zero_shot=True)
    section = run.directory.config.messenger
    blocks = global_blocks(range(run.model.shape.layers))
    settings = AdapterSettings(rank=section.rank, alpha=section.alpha, train_first=True)
    student = Adapter(run.model, blocks, settings, seed=run.directory.config.seed)
    start = student.payload()
    student.load(start | {name: run.best[name] for name in start if name in run.best})
    return student
