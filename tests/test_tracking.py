"""MLflow by one line of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsp import commands
from fedsp.errors import RunError
from test_run import settings

pytestmark = pytest.mark.study
pytest.importorskip("mlflow", reason="MLflow comes with the mlflow extra")


def test_a_run_is_logged_by_one_line_and_a_resumed_one_goes_on_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    from fedsp import runs

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = {**settings(tmp_path), "tracking": {"mlflow": uri}}
    original = runs.RunDirectory.keep

    def stop_in_round_two(self: runs.RunDirectory, standing: object, record: object, *rest: object) -> None:
        original(self, standing, record, *rest)  # type: ignore[arg-type]
        if getattr(record, "round") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.RunDirectory, "keep", stop_in_round_two)
    with pytest.raises(KeyboardInterrupt):
        commands.run(config)
    monkeypatch.setattr(runs.RunDirectory, "keep", original)
    figures = commands.resume(tmp_path / "run")
    client = MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("fedsp").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["round.rounds"] == "3" and found.data.params["method"] == "fedsp"
    assert found.data.metrics["test.accuracy"] == pytest.approx(figures["test"]["accuracy"])
    assert sorted(metric.step for metric in client.get_metric_history(found.info.run_id, "validation loss")) == [1, 2, 3]
    names = {artefact.path for artefact in client.list_artifacts(found.info.run_id)}
    assert names == {"config.toml", "rounds.jsonl", "result.json", "best.safetensors"}


def test_a_server_that_is_not_there_is_said_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RunError, match=r"tracking.mlflow = 'http://127.0.0.1:9' cannot be used .*start that MLflow server, or remove the line"):
        commands.run({**settings(tmp_path), "tracking": {"mlflow": "http://127.0.0.1:9"}})
    assert not (tmp_path / "run" / "rounds.jsonl").exists()
