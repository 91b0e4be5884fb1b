"""A run's server side, opened again with the best that was tuned: what is evaluated, generated with
and exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fedsp.data.dataset import load_dataset
from fedsp.errors import RunError
from fedsp.experiments.build import server_side
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import Server, open_server
from fedsp.models.payload import Payload
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import SoftPrompt, read_prompt
from fedsp.models.trainable import Messenger
from fedsp.storage import read_tensors


@dataclass(kw_only=True)
class OpenRun:
    """The server's side of a run: the global model, as the run's method reads it, and the best that
    was tuned."""

    directory: RunDirectory
    server: Server
    model: PromptedLM
    messenger: Messenger
    best: Payload
    start: Payload

    def prefix(self, *, zero_shot: bool = False) -> torch.Tensor | None:
        """Load the best prompt or weights, or with `zero_shot` the initial ones; returns the prefix
        keys and values, None if there are none."""
        if zero_shot and isinstance(self.messenger, SoftPrompt):
            return None
        self.messenger.load(self.start if zero_shot else self.best)
        with torch.no_grad():
            return self.messenger.prefix(self.model)


def open_run(folder: str | Path) -> OpenRun:
    """The server's side of a run, with the best of its rounds so far.

    Raises:
        RunError: there is no run, or no round of it is finished.
    """
    directory = RunDirectory.open(Path(folder))
    if not directory.best.exists():
        raise RunError(f"{folder} has no prompt yet: its first round is not finished")
    server = open_server(directory.config, load_dataset(directory.config, directory.partition()))
    model, messenger = server_side(server)
    if isinstance(messenger, SoftPrompt):
        prompt = read_prompt(directory.best).to(server.model.device)
        return OpenRun(
            directory=directory,
            server=server,
            model=model,
            messenger=prompt,
            best=prompt.payload(),
            start={},
        )
    return OpenRun(
        directory=directory,
        server=server,
        model=model,
        messenger=messenger,
        best=read_tensors(directory.best)[0],
        start=messenger.payload(),
    )
