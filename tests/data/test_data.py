"""Rows, tasks, encoding and partition: what users bring, and what must hold whatever they bring."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import re
import sqlite3
import tempfile
import zipfile
from contextlib import closing
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl.worksheet.formula import ArrayFormula
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fedsp.config import PartitionSection, TaskSection
from fedsp.data.batching import pack_trees, tree_size
from fedsp.data.dataset import rows_digest
from fedsp.data.encoding import (
    IGNORED,
    Encoded,
    collate,
    decode_behind,
    encode_pairs,
    encode_targets,
    encode_texts,
    training_batches,
)
from fedsp.data.files import fields_of, how_it_is_read, read_passages, read_rows
from fedsp.data.partition import group_of, make_partition, read_partition
from fedsp.data.rendering import Rendering
from fedsp.data.tasks import TASKS, Example, examples_of, find_task
from fedsp.errors import DataError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.models.loading import load_tokenizer
from support.real_rows import hub_schema
from support.reference import harness_task
from support.tokenizers_made import bpe

TOKENIZER = load_tokenizer(str(EMBEDDED / "model"))

HUB_ROWS: dict[str, tuple[dict[str, Any], str, list[str], list[int]]] = {
    "arc_easy": (
        {
            "question": "Why?",
            "choices": {"text": ["a b", "c"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        "Question: Why?\nAnswer:",
        ["a b", "c"],
        [1],
    ),
    "openbookqa": (
        {
            "question_stem": "Plants need",
            "choices": {"text": ["sun", "tar"], "label": ["A", "B"]},
            "answerKey": " A",
        },
        "Plants need",
        ["sun", "tar"],
        [0],
    ),
    "piqa": (
        {"goal": "Boil", "sol1": "heat it", "sol2": "cool it", "label": 0},
        "Question: Boil\nAnswer:",
        ["heat it", "cool it"],
        [0],
    ),
    "sciq": (
        {
            "support": " It is.",
            "question": "What?",
            "distractor1": "x",
            "distractor2": "y",
            "distractor3": "z",
            "correct_answer": "w",
        },
        "It is.\nQuestion: What?\nAnswer:",
        ["x", "y", "z", "w"],
        [3],
    ),
    "hellaswag": (
        {
            "activity_label": "Roof",
            "ctx_a": "A man.",
            "ctx_b": "he [step] sits",
            "endings": ["falls [title] down", " goes"],
            "label": "1",
        },
        "Roof: A man. He sits",
        ["falls. down", "goes"],
        [1],
    ),
    "race": (
        {
            "article": "Text.",
            "problems": str(
                [
                    {"question": "It was  _  .", "answer": "B", "options": ["a", "bee", "c", "d"]},
                    {"question": "Who?", "answer": "A", "options": ["he", "b", "c", "d"]},
                    {"question": "Why?", "answer": "D", "options": ["1", "2", "3", "4"]},
                ]
            ),
        },
        "Article: Text.\n\nIt was bee\nQuestion: Who?\nAnswer: he\nWhy?",
        ["1", "2", "3", "4"],
        [3],
    ),
    "webqs": (
        {"question": "where?", "answers": ["Paris, France", "Lyon", "Paris"]},
        "Question: where?\nAnswer:",
        ["Lyon", "Paris"],
        [0, 1],
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_rows_are_rendered_as_the_harness_renders_them(name: str) -> None:
    row, context, choices, gold = HUB_ROWS[name]
    (example,) = examples_of(find_task(name), [row])
    assert example.context == context
    assert example.choices == tuple(f" {choice}" for choice in choices)
    assert example.gold == tuple(gold)


@pytest.mark.parametrize(
    "name", ["arc_easy", "openbookqa", "piqa", "sciq", "hellaswag", "race", "webqs"]
)
def test_rendering_equals_the_harness(name: str, tmp_path: Path) -> None:
    """The same rows through lm-evaluation-harness's own task files."""
    row = HUB_ROWS[name][0]
    task = harness_task(name, [row], tmp_path)
    (document,) = task.test_docs()
    (example,) = examples_of(find_task(name), [row])
    assert example.context == task.doc_to_text(document)
    assert [choice[1:] for choice in example.choices] == list(task.doc_to_choice(document))
    target = task.doc_to_target(document)
    assert list(example.gold) == (target if isinstance(target, list) else [int(target)])


def test_own_rows_multiple_choice_and_completion() -> None:
    question, completion = find_task("multiple_choice"), find_task("completion")
    (example,) = examples_of(
        question,
        [
            {
                "context": "Facts.",
                "question": "So?",
                "choices": [" yes", "no"],
                "answer": 1,
                "id": "q",
            }
        ],
    )
    assert (example.context, example.choices, example.target) == (
        "Facts.\nQuestion: So?\nAnswer:",
        (" yes", " no"),
        " no",
    )
    (example,) = examples_of(completion, [{"prompt": "Dear ", "completion": "Sir"}])
    assert (example.context, example.target) == ("Dear", " Sir")


def test_files_in_every_form(tmp_path: Path) -> None:
    row = {"question": "q", "choices": ["a", "b"], "answer": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(row))
    (tmp_path / "a.csv").write_text('question,choices,answer\nq,"[""a"", ""b""]",1\n')
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv"):
        (example,) = examples_of(TASKS["multiple_choice"], read_rows(tmp_path / name))
        assert example.target == " b"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"question": "q"}\nnot json\n', r"line 2 is not JSON"),
        ('{"question": "q"}\n[1]\n', r"line 2 is a list"),
        ("", "holds no rows"),
        (
            '{"question": "q", "choices": ["a", "b"], "answer": 2}',
            "line 1 has answer 2 but 2 choices: expected an index from 0 to 1",
        ),
        ('{"question": "q", "choices": ["a", "b"], "answer": -1}', "line 1 has answer -1"),
        (
            '{"question": "q", "choices": ["a", "b"], "answer": "b"}',
            "line 1 cannot be read.*answer is a string, not an index",
        ),
        (
            '{"question": "q", "choices": "Anna Q has it", "answer": 0}',
            "line 1 cannot be read.*choices is a string, not a list",
        ),
        ('{"question": "q", "choices": ["a"]}', "line 1 has no field 'answer'.*needs question"),
        (
            '{"question": "q", "choices": ["a", " "], "answer": 0}',
            "line 1 has no choices, or an empty one",
        ),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=sentence) as error:
        examples_of(TASKS["multiple_choice"], read_rows(path))
    assert "Anna" not in str(error.value), "no example text is in an error"


ROW = {"question": "q", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"question": None}, "question is null, not a string"),
        ({"question": ["a", "b"]}, "question is a list, not a string"),
        ({"question": {"text": "a"}}, "question is an object, not a string"),
        ({"question": 7}, "question is a number, not a string"),
        ({"context": False}, "context is true or false, not a string"),
        ({"context": 0}, "context is a number, not a string"),
        ({"choices": ["a", None]}, "one of choices is null, not a string"),
        ({"choices": ["a", 3]}, "one of choices is a number, not a string"),
        ({"answer": 1.0}, "answer is a number, not an index"),
        ({"answer": True}, "answer is true or false, not an index"),
    ],
)
@pytest.mark.parametrize("task", ["multiple_choice", "continuation", "sciq"])
def test_a_value_that_is_no_text_is_refused_with_its_line(
    task: str, changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    """And not trained on as "None", or as what Python writes for a list."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | changes) + "\n")
    with pytest.raises(
        DataError, match=f"rows.jsonl, line 2 cannot be read as a {task} row \\({sentence}\\)"
    ):
        examples_of(TASKS[task], read_rows(path))


@pytest.mark.parametrize("name", sorted(HUB_ROWS))
def test_no_field_of_a_hub_row_is_read_as_what_python_writes_for_it(name: str) -> None:
    """Every text and every list of every schema, replaced by nothing, by a number, by another kind;
    a list as a table has it; and an answer that is none."""
    row = HUB_ROWS[name][0]
    for key, value in row.items():
        others: list[Any] = [
            None,
            7.5,
            {"a": "b"},
            ["a", None] if isinstance(value, list) else ["a"],
        ]
        for other in [*others, "['Paris']"] if not isinstance(value, str | int) else others:
            with pytest.raises(DataError, match="cannot be read as|needs question"):
                examples_of(find_task(name), [row | {key: other}])


def test_a_plain_row_of_race_has_its_article_as_the_harness_writes_it() -> None:
    row = {"context": "A tale.", "question": "Who?", "choices": ["he", "she"], "answer": 1}
    (found,) = examples_of(TASKS["race"], [row])
    assert (found.context, found.gold) == ("Article: A tale.\n\nWho?", (1,))
    (bare,) = examples_of(TASKS["race"], [{**row, "context": ""}])
    assert bare.context == "Who?"


@pytest.mark.parametrize("answer", ["", "BC", "E", "a", None, 1])
def test_an_answer_of_race_is_one_letter(answer: Any) -> None:
    row = {"article": "Text.", "question": "Who?", "options": ["a", "b", "c", "d"], "answer": "B"}
    assert examples_of(TASKS["race"], [row])[0].gold == (1,)
    with pytest.raises(DataError, match="row 0 cannot be read as a race row"):
        examples_of(TASKS["race"], [row | {"answer": answer}])


@pytest.mark.parametrize("value", [None, ["x"], 1.5, True])
def test_an_id_is_a_text_or_a_whole_number(value: Any) -> None:
    with pytest.raises(
        DataError, match="row 0 has an id that is .*expected a string or an integer"
    ):
        examples_of(TASKS["multiple_choice"], [ROW | {"id": value}])


def test_labels_are_whole_numbers_or_their_digits() -> None:
    row = HUB_ROWS["hellaswag"][0]
    for right in (1, "1", " 1 "):
        assert examples_of(TASKS["hellaswag"], [row | {"label": right}])[0].gold == (1,)
    wrong: list[Any] = ["1_0", "\u0661", "1.0", "", "+1", "9" * 5000, 1.0, None]
    for label in wrong:
        with pytest.raises(DataError, match="row 0 cannot be read"):
            examples_of(TASKS["hellaswag"], [row | {"label": label}])


def test_completions_are_texts() -> None:
    for row in ({"prompt": None, "completion": "a"}, {"prompt": "a", "completion": 3}):
        with pytest.raises(DataError, match="not a string"):
            examples_of(TASKS["completion"], [row])


def test_the_same_rows_in_every_dress(tmp_path: Path) -> None:
    """Excel's byte order mark, its semicolons, tabs, line ends of every system, a field of a
    million letters, gzip, and endings in capitals: the same rows, and one digest."""
    long = "x" * 1_000_000
    rows = [
        {"question": f"a; b, c{long}", "choices": ["a", "b"], "answer": 1},
        {"question": "two\r\nlines", "choices": ["c", "d"], "answer": 0},
    ]
    json_lines = "".join(json.dumps(row) + "\n" for row in rows)
    tables = {}
    for ending, divider in ((".csv", ","), (".semi.csv", ";"), (".tsv", "\t"), (".CSV", ",")):
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter=divider, lineterminator="\r\n")
        writer.writerows(
            [
                ["question", "choices", "answer"],
                *([row["question"], json.dumps(row["choices"]), row["answer"]] for row in rows),
            ]
        )
        tables[f"table{ending}"] = out.getvalue()
    files = {
        "rows.jsonl": json_lines,
        "name.csv.jsonl": json_lines,
        "rows.csv.d/rows": json_lines,
        "windows.jsonl": json_lines.replace("\n", "\r\n"),
        **tables,
    }
    digests = {}
    for name, text in files.items():
        for mark in ("utf-8", "utf-8-sig"):
            for packed in ("", ".gz", ".GZ"):
                path = tmp_path / mark / f"{name}{packed}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(gzip.compress(text.encode(mark)) if packed else text.encode(mark))
                found = read_rows(path)
                assert [
                    {key: value for key, value in row.items() if key != "__where__"}
                    for row in found
                ] == rows, path
                digests[str(path)] = rows_digest(found)
    assert len(set(digests.values())) == 1
    (tmp_path / "marked.txt").write_bytes("\ufefffirst\r\n\r\nsecond".encode())
    assert read_passages([tmp_path / "marked.txt"]) == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            'question,choices,answer\nq,"[""a"", ""b""]",1\nq,"[""a"", ""b""]",1,more\n',
            "line 3 has 4 fields, but the first line names 3 columns",
        ),
        (
            'question,choices,answer\nq,"[""a"", ""b""]"\n',
            "line 2 has 2 fields, but the first line names 3 columns",
        ),
        ("question,choices,question\nq,[],1\n", "line 1 has two columns named 'question'"),
        ("question,,answer\nq,[],1\n", "line 1 has a column without a name"),
        (
            'question,choices,answer\nq,"[""a"", ""b""]",1_0\n',
            (
                "line 2: in a table, choices is a JSON list .* and answer its index \\(not a whole"
                " number"
            ),
        ),
        ('question,choices,answer\nq,"[""a"", ""b""]",' + "9" * 5000 + "\n", "line 2: in a table"),
        (
            "question,choices,answer\nq," + "[" * 100_000 + ",1\n",
            "line 2: in a table.*nested too deeply",
        ),
        (
            'question,choices,answer\nq,"[""a"", ""b""]",1\nopen,"[""a"",1\nq,x,1\n',
            "line 3 cannot be read as a row of a table",
        ),
        ('prompt\n"two\nlines"\n"x" y\n', "line 4 cannot be read as a row of a table"),
    ],
)
def test_a_table_that_does_not_fit_its_first_line_is_refused_with_the_line(
    content: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "table.csv").write_text(content)
    with pytest.raises(DataError, match=f"table.csv, {sentence}"):
        read_rows(tmp_path / "table.csv")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"question": "half \\ud83d of a pair"}', "an unpaired UTF-16 surrogate"),
        ('{"question": ' + "9" * 5000 + "}", "a number has too many digits"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"question": "a", "question": "b"}', "a field has the same name as another"),
        ('{"question": "a"', "at column"),
    ],
)
def test_json_that_nothing_can_use_is_refused_with_its_line(
    line: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"question": "whole \\ud83d\\ude00 pair"}\n' + line + "\n"
    )
    with pytest.raises(DataError, match=f"rows.jsonl, line 2 is not JSON \\(.*{sentence}"):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('sep=;\nquestion;answer;choices\nq;1;"[""a"", ""b""]"\n', 1),
        ('\n\r\nquestion,answer,choices\nq,1,"[""a"", ""b""]"\n,,\n\n', 1),
        (
            'question,"answer",choices,"a\nname"\nq,1,"[""a"", ""b""]",x\nq,1,"[""a"", ""b""]",y\n',
            2,
        ),
    ],
)
def test_what_excel_puts_around_a_table_is_not_the_table(
    content: str, rows: int, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text(content, newline="")
    found = read_rows(tmp_path / "t.csv")
    assert len(found) == rows and all(
        (row["question"], row["answer"], row["choices"]) == ("q", 1, ["a", "b"]) for row in found
    )


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "t.csv",
            b"question|answer\nq|1\n",
            "divides its columns by '|': save the table with commas",
        ),
        ("t.csv", b"prompt,completion\na,b,\n", "line 2 ends in more dividers"),
        ("t.csv", b"prompt,completion\na\0,b\n", "line 2 holds a NUL character"),
        ("t.csv", b"\n\nprompt,completion\na\n", "line 4 has 1 fields, but the first line names 2"),
        ("t.jsonl", "{}".encode("utf-16"), "it is UTF-16 .*save it as CSV UTF-8"),
        (
            "t.ods",
            b"PK\x03\x04\xff\xff",
            "it is a spreadsheet or an archive; export the sheet as CSV",
        ),
        ("t.xlsx", b"PK\x03\x04\xff\xff", "cannot read .*t.xlsx as an Excel workbook"),
        ("t.jsonl", b'{"prompt": "a\\u0000"}', "line 1 is not JSON .a string holds a NUL"),
        ("t.jsonl", b"null", "line 1 is null: expected one JSON object"),
    ],
)
def test_what_is_no_table_or_text_says_what_it_is(
    name: str, content: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig", "cp1251"])
def test_a_table_is_read_in_the_encoding_that_excel_wrote(
    encoding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    german = "Der Drucker im dritten Stock f\u00fcr M\u00fcller ist kaputt, bitte pr\u00fcfen"
    russian = bytes.fromhex("cff0e8edf2e5f020ede0203320fdf2e0e6e520ede520efe5f7e0f2e0e5f2")
    text = russian.decode("cp1251") if encoding == "cp1251" else german
    table = "".join(f"{text} ({number})\tHardware\r\n" for number in range(8))
    for name in ("tickets.csv", "TICKETS.TSV"):
        (tmp_path / name).write_bytes(("prompt\tcompletion\r\n" + table).encode(encoding))
        rows = read_rows(tmp_path / name)
        assert [row["prompt"] for row in rows] == [f"{text} ({number})" for number in range(8)]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (2 if encoding.startswith("cp") else 0)
    assert all("it is read as cp125" in line for line in said)


GERMAN = "Bitte prüfen Sie die Gebühr für größere Aufträge, sie stimmt nicht"


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("cp1252", "Señor Peña, Menü à la carte, João"),
        ("cp1252", "Où est passé le reçu que l'élève a déjà envoyé près du château"),
        ("cp1252", "Não há informações sobre a situação do cliente, a ligação caiu"),
        ("cp1252", "Jag undrar när räkningen för året kommer, tack så mycket på förhand"),
        ("cp1252", "Arve ei ole õige, palun kontrollige, mis põhjusel tõusis tarbimine"),
        ("cp1250", "Proszę sprawdzić, dlaczego rachunek za wrzesień został źle naliczony"),
        ("cp1250", "Kérem, ellenőrizze a számlát, mert az összeg nem a szerződés szerint van"),
        ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy, prosím zkontrolujte účet"),
        (
            "cp1250",
            "Molim vas provjerite račun koji sam dobio prošli tjedan, želim znati što je točno",
        ),
        ("cp1250", "Vă rog să verificaţi factura pe care am primit-o, mulţumesc"),
    ],
)
def test_western_and_central_tables_are_told_apart(
    encoding: str, line: str, tmp_path: Path
) -> None:
    """Foreign names and slips in a German table, and nine languages."""
    lines = [line] * 10
    if line.startswith("Se"):
        lines += [*[GERMAN] * 30, "Preis£pro Stück", "Sigþór fragt", "Põldma kommt"]
    path = tmp_path / "t.tsv"
    path.write_bytes("\n".join(["text\tlabel", *(f"{one}\ta" for one in lines)]).encode(encoding))
    assert [row["text"] for row in read_rows(path)] == lines


def workbook(path: Path, *sheets: list[list[Any]]) -> Path:
    from openpyxl import Workbook

    book = Workbook()
    book.remove(book.active)
    for number, lines in enumerate(sheets):
        sheet = book.create_sheet(f"Sheet {number}")
        for line in lines:
            sheet.append(line)
    book.save(path)
    return path


def test_a_workbook_holds_the_rows_of_the_table_that_excel_would_export(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Names stand in the first row that is not empty; numbers and dates are texts; empty rows and
    cells behind the last column are none. Other sheets are said to be left out."""
    lines: list[list[Any]] = [
        [],
        ["prompt", "completion", "on", "count"],
        ["M\u00fcller, 3. Stock", "printer", date(2026, 1, 31), 5],
        [],
        ["two\nlines", None, None, 0.5],
    ]
    rows = read_rows(workbook(tmp_path / "tickets.XLSX", lines, [["other"], ["x"]]))
    assert [{key: value for key, value in row.items() if key != "__where__"} for row in rows] == [
        {
            "prompt": "M\u00fcller, 3. Stock",
            "completion": "printer",
            "on": "2026-01-31T00:00:00",
            "count": "5",
        },
        {"prompt": "two\nlines", "completion": "", "on": "", "count": "0.5"},
    ]
    assert [row["__where__"][-5:] for row in rows] == ["row 3", "row 5"]
    assert "has 2 sheets: the first, 'Sheet 0', is read" in caplog.text
    asked: list[list[Any]] = [["question", "choices", "answer"], ["Why?", '["so", "no"]', 1]]
    (row,) = read_rows(workbook(tmp_path / "asked.xlsx", asked))
    (example,) = examples_of(TASKS["multiple_choice"], [row])
    assert example.choices == (" so", " no") and example.gold == (1,)


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("=1+1", "row 3 has a formula without a saved value: open the workbook in Excel or"),
        (ArrayFormula("B3", "=A3:A3"), "row 3 has a formula without a saved value"),
        ("#N/A", "row 3 holds the error #N/A: mend its formula"),
    ],
)
def test_what_a_workbook_does_not_say_is_no_empty_cell(
    cell: Any, sentence: str, tmp_path: Path
) -> None:
    lines: list[list[Any]] = [["prompt", "completion"], ["a", "b"], ["c", cell]]
    with pytest.raises(DataError, match=sentence):
        read_rows(workbook(tmp_path / "t.xlsx", lines))


def test_a_formula_whose_value_is_the_empty_text_is_an_empty_cell(tmp_path: Path) -> None:
    """Such as =IF(A2="","",A2), of which a program that has computed it saves just that."""
    lines: list[list[Any]] = [["prompt", "note"], ["a", '=IF(TRUE,"")']]
    path = workbook(tmp_path / "t.xlsx", lines)
    with zipfile.ZipFile(path) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    saved = re.sub(
        rb'<c r="B2"[^>]*><f>(.*?)</f><v ?(/>|></v>)</c>',
        rb'<c r="B2" t="str"><f>\1</f><v></v></c>',
        parts[sheet],
    )
    assert saved != parts[sheet]
    with zipfile.ZipFile(path, "w") as book:
        for name, data in {**parts, sheet: saved}.items():
            book.writestr(name, data)
    (row,) = read_rows(path)
    assert (row["prompt"], row["note"]) == ("a", "")


def test_what_is_no_workbook_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "t.xlsx").write_text("a;b\n")
    with pytest.raises(DataError, match="as an Excel workbook: it is none, or only half of one"):
        read_rows(tmp_path / "t.xlsx")


def test_a_cell_without_an_answer_is_named(tmp_path: Path) -> None:
    rows = read_rows(workbook(tmp_path / "t.xlsx", [["prompt", "completion"], ["a", None]]))
    with pytest.raises(DataError, match=r"row 2 has no answer: completion is empty; fill it in"):
        examples_of(TASKS["completion"], rows)


def test_rows_beyond_the_dimensions_that_a_workbook_tells_are_read(tmp_path: Path) -> None:
    path = workbook(tmp_path / "t.xlsx", [["a", "b"], *([str(row), "x"] for row in range(4))])
    with zipfile.ZipFile(path) as book:
        parts = {name: book.read(name) for name in book.namelist()}
    with zipfile.ZipFile(tmp_path / "odd.xlsx", "w") as book:
        for name, data in parts.items():
            book.writestr(name, data.replace(b'ref="A1:B5"', b'ref="A1:B2"'))
    assert b'ref="A1:B5"' in parts["xl/worksheets/sheet1.xml"]
    assert len(read_rows(tmp_path / "odd.xlsx")) == 4


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([["a", "a"], ["1", "2"]], "row 1 has two columns named 'a'"),
        ([["a", None, "b"], ["1", "2", "3"]], "row 1 has a column without a name"),
        ([["a"], ["1", "2"]], "row 2 has 2 cells, but the first row names 1 columns"),
        ([["a"]], "holds no rows"),
        ([["choices", "answer"], ["yes", 1]], "row 2: in a table, choices is a JSON list"),
    ],
)
def test_a_workbook_that_is_no_table_is_refused_by_its_row(
    lines: list[list[Any]], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=sentence):
        read_rows(workbook(tmp_path / "t.xlsx", lines))


@cache
def small_workbook() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        lines = [["prompt", "completion"], ["a", "b"]]
        return workbook(Path(folder) / "whole.xlsx", lines).read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 4000))
def test_no_bytes_crash_the_reader_of_workbooks(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, place: int
) -> None:
    """Any bytes, and a workbook with some of its own written over."""
    folder = tmp_path_factory.mktemp("bytes")
    whole = small_workbook()
    for damaged in (content, whole[:place] + content + whole[place + len(content) :]):
        (folder / "t.xlsx").write_bytes(damaged)
        try:
            read_rows(folder / "t.xlsx")
        except DataError as error:
            assert str(folder / "t.xlsx") in str(error)


def test_own_names_of_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Betreff,Queue,prompt\nKaputt,it,old\n")
    columns = {"prompt": "Betreff", "completion": "Queue"}
    (row,) = read_rows(tmp_path / "t.csv", columns)
    assert {key: row[key] for key in row if key != "__where__"} == {
        "prompt": "Kaputt",
        "completion": "it",
    }
    (tmp_path / "asked.csv").write_text('Frage,Options,Correct\nWhy?,"[""so"", ""no""]",1\n')
    names = {"question": "Frage", "choices": "Options", "answer": "Correct"}
    (row,) = read_rows(tmp_path / "asked.csv", names)
    assert row["choices"] == ["so", "no"] and row["answer"] == 1
    with pytest.raises(
        DataError,
        match=r"line 2 has no column 'Qeue', which data.columns names; it has \['Betreff', 'Queue'",
    ):
        read_rows(tmp_path / "t.csv", columns | {"completion": "Qeue"})


def test_a_missing_field_is_said_with_those_that_are_there() -> None:
    row = {"betreff": "x", "kategorie": "y"}
    with pytest.raises(DataError, match=r"has no field 'prompt': .*; it has betreff, kategorie$"):
        examples_of(TASKS["completion"], [row])


def test_a_text_without_letters_between_nul_characters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes("the text".encode("utf-16-le"))
    with pytest.raises(
        DataError, match=r"holds NUL characters, which no text has \(it may be UTF-16\)"
    ):
        read_passages([tmp_path / "t.txt"])


@pytest.mark.parametrize(
    "written",
    [
        {"server": [0], "validation": [], "clients": 5},
        {"server": []},
        {"server": [3], "validation": [], "clients": {}},
        {"server": ["x"], "validation": [], "clients": {}},
    ],
)
def test_a_partition_that_was_damaged_or_is_of_other_rows_is_a_sentence(written: Any) -> None:
    with pytest.raises(DataError, match="the run's partition.json"):
        read_partition(written, 3)


TABLE_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1, max_size=20
).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(TABLE_TEXT, st.lists(TABLE_TEXT, min_size=1, max_size=3)), min_size=1, max_size=4
    ),
    st.sampled_from(",;\t"),
)
def test_what_a_spreadsheet_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, list[str]]], divider: str
) -> None:
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=divider).writerows(
            [
                ["question", "choices", "answer"],
                *([text, json.dumps(choices), 0] for text, choices in rows),
            ]
        )
    assert [(row["question"], row["choices"]) for row in read_rows(path)] == rows


@pytest.mark.parametrize("column", [None, "", 1.5, True, ["a"]])
def test_a_group_is_a_text_or_a_whole_number(column: Any) -> None:
    rows = [{"owner": "a", "__where__": "f, line 1"}, {"owner": column, "__where__": "f, line 2"}]
    with pytest.raises(
        DataError,
        match=(
            "f, line 2 has .* in column 'owner', which partition.column names: expected a string or"
            " an integer"
        ),
    ):
        make_partition(
            rows,
            PartitionSection(kind="natural", column="owner"),
            server_share=0,
            holdout=0,
            seed=0,
        )


MERGES = [("b", " "), ("b ", "x"), ("a", "b"), (" ", "x"), ("y", "y"), ("c", " "), ("d", " x")]


@settings(max_examples=300, deadline=None)
@given(
    st.text("abcdxy <s>", max_size=6),
    st.text("abcdxy ", min_size=1, max_size=5).filter(str.strip),
    st.booleans(),
    st.booleans(),
    st.integers(2, 9),
)
def test_whatever_a_tokenizer_merges_an_answer_has_a_token(
    context: str, answer: str, begins: bool, ends: bool, limit: int
) -> None:
    """Where something is left behind the context, it is what lm-evaluation-harness takes; where
    nothing is, the tokens that the answer changed."""
    tokenizer = bpe(MERGES, begins=begins, ends=ends)
    (full,), (cut,) = (
        encode_pairs(tokenizer, [(context, f" {answer}")], most) for most in (1000, limit)
    )
    bare = context.rstrip()
    assert 1 <= full.start < len(full.ids) and 1 <= cut.start < len(cut.ids) <= limit
    assert cut.ids == full.ids[-len(cut.ids) :]
    assert full.ids[-1] != tokenizer.eos_token_id, "nothing ends behind an answer"
    plain = bpe(MERGES, begins=begins)
    special = not bare.startswith("<s>")
    before, whole = (
        plain.encode(part, add_special_tokens=special) for part in (bare, context + f" {answer}")
    )
    if bare and len(whole) > len(before):
        assert list(full.ids) == [*before, *whole[len(before) :]] and full.start == len(before)
    else:
        text = tokenizer.decode(full.ids, skip_special_tokens="<s>" not in context)
        assert text.removeprefix("<s>") == (context + f" {answer}").removeprefix("<s>")
    collated = collate([full])
    assert (collated.labels[0, full.start :] != IGNORED).all()


def test_an_answer_without_a_token_is_refused_by_name() -> None:
    tokenizer = bpe()
    with pytest.raises(DataError, match="example q7: the tokenizer makes no token of an answer"):
        encode_targets(
            tokenizer, [Example(id="q7", context="abc", choices=("\u0000",), gold=(0,))], 20
        )
    with pytest.raises(
        DataError,
        match="pair 0: no context token precedes the answer, and this tokenizer has neither",
    ):
        encode_pairs(bpe(tokens=False), [("", " a")], 20)


@pytest.mark.parametrize(
    ("begins", "ends"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_a_text_is_begun_as_its_tokenizer_begins_it_and_never_ended(
    begins: bool, ends: bool
) -> None:
    tokenizer = bpe(begins=begins, ends=ends)
    first, body = [0] if begins else [], bpe().encode("abc")
    assert encode_texts(tokenizer, ["abc", "<s>abc", "", "abc</s>"]) == [
        [*first, *body],
        [0, *body],
        first,
        [*first, *body, 1],
    ]
    (pair,) = encode_pairs(tokenizer, [("", " a")], 20)
    assert pair.ids[:1] == (0,) and pair.start == 1


def test_rows_as_datasets_and_parquet_users_have_them(tmp_path: Path) -> None:
    rows = [
        {"question": f"q{number}", "choices": ["a", "b"], "answer": number % 2}
        for number in range(5)
    ]
    saved = Dataset.from_list(rows)
    saved.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "shards").mkdir()
    for shard in (0, 1):
        name = f"train-0000{shard}-of-00002.parquet"
        saved.shard(2, shard, contiguous=True).to_parquet(tmp_path / "shards" / name)
    saved.save_to_disk(tmp_path / "saved")
    saved.select([4, 3, 2, 1, 0]).select([4, 3, 2, 1, 0]).save_to_disk(tmp_path / "picked")
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(tmp_path / "list.json.gz", "wt") as file:
        json.dump(rows, file)
    (tmp_path / "late.json").write_text("\n\n" + json.dumps(rows))
    names = "late.json rows.parquet shards saved picked list.json lines.json list.json.gz"
    for name in names.split():
        found = read_rows(tmp_path / name)
        assert rows_digest(found) == rows_digest(rows), name
        assert examples_of(TASKS["multiple_choice"], found)[4].gold == (0,)


@pytest.mark.parametrize("form", ["rows.parquet", "shards", "saved"])
def test_a_class_has_its_name_as_a_label_and_its_number_as_an_index(
    form: str, tmp_path: Path
) -> None:
    """As `datasets` keeps them (ClassLabel)."""
    columns = {
        "text": [f"text {number}" for number in range(4)],
        "label": [0, 1, 1, -1],
        "question": ["q"] * 4,
        "choices": [["a", "b"]] * 4,
        "answer": [0, 1, 1, 0],
    }
    features = Features(
        text=Value("string"),
        label=ClassLabel(names=["spam", "no spam"]),
        question=Value("string"),
        choices=Sequence(Value("string")),
        answer=ClassLabel(names=["A", "B"]),
    )
    saved = Dataset.from_dict(columns, features=features)
    (tmp_path / "shards").mkdir()
    saved.to_parquet(tmp_path / "rows.parquet")
    saved.to_parquet(tmp_path / "shards" / "train.parquet")
    saved.save_to_disk(tmp_path / "saved")
    rows = read_rows(tmp_path / form)
    assert [row.gold for row in examples_of(TASKS["multiple_choice"], rows)][:2] == [(0,), (1,)]
    how = Rendering.of(TaskSection(task="classification"))
    found = [how.example(row, number).target for number, row in enumerate(rows[:3])]
    assert found == [" spam", " no spam", " no spam"]
    assert group_of(rows[1], "label") == "no spam"
    sent = pickle.loads(pickle.dumps(rows))
    assert examples_of(TASKS["multiple_choice"], sent)[1].gold == (1,)
    saved.cast_column("label", ClassLabel(names=["spam", "ham"])).save_to_disk(tmp_path / "other")
    assert rows_digest(read_rows(tmp_path / "other")) != rows_digest(rows), "names are pinned too"
    with pytest.raises(DataError, match="row 3 .*label is null"):
        how.example(rows[3], 3)


def test_what_is_wrong_with_such_files_is_a_sentence(tmp_path: Path) -> None:
    def refused(name: str, sentence: str) -> None:
        with pytest.raises(DataError, match=sentence):
            read_rows(tmp_path / name)

    refused("none.parquet", r"there is no file .*none\.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    refused("text.parquet", r"cannot read .*text\.parquet as Parquet")
    (tmp_path / "empty").mkdir()
    refused("empty", "a folder without Parquet files and without a saved data set")
    DatasetDict(train=Dataset.from_list([{"question": "q"}])).save_to_disk(tmp_path / "splits")
    refused("splits", r"holds several splits of a data set: name one of them, such as .*train")
    classes = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a"]}}}}
    for name, about in {"short": json.dumps(classes), "damaged": '{"info": []}'}.items():
        table = pyarrow.table({"label": [0, 1]}).replace_schema_metadata({"huggingface": about})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    refused("short.parquet", r"short\.parquet, row 1 has label 1, but its file names 1 classes")
    refused("damaged.parquet", "what `datasets` wrote there of its columns is damaged")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    refused("saved", "cannot read the data set in .*saved")
    (tmp_path / "open.json").write_text('[{"question": "q"},')
    refused("open.json", "begins as a JSON list but is not one")
    (tmp_path / "odd.json").write_text('[{"question": "q"}, 3]')
    refused("odd.json", "row 1 is not an object")
    (tmp_path / "nul.json").write_text('[{"question": "q\\u0000"}]')
    refused("nul.json", "row 0 holds a NUL character")
    Dataset.from_list([{"question": "q", "choices": ["a"], "answer": 3}]).to_parquet(
        tmp_path / "out.parquet"
    )
    with pytest.raises(DataError, match=r"out\.parquet, row 0 has answer 3 but 1 choices"):
        examples_of(TASKS["multiple_choice"], read_rows(tmp_path / "out.parquet"))


def test_what_is_generated_keeps_its_space_and_shows_no_special_token() -> None:
    backend = Backend(
        BPE(
            vocab={word: number for number, word in enumerate(["<s>", "</s>", "\u2581", *"abc"])},
            merges=[],
        )
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    (ids,) = encode_texts(tokenizer, ["ab"])
    new = [2, 4, 5, 1, 2, 3]
    assert tokenizer.decode(new) != " bc a", "which is why the whole text is decoded"
    assert decode_behind(tokenizer, ids, new) == " bc a"
    assert decode_behind(tokenizer, [0, *ids], new) == " bc a"
    assert decode_behind(tokenizer, ids, []) == ""


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "x.jsonl.gz")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "x.jsonl")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        read_passages([tmp_path / "empty.txt"])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "rows.jsonl"
    path.write_bytes(content)
    try:
        examples_of(TASKS["multiple_choice"], read_rows(path))
    except DataError as error:
        assert str(path) in str(error)


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.text(max_size=60) | st.just("one context "), st.text(min_size=1, max_size=20)),
        max_size=5,
    ),
    limit=st.integers(2, 40),
)
def test_a_long_example_loses_old_context_and_never_the_answer(
    pairs: list[tuple[str, str]], limit: int
) -> None:
    """And pairs that are encoded together have the tokens that each has alone."""
    asked = [(context, f" {continuation}") for context, continuation in pairs]
    for (context, continuation), full, cut in zip(
        asked,
        encode_pairs(TOKENIZER, asked, 10_000),
        encode_pairs(TOKENIZER, asked, limit),
        strict=True,
    ):
        bare = context.rstrip()
        before = TOKENIZER.encode(bare) or [TOKENIZER.bos_token_id]
        assert full.start == len(before)
        assert full.ids == tuple(
            TOKENIZER.encode(context + continuation)
            if bare
            else before + TOKENIZER.encode(context + continuation, add_special_tokens=False)
        )
        assert (
            len(cut.ids) <= limit
            and cut.ids == full.ids[-len(cut.ids) :]
            and cut.dropped == len(full.ids) - len(cut.ids)
        )
        answer = full.ids[full.start :]
        if len(answer) < limit:
            assert cut.ids[cut.start :] == answer


def test_batches_are_padded_to_their_own_longest_and_cover_every_row() -> None:
    rows = [Encoded(tuple(range(1, 3 + n)), 1 + n // 2) for n in range(12)]
    batches = list(training_batches(rows, steps=4, batch_size=3, seed=0))
    assert sorted(int(n) for batch in batches for n in batch.attention_mask.sum(dim=1)) == [
        len(row.ids) for row in rows
    ]
    assert sum(batch.input_ids.numel() for batch in batches) < 12 * 13
    again = list(training_batches(rows, steps=4, batch_size=3, seed=0))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))
    batch = collate([rows[4]])
    assert batch.labels[0].tolist() == [IGNORED] * rows[4].start + list(
        rows[4].ids[rows[4].start :]
    )


ROWS = [{"topic": f"t{index % 7}", "question": "q"} for index in range(210)]


@pytest.mark.parametrize(
    "section",
    [
        PartitionSection(clients=10),
        PartitionSection(clients=10, kind="dirichlet", column="topic", alpha=0.5),
        PartitionSection(kind="natural", column="topic"),
        PartitionSection(clients=7, kind="pathological", column="topic", values_per_client=2),
    ],
    ids=lambda section: section.kind,
)
def test_partitions_are_seeded_and_give_each_row_one_holder(section: PartitionSection) -> None:
    one, same, other = (
        make_partition(ROWS, section, server_share=0.1, holdout=0.1, seed=seed)
        for seed in (0, 0, 1)
    )
    assert one == same != other
    held = sorted(
        [*one.server, *one.validation, *(row for rows in one.clients.values() for row in rows)]
    )
    assert held == list(range(210))
    assert len(one.server) == len(one.validation) == 21
    if section.kind == "natural":
        assert sorted(one.clients) == [f"t{index}" for index in range(7)]
        assert all(
            {ROWS[row]["topic"] for row in rows} == {client} for client, rows in one.clients.items()
        )
    if section.kind == "pathological":
        assert all(len({ROWS[row]["topic"] for row in rows}) <= 2 for rows in one.clients.values())


def test_partitions_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(DataError, match=r"partition.clients = 300, but only 210"):
        make_partition(ROWS, PartitionSection(clients=300), server_share=0, holdout=0, seed=0)
    with pytest.raises(DataError, match="has no column 'colour'"):
        make_partition(
            ROWS,
            PartitionSection(kind="natural", column="colour"),
            server_share=0,
            holdout=0,
            seed=0,
        )
    with pytest.raises(DataError, match="values_per_client = 9"):
        make_partition(
            ROWS,
            PartitionSection(kind="pathological", column="topic", values_per_client=9),
            server_share=0,
            holdout=0,
            seed=0,
        )
    with pytest.raises(DataError, match="cannot be made"):
        make_partition(
            ROWS[:12],
            PartitionSection(clients=10, kind="dirichlet", column="topic", alpha=0.001),
            server_share=0,
            holdout=0,
            seed=0,
        )


def test_the_server_may_own_a_domain_that_no_client_has() -> None:
    rows = [{"domain": domain, "id": str(index)} for index, domain in enumerate("abcab" * 6)]
    section = PartitionSection(kind="natural", column="domain", server_values=["b"])
    made = make_partition(rows, section, server_share=0.0, holdout=0.2, seed=0)
    assert {rows[index]["domain"] for index in made.server} == {"b"}
    assert sorted(made.clients) == ["a", "c"]
    held = [*made.server, *made.validation, *(i for part in made.clients.values() for i in part)]
    assert sorted(held) == list(range(30)), "everybody's rows are somebody's, once"
    with pytest.raises(DataError, match="no training example has 'x' in column 'domain'"):
        make_partition(
            rows,
            section.model_copy(update={"server_values": ["x"]}),
            server_share=0.0,
            holdout=0.0,
            seed=0,
        )


@given(
    st.lists(st.integers(0, 9), max_size=4),
    st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=8),
)
def test_a_tree_holds_every_branch_once_and_shows_each_token_what_stands_before_it(
    context: list[int], branches: list[list[int]]
) -> None:
    packed, places = pack_trees([context, []], [branches, branches], torch.device("cpu"))
    seen = packed.seen()
    for row, front in enumerate((context, [])):
        nodes = {tuple(tail[:end]) for tail in branches for end in range(1, len(tail) + 1)}
        assert {place for tail in places[row] for place in tail} == set(
            range(len(front), len(front) + len(nodes))
        )
        assert tree_size(branches) == len(nodes)
        for tail, found in zip(branches, places[row], strict=True):
            assert packed.ids[row, found].tolist() == tail
            for depth, place in enumerate(found):
                assert int(packed.positions[row, place]) == len(front) + depth
                assert seen[row, place].nonzero()[:, 0].tolist() == [
                    *range(len(front)),
                    *found[: depth + 1],
                ]
        for place in range(len(front)):
            assert seen[row, place].nonzero()[:, 0].tolist() == list(range(place + 1))


def database(folder: Path) -> Path:
    """A database of tickets, and a query for them."""
    with closing(sqlite3.connect(folder / "tickets.db")) as base:
        base.execute("create table tickets (id integer, body text, kind text, price real, d date)")
        base.executemany(
            "insert into tickets values (?, ?, ?, ?, ?)",
            [
                (2, "it prints: stripes;", "printer", 1.5, "2026-01-02"),
                (1, "lo\u00e7ked", "login", None, None),
            ],
        )
        base.commit()
    path = folder / "tickets.sql"
    path.write_text(
        "-- url: sqlite:///${HERE}/tickets.db\nselect body, kind, price from tickets order by id;\n"
    )
    return path


def test_the_rows_of_a_query_are_those_of_the_same_table(tmp_path: Path) -> None:
    rows = read_rows(database(tmp_path), {"text": "body", "label": "kind"})
    (tmp_path / "t.csv").write_text(
        'body,kind,price\nlo\u00e7ked,login,\n"it prints: stripes;",printer,1.5\n', encoding="utf-8"
    )
    same = read_rows(tmp_path / "t.csv", {"text": "body", "label": "kind"})
    assert [fields_of(row) for row in rows] == [fields_of(row) for row in same]
    assert how_it_is_read(tmp_path / "tickets.sql") == "the answer of a database"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("select 1", "expected '-- url:' and the address of a database in the first line"),
        ("-- url: sqlite://\n", "and a query below it"),
        ("-- url: sqlite://\nselect 1 as a", "the query has no ORDER BY"),
        ("-- url: sqlite://\nselect 1 as a -- order by a", "the query has no ORDER BY"),
        ("-- url: sqlite://\nselect 1 as a /*\norder by a */", "the query has no ORDER BY"),
        ("-- url: sqlite:///${NIX_39}/db\nselect 1 as a order by a", "variable NIX_39 of the add"),
        ("-- url: sqlite:///nix39.db\nselect 1 as a order by a", "there is no database nix39.db"),
        ("-- url: sqlite+nix://\nselect 1 as a order by a", "cannot be asked"),
        ("-- url: mssql://x/y\nselect 1 as a order by a", "the driver of its database is not ins"),
        ("-- url: pg://u:a@b:c@d/x\nselect 1 as a order by a", "the address of .* cannot be read"),
        ("-- url: nonsense\nselect 1 as a order by a", "the database cannot be asked"),
        ("-- url: nosuch://x\nselect 1 as a order by a", "the database cannot be asked"),
        ("-- url: sqlite://\nselect a from b order by a", "cannot be asked .*no such table"),
        ("-- url: sqlite://\nselect x'00' as a order by a", "a column holds bytes"),
        ("-- url: sqlite://\nselect 1 as a where 1 = 0 order by a", "holds no rows"),
    ],
)
def test_a_query_that_cannot_be_used_is_a_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.sql").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "q.sql")


def test_a_password_may_stand_in_the_environment_and_nothing_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = database(tmp_path)
    monkeypatch.setenv("BASE", "tickets.db")
    address = "-- url: sqlite:///${HERE}/${BASE}\n"
    path.write_text(f"{address}select body from tickets order by id")
    assert len(read_rows(path)) == 2
    path.write_text(
        "-- url: sqlite:///file:${HERE}/${BASE}?mode=ro&uri=true\n"
        "select body from tickets where body != '--' order by id"
    )
    assert len(read_rows(path)) == 2
    for deletes in (
        "with one as (select 1 order by 1) delete from tickets returning body",
        "delete from tickets where id in (select id from tickets order by id) returning body",
    ):
        path.write_text(address + deletes)
        with pytest.raises(DataError, match="attempt to write a readonly database"):
            read_rows(path)
    with closing(sqlite3.connect(tmp_path / "tickets.db")) as base:
        assert base.execute("select count(*) from tickets").fetchone() == (2,)


@pytest.mark.parametrize(
    "name", ["arc_easy", "openbookqa", "hellaswag", "piqa", "sciq", "race", "webqs"]
)
def test_a_question_of_the_hub_needs_no_answer_where_none_is_read(name: str) -> None:
    """`fedsp adapt` reads questions alone."""
    plain = {"question": "why not", "choices": ["a", "b", "c", "d"], "answer": 1}
    if name == "race":
        row: dict[str, Any] = {"article": "x", "question": "why", "options": ["a", "b", "c", "d"]}
    elif name == "webqs":
        row = {"question": "why not"}
    elif name == "sciq":
        row = hub_schema(name, {**plain, "context": "x"})
    elif name == "piqa":
        row = {"goal": "why", "sol1": "a", "sol2": "b"}
    elif name == "hellaswag":
        row = {"ctx_a": "x", "ctx_b": "y", "activity_label": "z", "endings": ["a", "b", "c", "d"]}
    else:
        row = {
            "question": "why",
            "question_stem": "why",
            "choices": {"text": ["a", "b"], "label": ["1", "2"]},
        }
    asked = find_task(name).question(row, 1)
    assert "why" in asked.context or asked.context.startswith("z: x")
