"""Paired comparison of two methods on the same questions and seeds: difference, confidence
interval, and a p-value corrected for many comparisons.

The bootstrap resamples questions and seeds together (two levels), so both kinds of chance are in
the interval; with few seeds the second is known badly, and intervals are rather too narrow than too
wide. Correction: S. Holm, *A Simple Sequentially Rejective Multiple Test Procedure*, Scandinavian
Journal of Statistics 6, 1979.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
"""One number per seed and question, (S, Q)."""

RESAMPLES, PART = 10_000, 500


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference, its 95 % confidence interval, and the two-sided p-value of no
    difference."""

    mean: float
    low: float
    high: float
    p: float


def paired_difference(pairs: Sequence[tuple[Scores, Scores]], *, seed: int = 0) -> Difference:
    """The first of each pair less the second, averaged over pairs (tasks); each pair has the same
    seeds and questions on both sides."""
    rng = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    drawn = {
        seeds: rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
        for seeds in sorted({len(one) for one, _ in pairs})
    }
    for one, other in pairs:  # one draw of seeds for all tasks, which share what a seed made
        means += _resampled_means(one - other, drawn[len(one)], rng) / len(pairs)
    mean = float(np.mean([np.mean(one - other) for one, other in pairs]))
    low, high = np.quantile(means, [0.025, 0.975])
    smaller = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Difference(
        mean=mean, low=float(low), high=float(high), p=min(1.0, 2 * (smaller + 1) / (RESAMPLES + 1))
    )


def _resampled_means(differences: Scores, weights: Scores, rng: np.random.Generator) -> Scores:
    """Means of differences (S, Q), their seeds weighted as in `weights` (R, S), their questions
    drawn anew; (R,)."""
    questions = differences.shape[1]
    places = np.arange(PART)[:, None] * questions
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, PART):  # in parts: (R, Q) is large
        part = slice(start, start + PART)
        drawn = rng.integers(0, questions, (PART, questions)) + places
        # fifty times faster than a multinomial draw
        counts = np.bincount(drawn.ravel(), minlength=PART * questions).reshape(PART, questions)
        means[part] = ((weights[part] @ differences) * (counts / questions)).sum(axis=1)
    return means


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value, adjusted so that the chance of even one false finding among all is held.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
