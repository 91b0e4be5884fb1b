"""What the inversion audit says of one level: what is seen, by which attack, how much of the text
is read, and what a guess would have."""

from __future__ import annotations

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
    """What every level of the audit needs: the opened run, its rows with their holders, and a
    prompt in either space."""

    opened: Opened
    rows: list[Encoded]
    prompts: dict[str, SoftPrompt]

    def bodies(self) -> list[Encoded]:
        """The rows without their common leading tokens: the prompt template is public, so
        reconstructing it does not count."""
        shared = sum(
            1
            for _ in takewhile(
                lambda tokens: len(set(tokens)) == 1,
                zip(*(row.ids for row in self.rows), strict=False),
            )
        )
        return [
            Encoded(row.ids[shared:], max(1, row.start - shared))
            for row in self.rows
            if len(row.ids) > shared + 1
        ]

    def lots(self, tokens: int, included: Sequence[bool] | None = None) -> dict[str, list[Encoded]]:
        """Each client's texts, no longer than so many tokens: all, or those that were in a shadow
        run."""
        there = included or [True] * len(self.rows)
        held = zip(self.rows, self.opened.holders, there, strict=True)
        lots: dict[str, list[Encoded]] = {client: [] for client in sorted(set(self.opened.holders))}
        for row, client, known in held:
            if known:
                lots[client].append(row if len(row.ids) <= tokens else cut(row, tokens))
        return lots


def guess(lots: Sequence[Sequence[Encoded]], like: Sequence[Encoded]) -> float:
    """Baseline without observation: recall, averaged over lots, of guessing the most frequent
    tokens of `like` at each position. (`like` includes the attacked texts, which favours the
    baseline.)"""
    longest = max(len(text.ids) for lot in lots for text in lot)
    common = [
        [
            token
            for token, _ in Counter(
                text.ids[at] for text in like if at < len(text.ids) - 1
            ).most_common()
        ]
        for at in range(longest - 1)
    ]

    def recalled(lot: Sequence[Encoded]) -> float:
        right = total = 0
        for at in range(max(len(text.ids) for text in lot) - 1):
            there = {text.ids[at] for text in lot if at < len(text.ids) - 1}
            right, total = right + len(there & set(common[at][: len(there)])), total + len(there)
        return right / max(1, total)

    return mean([recalled(lot) for lot in lots])


@dataclass(frozen=True, kw_only=True)
class Level:
    """Something that is seen, an attack on it, what it read, and what a guess would have."""

    seen: str
    attack: str
    read: list[Recovery]
    guess: float
    observed: bool = False
    """Whether a run's server really sees it."""

    def to_json(self) -> dict[str, Any]:
        """The row of `inversion.json`; the 95 % interval of the tokens is a bootstrap over what was
        read, that of whole texts is Clopper and Pearson's."""
        exact, rouge = (
            [getattr(one, name) for one in self.read if getattr(one, name) is not None]
            for name in ("exact", "rouge")
        )
        whole = sum(exact)
        return {
            "level": self.seen,
            "observed": self.observed,
            "attack": self.attack,
            "tokens": (
                mean([one.tokens for one in self.read]),
                *_interval([one.tokens for one in self.read]),
            ),
            "texts": (whole / len(exact), *exact_interval(whole, len(exact))) if exact else None,
            "rouge": mean(rouge) if rouge else None,
            "guess": self.guess,
            "read": len(self.read),
        }


def _interval(values: Sequence[float], resamples: int = 1000) -> tuple[float, float]:
    rng = random.Random(0)
    means = sorted(mean(rng.choices(values, k=len(values))) for _ in range(resamples))
    return means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]


def recovery_of(tokens: list[int], row: Encoded) -> Recovery:
    """Tokens read back in order, held against an example without its last one."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Spaces(Tokenizer):  # type: ignore[misc]
        def tokenize(self, text: str) -> list[str]:
            return text.split()

    there = list(row.ids[:-1])
    right = sum(mine == true for mine, true in zip(tokens, there, strict=False))
    score = (
        RougeScorer(["rougeL"], tokenizer=Spaces())
        .score(" ".join(map(str, there)), " ".join(map(str, tokens)))["rougeL"]
        .fmeasure
    )
    return Recovery(right / len(there), tokens == there, score)


def noise_of(epsilon: float) -> float:
    """The noise multiplier of one release at this epsilon and delta 1e-5."""
    return noise_for(epsilon, 1e-5, 1.0, 1)


def noised(change: Tensor, noise: float) -> Tensor:
    """The change plus the noise of one private release whose clipping norm is the change's own
    norm, the attacker's best case."""
    if not noise:
        return change
    bound = float(change.norm())
    return (
        noised_mean(
            clipped_sum(change.flatten()[None].cpu(), bound),
            bound=bound,
            noise_multiplier=noise,
            expected=1.0,
        )
        .float()
        .view_as(change)
    )


def cut(row: Encoded, tokens: int) -> Encoded:
    """The first tokens of an example, the last of them as its answer."""
    kept = row.ids[:tokens]
    return Encoded(kept, len(kept) - 1)


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)
