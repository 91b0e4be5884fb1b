"""Your own method: federated averaging of the prompt, but each client goes back half of its way.

A method is a class with four functions (`fedsp.federation.methods.base.Method`) and one registered
entry that says what clients hold and what is tuned; after that its name works in every
configuration and study. Run it: `python examples/new_method.py`
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import fedsp
from fedsp.experiments.embedded import EMBEDDED
from fedsp.federation.methods.base import Averaging
from fedsp.federation.methods.fedsp import client_side
from fedsp.federation.party import Party
from fedsp.models.trainable import Tensors


@dataclass(frozen=True, kw_only=True)
class Damped(Averaging):
    """Averaging, where a client sends only a share of its change, which damps client drift."""

    share: float = 0.5

    def client_update(self, client: Party, request: fedsp.Request) -> fedsp.Update:
        update = super().client_update(client, request)
        payload = {
            name: request.payload[name].lerp(tensor, self.share)
            for name, tensor in update.payload.items()
        }
        return replace(update, payload=payload)


def algorithm(stages: fedsp.Stages, start: Tensors) -> Damped:
    return Damped(client_stage=stages.messenger, server_stage=stages.server)


fedsp.register_method(
    fedsp.MethodEntry(
        name="damped",
        title="damped averaging",
        paper="an example",
        clients_hold="the auxiliary model",
        algorithm=algorithm,
        client_side=client_side,  # as in FedSP: clients tune the prompt through the auxiliary model
        package=True,
    )
)


def main(folder: Path) -> dict[str, float]:
    """Run the method for three rounds, and return the validation loss of each."""
    result = fedsp.run(
        {
            "method": "damped",
            "output": str(folder / "run"),
            "model": {"name": "embedded", "device": "cpu"},
            "data": {
                "task": "continuation",
                "train": str(EMBEDDED / "train.jsonl"),
                "validation": str(EMBEDDED / "validation.jsonl"),
            },
            "partition": {"clients": 4},
            "distill": {"steps": 20, "sequence_length": 64, "text": [str(EMBEDDED / "public.txt")]},
            "round": {"rounds": 3},
            "client": {"prompt_steps": 3},
            "validation": {"examples": 50},
        }
    )
    return {"best_round": result["best_round"], "validation_loss": result["validation_loss"]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(main(Path(temporary)))
