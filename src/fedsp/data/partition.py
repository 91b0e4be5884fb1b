"""Who holds which training questions: the server's share first, then `flwr-datasets` among the
clients. Seeded, and written to disk."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fedsp.config import PartitionSection
from fedsp.data.files import Row, fields_of
from fedsp.data.seeding import derive_seed
from fedsp.errors import DataError

ROW = "__row__"


@dataclass(frozen=True)
class Partition:
    """Row numbers of train, by holder. No row has two holders."""

    server: list[int]
    validation: list[int]
    clients: dict[str, list[int]]
    test: list[int] = field(default_factory=list)


def read_partition(written: dict[str, Any], rows: int) -> Partition:
    """Parse the content of a partition.json for `rows` training rows.

    Raises:
        DataError: it is damaged, or has indices outside of these rows.
    """
    try:
        partition = Partition(
            list(written["server"]),
            list(written["validation"]),
            {str(name): list(held) for name, held in written["clients"].items()},
            list(written.get("test", [])),
        )
        held = [
            *partition.server,
            *partition.validation,
            *partition.test,
            *(row for owned in partition.clients.values() for row in owned),
        ]
        if all(isinstance(row, int) and 0 <= row < rows for row in held):
            return partition
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "the run's partition.json is damaged: restore it, or start a new run"
        ) from error
    raise DataError(
        f"the run's partition.json does not fit the {rows} rows of data.train: restore the file"
        " that the run was started with"
    )


def make_partition(
    rows: Sequence[Row],
    section: PartitionSection,
    *,
    server_share: float,
    holdout: float,
    test_holdout: float = 0.0,
    seed: int,
) -> Partition:
    """Hold out validation and test rows, give the server its share, and divide the rest among the
    clients.

    Raises:
        DataError: there are more clients than rows, a client would be empty, or the column is not
            there.
    """
    order = list(range(len(rows)))
    # the same for every seed, so that runs can be paired
    drawn = random.Random(derive_seed(0, "test")).sample(order, round(test_holdout * len(order)))
    test, tested = sorted(drawn), set(drawn)
    random.Random(derive_seed(seed, "partition")).shuffle(order)
    left = (index for index in order if index not in tested)
    validation, server = (
        sorted(islice(left, round(share * len(rows)))) for share in (holdout, server_share)
    )
    remaining = list(left)
    if section.server_values:
        own, remaining = _owned(rows, remaining, section)
        server += own
    if not section.clients:
        return Partition(sorted(server + remaining), validation, {}, test)
    if section.kind != "natural" and section.clients > len(remaining):
        raise DataError(
            f"partition.clients = {section.clients}, but only {len(remaining)} training examples"
            " are left for clients: use fewer clients or more examples"
        )
    clients = _divide(rows, remaining, section, derive_seed(seed, "clients") % 2**32)
    empty = [client for client, owned_rows in clients.items() if not owned_rows]
    if empty:
        raise DataError(
            f"client {empty[0]!r} would hold no example: use fewer clients, a larger"
            " partition.alpha, or another column"
        )
    return Partition(server, validation, clients, test)


def _owned(
    rows: Sequence[Row], remaining: list[int], section: PartitionSection
) -> tuple[list[int], list[int]]:
    """The rows with one of the server's values of the column, sorted, and the others."""
    column = str(section.column)
    values = {index: group_of(rows[index], column) for index in remaining}
    if missing := sorted(set(section.server_values) - set(values.values())):
        raise DataError(
            f"partition.server_values: no training example has {missing[0]!r} in column {column!r}"
        )
    own = sorted(index for index in remaining if values[index] in section.server_values)
    return own, [index for index in remaining if values[index] not in section.server_values]


def _divide(
    rows: Sequence[Row], remaining: list[int], section: PartitionSection, seed: int
) -> dict[str, list[int]]:
    """Rows by client, by the partitioner of flwr-datasets that the section names."""
    if not remaining:
        raise DataError(
            "no training examples are left for the clients: lower partition.server_share, or set"
            " partition.clients = 0"
        )
    # every (clients)-th of a shuffled list: what its IidPartitioner does, without a table in memory
    if section.kind == "even":
        width = len(str(section.clients - 1))
        return {
            f"client-{index:0{width}d}": sorted(remaining[index :: section.clients])
            for index in range(section.clients)
        }
    from flwr_datasets import partitioner as flower

    if section.kind in ("linear", "exponential"):
        linear = section.kind == "linear"
        sizes = flower.LinearPartitioner if linear else flower.ExponentialPartitioner
        return _parts(sizes(section.clients), {ROW: remaining}, section)
    column = str(section.column)
    values = [group_of(rows[index], column) for index in remaining]
    if section.kind == "natural":
        partitioner = flower.NaturalIdPartitioner(partition_by=column)
    elif section.kind == "dirichlet":
        partitioner = flower.DirichletPartitioner(
            section.clients,
            column,
            section.alpha,
            min_partition_size=1,
            self_balancing=False,
            seed=seed,
        )
    else:
        if section.values_per_client > len(Counter(values)):
            raise DataError(
                f"partition.values_per_client = {section.values_per_client}, but column {column!r}"
                f" has {len(Counter(values))} values"
            )
        partitioner = flower.PathologicalPartitioner(
            section.clients,
            column,
            section.values_per_client,
            class_assignment_mode="deterministic",
            seed=seed,
        )
    clients = _parts(partitioner, {ROW: remaining, column: values}, section)
    left = len(remaining) - sum(len(part) for part in clients.values())
    if left:
        raise DataError(
            f"partition.values_per_client = {section.values_per_client} for {section.clients}"
            f" clients leaves {left} examples to nobody: raise either"
        )
    if section.kind == "natural":
        return {group_of(rows[part[0]], column): part for part in clients.values()}
    return clients


def group_of(row: Row, column: str) -> str:
    """The value of a row in `column`, as the string that names its group.

    Raises:
        DataError: there is no such column, the value is missing, or is not a string or an integer.
    """
    if column not in row:
        raise DataError(
            f"{row.get('__where__', 'a row')} has no column {column!r}, which partition.column"
            f" names; it has {sorted(fields_of(row))}"
        )
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        what = "no value" if value in (None, "") else f"a {type(value).__name__}"
        raise DataError(
            f"{row.get('__where__', 'a row')} has {what} in column {column!r}, which"
            " partition.column names: expected a string or an integer"
        )
    return str(value)


def _parts(
    partitioner: Any, columns: dict[str, list[Any]], section: PartitionSection
) -> dict[str, list[int]]:
    """Rows by client, as a partitioner of flwr-datasets divides a table of these columns."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict(columns)
    try:
        # of draws that were made again; a draw that never fits raises
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            parts = [
                sorted(partitioner.load_partition(index)[ROW])
                for index in range(partitioner.num_partitions)
            ]
    except ValueError as error:
        by = f" over {section.column!r}" if section.column else ""
        raise DataError(
            f"partition.kind = {section.kind!r}{by} with {section.clients} clients cannot be made:"
            f" {str(error).splitlines()[0]}"
        ) from error
    width = len(str(len(parts) - 1))
    return {f"client-{index:0{width}d}": part for index, part in enumerate(parts)}
