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
from fedsp.training.evaluation import LogProbabilities, log_probabilities

WEIGHTS = (0.5, 1.0, 1.5, 2.0)
"""Weights of proxy-tuned answers, of which validation chooses one."""
Answering = Literal["global", "auxiliary", "proxy", "mean"]
"""Who answers: the global model with what was tuned, the tuned auxiliary model, proxy-tuned answers
or the mean of the two tuned models."""


class Answers(Protocol):
    """One or several models as they answer."""

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


def proxy_tuned(bare: Side, tuned: Side, untuned: Side, weight: float) -> Together:
    """The answers of the untuned global model `bare`, moved as tuning moves the auxiliary model."""

    def combine(bare: Tensor, tuned: Tensor, untuned: Tensor) -> Tensor:
        return torch.log_softmax(bare + weight * (tuned - untuned), dim=-1)

    return Together((bare, tuned, untuned), combine)


def mean_of(one: Side, other: Side) -> Together:
    """The mean of two models' probabilities."""
    return Together((one, other), lambda one, other: torch.logaddexp(one, other) - math.log(2))
