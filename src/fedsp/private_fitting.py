"""Steps on a prompt with example-level differential privacy: DP-SGD's clipped and noised gradients, with AdamW on the result.

M. Abadi et al. *Deep Learning with Differential Privacy*. CCS 2016. https://arxiv.org/abs/1607.00133. What an optimizer makes of a released gradient
is post-processing. Lots are Poisson samples, as the accountant assumes, and an empty one releases noise like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsp.data.encoding import Encoded, collate
from fedsp.errors import PrivacyError
from fedsp.fitting import Fitted, Optimisation, Tensors, descend
from fedsp.models import PromptedLM
from fedsp.per_example import example_gradients
from fedsp.privacy import Release, clipped_sum, noise_for, noised_mean, poisson_sample
from fedsp.prompts import SoftPrompt


@dataclass(frozen=True)
class PrivateSteps:
    """Steps of one round: each a release of noise `noise_multiplier` x `bound` over a Poisson sample of rate `sampling_rate`."""

    bound: float
    noise_multiplier: float
    sampling_rate: float
    count: int

    @property
    def release(self) -> Release:
        return Release(self.noise_multiplier, self.sampling_rate, self.count)


@dataclass(frozen=True)
class ExamplePrivacy:
    """What a run asks of every client: gradients of one example clipped to `bound`, and noise so that all `rounds` rounds cost `epsilon` at `delta`, or
    noise of a given multiplier."""

    bound: float
    delta: float
    rounds: int
    epsilon: float | None = None
    noise_multiplier: float | None = None

    def steps(self, examples: int, lot: int, steps: int) -> PrivateSteps:
        """The steps of one round of a client with so many examples, `lot` of them expected in a step. How many it has is taken as public.

        Raises:
            PrivacyError: delta is no promise for so many examples, or no noise is enough.
        """
        if self.delta * examples >= 1:
            raise PrivacyError(
                f"privacy.delta = {self.delta:g} is no promise for {examples} examples: with one chance in {1 / self.delta:g} an example may be told whole; set it below {1 / examples:.1g}"
            )
        rate = min(1.0, lot / examples)
        noise = self.noise_multiplier
        if noise is None:
            assert self.epsilon is not None
            noise = noise_for(self.epsilon, self.delta, rate, self.rounds * steps)
        return PrivateSteps(self.bound, noise, rate, steps)


def fit_privately(
    model: PromptedLM,
    prompt: SoftPrompt,
    examples: Sequence[Encoded],
    steps: PrivateSteps,
    optimisation: Optimisation,
    *,
    first_step: int = 0,
    moments: Tensors | None = None,
    at_once: int = 8,
) -> Fitted:
    """AdamW steps on the prompt from private gradients; no loss is told. `at_once` examples go through the model together."""

    def gradients(lot: list[int]) -> None:
        prompt.direct.grad = private_gradient(model, prompt, [examples[index] for index in lot], len(examples), steps, at_once)

    lots = (poisson_sample(len(examples), steps.sampling_rate) for _ in range(steps.count))
    return descend(prompt.trained(), gradients, lots, optimisation, first_step=first_step, moments=moments)


def private_gradient(model: PromptedLM, prompt: SoftPrompt, lot: Sequence[Encoded], examples: int, steps: PrivateSteps, at_once: int = 8) -> Tensor:
    """The noised mean gradient of a lot, of the prompt's shape, float32; clipped, summed and noised in float64 on the processor, which every device can do."""
    total = torch.zeros(prompt.direct.numel(), dtype=torch.float64)
    ordered = sorted(lot, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), at_once):
        _, each = example_gradients(model, prompt, collate(ordered[start : start + at_once]))
        total += clipped_sum(each.flatten(start_dim=1).cpu(), steps.bound)
    noised = noised_mean(total, bound=steps.bound, noise_multiplier=steps.noise_multiplier, expected=steps.sampling_rate * examples)
    return noised.float().view_as(prompt.direct).to(prompt.direct.device)
