"""Aggregation that is robust to a minority of malicious clients (Byzantine robustness). All rules
work on updates: rows of one matrix, one per client.

Notation: n clients, of which up to f are malicious; updates of dimension d. Rows must be finite,
which `fedsp.federation.aggregation.mean.validate_update` checks before: no rule here is robust to
NaN or infinity. All sums are float64 and rows are in the order of client ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsp.config import malicious_of
from fedsp.errors import ConfigurationError, FedspError, TooFewClients, first_line
from fedsp.federation.aggregation.mean import Aggregator, Replies, Weights
from fedsp.federation.aggregation.registry import (
    NO_FUNCTION,
    Rule,
    find_rule,
    replies_needed,
    require_rule,
)
from fedsp.models.payload import Payload, as_row, from_row


def median(rows: Tensor, f: int) -> Tensor:
    """The median of each coordinate; of an even number, the mean of the middle two (Yin et al.,
    ICML 2018, https://arxiv.org/abs/1803.01498)."""
    ordered = rows.sort(dim=0).values
    return (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2


def trimmed_mean(rows: Tensor, f: int) -> Tensor:
    """The mean of each coordinate without its f largest and f smallest numbers (the same paper)."""
    kept: Tensor = rows.sort(dim=0).values[f : len(rows) - f]
    return kept.mean(dim=0)


def krum(rows: Tensor, f: int) -> Tensor:
    """The row whose n - f - 2 nearest others are nearest (Blanchard et al., NeurIPS 2017,
    https://arxiv.org/abs/1703.02757)."""
    best: Tensor = rows[int(_krum_scores(rows, f).argmin())]
    return best


def multi_krum(rows: Tensor, f: int) -> Tensor:
    """The mean of the n - f rows with the best of Krum's scores (the same paper)."""
    return rows[_krum_scores(rows, f).argsort(stable=True)[: len(rows) - f]].mean(dim=0)


def geometric_median(rows: Tensor, f: int, *, steps: int = 100, smallest: float = 1e-12) -> Tensor:
    """The point with the least sum of distances to the rows, by Weiszfeld's steps (Pillutla et al.
    2022, https://arxiv.org/abs/1912.13445)."""
    point = median(rows, f)
    for _ in range(steps):
        weights: Tensor = 1 / (rows - point).norm(dim=1).clamp_min(smallest)
        after: Tensor = (weights[:, None] * rows).sum(dim=0) / weights.sum()
        if float((after - point).norm()) <= 1e-10 * float(point.norm()):
            return after
        point = after
    return point


def centred_clipping(rows: Tensor, f: int, *, steps: int = 3) -> Tensor:
    """From the coordinate median, a few means of the differences to it, each cut to the median
    length (Karimireddy et al., ICML 2021, https://arxiv.org/abs/2012.10333). The centre is this
    round's: one kept from round to round would stay poisoned.
    """
    point = median(rows, f)
    for _ in range(steps):
        differences = rows - point
        lengths = differences.norm(dim=1, keepdim=True)
        point = point + (
            differences * (lengths.median() / lengths.clamp_min(1e-300)).clamp(max=1.0)
        ).mean(dim=0)
    return point


def nearest_neighbour_mixing(rows: Tensor, f: int) -> Tensor:
    """Each row replaced by the mean of the n - f rows nearest to it, itself included (Allouah et
    al., AISTATS 2023, https://arxiv.org/abs/2302.01772)."""
    nearest = _distances(rows).argsort(dim=1, stable=True)[:, : len(rows) - f]
    return torch.stack([rows[indices].mean(dim=0) for indices in nearest])


def norm_bounded(rows: Tensor, times: float) -> Tensor:
    """Rows cut to `times` the median of their lengths."""
    lengths = rows.norm(dim=1, keepdim=True)
    scale: Tensor = (times * lengths.median() / lengths.clamp_min(1e-300)).clamp(max=1.0)
    return rows * scale


def trusted(rows: Tensor, reference: Tensor) -> Tensor:
    """The mean of the rows, each as long as the server's own change and weighted by its cosine with
    it, never below zero (FLTrust, Cao et al., NDSS 2021, https://arxiv.org/abs/2012.13995); no
    change where nothing agrees."""
    length = reference.norm()
    lengths = rows.norm(dim=1)
    trust = ((rows @ reference) / (lengths * length).clamp_min(1e-300)).clamp_min(0.0)
    total = trust.sum()
    if float(total) == 0:
        return torch.zeros_like(reference)
    scale: Tensor = trust * length / lengths.clamp_min(1e-300) / total
    return scale @ rows


def _distances(rows: Tensor) -> Tensor:
    """Squared distances (n, n) between rows, without differences of large sums."""
    return torch.stack([(rows - row).square().sum(dim=1) for row in rows])


def _krum_scores(rows: Tensor, f: int) -> Tensor:
    nearest: Tensor = _distances(rows).sort(dim=1).values
    return nearest[:, 1 : len(rows) - f - 1].sum(dim=1)


RULES: dict[str, Rule] = {
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "centred_clipping": centred_clipping,
}


@dataclass(frozen=True, kw_only=True)
class Robust(Aggregator):
    """A rule and what comes before it: changes cut to `norm_bound` times the median length (0:
    not), then mixing. `malicious` is the share of the clients asked that may be malicious; their
    number is rounded down."""

    rule: str
    malicious: float
    mixing: bool = False
    norm_bound: float = 0.0

    def __post_init__(self) -> None:
        require_rule(self.rule)

    @property
    def by_reference(self) -> bool:
        return self.rule == "trust"

    def malicious_among(self, asked: int) -> int:
        """How many of those asked may be malicious: f.

        Raises:
            TooFewClients: f rounds down to 0 although `malicious` is positive, or the rule does not
                withstand f malicious clients even if all clients reply.
        """
        f = malicious_of(self.malicious, asked)
        if f == 0 and self.malicious and (self.rule not in NO_FUNCTION or self.mixing):
            raise TooFewClients(
                f"aggregation.malicious = {self.malicious:g} of {asked} clients asked is less than"
                f" one, so aggregation.rule = {self.rule!r} would withstand none: ask at least"
                f" {math.ceil(1 / self.malicious)} clients, or raise aggregation.malicious"
            )
        self._require(asked, f, asked)
        return f

    def _require(self, replies: int, f: int, asked: int) -> None:
        """Refuse fewer replies than the rule needs to withstand f malicious clients."""
        withstands = self.rule not in NO_FUNCTION or self.mixing
        needed = replies_needed(self.rule, f) if withstands else 1
        if replies < needed:
            raise TooFewClients(
                f"{replies} replies are too few for aggregation.rule ="
                f" {self.rule!r}{' with mixing' if self.mixing else ''} to withstand {f} malicious"
                f" clients of {asked} asked: it needs {needed}; ask more clients or lower"
                " aggregation.malicious"
            )

    def __call__(
        self, sent: Payload, replies: Replies, weights: Weights, asked: int, own: Payload | None
    ) -> Payload:
        """The payload that this rule makes of the replies; weights are ignored, since clients could
        inflate them.

        Raises:
            TooFewClients: there are fewer replies than the rule needs for so many malicious
                clients; it is never applied with fewer.
        """
        f = self.malicious_among(asked)
        self._require(len(replies), f, asked)
        start = as_row(sent)
        rows = torch.stack([as_row(replies[client]) - start for client in sorted(replies)])
        if self.norm_bound:
            rows = norm_bounded(rows, self.norm_bound)
        if self.mixing:
            rows = nearest_neighbour_mixing(rows, f)
        if self.rule == "trust":
            assert own is not None
            change = trusted(rows, as_row(own) - start)
        else:
            change = rows.mean(dim=0) if self.rule == "mean" else _by_rule(self.rule, rows, f)
        return from_row(start + change, sent)


def _by_rule(name: str, rows: Tensor, f: int) -> Tensor:
    """What a rule makes of the rows (n, d), one of your own among them.

    Raises:
        ConfigurationError: it raises something, or gives anything but finite numbers (d,).
    """
    rule = find_rule(name)
    try:
        change = rule(rows, f)
    except FedspError:
        raise
    except Exception as error:  # a rule of a user's own raises what it likes
        raise _no_change(name, f"it raised {type(error).__name__} ({first_line(error)})") from error
    if not isinstance(change, Tensor):
        raise _no_change(name, f"it gave a {type(change).__name__}, not a tensor")
    if change.shape != rows.shape[1:]:
        raise _no_change(name, f"it gave {tuple(change.shape)}, not {tuple(rows.shape[1:])}")
    if not bool(torch.isfinite(change).all()):
        raise _no_change(name, "it gave numbers that are not finite")
    return change


def _no_change(name: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"aggregation.rule = {name!r} made no change of the updates: {why};"
        " fedsp.testing.check_rule says what is asked of a rule"
    )
