"""The interface of a method without a language model: clients pull a vector to their own targets.

A method sees parties and payloads (dictionaries of tensors), and nothing else. `fedsp.federate`
runs the rounds: it samples clients, collects updates, averages, lets the server take its step,
validates and keeps the best. Run it: `python examples/algorithm.py`
"""

from __future__ import annotations

import torch

import fedsp

TARGETS = {
    "a": torch.tensor([1.0, 0.0]),
    "b": torch.tensor([0.0, 1.0]),
    "c": torch.tensor([2.0, 2.0]),
}
"""The private data of three clients: client k's loss is |x - target_k|^2 / 2."""


class Quadratic:
    """The vector x is tuned: local gradient steps at each client, and none at the server."""

    def init(self, server: None) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(2)}

    def client_update(self, request: fedsp.Request, target: torch.Tensor) -> fedsp.Update:
        x = request.payload["x"].clone()
        for _ in range(5):
            x -= 0.1 * (x - target)
        return fedsp.Update(round=request.round, client=request.client, payload={"x": x})

    def server_update(
        self, server: None, aggregated: dict[str, torch.Tensor], round: int, seed: int
    ) -> tuple[dict[str, torch.Tensor], float | None]:
        return aggregated, None


def main() -> torch.Tensor:
    """Run 20 rounds, and return the best vector."""
    method = Quadratic()

    def transport(requests: list[fedsp.Request]) -> list[fedsp.Update]:
        return [method.client_update(request, TARGETS[request.client]) for request in requests]

    def validate(payload: dict[str, torch.Tensor]) -> float:
        losses = [(payload["x"] - target).square().sum() / 2 for target in TARGETS.values()]
        return float(torch.stack(losses).mean())

    final = fedsp.federate(
        method,
        None,
        dict.fromkeys(TARGETS, 1),
        transport,
        fedsp.RoundConfig(
            run="example",
            seed=0,
            rounds=20,
            clients=None,
            min_clients=1,
            weighting="uniform",
            max_change=10.0,
            validate_by="server",
        ),
        state=None,
        validate=validate,
        save=lambda state, record: print(f"round {record.round}: loss {record.validation:.4f}"),
    )
    best: torch.Tensor = final.best["x"]
    return best


if __name__ == "__main__":
    best = main()
    print("tuned:", best, "mean of the targets:", torch.stack(list(TARGETS.values())).mean(dim=0))
