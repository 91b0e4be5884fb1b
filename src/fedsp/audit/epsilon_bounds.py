"""Empirical lower bounds on a run's epsilon: one run, many canaries, each included or left out by a
fair coin.

T. Steinke, M. Nasr, M. Jagielski. *Privacy Auditing with One (1) Training Run*. NeurIPS 2023.
https://arxiv.org/abs/2305.08846. For clients: G. Andrew et al. *One-shot Empirical Privacy
Estimation for Federated Learning*. ICLR 2024. https://arxiv.org/abs/2302.03098. A lower bound below
the guaranteed epsilon proves nothing; one above it proves that the guarantee is broken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

CONFIDENCE = 0.95


def lower_bound(
    scores: Sequence[float], included: Sequence[bool], *, delta: float
) -> dict[str, Any]:
    """The largest `epsilon` at `delta` that the scores refute at CONFIDENCE: of the `canaries` the
    highest are guessed in, the lowest out, and the middle is passed over; so many `guesses`, of
    which so many are `right`; `most` is the epsilon that this many guesses show if all are right.

    A tenth, a fifth, half or all are guessed, whichever shows most, with a Bonferroni correction
    for the choice.
    """
    m = len(scores)
    choices = sorted({2 * max(1, count // 2) for count in (m // 10, m // 5, m // 2, m)})
    order = sorted(range(m), key=lambda index: scores[index])
    failure = (1 - CONFIDENCE) / len(choices)
    found = []
    for guesses in choices:
        low, high = order[: guesses // 2], order[m - guesses // 2 :]
        right = sum(not included[index] for index in low) + sum(included[index] for index in high)
        found.append(
            {
                "epsilon": _refuted(m, guesses, right, delta, failure),
                "delta": delta,
                "confidence": CONFIDENCE,
                "canaries": m,
                "guesses": guesses,
                "right": right,
                "most": _refuted(m, guesses, guesses, delta, failure),
            }
        )
    return max(found, key=lambda bound: bound["epsilon"])


def _refuted(m: int, guesses: int, right: int, delta: float, failure: float) -> float:
    """The largest epsilon whose p-value is at most `failure`, by bisection; 0 where none is."""
    if p_value(m, guesses, right, 0.0, delta) > failure:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(m, guesses, right, high, delta) <= failure:
        low, high = high, 2 * high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if p_value(m, guesses, right, middle, delta) <= failure
            else (low, middle)
        )
    return low


def p_value(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The chance, at most, that a mechanism of (epsilon, delta) lets so many of `guesses` be right,
    with m canaries in all (theorem 5.2 of the paper)."""
    chance = 1 / (1 + math.exp(-epsilon))
    # P[Binomial >= v] for v = 0 .. guesses
    tail = binom.sf(np.arange(-1, guesses), guesses, chance).tolist()
    worst = max(((tail[right - i] - tail[right]) / i for i in range(1, right + 1)), default=0.0)
    return float(min(1.0, tail[right] + 2 * m * delta * worst))


def spheres(count: int, numbers: int, length: float, seed: int) -> Tensor:
    """Canary updates (count, numbers) of dimension `numbers`: uniform on the sphere of radius
    `length`, so that any two are nearly orthogonal."""
    rows = torch.randn(
        count, numbers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    scaled: Tensor = length * rows / rows.norm(dim=1, keepdim=True)
    return scaled


def estimated_epsilon(inside: Sequence[float], numbers: int, *, delta: float) -> float:
    """The client-level estimate of Andrew et al.: cosines of included canaries, against the normal
    of variance 1 / numbers that those left out follow in `numbers` dimensions.

    An estimate, not a bound: it assumes that the cosines are normal.
    """
    mean = sum(inside) / len(inside)
    spread = math.sqrt(sum((value - mean) ** 2 for value in inside) / (len(inside) - 1))
    out = NormalDist(0.0, math.sqrt(1 / numbers))
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if _delta_of(NormalDist(mean, spread), out, middle) > delta
            else (low, middle)
        )
    return high


def _delta_of(one: NormalDist, other: NormalDist, epsilon: float, points: int = 4001) -> float:
    """The larger of the two deltas at which neither normal is more than e^epsilon likelier than the
    other, by the trapezoid rule."""
    low = min(one.mean - 10 * one.stdev, other.mean - 10 * other.stdev)
    high = max(one.mean + 10 * one.stdev, other.mean + 10 * other.stdev)
    x = torch.linspace(low, high, points, dtype=torch.float64)
    p, q = (
        torch.exp(-(((x - normal.mean) / normal.stdev) ** 2) / 2)
        / (normal.stdev * math.sqrt(2 * math.pi))
        for normal in (one, other)
    )
    factor = math.exp(epsilon)
    return max(
        float(torch.trapezoid((p - factor * q).clamp_min(0), x)),
        float(torch.trapezoid((q - factor * p).clamp_min(0), x)),
    )
