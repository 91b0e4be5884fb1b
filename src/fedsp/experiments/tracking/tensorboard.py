"""TensorBoard (https://www.tensorflow.org/tensorboard): `tracking.tensorboard = FOLDER`.

Losses of every round by step, the configuration as a text, and the figures at the end, in a folder
of the run's name and identity below FOLDER. A resumed run is written there anew from its first
round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsp.errors import RunError, first_line, require_installed
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.tracking.figures import Told
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.messages import RoundRecord


def tensorboard_callbacks(run: RunDirectory, folder: str, info: Callable[[str], None]) -> Callbacks:
    """What tells TensorBoard of a run.

    Raises:
        ConfigurationError: TensorBoard is not installed.
        RunError: the folder cannot be written.
    """
    require_installed("tensorboard", "tracking.tensorboard needs", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    told = Told(run)
    place = Path(folder) / f"{run.path.name}-{run.identity[:8]}"
    try:
        writer = SummaryWriter(str(place), purge_step=0)
    except OSError as error:
        raise RunError(
            f"tracking.tensorboard = {folder!r} cannot be written ({first_line(error)}): name"
            " another folder, or remove the line"
        ) from error

    def attempt(write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            info(f"part of this run could not be written to {place} ({first_line(error)})")

    def scalars(figures: Mapping[str, float], step: int) -> None:
        def write() -> None:
            for name, value in figures.items():
                writer.add_scalar(name.replace(" ", "_").replace(".", "/"), value, step)
            writer.flush()

        attempt(write)

    def round_done(record: RoundRecord, rounds: int) -> None:
        scalars(told.round(record), record.round)

    def finished(figures: Mapping[str, Any]) -> None:
        end = {f"end.{name}": value for name, value in told.end(figures).items()}
        scalars(end, max((record.round for record in told.kept()), default=0))
        attempt(writer.close)

    configuration = f"```\n{json.dumps(told.parameters(), indent=1)}\n```"
    attempt(lambda: writer.add_text("configuration", configuration))
    for record in told.kept():
        scalars(told.round(record), record.round)
    return Callbacks(
        round_done=round_done, finished=finished, failed=lambda error: attempt(writer.close)
    )
