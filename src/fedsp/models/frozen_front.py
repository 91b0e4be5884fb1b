"""The blocks of a model before the first one that a messenger lives in. They are frozen, so what
they make of a text is computed once and kept, and a step computes only the blocks behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad as filled

from fedsp.data.batching import pad
from fedsp.models.blocks import forwarding
from fedsp.storage import tensor_on_disk

if TYPE_CHECKING:
    from fedsp.models.prompted_lm import PromptedLM

Ids = tuple[int, ...]

GROUP = 16
IN_MEMORY = 1 << 30
"""Largest size, in bytes, of hidden states that are kept in memory; further ones are kept in
unlinked files, which end with the process."""


class Entry(NamedTuple):
    """Hidden states (B, T, D) of a batch as they enter the block at `depth`."""

    depth: int
    states: Tensor
    as_tuple: bool

    def arranged(self, cells: Tensor, mask: Tensor, shape: tuple[int, ...]) -> Entry:
        """The same for a packed batch of this shape (B', T'), of whose tokens, in one line, `cells`
        (B, T) are those of the batch where its `mask` is 1."""
        width = self.states.shape[-1]
        line = self.states.new_zeros(math.prod(shape), width)
        real = mask.bool()
        line[cells[real]] = self.states[real]
        return self._replace(states=line.view(*shape, width))


class _Reached(Exception):
    """Raised at a block in place of its computation, with what enters it."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _hidden(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    hidden: Tensor = arguments[0] if arguments else named["hidden_states"]
    return hidden


@contextmanager
def entered(blocks: nn.ModuleList, entry: Entry | None) -> Iterator[None]:
    """Within the context the blocks before the entry compute nothing, and the one at its depth
    reads its states."""
    if entry is None:
        yield
        return

    def skip(_forward: Any) -> Any:
        def nothing(*arguments: Any, **named: Any) -> Any:
            hidden = _hidden(arguments, named)
            return (hidden,) if entry.as_tuple else hidden

        return nothing

    def enter(forward: Any) -> Any:
        def read(*arguments: Any, **named: Any) -> Any:
            states = entry.states.to(_hidden(arguments, named))
            named.pop("hidden_states", None)
            return forward(states, *arguments[1:], **named)

        return read

    with forwarding(blocks[: entry.depth], skip), forwarding([blocks[entry.depth]], enter):
        yield


class FrozenFront:
    """Hidden states of texts as they enter the block at `depth`, each computed once.

    A model's blocks before `depth` must not change as long as it is used. Texts are computed with
    others of like length, the same ones whenever it is, so that their states have the same bits in
    every process, and whether they were kept or not.
    """

    def __init__(self, model: PromptedLM, depth: int) -> None:
        self.model, self.depth = model, depth
        self._kept: dict[tuple[Ids, ...], list[Tensor]] = {}
        self._bytes = 0

    @cached_property
    def as_tuple(self) -> bool:
        """Whether the blocks of this family return a tuple."""
        seen: list[Any] = []
        handle = self.model.blocks[0].register_forward_hook(
            lambda _module, _arguments, output: seen.append(output)
        )
        try:
            with torch.no_grad():
                self.model.read_padded(self.model.some_tokens())
        finally:
            handle.remove()
        return isinstance(seen[0], tuple)

    @cached_property
    def works(self) -> bool:
        """Whether the model, given what enters the block, gives the hidden states that it gives by
        itself, tried on a few tokens: in some families later blocks read what earlier ones have
        left elsewhere, or rotations depend on how long a call is."""
        if self.model.switch is not None:
            return False
        tokens = self.model.some_tokens()
        with torch.no_grad():
            expected = self.model.read_padded(tokens)
            entry = Entry(self.depth, self._read(tokens), self.as_tuple)
            self.model.read_padded(tokens.flip(1))  # takes the place of what blocks have left
            try:
                found = self.model(tokens, entry=entry)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                return False
        return bool(torch.equal(found, expected))

    def groups(self, texts: Sequence[Ids]) -> dict[int, tuple[int, ...]]:
        """For each text the numbers of those that are computed with it."""
        order = sorted(range(len(texts)), key=lambda number: (len(texts[number]), texts[number]))
        return {
            number: group
            for start in range(0, len(order), GROUP)
            for group in [tuple(order[start : start + GROUP])]
            for number in group
        }

    def entry(
        self, texts: Sequence[Ids], groups: dict[int, tuple[int, ...]], numbers: Sequence[int]
    ) -> Entry:
        """The states of these texts, padded on the right with zeros to the longest of them."""
        rows = []
        for number in numbers:
            group = groups[number]
            key = tuple(texts[other] for other in group)
            if key not in self._kept:
                self._kept[key] = self._computed(key)
            rows.append(self._kept[key][group.index(number)])
        longest = max(len(row) for row in rows)
        states = torch.stack([filled(row, (0, 0, 0, longest - len(row))) for row in rows])
        return Entry(self.depth, states, self.as_tuple)

    @torch.no_grad()
    def _computed(self, texts: Sequence[Ids]) -> list[Tensor]:
        batch = pad(texts, self.model.device)
        states = self._read(*batch).cpu()
        rows = [state[: len(text)] for state, text in zip(states, texts, strict=True)]
        line = torch.cat(rows)
        self._bytes += line.numel() * line.element_size()
        if self._bytes > IN_MEMORY:
            kept = tensor_on_disk(
                line.numel(), line.dtype, what="hidden states of texts", instead="free some space"
            )
            line = kept.view(line.shape).copy_(line)
        return list(torch.split(line, [len(text) for text in texts]))

    def _read(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """What enters the block (B, T, D)."""

        def stop(*arguments: Any, **named: Any) -> Any:
            raise _Reached(_hidden(arguments, named))

        try:
            with forwarding([self.model.blocks[self.depth]], lambda _forward: stop):
                self.model.read_padded(ids, mask)
        except _Reached as reached:
            return reached.hidden
        raise AssertionError(f"{self.model.name} does not call its block {self.depth}")
