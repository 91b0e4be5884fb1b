"""How the rows of a run become examples: by its task, or by the one that each row names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fedsp.config import TaskSection
from fedsp.data.files import Row
from fedsp.data.tasks import COMPLETION, LABELLED, Example, Task, classification, find_task
from fedsp.errors import DataError


@dataclass(frozen=True)
class Rendering:
    """The keys of `[data]` that say what rows are, and the labels to choose from, if they are
    known."""

    section: TaskSection
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, section: TaskSection) -> Rendering:
        """That of a configuration or an agreement, with the labels that it lists."""
        return cls(section, tuple(section.labels))

    def with_labels_of(self, examples: Sequence[Example]) -> Rendering:
        """The same, where no labels are given with those of examples to choose from."""
        if self.labels:
            return self
        found = {example.target.strip() for example in examples if example.task == LABELLED}
        return Rendering(self.section, tuple(sorted(found)))

    @cached_property
    def _classification(self) -> Task:
        section = self.section
        listed = bool(section.labels)
        return classification(section.template, section.label, self.labels, listed=listed)

    def task(self, row: Row) -> Task:
        """The task of a row.

        Raises:
            DataError: it names one that is not known.
            ConfigurationError: the template of labels cannot be read.
        """
        column = self.section.task_column
        named = row.get(column) if column else None
        name = self.section.task if named in (None, "") else named
        if not isinstance(name, str):
            raise DataError(
                f"{row.get('__where__', 'a row')}: {column} names the task of the row, and is no"
                " text"
            )
        if name == LABELLED:
            return self._classification
        try:
            return find_task(name)
        except DataError as error:
            where = f"{row['__where__']}: " if named and "__where__" in row else ""
            raise DataError(f"{where}{error}") from error

    def examples(self, rows: Iterable[Row]) -> list[Example]:
        """The examples in rows, in their order.

        Raises:
            DataError: a row cannot be used; the message says where it stands.
        """
        return [self.example(row, number) for number, row in enumerate(rows)]

    def example(self, row: Row, number: int) -> Example:
        """The example in a row.

        Raises:
            DataError: as `examples`.
        """
        return self._with_end(self.task(row).example(row, number))

    def questions(self, rows: Iterable[Row]) -> list[Example]:
        """The questions in rows, whose labels are not read.

        Raises:
            DataError: as `examples`.
        """
        return [
            self._with_end(self.task(row).question(row, number)) for number, row in enumerate(rows)
        ]

    def _with_end(self, found: Example) -> Example:
        ends = self.section.ends and found.task in (COMPLETION, LABELLED)
        return replace(found, ends=True) if ends else found
