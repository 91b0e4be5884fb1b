"""Adaptation of the global model at the server, after a run and without labels.

What clients tune is learned by the auxiliary model first, and the global model shows only a part of
it (`fedsp.training.answers`). So the server lets a teacher, such as both models together, answer
questions in the task's form, and trains low-rank adapters in all layers of the global model to
answer as the teacher does. They never leave the server, and no text of a client is read.

The loss is the Kullback-Leibler divergence from the teacher's to the student's distribution of each
answer token, both at a temperature (G. Hinton et al. *Distilling the Knowledge in a Neural
Network*. 2015. https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsp.data.encoding import Encoded
from fedsp.data.seeding import derive_seed
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.weights import Weights
from fedsp.training.answers import Answers
from fedsp.training.evaluation import LogProbabilities, log_probabilities
from fedsp.training.loop import Optimisation, TrainResult, fit

LIKELIEST = 64
"""Tokens whose teacher probabilities are kept one by one; all others count as one."""
AT_ONCE = 32
"""Questions that the teacher reads together."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Settings: optimizer steps, questions per step, AdamW, and the temperature of both
    distributions."""

    steps: int
    batch_size: int
    optimisation: Optimisation
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A question with an answer, and what the teacher says at each of its T answer tokens: the
    likeliest tokens (T, K) and their log-probabilities (T, K) at the settings' temperature."""

    text: Encoded
    tokens: Tensor
    likely: Tensor


def lessons(teacher: Answers, texts: Sequence[Encoded], temperature: float) -> list[Lesson]:
    """What a teacher says to each text."""
    found: list[Lesson] = []
    read = teacher.scorer()
    with torch.no_grad():
        for start in range(0, len(texts), AT_ONCE):
            some = texts[start : start + AT_ONCE]
            said = torch.log_softmax(read(*_asked(some)) / temperature, dim=-1)
            likely, tokens = said.topk(min(LIKELIEST, said.shape[-1] - 1), dim=-1)
            counts = [len(text.ids) - text.start for text in some]
            parts = zip(some, torch.split(tokens, counts), torch.split(likely, counts), strict=True)
            found += [
                Lesson(text=text, tokens=places.cpu(), likely=values.cpu())
                for text, places, values in parts
            ]
    return found


def _asked(
    texts: Sequence[Encoded],
) -> tuple[list[tuple[int, ...]], list[list[tuple[int, ...]]], list[list[int]]]:
    """Texts as `LogProbabilities` takes them."""
    contexts = [text.ids[: text.start - 1] for text in texts]
    tails = [[text.ids[text.start - 1 : -1]] for text in texts]
    return contexts, tails, [[0] for _ in texts]


def divergence(answers: LogProbabilities, some: Sequence[Lesson], temperature: float) -> Tensor:
    """Mean Kullback-Leibler divergence, nats per answer token, from the teacher's distributions to
    other `answers`. The tokens that are not among the likeliest count as one token."""
    read = answers(*_asked([lesson.text for lesson in some]))
    own = torch.log_softmax(read / temperature, dim=-1)
    tokens = torch.cat([lesson.tokens for lesson in some]).to(own.device)
    likely = torch.cat([lesson.likely for lesson in some]).to(own.device)
    mine = own.gather(1, tokens)
    named = (likely.exp() * (likely - mine)).sum(dim=-1)
    left, my_left = _left(likely), _left(mine)
    return (named + left.exp() * (left - my_left)).mean()


def _left(likely: Tensor) -> Tensor:
    """The log-probability of all tokens that are not named (T,)."""
    return torch.log1p(-likely.exp().sum(dim=-1).clamp(max=1 - 1e-6))


@torch.no_grad()
def distance(answers: Answers, taught: Sequence[Lesson], temperature: float) -> float:
    """The same of any number of texts, each of its tokens counted alike."""
    read, total, count = answers.scorer(), 0.0, 0
    for start in range(0, len(taught), AT_ONCE):
        some = taught[start : start + AT_ONCE]
        tokens = sum(len(lesson.tokens) for lesson in some)
        total += tokens * float(divergence(read, some, temperature))
        count += tokens
    return total / count


def adapt(
    model: PromptedLM,
    student: Weights,
    taught: Sequence[Lesson],
    settings: Adaptation,
    *,
    seed: int,
) -> TrainResult:
    """Train the student's numbers, which live in `model`, to answer as the teacher does.

    Raises:
        TrainingDiverged: a loss is not finite.
    """

    answers = log_probabilities(model, None)

    def loss(batch: list[Lesson]) -> Tensor:
        return settings.temperature**2 * divergence(answers, batch, settings.temperature)

    return fit(student.trained(), loss, _batches(taught, settings, seed), settings.optimisation)


def _batches(taught: Sequence[Lesson], settings: Adaptation, seed: int) -> Iterator[list[Lesson]]:
    """Batches drawn without replacement until the questions run out, then afresh."""
    rng = random.Random(derive_seed(seed, "adaptation"))
    drawn: list[int] = []
    for _ in range(settings.steps):
        while len(drawn) < settings.batch_size:
            drawn += rng.sample(range(len(taught)), len(taught))
        yield [taught[drawn.pop(0)] for _ in range(settings.batch_size)]
