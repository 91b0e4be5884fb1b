"""Answers that two models give together, without changing the global one.

What was tuned through the auxiliary model is learned there first; how much of it the global model
shows is another question. So the auxiliary model's own answers are measured, and two combinations:
proxy-tuned answers (A. Liu et al. *Tuning Language Models by Proxy*. COLM 2024.
https://arxiv.org/abs/2401.08565), z = z_global + weight (z_tuned - z_untuned), with the logits of
the auxiliary model with and without what was tuned; and the mean of the probabilities of the global
model that reads the messenger and of the tuned auxiliary model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedsp.models.prompted_lm import NextToken, PromptedLM, length_of
from fedsp.models.running_texts import RunningTexts
from fedsp.training.evaluation import LogProbabilities, log_probabilities

WEIGHTS = (0.5, 1.0, 1.5, 2.0)
"""Weights of proxy-tuned answers, of which validation chooses one."""
Answering = Literal["global", "auxiliary", "proxy", "mean"]
"""Who answers: the global model with what was tuned, the tuned auxiliary model, proxy-tuned answers
or the mean of the two tuned models."""


class Answers(Protocol):
    """One or several models as they answer."""

    @property
    def sides(self) -> Sequence[Side]:
        """Its models."""

    def combine(self, *rows: Tensor) -> Tensor:
        """The log-probabilities (..., V) of its answer, from those of each of its models, in the
        order of `sides`."""

    def scorer(self) -> LogProbabilities:
        """Log-probabilities of answer tokens, for as long as no other numbers are loaded into the
        models."""

    def reader(self) -> NextToken:
        """Reads a text that grows, to log-probabilities (V,) of its next token; as long."""

    def room(self) -> int:
        """The longest text, tokens, that all of its models read."""


@dataclass(frozen=True)
class Side:
    """A model as it answers with a messenger's numbers, or with none: `load` puts them into place
    and returns the prefix of keys and values, if there is one."""

    model: PromptedLM
    load: Callable[[], Tensor | None]

    @property
    def sides(self) -> Sequence[Side]:
        return (self,)

    def combine(self, *rows: Tensor) -> Tensor:
        return rows[0]

    def scorer(self) -> LogProbabilities:
        return log_probabilities(self.model, self.load())

    def reader(self) -> NextToken:
        read = self.model.reader(self.load())
        return lambda ids: torch.log_softmax(read(ids.to(self.model.device)), dim=-1)

    def room(self) -> int:
        return self.model.room_behind(length_of(self.load()))


@dataclass(frozen=True)
class Together:
    """Several models whose log-probabilities, each (..., V), `combine` makes into one. Two of them
    may be one model with different numbers, so each loads its own before it reads."""

    sides: Sequence[Side]
    combine: Callable[..., Tensor]

    def scorer(self) -> LogProbabilities:
        return lambda *rows: self.combine(*(side.scorer()(*rows) for side in self.sides))

    def reader(self) -> NextToken:
        readers = [(side, side.reader()) for side in self.sides]

        def scores(ids: Tensor) -> Tensor:
            found = []
            for side, read in readers:
                side.load()
                found.append(read(ids))
            return self.combine(*found)

        return scores

    def room(self) -> int:
        return min(side.room() for side in self.sides)


class RunningAnswers:
    """Texts that are answered together, one row for each, in the order in which they joined
    (`fedsp.models.running_texts`), for as long as no other numbers are loaded into the models."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._running = [RunningTexts(side.model, side.load()) for side in answers.sides]

    def join(self, ids: Tensor) -> Tensor:
        """Read a text (T,), whose row is the last from now on, to the log-probabilities (V,) of its
        next token."""
        return self._combined(lambda one: one.join(ids))

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to each text (B,), to the log-probabilities (B, V) of the next ones."""
        return self._combined(lambda one: one.step(tokens))

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other texts leave."""
        for one in self._running:
            one.keep(rows)

    def _combined(self, read: Callable[[RunningTexts], Tensor]) -> Tensor:
        sides, found = self._answers.sides, []
        for side, one in zip(sides, self._running, strict=True):
            if len(sides) > 1:  # two may be one model with different numbers
                side.load()
            found.append(torch.log_softmax(read(one), dim=-1))
        return self._answers.combine(*found)


class AnswersAlone:
    """The same for one text at a time, of models that do not read several together as each
    alone."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._ids = torch.tensor([])

    def join(self, ids: Tensor) -> Tensor:
        self._read, self._ids = self._answers.reader(), ids
        return self._read(ids)

    def step(self, tokens: Tensor) -> Tensor:
        self._ids = torch.cat([self._ids, tokens])
        return self._read(self._ids)[None]

    def keep(self, rows: Sequence[int]) -> None:
        pass


def proxy_tuned(bare: Side, tuned: Side, untuned: Side, weight: float) -> Together:
    """The answers of the untuned global model `bare`, moved as tuning moves the auxiliary model."""

    def combine(bare: Tensor, tuned: Tensor, untuned: Tensor) -> Tensor:
        return torch.log_softmax(bare + weight * (tuned - untuned), dim=-1)

    return Together((bare, tuned, untuned), combine)


def mean_of(one: Side, other: Side) -> Together:
    """The mean of two models' probabilities."""
    return Together((one, other), lambda one, other: torch.logaddexp(one, other) - math.log(2))
