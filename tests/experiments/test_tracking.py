"""MLflow, TensorBoard and Weights & Biases by one line of the configuration each, and callbacks of
one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedsp import QUIET
from fedsp import api as commands
from fedsp.errors import RunError
from fedsp.experiments import run_directory as runs
from fedsp.experiments.tracking.figures import PUBLISHED
from fedsp.federation.callbacks import Callbacks
from support.deployed import until
from support.small_runs import settings

pytestmark = pytest.mark.study
pytest.importorskip("mlflow", reason="MLflow comes with the mlflow extra")


def stopped_and_resumed(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **callbacks: Any
) -> dict[str, Any]:
    """The figures of a run that is stopped between the checkpoint of round 2 and whoever is told of
    it, and resumed."""
    original = runs.RunDirectory.save_round

    def stop_in_round_two(
        self: runs.RunDirectory, state: object, record: object, *rest: object
    ) -> None:
        original(self, state, record, *rest)  # type: ignore[arg-type]
        if getattr(record, "round") == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.RunDirectory, "save_round", stop_in_round_two)
        with pytest.raises(KeyboardInterrupt):
            commands.run(config, callbacks=Callbacks(**callbacks))
    return commands.resume(config["output"], callbacks=Callbacks(**callbacks))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a folder: by name, the value at each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {
        name: {event.step: event.value for event in read.Scalars(name)}
        for name in read.Tags()["scalars"]
    }


def test_tensorboard_shows_every_round_once_and_the_end_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**settings(tmp_path), "tracking": {"tensorboard": str(tmp_path / "events")}}
    figures = stopped_and_resumed(config, monkeypatch)
    (place,) = (tmp_path / "events").iterdir()
    shown = scalars(place)
    records = runs.RunDirectory.open(tmp_path / "run").records()
    assert shown["validation_loss"] == pytest.approx(
        {record["round"]: record["validation"] for record in records}
    )
    assert shown["end/test/accuracy"] == pytest.approx({3: figures["test"]["accuracy"]})
    assert "client_prompt_loss" in shown


def records_of(path: Path) -> list[Any]:
    """The records of a W&B file: LevelDB's log format behind seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            records.append(record)
            whole = b""
    return records


def offline(folder: Path) -> dict[str, Any]:
    """What `wandb sync` would send of a run that was kept offline."""
    told: dict[str, Any] = {"steps": [], "summary": {}, "config": {}, "kinds": set()}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        # its own process writes it, and the last record last
        until(lambda path=path: any(record.HasField("exit") for record in records_of(path)))  # type: ignore[misc]
        for record in records_of(path):
            told["kinds"].add(record.WhichOneof("record_type"))
            for part, items in (
                ("summary", record.summary.update),
                ("config", record.run.config.update),
            ):
                told[part] |= {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }
            if record.HasField("history"):
                told["steps"].append(record.history.step.num)
    return told


def test_weights_and_biases_is_told_the_same_and_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = {**settings(tmp_path), "tracking": {"wandb": "fedsp"}}
    figures = stopped_and_resumed(config, monkeypatch)
    told = offline(tmp_path / "run")
    assert sorted(set(told["steps"])) == [1, 2, 3]
    assert told["summary"]["test.accuracy"] == pytest.approx(figures["test"]["accuracy"])
    assert told["config"]["round.rounds"] == "3" and "tracking.wandb" not in told["config"]
    assert not {"stats", "output", "output_raw", "environment"} & set(told["kinds"])
    kept = [path.name for path in tmp_path.glob("run/wandb/offline-run-*/files/*")]
    assert not kept, "nor a list of what is installed"


def test_one_s_own_callbacks_are_told_of_the_end_and_of_what_ended_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    figures = stopped_and_resumed(
        settings(tmp_path),
        monkeypatch,
        finished=lambda figures: told.append(figures["test"]),
        failed=lambda error: told.append(type(error)),
        round_done=lambda record, rounds: told.append(record.round),
    )
    assert told == [1, KeyboardInterrupt, 3, figures["test"]]


def test_a_run_is_logged_by_one_line_and_a_resumed_one_goes_on_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = {**settings(tmp_path), "tracking": {"mlflow": uri}}
    figures = stopped_and_resumed(config, monkeypatch)
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

    from fedsp.experiments.tracking import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setattr(
        mlflow.MlflowRun, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
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


def test_a_disk_that_takes_no_more_events_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("add_text", "add_scalar", "close"):
        monkeypatch.setattr(SummaryWriter, name, full)
    said: list[str] = []
    trackers = {"tensorboard": str(tmp_path / "events")}
    figures = commands.run(
        {**settings(tmp_path, round={"rounds": 1}), "tracking": trackers},
        callbacks=Callbacks(info=said.append),
    )
    assert "test" in figures and any("could not be written to" in line for line in said)


def test_a_tracker_that_cannot_start_ends_those_before_it(tmp_path: Path) -> None:
    """And leaves nothing in the way of the run once that is mended."""
    (tmp_path / "taken").write_text("a file")
    trackers = {
        "tensorboard": str(tmp_path / "taken" / "events"),
        "mlflow": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }
    with pytest.raises(RunError, match="tracking.tensorboard = .* cannot be written"):
        commands.run({**settings(tmp_path), "tracking": trackers})
    told: list[BaseException] = []
    with pytest.raises(RunError, match="tracking.mlflow"):
        commands.run(
            {**settings(tmp_path), "tracking": {"mlflow": "nothing://x"}},
            callbacks=Callbacks(failed=told.append),
        )
    assert len(told) == 1
    commands.run({**settings(tmp_path, round={"rounds": 1})})


def test_every_tracker_is_told_no_more_where_each_client_is_promised_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    private = {
        "privacy": {"unit": "client", "noise_multiplier": 2.0},
        "round": {"rounds": 1, "weighting": "uniform", "min_clients": 0},
    }
    trackers = {"tensorboard": str(tmp_path / "events"), "wandb": "fedsp"}
    commands.run({**settings(tmp_path, **private), "tracking": trackers})
    of_rounds = {"server_loss", "validation_loss"}
    (place,) = (tmp_path / "events").iterdir()
    names = set(scalars(place))
    assert "end/epsilon" in names and "end/test/accuracy" in names
    assert {name for name in names if not name.startswith("end/")} <= of_rounds
    told = {name.partition(".")[0] for name in offline(tmp_path / "run")["summary"]}
    assert "epsilon" in told
    assert {name for name in told if name[0] != "_"} <= {
        "server loss",
        "validation loss",
        *PUBLISHED,
    }


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
