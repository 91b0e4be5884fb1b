"""Weights & Biases (https://docs.wandb.ai): `tracking.wandb = PROJECT`.

Losses of every round by step, the configuration, and the figures at the end as the summary. A
resumed run goes on in its run there. Without a network, `WANDB_MODE=offline` keeps everything in
the run's folder until `wandb sync`. Its own collecting is off: it is told nothing of the machine,
the code, the repository or what stands on the terminal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from fedsp.errors import RunError, first_line, require_installed
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.tracking.figures import Told
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.messages import RoundRecord


def wandb_callbacks(run: RunDirectory, project: str, info: Callable[[str], None]) -> Callbacks:
    """What tells Weights & Biases of a run.

    Raises:
        ConfigurationError: it is not installed.
        RunError: it cannot be reached, or nobody is logged in there.
    """
    require_installed("wandb", "tracking.wandb needs", "wandb")
    import wandb

    told = Told(run)
    try:
        logged = wandb.init(
            project=project,
            name=run.path.name,
            id=hashlib.sha256(run.identity.encode()).hexdigest()[:16],
            resume="allow",
            dir=str(run.path),
            config=told.parameters(),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
    except (wandb.errors.Error, OSError) as error:
        raise RunError(
            f"tracking.wandb = {project!r} cannot be used ({first_line(error)}): run `wandb login`,"
            " set WANDB_MODE=offline, or remove the line"
        ) from error

    def attempt(log: Callable[[], object]) -> None:
        try:
            log()
        except (wandb.errors.Error, OSError) as error:
            info(
                f"part of this run could not be logged to Weights & Biases ({first_line(error)});"
                f" it is in {run.path}"
            )

    def round_done(record: RoundRecord, rounds: int) -> None:
        attempt(lambda: logged.log(told.round(record), step=record.round))

    def finished(figures: Mapping[str, Any]) -> None:
        attempt(lambda: logged.summary.update(told.end(figures)))
        attempt(lambda: logged.finish(exit_code=0))

    for record in told.kept():
        if record.round >= logged.step:  # those before are there already
            round_done(record, 0)
    return Callbacks(
        round_done=round_done,
        finished=finished,
        failed=lambda error: attempt(lambda: logged.finish(exit_code=1)),
    )
