"""What `fedsp data check` says of files of examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedsp
from fedsp.cli import app
from fedsp.data.check import IDENTIFIERS
from fedsp.errors import ConfigurationError, DataError
from support.gguf_made import tiny_llama, write_gguf


def rows_file(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ticket(number: int, text: str = "", label: str = "it") -> dict[str, object]:
    return {"prompt": text or f"Ticket {number}", "completion": label}


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("e-mail addresses", "write to max.muster+x@mail.firma.de, please", True),
        ("e-mail addresses", "at 5@home or @somebody", False),
        ("phone numbers", "call +49 170 1234567 today", True),
        ("phone numbers", "call 030/123456-78", True),
        ("phone numbers", "in 2024, 12 of 300 (4 %)", False),
        ("account numbers (IBAN)", "to DE89 3704 0044 0532 0130 00.", True),
        ("account numbers (IBAN)", "to DE88 3704 0044 0532 0130 00.", False),
        ("card numbers", "card 4111 1111 1111 1111", True),
        ("card numbers", "card 4111 1111 1111 1112", False),
        ("social security numbers", "SSN 123-45-6789", True),
        ("social security numbers", "part 000-45-6789", False),
        ("insurance numbers (a letter and nine digits)", "KVNR A123456789.", True),
        ("insurance numbers (a letter and nine digits)", "item AB123456789", False),
        ("Internet addresses of machines", "from 192.168.0.17:80", True),
        ("Internet addresses of machines", "version 1.2.300.4", False),
    ],
)
def test_what_looks_like_an_identifier(kind: str, text: str, found: bool) -> None:
    assert any(True for _ in IDENTIFIERS[kind].found(text)) is found


def test_a_file_is_described_and_no_identifier_is_shown(tmp_path: Path) -> None:
    secret = "max.muster@firma.de"
    rows: list[dict[str, object]] = [
        ticket(0),
        ticket(1),
        ticket(1),
        ticket(2, f"ask {secret}"),
        {"prompt": "no label"},
    ]
    path = rows_file(tmp_path / "train.jsonl", rows)
    (found,) = fedsp.check_data([path])["files"]
    assert found["rows"] == 5 and found["read"] == "JSON" and found["repeated"] == 1
    assert found["fields"] == {"prompt": 1.0, "completion": 0.8}
    assert found["tasks"] == {"completion": 4} and found["unusable"] == 1
    assert "line 5 has no field 'completion'" in found["fault"]
    assert found["identifiers"] == {"e-mail addresses": {"rows": 1, "first": f"{path}, line 4"}}
    assert [one["answer"] for one in found["preview"]] == [" it"] * 3
    assert "tokens" not in found


def test_examples_of_one_split_in_another_are_counted(tmp_path: Path) -> None:
    train = rows_file(tmp_path / "train.jsonl", [ticket(number) for number in range(5)])
    test = rows_file(tmp_path / "test.jsonl", [ticket(number) for number in range(3, 9)])
    assert fedsp.check_data([train, test])["shared"] == [{"file": str(test), "examples": 2}]


def test_a_run_s_file_says_what_rows_are_and_how_long_they_may_be(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"Betreff": "Printer " * 20, "Queue": "hw"},
        {"Betreff": "Password", "Queue": "account"},
        {"Betreff": "Screen", "Queue": "hw"},
    ]
    rows_file(tmp_path / "t.jsonl", rows)
    (tmp_path / "run.toml").write_text(
        '[model]\nname = "embedded"\n[data]\ntask = "classification"\ntrain = "t.jsonl"\n'
        'max_tokens = 40\ncolumns = { text = "Betreff", label = "Queue" }\n'
    )
    (found,) = fedsp.check_data(config=tmp_path / "run.toml")["files"]
    assert found["labels"] == {"hw": 2, "account": 1} and next(iter(found["labels"])) == "hw"
    assert found["tokens"]["cut"] == 1 and found["tokens"]["longest"] > 40
    assert found["preview"][1] == {"context": "Password\nLabel:", "answer": " account"}


def test_every_number_is_masked_whole_and_labels_that_mask_alike_are_summed(tmp_path: Path) -> None:
    text = "IBAN DE89 3704 0044 0532 0130 00, a@x.de aa@x.de baa@x.de"
    rows: list[dict[str, object]] = [
        {"prompt": text, "completion": f"p{number % 4}@x.de"} for number in range(8)
    ]
    (found,) = fedsp.check_data([rows_file(tmp_path / "t.jsonl", rows)])["files"]
    assert found["labels"] == {"[e-mail addresses]": 8}
    masked = "IBAN [account numbers (IBAN)]," + " [e-mail addresses]" * 3
    assert found["preview"][0]["context"] == masked


def test_completions_that_repeat_are_counted_as_labels(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"Ticket {number}", "completion": "hw" if number % 3 else "mail"}
        for number in range(9)
    ]
    (found,) = fedsp.check_data([rows_file(tmp_path / "t.jsonl", rows)])["files"]
    assert found["labels"] == {"hw": 6, "mail": 3}
    rows = [{"prompt": "Write", "completion": f"answer {number}"} for number in range(9)]
    (found,) = fedsp.check_data([rows_file(tmp_path / "u.jsonl", rows)])["files"]
    assert "labels" not in found


def test_the_command_shows_it_and_says_what_it_cannot_tell(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table = "prompt;completion\nDrucker f\u00fcr A123456789, max@x.de;it\n"
    path.write_bytes(table.encode("cp1252"))
    result = CliRunner().invoke(app, ["data", "check", str(path), "--json", f"{tmp_path}/a.json"])
    assert result.exit_code == 0 and "divided by semicolons" in result.output
    assert "insurance numbers" in result.output and "line 2" in result.output
    found = (tmp_path / "a.json").read_text()
    assert json.loads(found)["files"][0]["rows"] == 1
    for shown in (result.output, found):
        assert "A123456789" not in shown and "max@x" not in shown and "[e-mail addresses]" in shown
    rows_file(tmp_path / "odd.jsonl", [{"a": "b"}])
    with pytest.raises(DataError, match=r"has the fields \['a'\], by which no task can be told"):
        fedsp.check_data([tmp_path / "odd.jsonl"])
    with pytest.raises(DataError, match="unknown task 'nonsense'"):
        fedsp.check_data([path], task="nonsense")
    with pytest.raises(ConfigurationError, match="no file of examples is given"):
        fedsp.check_data()


def test_a_file_of_which_no_row_can_be_used_is_no_success(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", [ticket(0, label=""), ticket(1, label=" ")])
    told = CliRunner().invoke(app, ["data", "check", str(path), "--json", f"{tmp_path}/a.json"])
    assert isinstance(told.exception, DataError) and "rows.jsonl: no row can be used: " in str(
        told.exception
    )
    assert json.loads((tmp_path / "a.json").read_text())["files"][0]["unusable"] == 2
    assert fedsp.check_data(str(path))["files"][0]["rows"] == 2, "one name is no list of letters"


def test_columns_of_the_files_are_named_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "tickets.jsonl"
    path.write_text(json.dumps({"Frage": "Who?", "Antwort": "She."}) + "\n")
    words = ["data", "check", str(path), "--task", "completion"]
    named = ["--column", "prompt=Frage", "--column", "completion=Antwort"]
    told = CliRunner().invoke(app, [*words, *named, "--json", f"{tmp_path}/a.json"])
    assert told.exit_code == 0
    (found,) = json.loads((tmp_path / "a.json").read_text())["files"]
    assert found["preview"] == [{"context": "Who?", "answer": " She."}]
    with pytest.raises(ConfigurationError, match=r"--column 'Frage': expected a field of the task"):
        CliRunner().invoke(app, [*words, "--column", "Frage"], catch_exceptions=False)


def test_tokens_are_not_counted_without_a_model(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", [ticket(1)])
    with pytest.raises(ConfigurationError, match="max_tokens = 16: tokens are counted by a model"):
        fedsp.check_data(path, max_tokens=16)


def test_rows_that_a_model_s_template_refuses_are_counted_as_unusable(tmp_path: Path) -> None:
    """The embedded model has no template at all; without a model nothing can be refused."""
    rows: list[dict[str, object]] = [
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user"}]},
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        },
    ]
    path = rows_file(tmp_path / "chat.jsonl", rows)
    (found,) = fedsp.check_data([path])["files"]
    assert found["tasks"] == {"chat": 1} and found["unusable"] == 1
    (found,) = fedsp.check_data([path], model="embedded")["files"]
    assert found["unusable"] == 2 and "tokens" not in found and found["preview"] == []


def test_a_model_is_named_as_in_a_run_s_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf = str(write_gguf(tmp_path / "tiny.gguf", tiny_llama()))
    path = rows_file(tmp_path / "rows.jsonl", [ticket(number) for number in range(5)])
    found = [fedsp.check_data([path], model=name)["files"][0] for name in ("embedded", gguf)]
    assert found[0]["tokens"] == found[1]["tokens"], "they have one tokenizer"
