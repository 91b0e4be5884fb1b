"""A run's figures and artefacts in MLflow (https://mlflow.org/docs/latest/ml/tracking/), by the one
line `tracking.mlflow = URI`.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsp.errors import ConfigurationError, RunError, first_line
from fedsp.experiments.run_directory import BEST, CONFIG, RESULT, ROUNDS, RunDirectory, read_json
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.messages import RoundRecord
from fedsp.storage import each_figure, write_json

EXPERIMENT, MARK = "fedsp", "mlflow.json"
PUBLISHED = (
    "best_round",
    "validation_loss",
    "message_bytes",
    "package_bytes",
    "disclosed_share",
    "test",
    "zero_shot",
    "epsilon",
)
"""The figures that are published under client-level privacy: they follow from the broadcasts and
the server's own questions. Counts of clients, their examples and bytes do not, and stay on the
server."""

PUBLISHED_BESIDES = (
    "server loss and validation loss of each round, and when it ended",
    "the configuration",
    "the best prompt",
)
"""What else MLflow is told of a run at client level."""


def tracked(
    run: RunDirectory, callbacks: Callbacks, experiment: Callable[[Callbacks], dict[str, Any]]
) -> dict[str, Any]:
    """Run an experiment with callbacks that log to MLflow too, if the run's configuration names
    one.

    Raises:
        ConfigurationError: MLflow is not installed.
        RunError: it cannot be reached; then nothing has been trained.
    """
    uri = run.config.tracking.mlflow
    if uri is None:
        return experiment(callbacks)
    log = MlflowLog(run, uri, callbacks.info)

    def round_done(record: RoundRecord, rounds: int) -> None:
        log.round(record)
        callbacks.round_done(record, rounds)

    try:
        figures = experiment(replace(callbacks, round_done=round_done))
    except BaseException:
        log.end("FAILED")
        raise
    log.finish(figures)
    return figures


class MlflowLog:
    """One run in MLflow."""

    def __init__(self, run: RunDirectory, uri: str, info: Callable[[str], None]) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        try:
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise ConfigurationError(
                "tracking.mlflow needs MLflow: `pip install 'fedsp[mlflow]'`"
            ) from error
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self._run, self._info, self._refusal = run, info, MlflowException
        # what single clients said is between them and the server
        self._untold = run.config.privacy.unit == "client"
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
            for names, value in each_figure(run.config.model_dump()):
                if names != ("tracking", "mlflow"):  # it may hold a password
                    self._client.log_param(self._id, ".".join(names), str(value)[:500])
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

    def round(self, record: RoundRecord) -> None:
        """The figures of a round, at its number."""
        figures = {"server loss": record.server_loss, "validation loss": record.validation}
        if not self._untold:
            losses = {f"client {name} loss": loss for name, loss in record.client_losses.items()}
            figures |= {
                **losses,
                "update cosine": record.update_cosine,
                "answered": len(record.answered),
                "seconds": record.seconds,
                "bytes up": record.bytes_up,
                "bytes down": record.bytes_down,
            }
        self._metrics(figures, record.round)

    def finish(self, figures: Mapping[str, Any]) -> None:
        """The figures of the end, rounds that were kept but not told before the run was stopped,
        and the artefacts."""
        with contextlib.suppress(self._refusal, OSError):
            known = {
                metric.step
                for metric in self._client.get_metric_history(self._id, "validation loss")
            }
            for line in self._run.records():
                if line["round"] not in known:
                    self.round(RoundRecord(**line))
        last = (
            {name: figures[name] for name in PUBLISHED if name in figures}
            if self._untold
            else figures
        )
        numbers = {
            ".".join(names): value
            for names, value in each_figure(last)
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._metrics(numbers, 0)
        for name in (CONFIG, BEST, *([] if self._untold else [RESULT, ROUNDS])):
            if (self._run.path / name).exists():
                self._try(
                    lambda name=name: self._client.log_artifact(  # type: ignore[misc]
                        self._id, str(self._run.path / name)
                    )
                )
        self.end("FINISHED")

    def end(self, status: str) -> None:
        """Say to MLflow that the run has ended, and how."""
        self._try(lambda: self._client.set_terminated(self._id, status=status))

    def _metrics(self, figures: Mapping[str, float | None], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(_name(name), float(value), now, step)
            for name, value in figures.items()
            if value is not None
        ]
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
