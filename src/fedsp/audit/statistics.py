"""What a score says about membership: AUC, hits at few false alarms, each with an interval, and what differential privacy allows at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsp.audit.epsilon import clopper_pearson

Numbers = NDArray[np.float64]
Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class Told:
    """How well scores tell members from others: pairs (value, low, high) at 95 %. `hits_at_1` is None with too few others to say."""

    auc: tuple[float, float, float]
    hits_at_1: tuple[float, float, float] | None
    hits_at_01: tuple[float, float, float] | None
    balanced_accuracy: float


def auc(scores: Numbers, members: Marks) -> float:
    """The chance that a member scores higher than another, ties counted half."""
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    ranks[order] = np.arange(1, len(scores) + 1)
    values, inverse = np.unique(scores, return_inverse=True)
    ranks = (np.bincount(inverse, ranks) / np.bincount(inverse))[inverse] if len(values) < len(scores) else ranks
    inside = int(members.sum())
    outside = len(members) - inside
    return float((ranks[members].sum() - inside * (inside + 1) / 2) / (inside * outside)) if inside and outside else math.nan


def hits_at(scores: Numbers, members: Marks, false_alarms: float) -> tuple[float, float, float] | None:
    """The share of members above a threshold that this share of the others passes, with its Clopper-Pearson interval.

    None with fewer than ten others above the threshold: the threshold itself would be a guess.
    """
    others = np.sort(scores[~members])[::-1]
    allowed = math.floor(false_alarms * len(others))
    if allowed < 10:
        return None
    hits, inside = int((scores[members] > others[allowed]).sum()), int(members.sum())
    return (hits / inside, *clopper_pearson(hits, inside, 0.025))


def told(scores: Sequence[Numbers], members: Sequence[Marks], *, resamples: int = 200, seed: int = 0) -> Told:
    """The figures over all targets together; scores (targets of N). The interval of the AUC is by a bootstrap over records, whose scores under several
    targets belong together; an AUC is the mean over targets. The false alarms at 0.1 % need 10,000 others that are independent, so that many records."""
    table, marks = np.stack(scores), np.stack(members)
    rng = np.random.default_rng(seed)

    def mean(columns: NDArray[np.int64]) -> float:
        return float(np.nanmean([auc(row[columns], mark[columns]) for row, mark in zip(table, marks, strict=True)]))

    whole = np.arange(table.shape[1])
    drawn = sorted(mean(rng.choice(whole, len(whole))) for _ in range(resamples))
    flat, inside = table.ravel(), marks.ravel()
    independent = table.shape[1] // 2
    return Told(
        (mean(whole), drawn[int(0.025 * resamples)], drawn[int(0.975 * resamples) - 1]),
        hits_at(flat, inside, 0.01) if independent >= 1000 or len(flat) >= 2000 else None,
        hits_at(flat, inside, 0.001) if independent >= 10_000 else None,
        _balanced_accuracy(flat, inside),
    )


def _balanced_accuracy(scores: Numbers, members: Marks) -> float:
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(members[order]) / max(1, members.sum())
    alarms = np.cumsum(~members[order]) / max(1, (~members).sum())
    return float(((hits + 1 - alarms) / 2).max())


def ceiling(epsilon: float, delta: float, false_alarms: float) -> float:
    """The largest share of members that any attack can find at so many false alarms, under (epsilon, delta) (Kairouz et al., ICML 2015)."""
    if math.isinf(epsilon):
        return 1.0
    return min(1.0, math.exp(epsilon) * false_alarms + delta, 1 - math.exp(-epsilon) * (1 - delta - false_alarms))


def auc_ceiling(epsilon: float, delta: float) -> float:
    """The largest AUC under (epsilon, delta): the area below the ceiling."""
    alarms = np.linspace(0, 1, 10_001)
    return float(np.trapezoid([ceiling(epsilon, delta, float(share)) for share in alarms], alarms))
