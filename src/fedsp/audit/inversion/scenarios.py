"""What the inversion audit says of one level: what is seen, by which attack, how much of the text
is read, and what a guess would have."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor

from fedsp.audit.shadows import Opened
from fedsp.audit.statistics import exact_interval
from fedsp.data.encoding import Encoded
from fedsp.models.soft_prompt import SoftPrompt
from fedsp.privacy import clipped_sum, noise_for, noised_mean


@dataclass(frozen=True)
class Recovery:
    """What was read back of one text: the share of its tokens, whether all of it, and ROUGE-L of
    the order it was read in; the last two only where there is one."""

    tokens: float
    exact: bool | None = None
    rouge: float | None = None


@dataclass(frozen=True)
class AttackContext:
    """What every level of the audit needs: the opened run, and a prompt in either space."""

    opened: Opened
    prompts: dict[str, SoftPrompt]


def without_template(rows: Sequence[Encoded]) -> list[Encoded]:
    """The rows without their common leading tokens: the prompt template is public, so
    reconstructing it does not count."""
    columns = zip(*(row.ids for row in rows), strict=False)
    shared = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, columns)))
    return [
        Encoded(row.ids[shared:], max(1, row.start - shared))
        for row in rows
        if len(row.ids) > shared + 1
    ]


def guess_without_places(lots: Sequence[Sequence[Encoded]], like: Sequence[Encoded]) -> float:
    """Baseline of an attack that finds tokens and not where they stand: recall, averaged over lots,
    of guessing the most frequent tokens of `like`."""
    counts = Counter(token for text in like for token in text.ids[:-1])
    common = [token for token, _ in counts.most_common()]

    def recalled(lot: Sequence[Encoded]) -> float:
        there = {token for text in lot for token in text.ids[:-1]}
        return len(there & set(common[: len(there)])) / len(there)

    return mean([recalled(lot) for lot in lots])


def guess(lots: Sequence[Sequence[Encoded]], like: Sequence[Encoded]) -> float:
    """Baseline without observation: recall, averaged over lots, of guessing the most frequent
    tokens of `like` at each position. (`like` includes the attacked texts, which favours the
    baseline.)"""
    longest = max(len(text.ids) for lot in lots for text in lot) - 1
    counts = [
        Counter(text.ids[at] for text in like if at < len(text.ids) - 1) for at in range(longest)
    ]
    common = [[token for token, _ in count.most_common()] for count in counts]

    def recalled(lot: Sequence[Encoded]) -> float:
        right = total = 0
        for at in range(max(len(text.ids) for text in lot) - 1):
            there = {text.ids[at] for text in lot if at < len(text.ids) - 1}
            right, total = right + len(there & set(common[at][: len(there)])), total + len(there)
        return right / max(1, total)

    return mean([recalled(lot) for lot in lots])


def level(
    seen: str, attack: str, read: list[Recovery], guess: float, observed: bool = False
) -> dict[str, Any]:
    """A row of `inversion.json`: what is seen, an attack on it, what it read, what a guess would
    have, and whether a run's server really sees it. The 95 % interval of the tokens is a bootstrap
    over what was read, that of whole texts is Clopper and Pearson's; so is that of the tokens where
    all texts give the same share, which no bootstrap could tell from a certainty."""
    tokens = [one.tokens for one in read]
    exact = [one.exact for one in read if one.exact is not None]
    rouge = [one.rouge for one in read if one.rouge is not None]
    whole = sum(exact)
    return {
        "level": seen,
        "observed": observed,
        "attack": attack,
        "tokens": (mean(tokens), *_interval(tokens)),
        "texts": (whole / len(exact), *exact_interval(whole, len(exact))) if exact else None,
        "rouge": mean(rouge) if rouge else None,
        "guess": guess,
        "read": len(read),
    }


def _interval(values: Sequence[float], resamples: int = 1000) -> tuple[float, float]:
    if min(values) == max(values):  # nothing with this mean is more spread than whole texts
        count, texts = sum(values), len(values)
        low, high = (exact_interval(of(count), texts) for of in (math.floor, math.ceil))
        return low[0], high[1]
    rng = random.Random(0)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(resamples))
    return means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]


def recovery_of(tokens: list[int], row: Encoded) -> Recovery:
    """Tokens read back in order, held against an example without its last one."""
    from rouge_score.rouge_scorer import RougeScorer

    there = list(row.ids[:-1])
    right = sum(mine == true for mine, true in zip(tokens, there, strict=False))
    texts = (" ".join(map(str, some)) for some in (there, tokens))
    score = RougeScorer(["rougeL"]).score(*texts)["rougeL"].fmeasure
    return Recovery(right / len(there), tokens == there, score)


def noised(change: Tensor, epsilon: float | None) -> Tensor:
    """The change plus the noise of one private release at this epsilon and delta 1e-5, whose
    clipping norm is the change's own norm, the attacker's best case; the change itself for None."""
    if epsilon is None:
        return change
    bound, noise = float(change.norm()), noise_for(epsilon, 1e-5, 1.0, 1)
    total = clipped_sum(change.flatten()[None].cpu(), bound)
    made = noised_mean(total, bound=bound, noise_multiplier=noise, expected=1.0)
    return made.float().view_as(change)


def cut(row: Encoded, tokens: int) -> Encoded:
    """The first tokens of an example, the last of them as its answer."""
    kept = row.ids[:tokens]
    return Encoded(kept, len(kept) - 1)


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)
