"""Gradients of a messenger, one per example, in one pass: each example reads a copy of its own.

The gradient of the summed mean losses with respect to the copies is the gradient of each example's
loss. An example's loss is the mean over its own answer tokens: a mean over the tokens of the batch
would couple examples, and no bound on one of them would bound what it changes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsp.data.encoding import IGNORED, Batch
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.trainable import Messenger


def example_losses(
    model: PromptedLM, prefix: Tensor | None, batch: Batch, *, apart: bool = False
) -> Tensor:
    """Mean cross-entropy of each example's own answer tokens (B,), nats per token; `prefix` (P,
    depths, 2, H, K), or one per example. With `apart` each example has a row of its own."""
    read = model.read_padded if apart else model
    hidden = read(batch.input_ids, batch.attention_mask, prefix)
    asked = batch.labels[:, 1:] != IGNORED  # (B, T - 1)
    losses = cross_entropy(
        model.logits(hidden[:, :-1][asked]), batch.labels[:, 1:][asked], reduction="none"
    )
    row = asked.nonzero()[:, 0]
    total = torch.zeros(len(asked), device=losses.device).index_add(0, row, losses)
    return total / asked.sum(dim=1).clamp_min(1)


def example_gradients(
    model: PromptedLM, messenger: Messenger, batch: Batch
) -> tuple[Tensor, Tensor]:
    """The losses (B,) and the gradient of each with respect to what travels: (B, *shape) of a
    messenger with one tensor, else all numbers (B, N) in the order of the names."""
    batch = batch.to(model.device)
    with messenger.apart(len(batch.input_ids)) as copies:
        losses = example_losses(model, messenger.prefix_of(copies, model), batch, apart=True)
        gradients = torch.autograd.grad(losses.sum(), list(copies.values()))
    if len(gradients) == 1:
        return losses.detach(), gradients[0]
    return losses.detach(), torch.cat([part.flatten(start_dim=1) for part in gradients], dim=1)
