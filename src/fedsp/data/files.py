"""Questions from files and from the hub, with the line that is wrong when one is."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

from fedsp.errors import DataError, first_line, require_installed
from fedsp.storage import parse_json

Row = dict[str, Any]
UTF8, UTF16 = "utf-8-sig", "utf-16"
TABLES = (".csv", ".tsv")
WORKBOOKS = (".xlsx", ".xlsm")
QUERY, URL = ".sql", "-- url:"
"""The kind of a file that holds a query, and what its first line begins with."""
ARCHIVE = b"PK\x03\x04"
WESTERN, CENTRAL = "cp1252", "cp1250"
EXCEL = [WESTERN, CENTRAL, "cp1251", "cp1253", "cp1254", "cp932", "gb18030", "big5", "euc_kr"]
"""The encodings in which Excel saves tables in different countries."""
NOT_WESTERN = re.compile(r"[^\W\d_][¹³¼¾¿£¥þªº](?=[^\W\d_])|[^\W\d_]{4}³\b")
"""What ą, ł, Ľ, ľ, ż, Ł, Ą, ţ, Ş and ş of Central Europe become in the Western code page: signs
within or behind a word."""
HUNGARIAN = re.compile(r"õ(?![eE])")
"""What ő becomes; Portuguese has õ before e alone, and Estonian no accents beside it."""
RARE = 0.05
"""The share of letters beyond ASCII up to which such signs may be a name, or a slip."""


class ClassName(str):
    """The name of a class, and its number, which counts where an index belongs."""

    number: int


@contextmanager
def _open(path: Path, what: str, encoding: str = UTF8) -> Iterator[IO[str]]:
    """A text file, gzipped or not, in UTF-8 with or without a byte order mark unless another
    `encoding` is given, its line ends as they are.

    Raises:
        DataError: it is missing, or cannot be read as text.
    """
    try:
        with _opener(path)(path, "rt", encoding=encoding, newline="") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"there is no {what} {path}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path}: {_what_it_is(error.object)}") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def how_it_is_read(path: Path) -> str:
    """How `read_rows` reads a file, in a few words, as its name and its bytes decide."""
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if path.is_dir():
        return "a folder of Parquet files, or a saved data set"
    if kind not in TABLES:
        names = {".parquet": "Parquet", QUERY: "the answer of a database"} | dict.fromkeys(
            WORKBOOKS, "the first sheet of a workbook"
        )
        return names.get(kind, "JSON")
    encoding = _encoding_of(path)
    with _open(path, "file", encoding) as file:
        divider = _header(path, file).divider
    marks = {",": "commas", ";": "semicolons", "\t": "tabs"}
    name = {UTF8: "UTF-8", UTF16: "UTF-16"}.get(encoding, encoding)
    return f"a table in {name}, divided by {marks.get(divider, repr(divider))}"


def _opener(path: Path) -> Any:
    return gzip.open if path.suffix.lower() == ".gz" else open


def _encoding_of(path: Path) -> str:
    """The encoding of a table: UTF-8, UTF-16 where a byte order mark says so, or the likeliest of
    those that Excel writes (charset-normalizer). UTF-8 too where nothing fits, or the file cannot
    be read, which whoever opens it finds out."""
    try:
        with _opener(path)(path, "rb") as file:
            data: bytes = file.read()
    except (OSError, EOFError, zlib.error):
        return UTF8
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return UTF16
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return UTF8 if data.startswith(ARCHIVE) else _code_page_of(data)
    return UTF8


def _code_page_of(data: bytes) -> str:
    """The likeliest code page of text; UTF-8 where none fits. Western and Central European text
    look alike to charset-normalizer: of the two, the Central one is taken where the other would
    have what no Western language has; else the Western one, if it fits as well."""
    from charset_normalizer import from_bytes

    matches = from_bytes(data, cp_isolation=EXCEL)
    best = matches.best()
    if best is None:
        return UTF8
    if best.encoding in (WESTERN, CENTRAL):
        western = next((one for one in matches if WESTERN in one.could_be_from_charset), None)
        if western and _reads_wrong(str(western)):
            return CENTRAL
        as_orderly = western and western.chaos <= best.chaos + RARE
        if western and as_orderly and western.coherence >= best.coherence:
            return WESTERN
    return str(best.encoding)


def _reads_wrong(text: str) -> bool:
    """Whether text that was read as Western holds much that no Western language has."""
    beyond = sum(not letter.isascii() for letter in text)
    signs = len(NOT_WESTERN.findall(text))
    if any(letter in text for letter in "áéíóú"):
        signs += len(HUNGARIAN.findall(text))
    return signs > RARE * beyond


def _what_it_is(data: bytes) -> str:
    """What a file is that is not UTF-8 text, and what to do."""
    if data.startswith(ARCHIVE):
        return "it is a spreadsheet or an archive; export the sheet as CSV (UTF-8)"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is UTF-16 (Excel's 'Unicode text'); save it as CSV UTF-8"
    return "it is not UTF-8 text; save it as UTF-8"


def read_rows(path: Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of a file, by its name: a table (.csv, .tsv), the first sheet of an Excel workbook
    (.xlsx), a Parquet file (.parquet), or JSON, one object per line or a list of them; .gz may
    stand behind tables and JSON. Of a folder, the rows of its Parquet files in the order of their
    names, or of a data set that `datasets` has saved there. Of a query (.sql), whose first line
    names a database, the rows that this answers. The columns of a table are divided by
    commas, semicolons or tabs, as its first line is; in tables and workbooks, `choices` is a JSON
    list. `columns`: the file's own names of fields, by the names that they get.

    Raises:
        DataError: the file is missing, not text, or a row cannot be used; the message says where it
            stands.
    """
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if path.is_dir():
        rows = list(_folder_rows(path))
    elif kind == ".parquet":
        rows = list(_parquet_rows(path))
    elif kind in WORKBOOKS:
        rows = list(_cell_rows(path, _cells(path)))
    elif kind == QUERY:
        rows = list(_cell_rows(path, _answers(path)))
    else:
        encoding = _encoding_of(path) if kind in TABLES else UTF8
        if encoding not in (UTF8, UTF16):
            logging.getLogger("fedsp").warning(
                "%s is no UTF-8: it is read as %s; if letters look wrong, save it as CSV UTF-8",
                path,
                encoding,
            )
        with _open(path, "file", encoding) as file:
            rows = list(_table_rows(path, file) if kind in TABLES else _json_rows(path, file))
    if not rows:
        raise DataError(f"{path} holds no rows")
    if columns:
        rows = [_renamed(row, columns) for row in rows]
    return [_with_choices(row) for row in rows] if kind in (*TABLES, *WORKBOOKS, QUERY) else rows


def fields_of(row: Row) -> Row:
    """A row without the place that it comes from."""
    return {name: value for name, value in row.items() if name != "__where__"}


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    if missing := [name for name in columns.values() if name not in row]:
        raise DataError(
            f"{row['__where__']} has no column {missing[0]!r}, which data.columns names; it has"
            f" {sorted(fields_of(row))}"
        )
    others = {key: value for key, value in row.items() if key not in columns.values()}
    return others | {field: row[name] for field, name in columns.items()}


def _folder_rows(folder: Path) -> Iterable[Row]:
    if (folder / "dataset_dict.json").is_file():
        inside = sorted(part.name for part in folder.iterdir() if part.is_dir())
        raise DataError(
            f"{folder} holds several splits of a data set: name one of them, such as"
            f" {folder / inside[0] if inside else folder}"
        )
    if (folder / "state.json").is_file():
        from datasets import ClassLabel, load_from_disk

        try:
            saved = load_from_disk(str(folder))
            rows = saved.to_list()
            columns = saved.features.items()
        except Exception as error:  # of as many kinds as there are ways to be damaged
            raise DataError(f"cannot read the data set in {folder}: {first_line(error)}") from error
        classes = {name: about.names for name, about in columns if isinstance(about, ClassLabel)}
        yield from _numbered(folder, _named(folder, rows, classes))
        return
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(
            f"{folder} is a folder without Parquet files and without a saved data set: name a file"
        )
    for file in files:
        yield from _parquet_rows(file)


def _parquet_rows(path: Path) -> Iterable[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for part in file.iter_batches() for row in part.to_pylist())
            yield from _numbered(path, _named(path, rows, _classes_of(path, file.schema_arrow)))
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as Parquet: {first_line(error)}") from error


def _classes_of(path: Path, schema: Any) -> dict[str, list[str]]:
    """The names of classes by column, as `datasets` wrote them into a Parquet file."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None:
        return {}
    try:
        features = json.loads(written)["info"]["features"]
        return {
            column: list(map(str, about["names"]))
            for column, about in features.items()
            if isinstance(about, dict) and about.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"cannot read {path}: what `datasets` wrote there of its columns is damaged"
        ) from error


def _named(path: Path, rows: Iterable[Row], classes: Mapping[str, list[str]]) -> Iterable[Row]:
    """Rows with the names of classes where `datasets` numbers them (ClassLabel); its -1 is none."""
    for place, row in enumerate(rows):
        named: Row = {}
        for column, names in classes.items():
            number = row.get(column)
            if not isinstance(number, int):
                continue
            if number >= len(names):
                raise DataError(
                    f"{path}, row {place} has {column} {number}, but its file names {len(names)}"
                    " classes, from 0"
                )
            named[column] = ClassName(names[number]) if number >= 0 else None
            if number >= 0:
                named[column].number = number
        yield row | named


def _numbered(path: Path, rows: Iterable[Any]) -> Iterable[Row]:
    """Rows that stand on no line, with their numbers, from 0."""
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where} is not an object: expected a list of objects")
        if _holds_nul(row):
            raise DataError(f"{where} holds a NUL character, which no text has")
        yield row | {"__where__": where}


def _json_rows(path: Path, file: IO[str]) -> Iterable[Row]:
    begun = False
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if not begun and line.lstrip().startswith("["):
            yield from _json_list(path, line + file.read())
            return
        begun = True
        try:
            row = parse_json(line)
            if "\\u0000" in line and _holds_nul(row):
                raise ValueError("a string holds a NUL character")
        except ValueError as error:
            raise DataError(
                f"{path}, line {number} is not JSON ({error}): expected one JSON object per line"
            ) from error
        if not isinstance(row, dict):
            what = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(
                type(row), "a number"
            )
            raise DataError(f"{path}, line {number} is {what}: expected one JSON object per line")
        yield row | {"__where__": f"{path}, line {number}"}


def _json_list(path: Path, text: str) -> Iterable[Row]:
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise DataError(
            f"{path} begins as a JSON list but is not one ({error}): expected a list of objects, or"
            " one JSON object per line"
        ) from error
    yield from _numbered(path, rows)


@dataclass(frozen=True)
class _Header:
    """The names of a table's columns, what divides them, and the line of the file behind them."""

    names: list[str]
    divider: str
    line: int


def _header(path: Path, file: IO[str]) -> _Header:
    """Reads a table's first line. There are no names where the table is empty."""
    head, line = "", 1
    while not head.strip():
        part = file.readline()
        if not part:
            return _Header([], ",", line)
        head, line = part, line + 1
    divider = ""
    if head.lower().startswith("sep=") and len(head.strip()) == 5:  # a line for Excel alone
        divider, head, line = head.strip()[4], file.readline(), line + 1
    while head.count('"') % 2 and (part := file.readline()):  # a name over several lines
        head, line = head + part, line + 1
    divider = divider or max(",;\t", key=lambda mark: len(_names(head, mark)))
    names = _names(head, divider)
    if len(names) == 1 and "|" in names[0]:
        raise DataError(
            f"{path}, line {line - 1} divides its columns by '|': save the table with commas,"
            " semicolons or tabs"
        )
    _require_names(names, f"{path}, line {line - 1}")
    return _Header(names, divider, line)


def _table_rows(path: Path, file: IO[str]) -> Iterable[Row]:
    csv.field_size_limit(sys.maxsize)  # a field is as long as a text may be
    header = _header(path, file)
    names, divider, line = header.names, header.divider, header.line
    if not names:
        return
    reader = csv.reader(file, delimiter=divider, strict=True)
    while True:
        where, before = f"{path}, line {line}", reader.line_num
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{where} cannot be read as a row of a table ({error}): a quotation mark inside a"
                " field is doubled, and one that opens is closed"
            ) from error
        if fields is None:
            return
        line += reader.line_num - before
        if not any(field.strip() for field in fields):
            continue
        if any("\0" in field for field in fields):
            raise DataError(
                f"{where} holds a NUL character, which no text has: save the table as UTF-8"
            )
        if len(fields) > len(names) and not any(fields[len(names) :]):
            raise DataError(
                f"{where} ends in more dividers ({divider!r}) than the first line: remove those at"
                " its end"
            )
        if len(fields) != len(names):
            raise DataError(
                f"{where} has {len(fields)} fields, but the first line names {len(names)} columns:"
                f" put a field that contains {divider!r} in quotation marks"
            )
        yield dict(zip(names, fields, strict=True)) | {"__where__": where}


def _require_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names) or "" in names:
        odd = next((name for name in names if names.count(name) > 1 or not name), "")
        raise DataError(
            f"{where} has"
            f" {'a column without a name' if not odd else f'two columns named {odd!r}'}: every"
            " column needs a name of its own"
        )


def _with_choices(row: Row) -> Row:
    """A row of a table, all of whose fields are texts, with `choices` read, and `answer`, which a
    question alone has not."""
    if not row.get("choices"):  # a row of another task
        return row
    try:
        choices = parse_json(row["choices"])
        answer = {"answer": whole_number(row["answer"])} if row.get("answer") else {}
    except (TypeError, ValueError) as error:
        raise DataError(
            f'{row["__where__"]}: in a table, choices is a JSON list such as ["yes", "no"] and'
            f" answer its index ({error})"
        ) from error
    return row | {"choices": choices} | answer


def _cell_rows(path: Path, rows: Iterable[Sequence[Any]]) -> Iterable[Row]:
    """Rows of cells, every cell as the text that it would be in a table: numbers and dates
    (ISO 8601) written out, nothing where it is empty. The first row that is not empty has the
    names."""
    names: list[str] = []
    for number, cells in enumerate(rows, start=1):
        fields = [
            str(cell.isoformat() if isinstance(cell, date | time) else cell).strip()
            if cell is not None
            else ""
            for cell in cells
        ]
        while fields and not fields[-1]:
            fields.pop()
        where = f"{path}, row {number}"
        if not fields:
            continue
        if not names:
            names = fields
            _require_names(names, where)
            continue
        if len(fields) > len(names):
            raise DataError(
                f"{where} has {len(fields)} cells, but the first row names {len(names)} columns:"
                " name every column there"
            )
        fields += [""] * (len(names) - len(fields))
        yield dict(zip(names, fields, strict=True)) | {"__where__": where}


def _cells(path: Path) -> Iterable[Sequence[Any]]:
    require_installed("excel", f"reading the workbook {path} needs", "openpyxl", error=DataError)
    from openpyxl import load_workbook

    try:
        with closing(load_workbook(path, read_only=True, data_only=True)) as book:
            sheet = book.worksheets[0]
            if others := len(book.worksheets) - 1:
                logging.getLogger("fedsp").warning(
                    "%s has %d sheets: the first, %r, is read", path, others + 1, sheet.title
                )
            sheet.reset_dimensions()  # some programs write them wrongly
            cells = list(sheet.iter_rows())
        _require_values(path, cells)
        yield from ([cell.value for cell in row] for row in cells)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except BadZipFile as error:
        raise DataError(
            f"cannot read {path} as an Excel workbook: it is none, or only half of one; get it"
            " again, or save it as .xlsx"
        ) from error
    except DataError:
        raise
    except Exception as error:  # of as many kinds as there are ways to be damaged
        raise DataError(f"cannot read {path} as an Excel workbook: {first_line(error)}") from error


def _require_values(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Refuse cells that hold an error, and formulas whose values nobody has saved.

    Raises:
        DataError: there is one.
    """
    from openpyxl import load_workbook

    for number, cells in enumerate(rows, start=1):
        if error := next((cell.value for cell in cells if cell.data_type == "e"), None):
            raise DataError(f"{path}, row {number} holds the error {error}: mend its formula")
    if all(_has_value(cell) for cells in rows for cell in cells):
        return
    with closing(load_workbook(path, read_only=True)) as book:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()
        for number, (cells, written) in enumerate(zip(rows, sheet.iter_rows(), strict=False), 1):
            for cell, formula in zip(cells, written, strict=False):
                if formula.data_type == "f" and not _has_value(cell):
                    raise DataError(
                        f"{path}, row {number} has a formula without a saved value: open the"
                        " workbook in Excel or LibreOffice and save it there"
                    )


def _has_value(cell: Any) -> bool:
    """Whether a cell has a value, or a formula whose saved value is the empty text."""
    return cell.value is not None or cell.data_type == "str"


def _answers(path: Path) -> Iterable[Sequence[Any]]:
    """The names of a query's columns, and its rows. It is run on a connection whose work is never
    committed."""
    with _open(path, "file") as file:
        head, _, query = file.read().partition("\n")
    if not head.startswith(URL) or not query.strip():
        raise DataError(
            f"{path}: expected {URL!r} and the address of a database in the first line, such as"
            f" {URL} sqlite:///${{HERE}}/tickets.db, and a query below it"
        )
    bare = re.sub(r"'(?:[^']|'')*'|--[^\n]*|/\*.*?\*/", "", query, flags=re.DOTALL)
    if not re.search(r"\border\s+by\b", bare, re.IGNORECASE):
        raise DataError(
            f"{path}: the query has no ORDER BY, so its rows may come in another order each time,"
            " and a run cannot be resumed on them: add one over a unique column"
        )
    require_installed("sql", f"the query {path} needs", "sqlalchemy", error=DataError)
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.exc import SQLAlchemyError

    url = head.removeprefix(URL).strip().replace("${HERE}", str(path.parent.resolve()))
    url = os.path.expandvars(url)
    if unset := re.search(r"\$\{(\w+)\}", url):
        raise DataError(f"{path}: the variable {unset[1]} of the address is not set")
    try:
        try:
            told = make_url(url)
        except ValueError:  # which may quote a part of the password
            raise DataError(
                f"{path}: the address of the database cannot be read: expected"
                " dialect://user:password@host:port/database, with a number for the port and %40,"
                " %3A and %2F for @, : and / in a password"
            ) from None
        database = told.database or ":memory:"
        here = database == ":memory:" or database.startswith("file:") or Path(database).exists()
        if told.get_backend_name() == "sqlite" and not here:
            raise DataError(f"{path}: there is no database {database}")
        with closing(create_engine(told).connect()) as connection:
            if connection.dialect.name == "sqlite":  # it begins no transaction before WITH
                connection.exec_driver_sql("PRAGMA query_only = ON")
            answer = connection.exec_driver_sql(query.strip().removesuffix(";"))
            yield tuple(answer.keys())
            for row in answer:
                if any(isinstance(cell, bytes | memoryview) for cell in row):
                    raise DataError(f"{path}: a column holds bytes: select texts and numbers")
                yield row
    except ImportError as error:
        raise DataError(
            f"{path}: the driver of its database is not installed ({first_line(error)}): install"
            " that Python package"
        ) from error
    except SQLAlchemyError as error:
        raise DataError(f"{path}: the database cannot be asked ({first_line(error)})") from error


def _names(head: str, divider: str) -> list[str]:
    return [
        name.strip()
        for name in next(csv.reader(io.StringIO(head, newline=""), delimiter=divider), [])
    ]


def _holds_nul(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_nul, [*value, *value.values()] if isinstance(value, dict) else value))
    return isinstance(value, str) and "\0" in value


def whole_number(text: str) -> int:
    """The integer that a string of ASCII digits denotes.

    Raises:
        ValueError: it has other characters, or more than 18.
    """
    if not (text.strip().isascii() and text.strip().isdecimal()) or len(text) > 18:
        raise ValueError("not a whole number")
    return int(text)


def hub_rows(path: str, name: str | None, split: str) -> list[Row]:
    """The rows of one split of a data set on the Hugging Face hub.

    Raises:
        DataError: the hub does not answer or has no such data set.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(path, name, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError(
            f"cannot load {path} ({split}) from the Hugging Face hub: {first_line(error)}; or name"
            " local files in [data]"
        ) from error
    return [
        dict(row) | {"__where__": f"{path} {split}, row {number}"}
        for number, row in enumerate(dataset)
    ]


def text_digest(paths: Iterable[str | Path]) -> str:
    """SHA-256 of the passages of text files, wherever they lie.

    Raises:
        DataError: as `read_passages`.
    """
    return hashlib.sha256(json.dumps(read_passages(paths)).encode()).hexdigest()


def read_passages(paths: Iterable[str | Path]) -> list[str]:
    """The passages of text files, split at blank lines.

    Raises:
        DataError: a file is missing, not text, or empty.
    """
    passages: list[str] = []
    for path in map(Path, paths):
        with _open(path, "text file") as file:
            text = file.read().replace("\r\n", "\n")
        if "\0" in text:
            raise DataError(
                f"the text file {path} holds NUL characters, which no text has (it may be UTF-16):"
                " save it as UTF-8"
            )
        found = [passage.strip() for passage in text.split("\n\n") if passage.strip()]
        if not found:
            raise DataError(f"the text file {path} holds no text")
        passages += found
    return passages
