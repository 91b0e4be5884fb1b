"""A party's own state on disk. It never travels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedsp.models.trainable import Tensors
from fedsp.storage import read_tensors, write_tensors


@dataclass
class StateStore:
    """One file of tensors per round in a folder.

    The last three states are kept: after a crash the newest may belong to a round that is done
    again, and so may the one before it.
    """

    folder: Path
    _waiting: dict[int, Tensors] | None = field(default=None, init=False, repr=False)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is saved within the context is written at its end, as one file for each round; of
        what fails, nothing.

        Raises (on exit):
            StorageError: the disk did not take it.
        """
        self._waiting = {}
        try:
            yield
            self.flush()
        finally:
            self._waiting = None

    def flush(self) -> None:
        """Write what is waiting now; what is saved later in the context is written with it again.

        Raises:
            StorageError: the disk did not take it.
        """
        for round, state in (self._waiting or {}).items():
            self._write(round, state)

    def load(self, before: int) -> Tensors:
        """The newest state saved in a round earlier than `before`; empty if there is none.

        Raises:
            StorageError: that state is damaged.
        """
        rounds = [number for number in self.rounds() if number < before]
        return read_tensors(self._file(rounds[-1]))[0] if rounds else {}

    def at(self, round: int) -> Tensors:
        """The state saved in this very round; empty if there is none.

        Raises:
            StorageError: that state is damaged.
        """
        return read_tensors(self._file(round))[0] if round in self.rounds() else {}

    def save(self, round: int, state: Tensors) -> None:
        """Save the state after a round, beside what is saved of that round already, and remove
        states that are no longer needed.

        Raises:
            StorageError: the disk did not take it, or what is there is damaged.
        """
        if self._waiting is None:
            self._write(round, state)
        else:
            # as they are now: the clients of a process share one model, whose weights change
            copies = {name: tensor.detach().clone() for name, tensor in state.items()}
            self._waiting[round] = {**self._waiting.get(round, {}), **copies}

    def _write(self, round: int, state: Tensors) -> None:
        write_tensors(self._file(round), {**self.at(round), **state})
        for number in [number for number in self.rounds() if number < round][:-2]:
            self._file(number).unlink()

    def rounds(self) -> list[int]:
        """The rounds of which a state is kept, in order."""
        return sorted(
            int(path.stem.removeprefix("round-"))
            for path in self.folder.glob("round-*.safetensors")
        )

    def _file(self, round: int) -> Path:
        return self.folder / f"round-{round:05d}.safetensors"
