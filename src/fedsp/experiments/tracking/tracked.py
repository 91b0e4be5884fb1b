"""Runs an experiment with the callbacks of its trackers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.callbacks import Callbacks, together


def tracked(
    run: RunDirectory, callbacks: Callbacks, experiment: Callable[[Callbacks], dict[str, Any]]
) -> dict[str, Any]:
    """Run an experiment that tells `callbacks`, and the trackers that its configuration names, of
    its rounds and its end.

    Raises:
        ConfigurationError: a tracker is not installed.
        RunError: a tracker cannot be reached; then nothing has been trained.
    """
    section, info = run.config.tracking, callbacks.info
    trackers: list[Callbacks] = []
    if section.mlflow is not None:
        from fedsp.experiments.tracking.mlflow import MlflowRun

        trackers.append(MlflowRun(run, section.mlflow, info).callbacks())
    if section.tensorboard is not None:
        from fedsp.experiments.tracking.tensorboard import tensorboard_callbacks

        trackers.append(tensorboard_callbacks(run, section.tensorboard, info))
    if section.wandb is not None:
        from fedsp.experiments.tracking.wandb import wandb_callbacks

        trackers.append(wandb_callbacks(run, section.wandb, info))
    every = together(callbacks, *trackers)
    try:
        figures = experiment(every)
    except BaseException as error:
        every.failed(error)
        raise
    every.finished(figures)
    return figures
