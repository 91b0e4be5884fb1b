"""How repeated figures are told: the mean with its standard deviation over seeds, the median with
the least and the most over repeats."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def mean_and_deviation(numbers: Sequence[float]) -> tuple[float, float]:
    """The standard deviation of one number is zero."""
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def mean(numbers: Sequence[float], form: str) -> str:
    """With the standard deviation; `form` is that of the mean, and may ask for its sign."""
    middle, deviation = mean_and_deviation(numbers)
    return f"{middle:{form}} ± {deviation:{form.removeprefix('+')}}"


def median(numbers: Sequence[float], form: str) -> str:
    """With the least and the most."""
    return f"{statistics.median(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"
