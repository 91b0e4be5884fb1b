"""`fedsp watch`: how a run stands, by its folder alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedsp import api as commands
from fedsp.cli import app
from fedsp.errors import ConfigurationError
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.callbacks import Callbacks
from fedsp.report import console
from fedsp.report.console import duration, sparkline
from fedsp.report.progress import progress
from support.private_runs import EXAMPLE
from support.small_runs import settings


class Killed(Exception):
    pass


def test_a_run_that_goes_on_and_one_that_is_finished(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def after(record: Any, rounds: int) -> None:
        seen.append(progress(RunDirectory.open(tmp_path / "run")))
        if record.round == 2:
            raise Killed

    with pytest.raises(Killed):
        commands.run(settings(tmp_path), callbacks=Callbacks(round_done=after))
    now = seen[-1]
    assert (now["round"], now["rounds"], now["finished"]) == (2, 3, False)
    assert now["seconds_left"] == pytest.approx(now["seconds"]) and now["seconds_since"] >= 0
    assert [number for number, _ in now["validation"]] == [1, 2]
    assert now["best"] == min(loss for _, loss in now["validation"])
    assert now["clients"] == {
        f"client-{number}": {"asked": 2, "answered": 2, "failed": None} for number in range(3)
    }
    odd = tmp_path / "run" / "rounds.jsonl"
    whole = odd.read_text()
    odd.write_text(re.sub(r'"validation": [0-9.]+', '"validation": NaN', whole, count=1))
    assert len(progress(RunDirectory.open(tmp_path / "run"))["validation"]) == 1
    odd.write_text(whole)
    with open(tmp_path / "run" / "rounds.jsonl", "a") as journal:
        journal.write('{"round": 3, "asked": ["cli')  # a line that is being written
    assert progress(RunDirectory.open(tmp_path / "run"))["round"] == 2
    figures = commands.resume(tmp_path / "run")
    done = progress(RunDirectory.open(tmp_path / "run"))
    assert done["finished"] and done["seconds_left"] is None and done["round"] == 3
    assert (done["bytes_down"], done["bytes_up"]) == (figures["bytes_down"], figures["bytes_up"])


def test_the_command_shows_it(tmp_path: Path) -> None:
    commands.run(settings(tmp_path))
    journal = tmp_path / "run" / "rounds.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[1] |= {"answered": ["client-0"], "failed": {"client-1": "the disk is full"}}
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = tmp_path / "now.json"
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "run"), "--json", str(kept)])
    assert result.exit_code == 0 and "finished" in result.output and "3 of 3" in result.output
    assert "answered 2 of 3; failed: the disk is full" in result.output
    first, other = result.output.index("client-1"), result.output.index("client-0")
    assert first < other, "those that failed stand first"
    assert json.loads(kept.read_text())["round"] == 3
    for seconds in ("inf", "1e300", "nan", "0"):
        result = CliRunner().invoke(app, ["watch", str(tmp_path / "run"), "--seconds", seconds])
        assert result.exit_code != 0 and "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit | ConfigurationError), seconds
    result = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert result.exit_code != 0 and "holds no run" in str(result.exception)


def test_what_a_private_run_has_spent_is_shown(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting comes with the privacy extra")
    commands.run(settings(tmp_path, **EXAMPLE))
    spent = json.loads((tmp_path / "run" / "privacy_statement.json").read_text())["epsilon"]
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "run")])
    assert result.exit_code == 0 and f"{spent:.3f}" in result.output.split("epsilon so far")[1]


def test_a_terminal_is_shown_it_until_the_run_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.run(settings(tmp_path))
    done = progress(RunDirectory.open(tmp_path / "run"))
    states = iter([done | {"finished": False}, done | {"finished": False, "round": 2}, done])
    slept: list[float] = []
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr("time.sleep", slept.append)
    console.watch(lambda: next(states), 0.5)
    assert slept == [0.5] and next(states, None) is None


def test_lines_of_blocks_and_times() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "\u2588\u2585\u2581"
    assert sparkline([1.0, 1.0]) == "\u2581\u2581" and sparkline([]) == ""
    assert len(sparkline([float(number) for number in range(100)], width=10)) == 10
    assert [duration(one) for one in (0.25, 59, 61, 3725)] == [
        "0.2 s",
        "59 s",
        "1 min 1 s",
        "1 h 2 min",
    ]
