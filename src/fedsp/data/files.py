"""Questions from files and from the hub, with the line that is wrong when one is."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from fedsp.errors import DataError, first_line

Row = dict[str, Any]


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8", newline="")


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL or CSV file, gzipped or not. In a CSV, `choices` is a JSON list.

    Raises:
        DataError: the file is missing, not text, or a line is not a JSON object; the message gives the line number.
    """
    try:
        with _open(path) as file:
            rows = list(_csv_rows(path, file) if ".csv" in path.suffixes else _json_rows(path, file))
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def _json_rows(path: Path, lines: Iterable[str]) -> Iterable[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}): expected one JSON object per line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is a JSON {type(row).__name__}: expected one JSON object per line")
        yield row | {"__where__": f"{path}, line {number}"}


def _csv_rows(path: Path, file: IO[str]) -> Iterable[Row]:
    reader = csv.DictReader(file)
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        values: Row = {key: value for key, value in row.items() if key is not None}
        if "choices" in values:
            try:
                values["choices"], values["answer"] = json.loads(values["choices"] or ""), int(values["answer"])
            except (TypeError, ValueError, KeyError) as error:
                raise DataError(f'{where}: in a CSV, choices is a JSON list such as ["yes", "no"] and answer its index ({error})') from error
        yield values | {"__where__": where}


def hub_rows(path: str, name: str | None, split: str) -> list[Row]:
    """The rows of one split of a data set on the Hugging Face hub.

    Raises:
        DataError: the hub does not answer or has no such data set.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(path, name, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError(f"cannot load {path} ({split}) from the Hugging Face hub: {first_line(error)}; or name local files in [data]") from error
    return [dict(row) | {"__where__": f"{path} {split}, row {number}"} for number, row in enumerate(dataset)]


def read_passages(paths: Iterable[str | Path]) -> list[str]:
    """The passages of text files, split at blank lines.

    Raises:
        DataError: a file is missing, not text, or empty.
    """
    passages: list[str] = []
    for path in map(Path, paths):
        try:
            with _open(path) as file:
                found = [passage.strip() for passage in file.read().replace("\r\n", "\n").split("\n\n") if passage.strip()]
        except FileNotFoundError as error:
            raise DataError(f"there is no text file {path}") from error
        except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
            raise DataError(f"cannot read the text file {path}: {error}") from error
        if not found:
            raise DataError(f"the text file {path} holds no text")
        passages += found
    return passages
