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
    every = callbacks
    try:
        if section.tensorboard is not None:
            from fedsp.experiments.tracking.tensorboard import tensorboard_callbacks

            every = together(every, tensorboard_callbacks(run, section.tensorboard, info))
        if section.wandb is not None:
            from fedsp.experiments.tracking.wandb import wandb_callbacks

            every = together(every, wandb_callbacks(run, section.wandb, info))
        if section.mlflow is not None:
            from fedsp.experiments.tracking.mlflow import MlflowRun

            every = together(every, MlflowRun(run, section.mlflow, info).callbacks())
        figures = experiment(every)
    except BaseException as error:
        every.failed(error)
        raise
    every.finished(figures)
    return figures
