"""What a client learns of the global model from its package: what is in it, what it can do, and
what an attacker gains by starting from it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from fedsp.audit.findings import NEAR
from fedsp.audit.shadows import Opened, Options, open_audited
from fedsp.data.batching import pad
from fedsp.data.encoding import training_batches
from fedsp.data.seeding import derive_seed
from fedsp.errors import RunError
from fedsp.experiments.plan import model_name
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import HELD_OUT, distillation_text, score_test
from fedsp.federation.methods.registry import find_method
from fedsp.models.auxiliary import (
    AuxiliaryModel,
    disclosed_share,
    empty_auxiliary,
    load_auxiliary,
)
from fedsp.models.loading import choose_device, load_model
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.trainable import trainable
from fedsp.training.loop import Optimisation, answer_loss, fit, next_token_loss, text_loss

STEPS = (0, 30, 120)
"""Steps of an attacker who trains the package on with public text."""


def audit_model(folder: Path, options: Options) -> dict[str, Any]:
    """The audit of a finished run: what is in its package, what it can do, and what an attacker
    gains who trains on with public text.

    Raises:
        RunError: there is no finished run of FedSP with simulated clients, or no public text that
            was not read, or no test questions with choices.
    """
    opened, callbacks = open_audited(folder, options.callbacks), options.callbacks
    if "answer_loss" not in opened.run.result().get("test", {}):
        raise RunError(
            f"{folder} was not measured on test questions with choices, so no gap can be measured:"
            " name data.test"
        )
    auxiliary, model = opened.auxiliary, opened.server.model
    text = distillation_text(opened.server)
    # figures on what the package was fitted to would flatter it
    if len(text.unread) < HELD_OUT:
        raise RunError(
            f"{folder}: the distillation has read all public text but {len(text.unread)} sequences,"
            f" the audit needs {HELD_OUT} that it has not: lower distill.sequences, or add text"
        )
    figures: dict[str, Any] = {
        "embeddings": auxiliary.embeddings,
        "plan": opened.run.config.auxiliary.plan,
        "disclosed_share": disclosed_share(auxiliary, model),
        "nearly_disclosed_share": disclosed_share(auxiliary, model, NEAR),
        **_embeddings(auxiliary, model),
        **_capability(auxiliary, model, text.unread),
    }
    callbacks.info("what is in the package and what it can do is measured")
    figures |= _gap(opened)
    callbacks.info("a client's own fine-tuned package is measured")
    best, seed = figures["global_perplexity"], opened.run.config.seed
    return figures | {"extraction": _extraction(auxiliary, text.read, text.unread, best, seed)}


def _embeddings(auxiliary: PromptedLM, model: PromptedLM) -> dict[str, float]:
    """How near the embeddings of tokens are: relative distance as they are, and after the best
    rotation (Procrustes); linear CKA, which no rotation changes."""
    mine, theirs = (
        some.model.get_input_embeddings().weight.detach().double().cpu()
        for some in (auxiliary, model)
    )
    left, _, right = torch.linalg.svd(mine.T @ theirs)
    centred, other = mine - mine.mean(dim=0), theirs - theirs.mean(dim=0)
    return {
        "embedding_distance": float((mine - theirs).norm() / theirs.norm()),
        "embedding_distance_aligned": float(
            (mine @ (left @ right) - theirs).norm() / theirs.norm()
        ),
        "embedding_cka": linear_cka(centred, other),
    }


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of two centred tables of features (N, D) and (N, E)
    (Kornblith et al., ICML 2019, https://arxiv.org/abs/1905.00414)."""
    return float((one.T @ other).norm() ** 2 / ((one.T @ one).norm() * (other.T @ other).norm()))


@torch.no_grad()
def _capability(
    auxiliary: PromptedLM, model: PromptedLM, texts: Sequence[Sequence[int]]
) -> dict[str, float]:
    """On public text: perplexities, KL(global || auxiliary) in nats per token, agreement of the
    likeliest next token, and CKA of the last states."""
    loss, own, divergence, agreed, count = 0.0, 0.0, 0.0, 0, 0
    states: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(texts), 8):
        batch = pad(texts[start : start + 8], model.device)
        hidden = [some(batch.ids, batch.mask) for some in (auxiliary, model)]
        real = batch.mask[:, 1:].bool()
        predicted = [
            torch.log_softmax(some.logits(states_[:, :-1][real]), dim=-1)
            for some, states_ in zip((auxiliary, model), hidden, strict=True)
        ]
        wanted = batch.ids[:, 1:][real]
        own -= float(predicted[0].gather(1, wanted[:, None]).sum())
        loss -= float(predicted[1].gather(1, wanted[:, None]).sum())
        divergence += float(kl_div(predicted[0], predicted[1], log_target=True, reduction="sum"))
        agreed += int((predicted[0].argmax(dim=1) == predicted[1].argmax(dim=1)).sum())
        count += len(wanted)
        states.append(
            (hidden[0][:, :-1][real].double().cpu(), hidden[1][:, :-1][real].double().cpu())
        )
    mine, theirs = (torch.cat([pair[side] for pair in states]) for side in (0, 1))
    return {
        "auxiliary_perplexity": float(torch.tensor(own / count).exp()),
        "global_perplexity": float(torch.tensor(loss / count).exp()),
        "kl": divergence / count,
        "agreement": agreed / count,
        "cka": linear_cka(mine - mine.mean(dim=0), theirs - theirs.mean(dim=0)),
    }


def _gap(opened: Opened) -> dict[str, float]:
    """Answer loss on the test questions of the global model with the federated prompt, and of the
    package as its first client fine-tunes it alone, with as many steps as it takes in the run. The
    gap must be above zero, or a client has no reason to keep to the federation."""
    config, server, auxiliary = opened.run.config, opened.server, opened.auxiliary
    dataset = server.dataset
    rows = opened.federation.clients.party(min(opened.federation.clients.register)).examples
    package = auxiliary.weights()
    steps = config.round.rounds * config.client.prompt_steps
    batches = training_batches(
        rows,
        steps=steps,
        batch_size=config.client.batch_size,
        seed=derive_seed(config.seed, "alone"),
    )
    fit(
        trainable(auxiliary.model),
        lambda batch: answer_loss(auxiliary, None, batch),
        batches,
        Optimisation(learning_rate=1e-3, weight_decay=0.0, warmup=0.1, total_steps=steps),
    )
    alone, _ = score_test(auxiliary, None, dataset.test, server.tokenizer, server.max_tokens)
    auxiliary.load_weights(package)
    federated = opened.run.result()["test"]
    return {
        "client_alone_loss": alone["answer_loss"],
        "federated_loss": federated["answer_loss"],
        "gap": alone["answer_loss"] - federated["answer_loss"],
    }


def _extraction(
    auxiliary: AuxiliaryModel,
    public: Sequence[Sequence[int]],
    held: Sequence[Sequence[int]],
    best: float,
    seed: int,
) -> list[dict[str, float]]:
    """Perplexity on held-back public text of an attacker who trains the package on, and of one who
    starts the same architecture from nothing, with the same steps; the advantage is the share of
    the way from the second to the global model that the package gives."""
    found: dict[str, list[float]] = {"package": [], "nothing": []}
    package, batch_size = auxiliary.weights(), min(8, len(public))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "nothing"))
        empty = empty_auxiliary(auxiliary.model.config, auxiliary.plan)
    nothing = {name: parameter.detach() for name, parameter in trainable(empty).items()}
    for start, weights in (("package", package), ("nothing", nothing)):
        auxiliary.load_weights(weights)
        done = 0
        for number in STEPS:
            rng = random.Random(derive_seed(seed, "attacker", done))
            fit(
                trainable(auxiliary.model),
                partial(next_token_loss, auxiliary),
                [rng.sample(public, batch_size) for _ in range(number - done)],
                Optimisation(learning_rate=1e-3, weight_decay=0.0, warmup=0.1),
            )
            done = number
            found[start].append(float(torch.tensor(text_loss(auxiliary, held)).exp()))
    auxiliary.load_weights(package)
    return [
        {
            "steps": number,
            "tokens": number * batch_size * len(public[0]),
            "from_package": mine,
            "from_nothing": theirs,
            "advantage": (theirs - mine) / (theirs - best),
        }
        for number, mine, theirs in zip(STEPS, *found.values(), strict=True)
    ]


def measure_disclosure(folder: Path) -> dict[str, float]:
    """The shares of the global model's parameters that the clients of a finished run hold:
    `disclosed_share` bit for bit, and `nearly_disclosed_share` in tensors whose relative distance
    from the global one is at most NEAR.

    Raises:
        RunError: there is no finished run, or its auxiliary model is not the one that it was begun
            with.
    """
    run = RunDirectory.open(folder)
    # where clients hold nothing, the whole model, or its own layers
    config, share = run.config, float(run.result()["disclosed_share"])
    nearly = share
    if find_method(config.method).package and config.asks_clients:
        package = run.package.resolve()
        digest, share, nearly = _of_package(package, model_name(config), config.model.device)
        # a run in fewer bits was begun with the rounded numbers
        if config.auxiliary.precision == "float32":
            run.hold({"auxiliary model": digest})
    return {"disclosed_share": share, "nearly_disclosed_share": nearly}


@lru_cache(maxsize=256)
def _of_package(package: Path, name: str, device: str) -> tuple[str, float, float]:
    """A package's digest and its shares of the global model, bit for bit and nearly."""
    model = _model(name, device)
    auxiliary = load_auxiliary(package, device=choose_device(device), positions="hugging_face")
    return (
        auxiliary.digest(),
        disclosed_share(auxiliary, model),
        disclosed_share(auxiliary, model, NEAR),
    )


@lru_cache(maxsize=1)
def _model(name: str, device: str) -> PromptedLM:
    return load_model(name, device=device, precision="float32")
