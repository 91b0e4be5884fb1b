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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsp.models.prompted_lm import PromptedLM
from fedsp.training.evaluation import LogProbabilities, log_probabilities

WEIGHTS = (0.5, 1.0, 1.5, 2.0)
"""Weights of proxy-tuned answers, of which validation chooses one."""


@dataclass(frozen=True)
class Side:
    """A model as it answers with a messenger's numbers, or with none: `load` puts them into place
    and returns the prefix of keys and values, if there is one."""

    model: PromptedLM
    load: Callable[[], Tensor | None]

    def __call__(self, *rows: Any) -> Tensor:
        return log_probabilities(self.model, self.load())(*rows)


def proxy_tuned(
    bare: LogProbabilities, tuned: LogProbabilities, untuned: LogProbabilities, weight: float
) -> LogProbabilities:
    """The answers of the untuned global model `bare`, moved as tuning moves the auxiliary model."""

    def answer(*rows: Any) -> Tensor:
        moved = tuned(*rows) - untuned(*rows)
        return torch.log_softmax(bare(*rows) + weight * moved, dim=-1)

    return answer


def mean_of(one: LogProbabilities, other: LogProbabilities) -> LogProbabilities:
    """The mean of two models' probabilities."""
    return lambda *rows: torch.logaddexp(one(*rows), other(*rows)) - math.log(2)
