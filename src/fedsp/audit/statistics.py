"""What a score says about membership: AUC, hits at few false alarms, each with an interval, and
what differential privacy allows at most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, rankdata

from fedsp.errors import RunError

Numbers = NDArray[np.float64]
Marks = NDArray[np.bool_]


Estimate = tuple[float, float, float]
"""A value with the bounds of its 95 % interval."""


def auc(scores: Numbers, members: Marks) -> float:
    """The chance that a member scores higher than another, ties counted half; records without a
    score do not count."""
    scores, members = _scored(scores, members)
    ranks = rankdata(scores)
    inside = int(members.sum())
    outside = len(members) - inside
    return (
        float((ranks[members].sum() - inside * (inside + 1) / 2) / (inside * outside))
        if inside and outside
        else math.nan
    )


def _scored(scores: Numbers, members: Marks) -> tuple[Numbers, Marks]:
    there = ~np.isnan(scores)
    return scores[there], members[there]


def hits_at(scores: Numbers, members: Marks, false_alarms: float) -> float | None:
    """The share of members above a threshold that this share of the others passes; None with fewer
    than ten others above it: the threshold would be a guess."""
    scores, members = _scored(scores, members)
    others = np.sort(scores[~members])[::-1]
    allowed = math.floor(false_alarms * len(others))
    return float((scores[members] > others[allowed]).mean()) if allowed >= 10 else None


def summarise_scores(
    scores: Sequence[Numbers], members: Sequence[Marks], *, resamples: int = 200, seed: int = 0
) -> dict[str, Any]:
    """How well scores separate members from non-members over all targets together, scores (targets
    of N): `auc`, the mean over targets, and `hits_at_1` and `hits_at_01`, the hit rates at 1 % and
    0.1 % false positives, None with too few non-members.

    The intervals are by a bootstrap over records, whose scores under several targets belong
    together, with the threshold found anew each time. 0.1 % of false alarms needs 10,000 others
    that are independent, so that many records.

    Raises:
        RunError: no target has both members and others with a score.
    """
    table, marks = np.stack(scores), np.stack(members)
    rng = np.random.default_rng(seed)
    whole = np.arange(table.shape[1])
    drawn = [rng.choice(whole, len(whole)) for _ in range(resamples)]

    def mean_auc(columns: NDArray[np.int64]) -> float | None:
        found = [
            one
            for row, mark in zip(table, marks, strict=True)
            if not math.isnan(one := auc(row[columns], mark[columns]))
        ]
        return sum(found) / len(found) if found else None

    def hits(false_alarms: float, columns: NDArray[np.int64]) -> float | None:
        return hits_at(table[:, columns].ravel(), marks[:, columns].ravel(), false_alarms)

    def interval(
        measure: Callable[[NDArray[np.int64]], float | None],
    ) -> Estimate | None:
        value = measure(whole)
        spread = sorted(one for columns in drawn if (one := measure(columns)) is not None)
        if value is None or not spread:
            return None
        return value, spread[int(0.025 * len(spread))], spread[int(0.975 * len(spread)) - 1]

    found = interval(mean_auc)
    if found is None:
        raise RunError(
            "too few records have a score to tell members from others: take more --records"
        )
    enough = int((~np.isnan(table)).any(axis=0).sum()) >= 20_000
    return {
        "auc": found,
        "hits_at_1": interval(partial(hits, 0.01)),
        "hits_at_01": interval(partial(hits, 0.001)) if enough else None,
    }


def exact_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Clopper-Pearson interval of a share of which `hits` of `trials` were seen."""
    interval = binomtest(hits, trials).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def ceiling(epsilon: float, delta: float, false_alarms: float) -> float:
    """The largest share of members that any attack can find at so many false alarms, under
    (epsilon, delta) (Kairouz et al., ICML 2015)."""
    if math.isinf(epsilon):
        return 1.0
    return min(
        1.0,
        math.exp(epsilon) * false_alarms + delta,
        1 - math.exp(-epsilon) * (1 - delta - false_alarms),
    )


def auc_ceiling(epsilon: float, delta: float) -> float:
    """The largest AUC under (epsilon, delta): the area below the ceiling."""
    alarms = np.linspace(0, 1, 10_001)
    return float(np.trapezoid([ceiling(epsilon, delta, float(share)) for share in alarms], alarms))
