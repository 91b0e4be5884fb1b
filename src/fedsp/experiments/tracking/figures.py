"""What trackers are told of a run, whichever they are.

Under client-level privacy what single clients said, and what counts them, stays with the server:
trackers are told what follows from the broadcasts and the server's own questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsp.experiments.run_directory import BEST, CONFIG, RESULT, ROUNDS, RunDirectory
from fedsp.federation.messages import RoundRecord
from fedsp.storage import each_figure

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
"""The figures that are published under client-level privacy. Counts of clients, their examples and
bytes are not."""

PUBLISHED_BESIDES = (
    "server loss and validation loss of each round, and when it ended",
    "the configuration",
    "the best prompt",
)
"""What else a tracker is told of a run at client level."""

VALIDATION, BEFORE = "validation loss", " of the round before"
"""The loss that is told in a round; where clients validate, it is of the round before."""


@dataclass(frozen=True)
class Told:
    """What a tracker is told of one run."""

    run: RunDirectory

    @property
    def _untold(self) -> bool:
        return self.run.config.privacy.unit == "client"

    def parameters(self) -> dict[str, str]:
        """The configuration by dotted keys, but for [tracking], which may hold a password."""
        return {
            ".".join(names): str(value)
            for names, value in each_figure(self.run.config.model_dump())
            if names[0] != "tracking"
        }

    def kept(self) -> list[RoundRecord]:
        """The rounds that the run's folder has already, of which a tracker may not have heard."""
        return [RoundRecord(**line) for line in self.run.records()]

    def round(self, record: RoundRecord) -> dict[str, float]:
        """The figures of a round."""
        figures: dict[str, float | None] = {
            "server loss": record.server_loss,
            VALIDATION + BEFORE * (record.judged != record.round): record.validation,
        }
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
        return {name: float(value) for name, value in figures.items() if value is not None}

    def end(self, figures: Mapping[str, Any]) -> dict[str, float]:
        """The figures of a finished run, by dotted names."""
        told = {name: figures[name] for name in figures if not self._untold or name in PUBLISHED}
        return {
            ".".join(names): float(value)
            for names, value in each_figure(told)
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def files(self) -> list[Path]:
        """The files of the run's folder that a tracker may keep."""
        names = (CONFIG, BEST, *([] if self._untold else [RESULT, ROUNDS]))
        return [self.run.path / name for name in names if (self.run.path / name).exists()]
