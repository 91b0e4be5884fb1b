"""The examples of a run: what each is for, and who holds which."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsp.config import DataSection, RunConfig
from fedsp.data.files import Row, fields_of
from fedsp.data.partition import Partition, group_of, make_partition, read_partition
from fedsp.data.rendering import Rendering
from fedsp.data.seeding import derive_seed
from fedsp.data.tasks import LABELLED, Example, find_task, load_rows
from fedsp.data.topics import find_topics
from fedsp.errors import DataError

TOPIC = "topic"
"""The column of topics, where examples are divided by them."""


EvaluationGroups = tuple[list[str], list[str]]
"""For each training and each test example, its topic or its value of the partition's column."""


@dataclass(kw_only=True)
class FederatedDataset:
    """The examples of a run.

    rendering: how rows become examples.
    train: all training examples; `partition` holds the indices that each party has.
    train_digest: SHA-256 of the training rows, which a resumed run must find again.
    validation, test: the server's validation examples, and the test examples.
    groups: each example's topic or value of the partition's column, by which per-client metrics
        are weighted; None without either.
    """

    rendering: Rendering
    train: list[Example]
    train_digest: str
    partition: Partition
    validation: list[Example]
    test: list[Example]
    groups: EvaluationGroups | None = None

    def held(self, indices: Sequence[int]) -> list[Example]:
        """The training examples with these indices."""
        return [self.train[index] for index in indices]


def rows_digest(rows: list[Row]) -> str:
    """SHA-256 of rows in their order; the files and lines that they come from do not matter."""
    content = [fields_of(row) for row in rows]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def examples_digest(examples: list[Example]) -> str:
    """SHA-256 of examples in their order, as they are scored."""
    content = [[example.context, example.choices, example.gold] for example in examples]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_dataset(config: RunConfig, written: dict[str, Any] | None = None) -> FederatedDataset:
    """Read the examples that a configuration names, and divide them among the parties: by
    `written`, the content of a run's partition.json, or, without it, anew from the seed.

    Raises:
        DataError: a file or row is invalid, or the rows cannot be divided as configured.
    """
    data, task, rendering = config.data, find_task(config.data.task), Rendering.of(config.data)
    absent = config.federation is not None and data.train is None  # a server without examples
    if config.model.offline and task.hub and not (data.train or absent):
        raise DataError(
            f"data.train: it names no file, and model.offline = true lets nothing of the task"
            f" {task.name!r} be fetched from the hub"
        )
    rows = [] if absent else load_rows(task, data.train, "train", data.columns)
    train = rendering.examples(rows)
    private = config.privacy.unit != "none" and not config.federation
    if private and not rendering.labels and any(row.task == LABELLED for row in train):
        raise DataError(
            "data.labels: the labels to choose from would be those of private examples, and a"
            " figure of the test would tell, without noise, of one that a single client has: list"
            " them"
        )
    rendering = rendering.with_labels_of(train)
    from_hub = data.train is None and not absent
    checked: list[Row] = []
    if data.validation or from_hub:
        checked = load_rows(task, data.validation, "validation", data.columns)
    validation = rendering.examples(checked)
    test_rows = load_rows(task, data.test, "test", data.columns) if data.test or from_hub else []
    test_rows = _drawn(test_rows, data.test_examples)
    test = rendering.examples(test_rows)
    if not rendering.labels and any(row.task == LABELLED for row in [*validation, *test]):
        raise DataError(
            "data.labels: the server holds no training examples to take the labels from: list them"
        )
    if data.task_column and not config.federation:  # there, clients alone may name tasks
        _require_column(data.task_column, [*rows, *checked, *test_rows])
    groups = _groups(config, (rows, test_rows), (train, test))
    if written:
        partition = read_partition(written, len(train))
    else:
        partition = _divide(
            config, rows, groups, validated=bool(validation), tested=bool(test) or from_hub
        )
    # with all labels to choose from, which were not known at first
    validation = validation or [rendering.example(rows[at], at) for at in partition.validation]
    if held := _drawn(partition.test, config.data.test_examples):
        test = [rendering.example(rows[at], at) for at in held]
        groups = groups and (groups[0], [groups[0][at] for at in held])
    if config.validation.by == "server" and not validation:
        raise DataError(
            "validation.by = 'server', but there are no validation questions: set data.validation"
            " or data.holdout"
        )
    if config.server.steps and not partition.server:
        raise DataError(
            "server.steps is above 0, but the server holds no example: raise partition.server_share"
        )
    return FederatedDataset(
        rendering=rendering,
        train=train,
        train_digest=rows_digest(rows),
        partition=partition,
        validation=validation,
        test=test,
        groups=groups,
    )


def examples_of_file(data: DataSection, rendering: Rendering, split: str) -> list[Example]:
    """The examples of a split, as `load_dataset` has them, where a file of its own holds them; none
    where none does. No other file is read.

    Raises:
        DataError: the file or a row is invalid.
    """
    path = {"validation": data.validation, "test": data.test}[split]
    if not path:
        return []
    rows = load_rows(find_task(data.task), path, split, data.columns)
    return rendering.examples(_drawn(rows, data.test_examples) if split == "test" else rows)


def _require_column(name: str, rows: list[Row]) -> None:
    if not any(name in row for row in rows):
        raise DataError(
            f"data.task_column = {name!r}: no row has such a column; they have"
            f" {', '.join(sorted({field for row in rows for field in fields_of(row)}))}"
        )


def _drawn(some: list[Any], count: int | None) -> list[Any]:
    """At most so many of them, the same for every seed, so that runs can be paired."""
    if not count or count >= len(some):
        return some
    return random.Random(derive_seed(0, "test")).sample(some, count)


def _divide(
    config: RunConfig,
    rows: list[Row],
    groups: EvaluationGroups | None,
    *,
    validated: bool,
    tested: bool,
) -> Partition:
    """A partition from the seed; with `validated` no example is held out for validation, with
    `tested` none for the test."""
    changes: dict[str, Any] = {"clients": 0} if config.federation else {}
    if config.partition.topics:
        changes["column"] = TOPIC
        if groups:
            pairs = zip(rows, groups[0], strict=True)
            rows = [row | {TOPIC: topic} for row, topic in pairs]
    return make_partition(
        rows,
        config.partition.model_copy(update=changes),
        server_share=config.server_share,
        holdout=0.0 if validated or config.validation.by != "server" else config.data.holdout,
        test_holdout=0.0 if tested else config.data.test_holdout,
        seed=config.seed,
    )


def _groups(
    config: RunConfig,
    rows: tuple[list[Row], list[Row]],
    examples: tuple[list[Example], list[Example]],
) -> EvaluationGroups | None:
    """Topics, or a column that all training and test rows have; None without either."""
    column, topics = config.partition.column, config.partition.topics
    if topics and not config.federation:
        contexts = (tuple(example.context for example in some) for some in examples)
        seed = derive_seed(config.seed, "topics") % 2**32
        return find_topics(*contexts, count=topics, seed=seed)
    if column and all(column in row for some in rows for row in some):
        train, test = (  # a test row may have no value
            ["" if row[column] in (None, "") else group_of(row, column) for row in some]
            for some in rows
        )
        return train, test
    return None
