"""Gradients of a prompt, one per example, in one pass: each example reads a copy of the prompt of
its own.

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
from fedsp.models.soft_prompt import SoftPrompt


def example_losses(model: PromptedLM, prefix: Tensor | None, batch: Batch) -> Tensor:
    """Mean cross-entropy of each example's own answer tokens (B,), nats per token; `prefix` (P,
    depths, 2, H, K), or one per example."""
    hidden = model(batch.input_ids, batch.attention_mask, prefix)
    asked = batch.labels[:, 1:] != IGNORED  # (B, T - 1)
    losses = cross_entropy(
        model.logits(hidden[:, :-1][asked]), batch.labels[:, 1:][asked], reduction="none"
    )
    row = asked.nonzero()[:, 0]
    total = torch.zeros(len(asked), device=losses.device).index_add(0, row, losses)
    return total / asked.sum(dim=1).clamp_min(1)


def example_gradients(model: PromptedLM, prompt: SoftPrompt, batch: Batch) -> tuple[Tensor, Tensor]:
    """The losses (B,) and the gradient (B, *shape) of each with respect to the prompt's values."""
    batch = batch.to(model.device)
    values = prompt.values().detach()
    own = values[None].expand(len(batch.input_ids), *values.shape).clone().requires_grad_(True)
    losses = example_losses(model, prompt.read(own, model), batch)
    (gradients,) = torch.autograd.grad(losses.sum(), own)
    return losses.detach(), gradients
