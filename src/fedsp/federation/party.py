"""The parties: a client or the server, its model, what it tunes, its examples, and where its own state rests between rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from fedsp.data.encoding import Encoded
from fedsp.models.auxiliary import AuxiliaryModel
from fedsp.models.payload import Payload
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import SoftPrompt
from fedsp.models.trainable import Tensors
from fedsp.privacy import Ledger
from fedsp.storage import read_tensors, write_tensors


@dataclass(frozen=True)
class StateStore:
    """A party's own state on disk, one file per round. It never travels.

    Three states are kept: the newest may belong to a round that is done again, and so may the one before it.
    """

    folder: Path

    def load(self, before: int) -> Tensors:
        """The newest state written in a round earlier than `before`; empty if there is none.

        Raises:
            StorageError: that state is damaged.
        """
        rounds = [number for number in self.rounds() if number < before]
        return read_tensors(self._file(rounds[-1]))[0] if rounds else {}

    def at(self, round: int) -> Tensors:
        """The state written in this very round; empty if there is none.

        Raises:
            StorageError: that state is damaged.
        """
        return read_tensors(self._file(round))[0] if round in self.rounds() else {}

    def save(self, round: int, state: Tensors) -> None:
        """Keep the state that the party has after a round; states that nothing can ask for any more are removed.

        Raises:
            StorageError: the disk did not take it.
        """
        write_tensors(self._file(round), state)
        for number in [number for number in self.rounds() if number < round][:-2]:
            self._file(number).unlink()

    def _file(self, round: int) -> Path:
        return self.folder / f"round-{round:05d}.safetensors"

    def rounds(self) -> list[int]:
        """The rounds of which a state is kept, in order."""
        return sorted(int(path.stem.removeprefix("round-")) for path in self.folder.glob("round-*.safetensors"))


class Tunable(Protocol):
    """What a method tunes and sends: a soft prompt (`fedsp.models.soft_prompt`), or weights of the model (`fedsp.models.weights`)."""

    def trained(self) -> dict[str, nn.Parameter]:
        """What an optimizer trains, by name."""

    def payload(self) -> Payload:
        """What travels."""

    def load(self, payload: Payload) -> None:
        """Put received numbers in place. Raises PayloadError for any others than these names and shapes."""

    def own_state(self) -> Tensors:
        """What must rest with the party, since it does not travel."""

    def take_up(self, payload: Payload, own: Mapping[str, Tensor]) -> None:
        """Load received numbers, with the party's own state of an earlier round."""

    def distance(self, payload: Payload) -> Tensor:
        """The squared distance from a payload's numbers, with gradients."""

    def prefix(self, model: PromptedLM) -> Tensor | None:
        """The keys and values that the model reads in front of every text; None for none."""


@dataclass
class Party:
    """One side of the federation. `held_out` is what a client validates on; it is never trained on. `ledger` holds what was released of its examples,
    where that is counted, and `most` the epsilon that all of it may come to."""

    id: str
    model: PromptedLM
    tuned: Tunable
    examples: Sequence[Encoded]
    rest: StateStore
    held_out: Sequence[Encoded] = field(default_factory=tuple)
    ledger: Ledger | None = None
    most: float = math.inf

    @property
    def prompt(self) -> SoftPrompt:
        """What FedSP tunes."""
        assert isinstance(self.tuned, SoftPrompt)
        return self.tuned

    @property
    def shortened(self) -> int:
        """How many of its examples lost old context because they were too long."""
        return sum(row.dropped > 0 for row in [*self.examples, *self.held_out])

    @contextmanager
    def own_weights(self, weights: Tensors | None, package: Tensors) -> Iterator[None]:
        """Put this client's own auxiliary weights into the one model on the device (the package's if it has none yet), and take them
        out again, so that the next client finds the model as it was handed out."""
        assert isinstance(self.model, AuxiliaryModel)
        if weights:
            self.model.load_weights(weights)
        try:
            yield
        finally:
            self.model.load_weights(package)
