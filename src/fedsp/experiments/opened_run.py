"""A run's server side, opened again with the best that was tuned: what is evaluated, generated with and exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fedsp.errors import RunError
from fedsp.experiments.build import server_side
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import Server, load_dataset, open_server
from fedsp.federation.party import Tunable
from fedsp.models.payload import Payload
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import SoftPrompt, read_prompt
from fedsp.storage import read_tensors


@dataclass
class OpenRun:
    """The server's side of a run: the global model, as the run's method reads it, and the best that was tuned."""

    directory: RunDirectory
    server: Server
    model: PromptedLM
    tuned: Tunable
    best: Payload
    start: Payload

    def prefix(self, *, zero_shot: bool = False) -> torch.Tensor | None:
        """Put the best in place, or with `zero_shot` what was there before any tuning; returns the keys and values in front of every text, if any."""
        if zero_shot and isinstance(self.tuned, SoftPrompt):
            return None
        self.tuned.load(self.start if zero_shot else self.best)
        with torch.no_grad():
            return self.tuned.prefix(self.model)


def open_run(folder: str | Path) -> OpenRun:
    """The server's side of a run, with the best of its rounds so far.

    Raises:
        RunError: there is no run, or no round of it is finished.
    """
    directory = RunDirectory.open(Path(folder))
    if not directory.best.exists():
        raise RunError(f"{folder} has no prompt yet: its first round is not finished")
    server = open_server(directory.config, load_dataset(directory.config, directory.partition()))
    model, tuned = server_side(server)
    if isinstance(tuned, SoftPrompt):
        prompt = read_prompt(directory.best).to(server.model.device)
        return OpenRun(directory, server, model, prompt, prompt.payload(), {})
    return OpenRun(directory, server, model, tuned, read_tensors(directory.best)[0], tuned.payload())
