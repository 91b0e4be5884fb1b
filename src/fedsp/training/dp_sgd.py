"""DP-SGD on a messenger (example-level differential privacy): per-example gradients are clipped,
summed and noised, and AdamW is applied to the result.

M. Abadi et al. *Deep Learning with Differential Privacy*. CCS 2016.
https://arxiv.org/abs/1607.00133. The optimizer step is post-processing of a released gradient.
Batches ("lots") are Poisson samples, as the accountant assumes; an empty one still releases noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsp.data.encoding import Encoded, collate
from fedsp.errors import PrivacyError
from fedsp.models.loading import in_few_bits
from fedsp.models.prompted_lm import PromptedLM, length_of
from fedsp.models.soft_prompt import SoftPrompt
from fedsp.models.trainable import Messenger, Tensors
from fedsp.privacy import Release, clipped_sum, epsilon, noise_for, noised_mean, poisson_sample
from fedsp.training.loop import Optimisation, TrainResult, optimize
from fedsp.training.per_example_gradients import example_gradients


@dataclass(frozen=True, kw_only=True)
class PrivateSteps:
    """The `count` steps of one round. Each releases the gradients of a Poisson sample of rate
    `sampling_rate`, clipped to `bound`, with noise of deviation `noise_multiplier` x `bound`."""

    bound: float
    noise_multiplier: float
    sampling_rate: float
    count: int

    @property
    def release(self) -> Release:
        return Release(self.noise_multiplier, self.sampling_rate, self.count)


@dataclass(frozen=True, kw_only=True)
class ExamplePrivacy:
    """Privacy parameters of a run, alike for all clients: the clipping bound of one example's
    gradient, and either the `epsilon` at `delta` of all `rounds` rounds or a noise multiplier."""

    bound: float
    delta: float
    rounds: int
    epsilon: float | None = None
    noise_multiplier: float | None = None

    def steps(self, examples: int, lot: int, steps: int) -> PrivateSteps:
        """The steps of one round of a client with this number of examples, which is treated as
        public; `lot` is the expected batch size.

        Raises:
            PrivacyError: delta is too large for the number of examples, or no noise suffices.
        """
        if self.delta * examples >= 1:
            raise PrivacyError(
                f"privacy.delta = {self.delta:g} is too large for {examples} examples: with one"
                f" chance in {1 / self.delta:g} an example may be disclosed in full; set it below"
                f" {1 / examples:.1g}"
            )
        rate = min(1.0, lot / examples)
        noise = self.noise_multiplier
        if noise is None:
            assert self.epsilon is not None
            noise = noise_for(self.epsilon, self.delta, rate, self.rounds * steps)
        return PrivateSteps(
            bound=self.bound, noise_multiplier=noise, sampling_rate=rate, count=steps
        )

    def spent(self, examples: int, lot: int, steps: int, rounds: int) -> float:
        """The epsilon of so many rounds with these steps; raises as `steps` does."""
        taken = self.steps(examples, lot, steps)
        release = Release(taken.noise_multiplier, taken.sampling_rate, rounds * taken.count)
        return epsilon((release,), self.delta, 1e-3) if rounds else 0.0


def fit_privately(
    model: PromptedLM,
    messenger: Messenger,
    examples: Sequence[Encoded],
    steps: PrivateSteps,
    optimisation: Optimisation,
    *,
    first_step: int = 0,
    moments: Tensors | None = None,
) -> TrainResult:
    """AdamW steps on a messenger from private gradients; losses are not recorded.

    Raises:
        PrivacyError: an example's gradient depends on others, or is not finite.
    """
    together = examples_together(model, messenger, max(len(row.ids) for row in examples))
    parameters = dict(sorted(messenger.trained().items()))  # as private gradients are

    def gradients(lot: list[int]) -> None:
        found = private_gradient(
            model, messenger, [examples[index] for index in lot], len(examples), steps, together
        )
        parts = torch.split(found, [parameter.numel() for parameter in parameters.values()])
        for parameter, part in zip(parameters.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.device)

    lots = (poisson_sample(len(examples), steps.sampling_rate) for _ in range(steps.count))
    return optimize(
        parameters, gradients, lots, optimisation, first_step=first_step, moments=moments
    )


TOGETHER = 8
"""Batch size of per-example gradients if no example changes another's gradient."""

ALONE = 5e-5
"""The largest change of an example's gradient, relative to its norm, that counts as rounding: seven
neighbours that each change this much change a clipped sum by less than a thousandth of the bound.
"""


def examples_together(model: PromptedLM, messenger: Messenger, longest: int) -> int:
    """How many examples may share a batch, 1 or `TOGETHER`: clipping does not bound the influence
    of an example that changes the gradients of others.

    Measured once per model on random text: an example's gradient alone, and in batches with other
    examples. If they differ by more than rounding, the result is 1; also for 8bit and 4bit models,
    since LLM.int8 picks outlier columns over a whole batch, which random text may not show.
    `longest`: length of the longest example in tokens; if it can exceed `model.switch`, where RoPE
    frequencies change, a neighbour beyond the switch is tested too.

    Raises:
        PrivacyError: even alone, an example's gradient depends on what the model read before, or is
            not finite.
    """
    if model.together is None:
        lone = _probe(model, 5, seed=0)
        crowds = [
            [_probe(model, length, seed=seed) for seed in range(1, TOGETHER)] for length in (4, 24)
        ]
        with torch.no_grad():
            taken = model.positions_taken(length_of(messenger.prefix(model)))
        switches = model.switch is not None and taken + longest > model.switch.positions
        # rows on both sides of a switch are read in two calls: an adapter's copies are for one
        lone_rows = switches and not isinstance(messenger, SoftPrompt)
        if model.switch is not None and switches:
            crowds.append([_probe(model, model.switch.positions + 1, seed=1)])
        alone = _gradients(model, messenger, [lone])
        if not torch.isfinite(alone).all():
            raise PrivacyError(
                f"{model.name} has gradients that are not finite on random text, so clipping would"
                " drop every example: use another model or precision"
            )
        rounding = _moved(
            _gradients(model, messenger, [lone]), alone
        )  # between identical calls: some devices sum in a varying order
        for crowd in crowds:
            _gradients(model, messenger, crowd[:1])
            if _moved(_gradients(model, messenger, [lone]), alone) > max(ALONE, 4 * rounding):
                raise PrivacyError(
                    f"{model.name} gives an example another gradient after reading other text, so"
                    " clipping does not bound its influence: use another model"
                )
        beside = max(
            _moved(_gradients(model, messenger, [lone, *crowd])[:1], alone)
            for crowd in (crowds[:2] if lone_rows else crowds)
        )
        model.largest_difference = beside
        model.together = 1 if in_few_bits(model) or lone_rows or beside > ALONE else TOGETHER
    return model.together


def _probe(model: PromptedLM, length: int, seed: int) -> Encoded:
    """An example of `length` random tokens, the last three being the answer; no client's text."""
    vocabulary = model.model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
    return Encoded(tuple(tokens.tolist()), length - 3)


def _gradients(model: PromptedLM, messenger: Messenger, examples: Sequence[Encoded]) -> Tensor:
    return example_gradients(model, messenger, collate(examples))[1].flatten(start_dim=1)


def _moved(found: Tensor, expected: Tensor) -> float:
    moved = float(
        (found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny)
    )
    return moved if math.isfinite(moved) else math.inf


def private_gradient(
    model: PromptedLM,
    messenger: Messenger,
    lot: Sequence[Encoded],
    examples: int,
    steps: PrivateSteps,
    at_once: int = 1,
) -> Tensor:
    """The noised mean gradient of a batch (N,), float32, over all tensors that travel in the order
    of the names; clipped, summed and noised in float64 on the CPU, since not every accelerator has
    float64."""
    count = sum(parameter.numel() for parameter in messenger.trained().values())
    total = torch.zeros(count, dtype=torch.float64)
    ordered = sorted(lot, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), at_once):
        _, each = example_gradients(model, messenger, collate(ordered[start : start + at_once]))
        total += clipped_sum(each.flatten(start_dim=1).cpu(), steps.bound)
    noised = noised_mean(
        total,
        bound=steps.bound,
        noise_multiplier=steps.noise_multiplier,
        expected=steps.sampling_rate * examples,
    )
    return noised.float()
