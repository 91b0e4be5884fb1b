"""How signals grow or fade along the depths of an auxiliary model in which layers are shared:
hidden states forward, gradients backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedsp.data.dataset import load_dataset
from fedsp.data.encoding import collate
from fedsp.errors import RunError
from fedsp.experiments.build import open_clients
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.methods.registry import find_method
from fedsp.federation.party import Party
from fedsp.models.auxiliary import load_auxiliary
from fedsp.models.loading import choose_device
from fedsp.models.prompted_lm import hidden_at_depths
from fedsp.models.soft_prompt import read_prompt
from fedsp.models.trainable import entries_below
from fedsp.training.loop import gradients_set, states_loss

EXAMPLES = 32


def measure_depths(folder: Path) -> list[dict[str, Any]]:
    """One row for each depth of a finished run's auxiliary model, at its first client, with the
    last prompt in front of that client's own examples: with the weights as handed out (`package`),
    and with those that the client has after its last round (`client`, the same where
    client.auxiliary_steps is 0).

    `hidden_scale` is the root mean square of a number of the block's input; `gradient_norm` the
    norm of the loss's gradient with respect to that input, over the batch. The last row is behind
    the last block.

    Raises:
        RunError: there is no finished run of FedSP with clients in the folder.
    """
    run = RunDirectory.open(folder)
    check_depths(run)
    config = run.config
    prompts = sorted((run.path / "prompts").glob("round-*.safetensors"))
    device = choose_device(config.model.device)
    auxiliary = load_auxiliary(run.package, device=device, positions=config.model.positions)
    clients = open_clients(config, auxiliary, load_dataset(config, run.partition()), run)
    client = clients.party(min(clients.register))
    client.prompt.load(read_prompt(prompts[-1]).payload())
    rows = [{"weights": "package", **row} for row in _profile(client)]
    own = entries_below(client.store.load(before=config.round.rounds + 1), "auxiliary")
    with client.own_weights(own, auxiliary.weights()):
        rows += [{"weights": "client", **row} for row in _profile(client)]
    return rows


def check_depths(run: RunDirectory) -> None:
    """Refuse a run that is not finished, or not one of FedSP with clients (RunError)."""
    run.result()
    config = run.config
    if not (find_method(config.method).deployable and config.asks_clients) or (
        config.messenger.kind != "prompt"
    ):
        raise RunError(
            f"{run.path} has no soft prompts of clients: this audit needs a run of FedSP with"
            " clients and messenger.kind = 'prompt'"
        )


def _profile(client: Party) -> list[dict[str, Any]]:
    model = client.model
    batch = collate(client.examples[:EXAMPLES]).to(model.device)
    real = batch.attention_mask.bool()
    with gradients_set(model.trained().values(), True):
        states = hidden_at_depths(
            model, batch.input_ids, batch.attention_mask, client.prompt.prefix(model)
        )
        gradients = torch.autograd.grad(states_loss(model, states[-1], batch), states)
    return [
        {
            "depth": depth,
            "hidden_scale": float(state.detach()[real].square().mean().sqrt()),
            "gradient_norm": float(gradient[real].norm()),
        }
        for depth, (state, gradient) in enumerate(zip(states, gradients, strict=True))
    ]
