"""MLflow (https://mlflow.org/docs/latest/ml/tracking/): `tracking.mlflow = URI`.

Losses of every round as metrics by step, the configuration as parameters, the figures at the end,
and `config.toml`, `rounds.jsonl`, `result.json` and the tuned prompt as artefacts. A resumed run
goes on in its MLflow run. What MLflow cannot take is said, and the run goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsp.errors import RunError, first_line, require_installed
from fedsp.experiments.run_directory import RunDirectory, read_json
from fedsp.experiments.tracking.figures import BEFORE, VALIDATION, Told
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.messages import RoundRecord
from fedsp.storage import write_json

EXPERIMENT, MARK = "fedsp", "mlflow.json"


class MlflowRun:
    """One run in MLflow."""

    def __init__(self, run: RunDirectory, uri: str, info: Callable[[str], None]) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        require_installed("mlflow", "tracking.mlflow needs", "mlflow", "sqlalchemy", "alembic")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self._run, self._info, self._refusal = run, info, MlflowException
        self._told = Told(run)
        mark = run.path / MARK
        try:
            self._client = MlflowClient(tracking_uri=uri)
            if mark.exists():
                self._id = str(read_json(mark, "run_id")["run_id"])
                self._client.update_run(self._id, status="RUNNING")
                return
            experiment = self._experiment(uri)
            about = run.about()
            tags = {
                "fedsp.run": run.identity,
                "fedsp.folder": str(run.path.resolve()),
                "fedsp.commit": str(about["versions"].get("commit", "unknown")),
            }
            self._id = str(
                self._client.create_run(experiment, run_name=run.path.name, tags=tags).info.run_id
            )
            for name, value in self._told.parameters().items():
                self._client.log_param(self._id, name, value[:500])
        except (MlflowException, OSError, ValueError, KeyError) as error:
            raise RunError(
                f"tracking.mlflow = {uri!r} cannot be used ({first_line(error)}): start that MLflow"
                " server, or remove the line"
            ) from error
        write_json(mark, {"uri": uri, "run_id": self._id})

    def _experiment(self, uri: str) -> str:
        """The experiment of all runs; another process may make it at the same moment."""
        for _ in range(2):
            found = self._client.get_experiment_by_name(EXPERIMENT)
            if found:
                return str(found.experiment_id)
            with contextlib.suppress(self._refusal):
                # beside the database where there is no server; else where the server wants them
                base = uri.removeprefix("sqlite:///")
                place = str(Path(base).resolve().parent / "mlartifacts") if base != uri else None
                return str(self._client.create_experiment(EXPERIMENT, artifact_location=place))
        raise ValueError(f"the experiment {EXPERIMENT!r} can neither be found nor made")

    def callbacks(self) -> Callbacks:
        """What tells MLflow of the run."""
        return Callbacks(
            round_done=lambda record, rounds: self._round(record),
            finished=self._finish,
            failed=lambda error: self._end("FAILED"),
        )

    def _round(self, record: RoundRecord) -> None:
        self._metrics(self._told.round(record), record.round)

    def _finish(self, figures: Mapping[str, Any]) -> None:
        """The figures of the end, rounds that were kept but not told before the run was stopped,
        and the artefacts."""
        with contextlib.suppress(self._refusal, OSError):
            known = {
                metric.step
                for name in (VALIDATION, VALIDATION + BEFORE)
                for metric in self._client.get_metric_history(self._id, name)
            }
            for record in self._told.kept():
                if record.round not in known:
                    self._round(record)
        self._metrics(self._told.end(figures), 0)
        for path in self._told.files():
            self._try(lambda path=path: self._client.log_artifact(self._id, str(path)))  # type: ignore[misc]
        self._end("FINISHED")

    def _end(self, status: str) -> None:
        self._try(lambda: self._client.set_terminated(self._id, status=status))

    def _metrics(self, figures: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_name(name), value, now, step) for name, value in figures.items()]
        self._try(lambda: self._client.log_batch(self._id, metrics=metrics))

    def _try(self, log: Callable[[], object]) -> None:
        try:
            log()
        except (self._refusal, OSError) as error:
            self._info(
                f"part of this run could not be logged to MLflow ({first_line(error)}); it is in"
                f" {self._run.path}"
            )


def _name(name: str) -> str:
    """MLflow takes letters, digits, and a few signs."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)
