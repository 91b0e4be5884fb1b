"""Gradient steps on whatever is passed to be trained: a prompt, or an auxiliary model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsp.data.batching import Padded, pad
from fedsp.data.encoding import IGNORED, Batch
from fedsp.errors import TrainingDiverged
from fedsp.models.frozen_front import Entry
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.trainable import Tensors

Work = TypeVar("Work")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW, its peak learning rate and weight decay, and a warm-up followed by a linear fall to
    zero over `total_steps`.

    `warmup` is a share of `total_steps`; with `total_steps` 0 the learning rate is constant.
    """

    learning_rate: float
    weight_decay: float = 0.01
    warmup: float = 0.1
    total_steps: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run."""
        if not self.total_steps:
            return self.learning_rate
        rising = math.ceil(self.warmup * self.total_steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * max(
            0.0, (self.total_steps - step) / max(1, self.total_steps - rising)
        )


def answer_loss(
    model: PromptedLM, prefix: Tensor | None, batch: Batch, entry: Entry | None = None
) -> Tensor:
    """Mean cross-entropy, nats per token, over the answer tokens of a batch; logits are computed
    only there.

    `prefix`: keys and values (prompt length, layers, 2, heads, head size), or one per example.
    `entry`: hidden states of the batch at a depth, from which on the model is computed.
    """
    hidden = model(batch.input_ids, batch.attention_mask, prefix, entry)
    return states_loss(model, hidden, batch)


def states_loss(model: PromptedLM, hidden: Tensor, batch: Batch) -> Tensor:
    """`answer_loss` from last hidden states (batch, tokens, hidden)."""
    asked = batch.labels[:, 1:] != IGNORED  # (B, T - 1)
    return cross_entropy(model.logits(hidden[:, :-1][asked]), batch.labels[:, 1:][asked])


def next_token_loss(model: PromptedLM, texts: Sequence[Sequence[int]]) -> Tensor:
    """Mean cross-entropy of every token but the first of each text, nats per token."""
    batch = pad(texts, model.device)
    return predicted_loss(model, model(batch.ids, batch.mask), batch)


def predicted_loss(model: PromptedLM, hidden: Tensor, batch: Padded) -> Tensor:
    """`next_token_loss` from last hidden states (batch, tokens, hidden)."""
    real = batch.mask[:, 1:].bool()
    return cross_entropy(model.logits(hidden[:, :-1][real]), batch.ids[:, 1:][real])


@torch.no_grad()
def text_loss(model: PromptedLM, texts: Sequence[Sequence[int]]) -> float:
    """The mean of `next_token_loss` over texts, read one by one, since logits of all their tokens
    at once may be larger than the model."""
    losses = [float(next_token_loss(model, [text])) for text in texts]
    return sum(losses) / len(losses)


@dataclass(frozen=True)
class TrainResult:
    """The loss of each step (nats per token; none if training was private), and AdamW's state,
    named "STATE.PARAMETER"."""

    losses: list[float]
    moments: Tensors

    @property
    def last(self) -> float | None:
        return self.losses[-1] if self.losses else None

    @property
    def spikes(self) -> int:
        """Steps whose loss is more than half above the median of this fit's."""
        return sum(loss > 1.5 * statistics.median(self.losses) for loss in self.losses)


def fit(
    train: Mapping[str, nn.Parameter],
    loss: Callable[[Work], Tensor],
    batches: Iterable[Work],
    optimisation: Optimisation,
    *,
    first_step: int = 0,
    moments: Tensors | None = None,
) -> TrainResult:
    """One AdamW step on the parameters in `train` for each batch (whatever `loss` reads), and on
    nothing else.

    `first_step` is where this fit stands in the schedule of the run; `moments` continue an earlier
    fit's optimizer.

    Raises:
        TrainingDiverged: a loss is not finite.
    """

    def gradients(batch: Work) -> Tensor:
        value = loss(batch)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    fitted = optimize(
        train, gradients, batches, optimisation, first_step=first_step, moments=moments
    )
    bad = next(
        (index for index, value in enumerate(fitted.losses) if not math.isfinite(value)), None
    )
    if bad is not None:
        raise TrainingDiverged(
            f"the loss is {fitted.losses[bad]} at local step {bad + 1} of {len(fitted.losses)}:"
            " lower the learning rate"
        )
    return fitted


def optimize(
    train: Mapping[str, nn.Parameter],
    gradients: Callable[[Work], Tensor | None],
    batches: Iterable[Work],
    optimisation: Optimisation,
    *,
    first_step: int = 0,
    moments: Tensors | None = None,
) -> TrainResult:
    """`fit` with gradients from any source: `gradients` sets `.grad` of the parameters and returns
    the loss, or None if the loss is private."""
    names = list(train)
    optimizer = torch.optim.AdamW(
        [train[name] for name in names],
        lr=optimisation.rate(first_step),
        weight_decay=optimisation.weight_decay,
    )
    if moments:
        _restore_moments(optimizer, names, moments)
    losses: list[Tensor] = []
    with gradients_set(train.values(), True):
        for step, batch in enumerate(batches, start=first_step):
            for group in optimizer.param_groups:
                group["lr"] = optimisation.rate(step)
            optimizer.zero_grad(set_to_none=True)
            value = gradients(batch)
            optimizer.step()
            if value is not None:
                losses.append(value)
    return TrainResult(torch.stack(losses).tolist() if losses else [], _moments(optimizer, names))


@contextmanager
def gradients_set(parameters: Iterable[nn.Parameter], wanted: bool) -> Iterator[None]:
    """Set `requires_grad` of these parameters within the context; on exit it is restored and
    `.grad` is cleared."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.requires_grad_(wanted)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


def _moments(optimizer: torch.optim.Optimizer, names: list[str]) -> Tensors:
    """The optimizer's own tensors, not copies: after a fit it is not used again."""
    states = optimizer.state_dict()["state"]
    return {
        f"{key}.{names[index]}": torch.as_tensor(value).detach().cpu()
        for index, state in states.items()
        for key, value in state.items()
    }


def _restore_moments(optimizer: torch.optim.Optimizer, names: list[str], moments: Tensors) -> None:
    state = {
        index: {key: moments[f"{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
        for index, name in enumerate(names)
        if f"step.{name}" in moments
    }
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
