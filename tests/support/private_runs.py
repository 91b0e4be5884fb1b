"""Private runs of seconds, and a client that answers privately."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedsp import privacy
from fedsp.config_file import make_config
from fedsp.data.encoding import Encoded
from fedsp.federation.agreement import agreement_of
from fedsp.federation.clients import make_method
from fedsp.federation.messages import Request
from fedsp.federation.methods.base import Method
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.models.payload import PROMPT
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.privacy import Ledger
from support.small_runs import settings
from support.tiny_models import tiny_model

DELTA = 1e-5


EXAMPLE: dict[str, Any] = {"privacy": {"unit": "example", "epsilon": 8.0, "clip": 0.5}}


CLIENT: dict[str, Any] = {
    "privacy": {"unit": "client", "noise_multiplier": 2.0, "clip": 0.5},
    "round": {"rounds": 3, "weighting": "uniform", "min_clients": 0},
}


def private_party(folder: Path) -> tuple[Method, Party, Request]:
    """A client that answers privately for two rounds, and a request to it."""
    model = tiny_model("gpt2")
    spec = PromptSpec(space="residual", length=4, model=model.shape)
    config = make_config(
        settings(
            folder,
            privacy={"unit": "example", "epsilon": 4.0},
            round={"rounds": 2},
            prompt={"length": 4},
        )
    )
    method = make_method(agreement_of(config, 64), None)
    prompt = SoftPrompt(spec, torch.zeros(spec.shape))
    rows = [Encoded((5, 6, 7, 8), 2)] * 20
    party = Party(
        id="a",
        model=model,
        messenger=prompt,
        examples=rows,
        store=StateStore(folder / "rest"),
        ledger=Ledger(folder / "rest" / privacy.LEDGER),
    )
    return (
        method,
        party,
        Request(run="run", round=1, client="a", seed=7, payload={PROMPT: torch.zeros(spec.shape)}),
    )
