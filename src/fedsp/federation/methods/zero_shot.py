"""Zero-shot: the global model as it is, nothing tuned, nothing sent.

T. B. Brown et al. *Language Models are Few-Shot Learners*. NeurIPS 2020. https://arxiv.org/abs/2005.14165 (section 2, zero-shot).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsp.federation.messages import Request, Update
from fedsp.federation.methods.base import Side, Work
from fedsp.federation.party import Party
from fedsp.models.payload import Payload


@dataclass(frozen=True)
class ZeroShot:
    """No party does anything; the payload is empty."""

    def init(self, server: Party) -> Payload:
        """Nothing."""
        return {}

    def client_update(self, client: Party, request: Request) -> Update:
        """Nothing back."""
        return Update(request.round, client.id, {})

    def server_update(self, server: Party, aggregated: Payload, round: int, seed: int) -> tuple[Payload, float | None]:
        """Nothing."""
        return {}, None

    def work(self, party: Party, side: Side) -> list[Work]:
        """None."""
        return []
