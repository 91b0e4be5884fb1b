"""One stage of a party's work in a round: gradient steps on its messenger or its auxiliary model;
and the loss that selects a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsp.data.encoding import Encoded, collate, drawn_batches
from fedsp.data.seeding import derive_seed
from fedsp.models.payload import Payload
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.trainable import Messenger, Tensors, Trainable
from fedsp.training.dp_sgd import ExamplePrivacy, fit_privately
from fedsp.training.loop import Optimisation, TrainResult, answer_loss, fit


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Settings of one stage. With 0 steps the stage is skipped.

    name: key of the stage in reported losses and in saved state.
    seed_label: derives the seed of the stage's batches; fixed, so that renaming a stage changes no
        published result.
    steps, batch_size: optimizer steps per round, and examples per step.
    proximal: mu of FedProx (Li et al., MLSys 2020, https://arxiv.org/abs/1812.06127): mu / 2 times
        the squared distance from the received payload is added to the loss.
    privacy: if set, gradients are clipped per example and noised, batches are Poisson samples of
        expected size `batch_size`, and no loss is reported.
    reads: how many examples the stage reads in all rounds, if nothing trains the model's own
        weights; else 0. Where that is each example twice or more, what blocks that the messenger
        does not touch make of it is kept (`fedsp.models.frozen_front`).
    keep_optimizer: whether the party keeps AdamW's moments between rounds; else they start at zero.
    """

    name: str
    seed_label: str
    steps: int
    batch_size: int
    optimisation: Optimisation
    proximal: float = 0.0
    privacy: ExamplePrivacy | None = None
    reads: int = 0
    keep_optimizer: bool = False


def train_stage(
    stage: Stage,
    target: Trainable,
    model: PromptedLM,
    messenger: Messenger,
    examples: Sequence[Encoded],
    *,
    received: Payload,
    round: int,
    seed: int,
    moments: Tensors | None = None,
) -> TrainResult:
    """AdamW steps on the parameters of `target`, through `model` behind `messenger`. The loss is
    the cross-entropy of answer tokens, nats per token.

    Raises:
        TrainingDiverged: a loss is not finite.
        PrivacyError: the stage is private, and the model's gradient of one example depends on
            others.
    """
    first_step = (round - 1) * stage.steps
    if stage.privacy:
        private = stage.privacy.steps(len(examples), stage.batch_size, stage.steps)
        return fit_privately(
            model,
            messenger,
            examples,
            private,
            stage.optimisation,
            first_step=first_step,
            moments=moments,
        )

    texts = [row.ids for row in examples]
    front = model.front(messenger.first_depth) if messenger.first_depth else None
    if front and (stage.reads < 2 * len(examples) or not front.works):
        front = None
    groups = front.groups(texts) if front else {}

    def loss(drawn: list[int]) -> Tensor:
        batch = collate([examples[number] for number in drawn]).to(model.device)
        entry = front.entry(texts, groups, drawn) if front else None
        value = answer_loss(model, messenger.prefix(model), batch, entry)
        return (
            value + stage.proximal / 2 * messenger.distance(received) if stage.proximal else value
        )

    batches = drawn_batches(
        examples,
        steps=stage.steps,
        batch_size=stage.batch_size,
        seed=derive_seed(seed, stage.seed_label),
    )
    return fit(
        target.trained(), loss, batches, stage.optimisation, first_step=first_step, moments=moments
    )


@torch.no_grad()
def validation_loss(
    model: PromptedLM, messenger: Messenger, examples: Sequence[Encoded], batch_size: int = 32
) -> float | None:
    """Mean cross-entropy, nats per answer token, of examples that nothing was trained on; None if
    there are none."""
    if not examples:
        return None
    prefix, total, count = messenger.prefix(model), 0.0, 0
    ordered = sorted(examples, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        tokens = sum(row.asked for row in batch)
        total += tokens * float(answer_loss(model, prefix, collate(batch).to(model.device)))
        count += tokens
    return total / count
