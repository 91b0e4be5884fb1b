"""Client-level differential privacy: the noised mean of clipped updates (McMahan et al., ICLR 2018,
https://arxiv.org/abs/1710.06963)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedsp.errors import PrivacyError
from fedsp.federation.aggregation.mean import Aggregator, Replies, Weights
from fedsp.models.payload import Payload, as_row, from_row
from fedsp.privacy import Ledger, Release, clipped_sum, noised_mean


def private_mean(
    sent: Payload,
    replies: Replies,
    *,
    bound: float,
    noise_multiplier: float,
    expected: float,
) -> Payload:
    """What was broadcast plus the noised mean of the clients' whole changes, each clipped over all
    tensors together, none weighted."""
    start = as_row(sent)
    total = torch.zeros_like(start)
    for client in sorted(replies):
        total += clipped_sum((as_row(replies[client]) - start)[None], bound)
    return from_row(
        start
        + noised_mean(total, bound=bound, noise_multiplier=noise_multiplier, expected=expected),
        sent,
    )


@dataclass(frozen=True, kw_only=True)
class DPAggregator(Aggregator):
    """Client-level differential privacy: the noised mean of a round's clipped updates, recorded in
    the ledger before it is computed.

    Each client is sampled with probability `sampling_rate`, from secret randomness; `expected` is
    the mean number of clients of a round.
    """

    bound: float
    noise_multiplier: float
    sampling_rate: float
    expected: float
    delta: float
    epsilon: float | None
    ledger: Ledger

    always = True

    def __call__(
        self, sent: Payload, replies: Replies, weights: Weights, asked: int, own: Payload | None
    ) -> Payload:
        """The private aggregate; made and paid for even where nobody replied.

        Raises:
            PrivacyError: the budget does not allow another round.
        """
        release = Release(self.noise_multiplier, self.sampling_rate)
        if self.epsilon is not None and self.ledger.epsilon(self.delta, release) > self.epsilon:
            raise PrivacyError(
                f"another round would exceed privacy.epsilon = {self.epsilon:g} at delta ="
                f" {self.delta:g}; all rounds so far are kept: `fedsp evaluate` measures the best"
            )
        self.ledger.spend(release)
        return private_mean(
            sent,
            replies,
            bound=self.bound,
            noise_multiplier=self.noise_multiplier,
            expected=self.expected,
        )
