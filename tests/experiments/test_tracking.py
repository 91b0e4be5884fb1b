"""MLflow by one line of the configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsp import QUIET
from fedsp import api as commands
from fedsp.errors import RunError
from support.small_runs import settings

pytestmark = pytest.mark.study
pytest.importorskip("mlflow", reason="MLflow comes with the mlflow extra")


def test_a_run_is_logged_by_one_line_and_a_resumed_one_goes_on_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    from fedsp.experiments import run_directory as runs

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = {**settings(tmp_path), "tracking": {"mlflow": uri}}
    original = runs.RunDirectory.save_round

    def stop_in_round_two(
        self: runs.RunDirectory, state: object, record: object, *rest: object
    ) -> None:
        original(self, state, record, *rest)  # type: ignore[arg-type]
        if getattr(record, "round") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.RunDirectory, "save_round", stop_in_round_two)
    with pytest.raises(KeyboardInterrupt):
        commands.run(config)
    monkeypatch.setattr(runs.RunDirectory, "save_round", original)
    figures = commands.resume(tmp_path / "run")
    client = MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("fedsp").experiment_id])
    assert (
        found.info.status == "FINISHED"
        and found.data.params["round.rounds"] == "3"
        and found.data.params["method"] == "fedsp"
    )
    assert found.data.metrics["test.accuracy"] == pytest.approx(figures["test"]["accuracy"])
    assert sorted(
        metric.step for metric in client.get_metric_history(found.info.run_id, "validation loss")
    ) == [1, 2, 3]
    names = {artefact.path for artefact in client.list_artifacts(found.info.run_id)}
    assert names == {"config.toml", "rounds.jsonl", "result.json", "best.safetensors"}


def test_a_run_that_was_stopped_behind_its_last_figures_ends_in_mlflow_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    from fedsp.experiments import tracking

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setattr(
        tracking.MlflowLog, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        commands.run({**settings(tmp_path), "tracking": {"mlflow": uri}})
    monkeypatch.undo()
    commands.resume(tmp_path / "run")
    client = MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("fedsp").experiment_id])
    assert found.info.status == "FINISHED" and "test.accuracy" in found.data.metrics


def test_nobody_is_told_of_a_run(tmp_path: Path) -> None:
    """No library underneath asks where its makers are: in a process of its own, whose every look-up
    of a name is noted."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    values = {**settings(tmp_path), "tracking": {"mlflow": uri}}
    code = f"""
import socket, json, sys
asked = []
def refuses(host, *rest, **named):
    asked.append(str(host))
    raise socket.gaierror("no resolver")
socket.getaddrinfo = refuses
from fedsp import api as commands
commands.run(json.loads({json.dumps(json.dumps(values))}))
import time; time.sleep(1.0)
print(json.dumps(asked))
"""
    quiet_already = {
        *QUIET,
        "HF_HUB_OFFLINE",
        "PYTEST_CURRENT_TEST",
        "CI",
    }  # libraries keep quiet in tests by themselves
    environment = {name: value for name, value in os.environ.items() if name not in quiet_already}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) <= {"localhost", "127.0.0.1"}


OF_THE_SERVER = {"test.shortened_examples", "zero_shot.shortened_examples"}
"""Counts of its own test questions."""


def test_what_counts_single_clients_stays_with_the_server_where_each_is_promised_something(
    tmp_path: Path,
) -> None:
    """A long example of one client, and who answered, would show in counts and times."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    private = {
        "privacy": {"unit": "client", "noise_multiplier": 2.0},
        "round": {"rounds": 2, "weighting": "uniform", "min_clients": 0},
    }
    figures = commands.run({**settings(tmp_path, **private), "tracking": {"mlflow": uri}})
    client = MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("fedsp").experiment_id])
    told = set(found.data.metrics)
    assert "test.accuracy" in told and "epsilon" in told
    for word in (
        "shortened",
        "failures",
        "updates",
        "seconds",
        "answered",
        "client",
        "cosine",
        "bytes_up",
        "bytes up",
        "cost",
    ):
        assert not any(word in name for name in told - OF_THE_SERVER), word
    names = {artefact.path for artefact in client.list_artifacts(found.info.run_id)}
    assert names == {"config.toml", "best.safetensors"}
    assert "shortened_client_examples" not in figures
    statement = json.loads((tmp_path / "run" / "privacy_statement.json").read_text())
    assert statement["published"] and all(isinstance(line, str) for line in statement["published"])


def test_a_server_that_is_not_there_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        RunError,
        match=(
            r"tracking.mlflow = 'http://127.0.0.1:9' cannot be used .*start that MLflow server, or"
            r" remove the line"
        ),
    ):
        commands.run({**settings(tmp_path), "tracking": {"mlflow": "http://127.0.0.1:9"}})
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
