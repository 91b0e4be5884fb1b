"""The journal of what has left a client."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedsp.cli import app
from fedsp.errors import StorageError
from fedsp.federation.chained_log import SECURITY, ChainedLog, read_log, record_event
from fedsp.federation.egress import EGRESS, egress_figures, read_egress
from fedsp.report.console import egress_text


def journal(path: Path, count: int = 3) -> Path:
    kept = ChainedLog(path)
    for round in range(1, count + 1):
        about = {"run": "ab", "round": round, "kind": "update", "sha256": f"{round:064x}"}
        kept.write(**about, bytes=10 * round, norm=1.0 / round, epsilon=None)
    return path


def test_what_is_written_is_read_and_summed(tmp_path: Path) -> None:
    path = journal(tmp_path / "state" / "egress.jsonl")
    ChainedLog(path).write(run="cd", round=1, kind="refusal", bytes=5, epsilon=2.5, delta=1e-5)
    entries = read_egress(path)
    assert [entry["round"] for entry in entries] == [1, 2, 3, 1]
    figures = egress_figures(entries)
    assert figures["messages"] == {"update": 3, "refusal": 1} and figures["runs"] == ["ab", "cd"]
    assert (figures["bytes"], figures["largest_norm"], figures["epsilon"]) == (65, 1.0, 2.5)
    assert figures["chain"] == entries[-1]["chain"] and figures["delta"] == 1e-5
    assert figures["unprotected"] == 3
    told = egress_text(figures)
    assert "epsilon = 2.500 at delta = 1e-05" in told
    assert "3 updates left without differential privacy" in told and "sent again" not in told


def test_an_update_that_is_sent_again_is_one(tmp_path: Path) -> None:
    path = journal(tmp_path / "egress.jsonl")
    again = {"run": "ab", "round": 3, "kind": "update", "sha256": f"{3:064x}"}
    for _ in range(4):
        ChainedLog(path).write(**again, bytes=30, norm=1 / 3, epsilon=None)
    figures = egress_figures(read_egress(path))
    assert (figures["messages"], figures["updates"]) == ({"update": 7}, 3)
    told = egress_text(figures)
    assert "7 updates (3 of them different, the others sent again) and 0 refusals" in told
    assert "3 updates left without differential privacy" in told


def test_an_update_is_one_however_often_it_is_signed(tmp_path: Path) -> None:
    """A client that was restarted signs what it has answered anew, and each signature differs."""
    path = tmp_path / "egress.jsonl"
    about = {"run": "ab", "kind": "update", "bytes": 30, "norm": 1.0, "epsilon": None}
    for signature, (round, payload) in enumerate([(1, "a"), (1, "a"), (2, "a"), (2, "b")]):
        ChainedLog(path).write(**about, round=round, payload=payload, sha256=f"{signature:064x}")
    figures = egress_figures(read_egress(path))
    assert (figures["updates"], figures["unprotected"]) == (3, 3)


def test_epsilon_is_that_of_all_that_was_sent_whatever_delta_stood_before(tmp_path: Path) -> None:
    path = tmp_path / "egress.jsonl"
    about = {"run": "ab", "kind": "update", "bytes": 30, "norm": 1.0}
    for round, (epsilon, delta) in enumerate([(10.8, 1e-9), (7.7, 1e-5)], start=1):
        ChainedLog(path).write(**about, round=round, epsilon=epsilon, delta=delta)
    figures = egress_figures(read_egress(path))
    assert (figures["epsilon"], figures["delta"]) == (7.7, 1e-5)


def test_two_processes_do_not_write_over_each_other_s_lines(tmp_path: Path) -> None:
    path = journal(tmp_path / "egress.jsonl", 2)
    one, other = ChainedLog(path), ChainedLog(path)
    one.write(run="ab", round=3, kind="update", bytes=1)
    with pytest.raises(StorageError, match="was changed by another process: nothing was done"):
        other.write(run="ab", round=4, kind="update", bytes=1)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(StorageError, match="was changed by another process"):
        one.write(run="ab", round=4, kind="update", bytes=1)
    assert len(read_egress(path)) == 2


def test_a_journal_without_a_line_is_not_called_a_client_that_sent_nothing(tmp_path: Path) -> None:
    path = tmp_path / EGRESS
    path.write_text("")
    assert "holds no whole line" in egress_text(egress_figures(read_egress(path)))


def test_a_line_that_a_kill_cut_short_is_written_over(tmp_path: Path) -> None:
    """It was never followed by a message."""
    path = journal(tmp_path / "egress.jsonl", 2)
    with open(path, "ab") as file:
        file.write(b'{"time": "2026')
    assert len(read_egress(path)) == 2
    ChainedLog(path).write(run="ab", round=3, kind="update", bytes=1)
    assert [entry["round"] for entry in read_egress(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("change", ["edit", "remove", "repeat", "nonsense"])
def test_a_changed_line_shows_and_where(line: int, change: str, tmp_path: Path) -> None:
    path = journal(tmp_path / "egress.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    if change == "edit":
        lines[line] = lines[line].replace(b'"bytes": ', b'"bytes": 1')
    elif change == "remove":
        del lines[line]
    elif change == "repeat":
        lines.insert(line, lines[line])
    else:
        lines[line] = b"[]\n"
    path.write_bytes(b"".join(lines))
    if change == "remove" and line == 2:
        assert len(read_egress(path)) == 2, "of which only the digest of the last line tells"
        return
    number = line + 1 + (change == "repeat")
    with pytest.raises(StorageError, match=f"line {number} of .* does not follow from those"):
        read_egress(path)
    with pytest.raises(StorageError, match="the log was changed"):
        ChainedLog(path)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 600))
def test_no_bytes_crash_the_reader_or_pass_as_a_journal(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, place: int
) -> None:
    path = journal(tmp_path_factory.mktemp("bytes") / "egress.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + content + whole[place + len(content) :])
    try:
        found = read_egress(path)
    except StorageError:
        return
    path.write_bytes(whole)
    known = read_egress(path)
    assert found == known[: len(found)], "what is read is the beginning of what was written"


def test_what_cannot_be_written_down_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no .*: nothing has left this client yet"):
        read_egress(tmp_path / "egress.jsonl")
    (tmp_path / "state").write_text("a file")
    with pytest.raises(StorageError, match="cannot be (read|written)"):
        ChainedLog(tmp_path / "state" / "egress.jsonl").write(run="ab", round=1, kind="update")
    path = journal(tmp_path / "egress.jsonl", 1)
    assert set(json.loads(path.read_text())) >= {"time", "run", "round", "kind", "bytes", "chain"}


@pytest.mark.parametrize("value", ["\ud800", 10**5000], ids=["half", "long"])
def test_nothing_is_written_that_would_not_be_read(value: object, tmp_path: Path) -> None:
    """Else whoever sends it makes the journal one that was changed."""
    path = tmp_path / EGRESS
    log = ChainedLog(path)
    log.write(event="before")
    with pytest.raises(StorageError, match="cannot be written down, since it could not be read"):
        log.write(event="sent", run=value)
    log.write(event="after")
    assert [line["event"] for line in read_log(path, "")] == ["before", "after"]


def test_several_processes_write_one_security_log(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: record_event(tmp_path, "tried", number=number), range(24)))
    events = read_log(tmp_path / SECURITY, "")
    assert sorted(event["number"] for event in events) == list(range(24))
    lines = (tmp_path / SECURITY).read_text().splitlines()
    (tmp_path / SECURITY).write_text("\n".join([*lines[:3], *lines[4:]]) + "\n")
    with pytest.raises(StorageError, match="line 4 of .* does not follow"):
        record_event(tmp_path, "one more")
    told = CliRunner().invoke(app, ["federation", "events", str(tmp_path)])
    assert told.exit_code != 0 and isinstance(told.exception, StorageError)


def test_events_are_told_with_the_last_digest(tmp_path: Path) -> None:
    record_event(tmp_path, "admitted", client="a", key="SHA256:x")
    told = CliRunner().invoke(app, ["federation", "events", str(tmp_path)])
    (event,) = read_log(tmp_path / SECURITY, "")
    assert "admitted: client a, key SHA256:x" in told.output
    assert f"its last line has the digest {event['chain'][:16]}" in told.output
