"""Studies and their report: a grid is run once, whatever happens, and every number of the report is
a run's."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomli_w
from typer.testing import CliRunner

from fedsp import api as commands
from fedsp.cli import app
from fedsp.config_file import make_config
from fedsp.errors import ConfigurationError, RunError, TrainingDiverged
from fedsp.experiments import run_directory as runs
from fedsp.experiments import start, study
from fedsp.experiments.start import start_run
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.methods import registry
from fedsp.models.soft_prompt import read_prompt
from fedsp.report.collect import _lines, read_results
from fedsp.report.finished_run import open_finished
from fedsp.report.page import write_report
from fedsp.report.significance import holm, paired_difference
from fedsp.report.tables import _best_first
from support.small_runs import ROWS, questions, settings

pytestmark = pytest.mark.study
pytest.importorskip("matplotlib", reason="matplotlib comes with the study extra")


def study_file(folder: Path, **changes: Any) -> Path:
    """Two methods and two seeds of a run of seconds."""
    base = settings(folder / "questions")
    base.pop("output")
    values: dict[str, Any] = {
        "name": "small",
        "output": str(folder / "studies"),
        "seeds": [0, 1],
        "reference": "FedSP",
        "base": {key: value for key, value in base.items() if key not in ("model", "data")},
        "models": {"embedded": {"model": base["model"]}},
        "tasks": {"people": {"data": base["data"]}},
        "partitions": {
            "even": {},
            "topics": {"partition": {"kind": "dirichlet", "topics": 3, "alpha": 5.0}},
        },
        "methods": {
            "zero-shot": {"method": "zero_shot"},
            "FedSP": {},
            "FedPrompt": {"method": "fedprompt"},
        },
        "grids": [{"title": "Methods", "methods": ["zero-shot", "FedSP"]}],
    }
    path = folder / "study.toml"
    path.write_text(tomli_w.dumps({**values, **changes}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study with two grids, a choice, and clients of different kind."""
    folder = tmp_path_factory.mktemp("study")
    methods = {
        "zero-shot": {"method": "zero_shot"},
        "FedSP": {},
        "FedPrompt & <friends>": {
            "method": "fedprompt",
            "choose": {"client.learning_rate": [1e-3, 3e-2]},
        },
    }
    grids = [
        {"title": "Methods", "methods": list(methods)},
        {
            "title": "Topics",
            "methods": ["FedSP"],
            "partitions": ["even", "topics"],
            "text": "By topic.",
        },
    ]
    figures = study.run_study(study_file(folder, methods=methods, grids=grids))
    assert figures["finished"] == figures["cells"] == 2 * 5
    return Path(figures["folder"])


def test_a_study_runs_each_cell_once_and_shares_packages(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = sorted(path for path in finished.iterdir() if (path / "result.json").exists())
    assert len(folders) == 10
    assert (
        len(list((finished / "packages").glob("*.json"))) == 2
    )  # one for each seed: the division of the text is not in it
    before = {path: (path / "result.json").stat().st_mtime_ns for path in folders}

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(start, "start_run", never)
    monkeypatch.setattr(start, "resume_run", never)
    again = study.run_study(finished.parent.parent / "study.toml")
    assert again["finished"] == 10 and before == {
        path: (path / "result.json").stat().st_mtime_ns for path in folders
    }


def test_a_killed_study_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study.run_study(study_file(tmp_path / "whole"))
    original = runs.RunDirectory.save_round
    kept: list[str] = []

    def stop(self: runs.RunDirectory, *arguments: Any) -> None:
        original(self, *arguments)
        kept.append(self.path.name)
        if len(kept) == 5:  # in the second round of seed 1
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.RunDirectory, "save_round", stop)
    path = study_file(tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        study.run_study(path)
    monkeypatch.setattr(runs.RunDirectory, "save_round", original)
    rounds: list[int] = []
    callbacks = Callbacks(round_done=lambda record, _: rounds.append(record.round))
    killed = study.run_study(path, callbacks=callbacks)
    assert killed["finished"] == 4 and rounds == [3]
    for folder in Path(whole["folder"]).glob("*FedSP*"):
        name = next(Path(killed["folder"]).glob(f"{folder.name.rpartition('-')[0]}-*"))
        one, other = (read_prompt(place / "best.safetensors").values() for place in (folder, name))
        assert one.equal(other)


def test_two_studies_in_one_folder_leave_each_other_alone(tmp_path: Path) -> None:
    grids = [{"title": "One", "methods": ["zero-shot"]}]
    first = study.run_study(study_file(tmp_path, grids=grids, seeds=[0]))
    second = study.run_study(study_file(tmp_path, grids=grids, seeds=[0], name="other"))
    assert first["folder"] != second["folder"] and first["finished"] == second["finished"] == 1
    base = tomli(tmp_path / "study.toml")["base"] | {"round": {"rounds": 2}}
    changed = study.run_study(
        study_file(tmp_path, grids=grids, seeds=[0], base=base)
    )  # the same name, another configuration
    assert (
        changed["folder"] == first["folder"]
        and len(list(Path(first["folder"]).glob("*/result.json"))) == 2
    )
    assert (
        len(read_results([Path(first["folder"])]).runs) == 1
    )  # the report shows the study as it is now


def tomli(path: Path) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(path.read_text())


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    path = study_file(tmp_path)
    command = [sys.executable, "-m", "fedsp", "study", str(path), "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    both = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=180)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    folders = [folder.parent for folder in (tmp_path / "studies" / "small").glob("*/result.json")]
    assert (
        len(folders) == 4
        and len(list((tmp_path / "studies" / "small" / "packages").glob("*.json"))) == 2
    )
    assert all(
        len((folder / "rounds.jsonl").read_text().splitlines())
        == (3 if "FedSP" in folder.name else 0)
        for folder in folders
    )
    assert (
        sum(line.count(": finished  ") for text in said for line in text.splitlines()) == 4
    )  # each by one of them, once


def test_workers_share_a_study_to_the_same_figures(tmp_path: Path, finished: Path) -> None:
    figures = study.run_study(study_file(tmp_path), workers=2)
    assert (figures["cells"], figures["finished"]) == (4, 4)
    for method in ("zero-shot", "FedSP"):
        found, expected = (
            [json.loads(path.read_text())["test"] for path in sorted(folder.glob(pattern))]
            for folder in (tmp_path / "studies" / "small", finished)
            for pattern in [f"*-even-{method}-seed-*/result.json"]
        )
        assert found == expected and len(found) == 2
    for path in (tmp_path / "studies" / "small").glob("*-FedSP-*"):
        (path / "result.json").unlink()
        about = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps(about | {"threads": 3}))
    assert study.run_study(study_file(tmp_path), workers=2)["failed"] == 2  # and none is lost
    assert not list((tmp_path / "studies" / "small").glob("*/failure.json"))
    with pytest.raises(ConfigurationError, match="threads: each of the workers has one"):
        study.run_study(study_file(tmp_path), workers=2, threads=1)


def test_a_cell_that_another_process_has_is_left_to_it(tmp_path: Path) -> None:
    path = study_file(tmp_path, grids=[{"title": "One", "methods": ["zero-shot"]}])
    _, cells = study.read_study(path)
    lock = cells[0].folder.parent / ".locks" / cells[0].folder.name
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        figures = study.run_study(path)
    assert (figures["finished"], figures["elsewhere"]) == (1, 1)
    assert study.run_study(path)["finished"] == 2


def test_a_cell_that_fails_is_written_down_and_the_rest_goes_on(tmp_path: Path) -> None:
    methods = {
        "zero-shot": {"method": "zero_shot"},
        "broken": {"method": "lora", "lora": {"targets": ["nothing_of_that_name"]}},
    }
    path = study_file(
        tmp_path,
        methods=methods,
        reference="broken",
        seeds=[0],
        grids=[{"title": "One", "methods": ["broken", "zero-shot"]}],
    )
    result = CliRunner().invoke(app, ["study", str(path)])
    assert isinstance(result.exception, RunError) and "1 of 2 cells failed" in str(result.exception)
    (failure,) = (tmp_path / "studies" / "small").glob("*/failure.json")
    assert "name its linear modules in lora.targets" in json.loads(failure.read_text())["reason"]
    assert study.run_study(path) | {"folder": ""} == {
        "folder": "",
        "cells": 2,
        "finished": 1,
        "failed": 1,
        "elsewhere": 0,
    }
    report = write_report([tmp_path / "studies" / "small"], tmp_path / "report")
    assert (
        report["failed"] == 1
        and "nothing_of_that_name" in (tmp_path / "report" / "report.html").read_text()
    )


def test_a_study_is_reported_without_the_cells_that_cannot_be_read(tmp_path: Path) -> None:
    """One of a method that no package brings any more, and one whose figures are damaged: both are
    named on the page, the others stand in its tables."""
    registry.register_method(dataclasses.replace(registry.find_method("zero_shot"), name="own"))
    path = study_file(
        tmp_path,
        methods={"zero-shot": {"method": "zero_shot"}, "mine": {"method": "own"}},
        reference="zero-shot",
        seeds=[0, 1],
        grids=[{"title": "One", "methods": ["zero-shot", "mine"]}],
    )
    assert study.run_study(path)["finished"] == 4
    registry._ENTRIES.pop("own")
    (damaged,) = (tmp_path / "studies" / "small").glob("*zero-shot-seed-1*/result.json")
    damaged.write_text("{")
    report = write_report([tmp_path / "studies" / "small"], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert (report["runs"], report["failed"], report["missing"]) == (1, 3, 3)
    assert page.count("no method &#39;own&#39;") == 2 and "result.json" in page


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"grids": [{"title": "One", "methods": ["FedSp"]}]},
            r"the grid 'One' names 'FedSp', which is not in \[methods\]; did you mean 'FedSP'",
        ),
        (
            {"grids": [{"title": "One", "methods": ["FedSP"], "tasks": ["x"]}]},
            r"names 'x', which is not in \[tasks\]",
        ),
        ({"reference": "nobody"}, r"reference = 'nobody' is not in \[methods\]"),
        (
            {"methods": {"zero-shot": {}, "FedSP": {"round": {"roundz": 1}}}},
            (
                r"the cell 'embedded, people, even, FedSP', has 1 fault:\n  round.roundz: unknown"
                r" key; did you mean 'rounds'"
            ),
        ),
        (
            {"methods": {"zero-shot": {}, "FedSP": {"choose": {"client.learning_rate": 1.0}}}},
            "choose gives lists of values by key",
        ),
        ({"name": "a/b"}, "name: "),
        ({"sedes": [1]}, "sedes: unknown key; did you mean 'seeds'"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_is_run(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        study.run_study(study_file(tmp_path, **changes))
    assert not (tmp_path / "studies").exists()


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"data": {"train": "nowhere.jsonl"}}, r"there is no file .*nowhere.jsonl"),
        ({"distill": {"text": ["nowhere.txt"]}}, r"there is no text file .*nowhere.txt"),
        ({"partition": {"clients": 70}}, r"partition.clients = 70, but only 48 training examples"),
        ({"prompt": {"length": 250}}, r"prompt.length = 250 leaves 6 of the model's 256 positions"),
        ({"auxiliary": {"plan": "first(9)"}}, r"auxiliary.plan: .*"),
        ({"distill": {"sequence_length": 4000}}, r"distill.sequence_length = 4000 is more than"),
        ({"model": {"name": "nowhere"}}, r"cannot load the model 'nowhere'"),
    ],
)
def test_every_cell_is_checked_before_one_is_run(
    tmp_path: Path, sections: dict[str, Any], sentence: str
) -> None:
    """Also where the fault is the last cell's alone; each reason is said once."""
    methods = {"zero-shot": {"method": "zero_shot"}, "FedSP": {}, "wrong": sections}
    grids = [{"title": "All", "methods": list(methods)}]
    path = study_file(tmp_path, methods=methods, grids=grids)
    with pytest.raises(ConfigurationError, match=rf"2 of 6 cells cannot be run:\n  .*{sentence}"):
        study.run_study(path)
    assert not (tmp_path / "studies").exists()


def test_a_finished_study_needs_its_files_no_more(tmp_path: Path) -> None:
    grids = [{"title": "One", "methods": ["zero-shot"]}]
    path = study_file(tmp_path, grids=grids, seeds=[0])
    study.run_study(path)
    (tmp_path / "questions" / "train.jsonl").unlink()
    assert study.run_study(path)["finished"] == 1


def test_what_is_finished_and_what_is_added_were_run_on_the_same_examples(tmp_path: Path) -> None:
    grids = [{"title": "One", "methods": ["zero-shot"]}]
    folder = Path(study.run_study(study_file(tmp_path, grids=grids, seeds=[0]))["folder"])
    more = study_file(tmp_path, grids=grids)
    test = tmp_path / "questions" / "test.jsonl"
    before = test.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    test.write_text(
        "".join(json.dumps({**row, "answer": 3 - row["answer"]}) + "\n" for row in rows)
    )
    with pytest.raises(
        ConfigurationError, match=r"seed 0 was run on another data\.test than there is"
    ):
        study.run_study(more)
    (cell,) = folder.glob("*seed-0*")
    commands.run(make_config({**tomli(cell / "config.toml"), "output": str(tmp_path / "changed")}))
    changed, kept = (
        open_finished(path, "a", study="", choice="", method="", task="", model="", partition="")
        for path in (tmp_path / "changed", cell)
    )
    assert changed and kept and not set(changed.questions) & set(kept.questions)
    with pytest.raises(RunError, match="were run with another data.test each, so that they have"):
        _lines([kept, replace(changed, seed=1)])
    test.write_text(before)
    assert study.run_study(more)["finished"] == 2


SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "studies"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_that_come_with_fedsp_can_be_read(path: Path) -> None:
    shipped, cells = study.read_study(path)
    assert cells and len({cell.folder for cell in cells}) == len(cells)
    assert all(any(number in cell.grids for cell in cells) for number in range(len(shipped.grids)))


class Tables(HTMLParser):
    """The tables of a page by (section, name): rows of (text, link)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], list[list[tuple[str, str]]]] = {}
        self.ids: set[str] = set()
        self.resources: list[str] = []
        self._rows: list[list[tuple[str, str]]] | None = None
        self._text, self._link, self._inside = "", "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        self.resources += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and value
        ]
        if tag == "table":
            self._rows = self.found.setdefault(
                (values.get("data-section") or "", values.get("data-table") or ""), []
            )
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th"):
            self._text, self._link, self._inside = "", "", True
        elif tag == "a" and self._inside:
            self._link = values.get("href") or ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append((self._text.strip(), self._link))
            self._inside = False
        elif tag == "table":
            self._rows = None


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report")
    figures = write_report([finished], output)
    assert (figures["runs"], figures["sections"], figures["missing"], figures["failed"]) == (
        10,
        2,
        0,
        0,
    )
    return output


def figures_of(finished: Path, pattern: str) -> list[dict[str, Any]]:
    return [
        json.loads((path / "result.json").read_text()) for path in sorted(finished.glob(pattern))
    ]


def test_the_tables_of_the_report_agree_with_the_run_directories(
    finished: Path, page: Path
) -> None:
    tables = Tables()
    tables.feed((page / "report.html").read_text())
    losses = {row[0][0]: row for row in tables.found[("1", "answer_loss")][1:]}
    for label, pattern in (("zero-shot", "*zero-shot*"), ("FedSP", "*people-even-FedSP*")):
        numbers = [figures["test"]["answer_loss"] for figures in figures_of(finished, pattern)]
        assert len(numbers) == 2
        assert (
            losses[label][1][0]
            == f"{statistics.fmean(numbers):.3f} ± {statistics.stdev(numbers):.3f}"
        )
    chosen = min(
        ("0.001", "0.03"),
        key=lambda rate: statistics.fmean(
            figures["validation_loss"]
            for figures in figures_of(finished, f"*learning-rate-{rate}*")
        ),
    )
    (row,) = [row for label, row in losses.items() if label.startswith("FedPrompt & <friends>")]
    assert row[0][0] == f"FedPrompt & <friends> (learning_rate {chosen})"  # by validation
    numbers = [
        figures["test"]["answer_loss"]
        for figures in figures_of(finished, f"*learning-rate-{chosen}*")
    ]
    assert row[1][0] == f"{statistics.fmean(numbers):.3f} ± {statistics.stdev(numbers):.3f}"
    with open(page / "csv" / "1-answer_loss.csv") as file:
        written = {line["method"]: line for line in csv.DictReader(file)}
    own = [
        figures["test"]["answer_loss"] for figures in figures_of(finished, "*people-even-FedSP*")
    ]
    assert float(written["FedSP"]["people, number"]) == pytest.approx(
        statistics.fmean(own), abs=1e-12
    )
    markdown = (page / "report.md").read_text()
    assert f"| FedSP | {losses['FedSP'][1][0]} |" in markdown
    assert losses["FedSP"][1][0].replace("±", "$\\pm$") in (page / "report.tex").read_text()
    by_client = {row[0][0]: row for row in tables.found[("2", "clients")][1:]}
    worst = [
        100 * min(client["accuracy"] for client in figures["clients"].values())
        for figures in figures_of(finished, "*topics-FedSP*")
    ]
    assert (
        by_client["FedSP, topics"][2][0]
        == f"{statistics.fmean(worst):.1f} ± {statistics.stdev(worst):.1f}"
    )


def test_every_number_leads_to_its_run_with_seed_commit_and_configuration(
    finished: Path, page: Path
) -> None:
    text = (page / "report.html").read_text()
    tables = Tables()
    tables.feed(text)
    links = [
        link
        for rows in tables.found.values()
        for row in rows[1:]
        for shown, link in row[1:]
        if re.match(r"[+-]?\d", shown)
    ]
    assert links and all(link.removeprefix("#") in tables.ids for link in links)
    assert (
        len(re.findall(r'<a href="#run-\d+">people, seed [01]</a>', text)) == 2 * 3 + 2 * 2
    )  # each line's list: all of its runs
    with open(page / "csv" / "runs.csv") as file:
        assert {row["folder"] for row in csv.DictReader(file)} == {
            path.parent.name for path in finished.glob("*/result.json")
        }
    for path in finished.glob("*-seed-*"):
        if path.is_dir():
            assert path.name in text
    commit = json.loads((next(finished.glob("*FedSP*")) / "run.json").read_text())["versions"][
        "commit"
    ]
    assert (
        f"<dd>{commit}</dd>" in text
        and text.count("<dt>seed</dt>") == 10
        and text.count("[client]") == 10
    )


def test_the_report_needs_no_network(page: Path) -> None:
    tables = Tables()
    text = (page / "report.html").read_text()
    tables.feed(text)
    assert all(resource.startswith(("#", "data:,")) for resource in tables.resources)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_the_report_shows_no_error_in_chromium(page: Path) -> None:
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("there is no Chromium on this machine")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--dump-dom",
    ]
    result = subprocess.run(
        [*command, f"file://{page / 'report.html'}#run-3"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and "CONSOLE" not in result.stderr
    assert re.search(r'<details id="run-3" open', result.stdout)  # the page's one script has run


def test_plain_runs_make_a_report_too(tmp_path: Path) -> None:
    commands.run(settings(tmp_path))
    words = ["report", tmp_path, "--output", tmp_path / "report", "--json", tmp_path / "told.json"]
    told = CliRunner().invoke(app, [*map(str, words)])
    assert told.exit_code == 0 and str(tmp_path / "report") in told.output, told.output
    assert json.loads((tmp_path / "told.json").read_text())["runs"] == 1
    assert "FedSP, prompt (run)" in (tmp_path / "report" / "report.md").read_text()
    with pytest.raises(RunError, match="there is no finished run with test questions in"):
        write_report([tmp_path / "nothing"], tmp_path / "other")


def test_a_task_without_choices_is_reported_by_its_exact_match(tmp_path: Path) -> None:
    rows = [
        {"prompt": row["question"], "completion": row["choices"][row["answer"]]}
        for row in ROWS[:40]
    ]
    names = {
        split: questions(tmp_path, f"{split}-completions", rows[start : start + 20])
        for split, start in (("train", 0), ("validation", 20), ("test", 20))
    }
    figures = commands.run(settings(tmp_path, data={"task": "completion", **names}))
    write_report([tmp_path], tmp_path / "report")
    with open(tmp_path / "report" / "csv" / "1-accuracy.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["completion, number"]) == pytest.approx(100 * figures["test"]["exact_match"])
    assert "exact match" in (tmp_path / "report" / "report.md").read_text()


def test_the_benefit_is_over_the_best_client_alone_or_the_server_alone(tmp_path: Path) -> None:
    names = ["client-0", "client-1", "client-2"]
    methods = {
        "together": {"client": {"learning_rate": 0.1}},
        "one client alone": {"choose": {"round.only": names}},
        "server alone": {
            "round": {"clients": 0},
            "server": {"steps": 4, "batch_size": 4},
            "choose": {"server.learning_rate": [1e-3, 0.3]},
        },
        "all text in one place": {
            "partition": {"clients": 0},
            "server": {"steps": 1, "batch_size": 4},
        },
    }
    grids = [{"title": "Who joins", "methods": list(methods)}]
    path = study_file(tmp_path, methods=methods, reference="together", grids=grids, seeds=[0])
    folder = Path(study.run_study(path)["folder"])
    write_report([folder], tmp_path / "report")
    with open(tmp_path / "report" / "csv" / "1-benefit.csv") as file:
        (row,) = csv.DictReader(file)
    scores, losses = {}, {}
    for name in ("together", *names, "server-alone-learning-rate-0.001", "rate-0.3"):
        found = figures_of(folder, f"*{name}-seed*")
        losses[name] = statistics.fmean(figures["validation_loss"] for figures in found)
        scores[name] = 100 * statistics.fmean(figures["test"]["accuracy"] for figures in found)
    together, *alone, _, _ = scores.values()
    server = scores[min(list(scores)[-2:], key=lambda name: losses[name])]
    rival = max(*alone, server)
    shown = [float(value) for name, value in row.items() if name.endswith("%, number")]
    assert float(row["federation benefit, points, number"]) == pytest.approx(together - rival)
    assert shown == pytest.approx(
        [together, max(alone), statistics.fmean(alone), min(alone), server]
    )
    assert len(row["runs"].split()) == 1 + 3 + 1, (
        "all clients alone, and the server that validation prefers"
    )
    assert (tmp_path / "report" / "report.md").read_text().index("Federation benefit") < (
        tmp_path / "report" / "report.md"
    ).read_text().index("Accuracy, %")


def test_the_best_client_alone_is_the_best_by_the_seeds_that_all_have() -> None:
    def runs_of(cell: str, scores: list[float]) -> list[Any]:
        made = ((seed, score) for seed, score in enumerate(scores))
        return [SimpleNamespace(cell=(cell,), seed=seed, score=score) for seed, score in made]

    some = [*runs_of("a", [0.3, 0.3, 0.3]), *runs_of("b", [0.2, 0.2, 0.2]), *runs_of("c", [0.55])]
    assert [found[0].cell for found in _best_first(some)] == [("c",), ("a",), ("b",)]
    some = [*runs_of("a", [0.3, 0.9]), *runs_of("b", [0.5])]
    assert [found[0].cell for found in _best_first(some)] == [("b",), ("a",)]


def test_what_diverged_stays_in_the_table_of_stability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> Any:
        raise TrainingDiverged("the loss is nan")

    methods = {"zero-shot": {"method": "zero_shot"}, "FedPrompt": {"method": "fedprompt"}}
    path = study_file(
        tmp_path,
        methods=methods,
        reference="zero-shot",
        seeds=[0],
        grids=[{"title": "One", "methods": list(methods)}],
    )
    monkeypatch.setattr(
        start,
        "start_run",
        lambda config, *rest: (
            diverge() if config.method == "fedprompt" else start_run(config, *rest)
        ),
    )
    assert study.run_study(path)["failed"] == 1
    monkeypatch.setattr(start, "start_run", diverge)
    assert study.run_study(path)["failed"] == 1  # what diverged is not tried again
    write_report([tmp_path / "studies" / "small"], tmp_path / "report")
    assert "| FedPrompt | 1 of 1 |" in (tmp_path / "report" / "report.md").read_text()


def test_paired_differences_find_what_is_there_and_not_what_is_not() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(5, 2, (3, 200))
    noise = rng.normal(0, 0.3, (3, 200))
    better = paired_difference([(base - 0.2 + noise, base)])
    assert better.low < -0.2 + noise.mean() < better.high < 0 and better.p < 0.01
    same = paired_difference([(base, base)])
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    found = sum(
        paired_difference([(base[:, :50] + rng.normal(0, 1, (3, 50)), base[:, :50])], seed=seed).p
        < 0.05
        for seed in range(60)
    )
    assert found <= 8  # about one in twenty is false


def test_holm_is_the_published_procedure() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2, 0.01, 0.5, 0.02]) == pytest.approx([0.4, 0.04, 0.5, 0.06])
    assert holm([]) == []
