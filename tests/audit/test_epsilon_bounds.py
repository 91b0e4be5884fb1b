"""The audit of a promise: it never refutes a correct build, and it refutes every broken one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsp.audit.epsilon_bounds import (
    _refuted,
    estimated_epsilon,
    lower_bound,
    p_value,
    spheres,
)
from fedsp.audit.statistics import exact_interval
from fedsp.data.encoding import Batch, Encoded, collate
from fedsp.federation.aggregation.private import private_mean
from fedsp.models.payload import PROMPT
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.models.trainable import trainable
from fedsp.privacy import Release, clipped_sum, epsilon, gaussian, noised_mean
from fedsp.training import dp_sgd as private_fitting
from fedsp.training.dp_sgd import PrivateSteps, private_gradient
from fedsp.training.loop import Optimisation, fit, states_loss
from support.tiny_models import tiny_model

DELTA = 1e-5
CANARIES = 1024
NOISE = 4.0
PROMISED = epsilon((Release(NOISE),), DELTA)


@pytest.mark.parametrize(
    ("guesses", "expected"),
    [(10, 1.05), (50, 2.78), (100, 3.49), (200, 4.19), (500, 5.11), (1000, 5.81), (5000, 7.42)],
)
def test_what_so_many_right_guesses_can_show(guesses: int, expected: float) -> None:
    assert _refuted(guesses, guesses, guesses, 0.0, 0.05) == pytest.approx(expected, abs=0.01)


def test_the_p_value_is_that_of_a_binomial_and_grows_with_delta() -> None:
    assert p_value(10, 10, 10, 0.0, 0.0) == pytest.approx(2.0**-10)
    assert p_value(10, 10, 9, 0.0, 0.0) == pytest.approx(11 * 2.0**-10)
    assert p_value(10, 10, 10, 0.0, 1e-2) > p_value(10, 10, 10, 0.0, 0.0)


def test_intervals_of_a_share() -> None:
    assert exact_interval(0, 100) == pytest.approx((0.0, 0.0362), abs=1e-3)
    assert exact_interval(50, 100) == pytest.approx((0.3983, 0.6017), abs=1e-3)


def released(model: Any, prompt: SoftPrompt, included: list[bool]) -> list[float]:
    """What one private step releases of examples whose gradients are ten times the bound, each
    along a coordinate of its own."""
    lot = [Encoded((index, 0), 1) for index, there in enumerate(included) if there]
    steps = PrivateSteps(bound=1.0, noise_multiplier=NOISE, sampling_rate=1.0, count=1)
    return private_gradient(model, prompt, lot, len(included), steps, at_once=64).flatten().tolist()


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """One audit in one run, of the private step as it stands when this is called."""
    model = tiny_model("gpt2")
    prompt = SoftPrompt(
        PromptSpec(space="residual", length=8, model=model.shape), torch.zeros(8, 4, 32)
    )
    assert prompt.direct.numel() == CANARIES

    def gradients(model: Any, prompt: SoftPrompt, batch: Batch) -> tuple[Tensor, Tensor]:
        coordinates = torch.zeros(len(batch.input_ids), CANARIES)
        coordinates[torch.arange(len(coordinates)), batch.input_ids[:, 0]] = 10.0
        return coordinates.sum(dim=1), coordinates.view(-1, 8, 4, 32)

    monkeypatch.setattr(private_fitting, "example_gradients", gradients)

    def audit() -> Any:
        coins = random.Random(5)
        included = [coins.random() < 0.5 for _ in range(CANARIES)]
        return lower_bound(released(model, prompt, included), included, delta=DELTA)

    return audit


def test_a_correct_build_is_never_refuted(canaries: Callable[[], Any]) -> None:
    assert all(canaries()["epsilon"] <= PROMISED < canaries()["most"] for _ in range(5))


def no_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        private_fitting, "clipped_sum", lambda rows, bound: rows.double().sum(dim=0)
    )


def noise_divided_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        private_fitting,
        "noised_mean",
        lambda total, *, bound, noise_multiplier, expected: (
            (total + noise_multiplier * bound * gaussian(total.shape) / expected) / expected
        ),
    )


def noise_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        private_fitting,
        "noised_mean",
        lambda total, *, bound, noise_multiplier, expected: (
            (total + noise_multiplier / 10 * bound * gaussian(total.shape)) / expected
        ),
    )


def clipping_after_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def noised(total: Tensor, *, bound: float, noise_multiplier: float, expected: float) -> Tensor:
        return clipped_sum(
            (total + noise_multiplier * bound * gaussian(total.shape))[None] / expected, bound
        )

    monkeypatch.setattr(
        private_fitting, "clipped_sum", lambda rows, bound: rows.double().sum(dim=0)
    )
    monkeypatch.setattr(private_fitting, "noised_mean", noised)


@pytest.mark.parametrize(
    "broken", [no_clipping, noise_divided_twice, noise_too_small, clipping_after_noise]
)
def test_a_broken_build_is_refuted(
    canaries: Callable[[], Any],
    broken: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(monkeypatch)
    assert canaries()["epsilon"] > PROMISED


def two_worlds_bound(
    inside: Sequence[float], outside: Sequence[float], *, delta: float, confidence: float = 0.95
) -> float:
    """The largest epsilon refuted by many runs with a unit and many without it: the first half of
    both chooses the threshold, the second half is counted, with Clopper-Pearson intervals
    (Jagielski, Ullman and Oprea, NeurIPS 2020, https://arxiv.org/abs/2006.07709)."""
    halves = [
        (list(scores[: len(scores) // 2]), list(scores[len(scores) // 2 :]))
        for scores in (inside, outside)
    ]
    (chosen_in, counted_in), (chosen_out, counted_out) = halves

    def gap(threshold: float) -> float:
        return sum(score > threshold for score in chosen_in) / len(chosen_in) - sum(
            score > threshold for score in chosen_out
        ) / len(chosen_out)

    threshold = max(sorted([*chosen_in, *chosen_out]), key=gap)
    hits, false = (
        sum(score > threshold for score in counted_in),
        sum(score > threshold for score in counted_out),
    )
    least, most = (
        exact_interval(hits, len(counted_in), confidence)[0],
        exact_interval(false, len(counted_out), confidence)[1],
    )
    return max(0.0, math.log(max(least - delta, 1e-300) / most))


def distinguished(*, auxiliary_trained: bool) -> float:
    """The epsilon refuted by 400 private steps with an example and 400 without it, the auxiliary
    model auxiliary_trained on all of them first, or not."""
    base = [Encoded((5 + index % 7, 20 + index % 11, 40), 1) for index in range(40)]
    worlds, noiseless = [], []
    steps = PrivateSteps(bound=1e-3, noise_multiplier=NOISE, sampling_rate=1.0, count=1)
    quiet = PrivateSteps(bound=1e-3, noise_multiplier=0.0, sampling_rate=1.0, count=1)
    for rows in ([*base, Encoded((90, 91, 92, 93, 94), 1)], base):
        model = tiny_model("gpt2")
        prompt = SoftPrompt(
            PromptSpec(space="residual", length=4, model=model.shape),
            torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(0)),
        )
        if auxiliary_trained:
            loss = lambda batch, model=model: states_loss(
                model, model(batch.input_ids, batch.attention_mask), batch
            )
            fit(
                trainable(model.model),
                loss,
                [collate(rows[-8:])] * 10,
                Optimisation(learning_rate=3e-3),
            )
        worlds.append((model, prompt, rows))
        noiseless.append(
            private_gradient(model, prompt, rows, 40, quiet, at_once=64).double().flatten()
        )
    direction = noiseless[0] - noiseless[1]
    each: list[list[float]] = []
    for (model, prompt, rows), mean in zip(worlds, noiseless, strict=True):
        # the sum of clipped gradients is the same each time: only the noise is drawn anew
        total = mean * 40
        draws = [
            noised_mean(total, bound=1e-3, noise_multiplier=NOISE, expected=40.0)
            for _ in range(400)
        ]
        assert torch.isfinite(private_gradient(model, prompt, rows, 40, steps, at_once=64)).all()
        each.append([float(draw @ direction) for draw in draws])
    return two_worlds_bound(each[0], each[1], delta=DELTA)


def test_alternating_training_left_on_is_refuted_and_without_it_nothing_is() -> None:
    assert distinguished(auxiliary_trained=False) <= PROMISED
    assert distinguished(auxiliary_trained=True) > PROMISED


def test_canary_clients_refute_a_server_with_too_little_noise() -> None:
    numbers, asked = 4096, 200
    sent = {PROMPT: torch.zeros(1, 4, 1024)}
    rows = spheres(2 * asked, numbers, 1.0, 3)
    coins = random.Random(1)
    included = [coins.random() < 0.5 for _ in rows]
    replies = {
        str(index): {PROMPT: row.float().view(1, 4, 1024)}
        for index, (row, there) in enumerate(zip(rows, included, strict=True))
        if there
    }
    promised = epsilon((Release(2.0),), DELTA)

    def audit(noise: float) -> tuple[float, float]:
        release = (
            private_mean(sent, replies, bound=1.0, noise_multiplier=noise, expected=float(asked))[
                PROMPT
            ]
            .double()
            .flatten()
        )
        cosines = (rows @ release / release.norm()).tolist()
        inside = [cosine for cosine, there in zip(cosines, included, strict=True) if there]
        return lower_bound(cosines, included, delta=DELTA)["epsilon"], estimated_epsilon(
            inside, numbers, delta=DELTA
        )

    bound, estimate = audit(2.0)
    assert bound <= promised and promised / 2 < estimate < 3 * promised, "it comes of 200 cosines"
    bound, estimate = audit(0.2)
    assert bound > promised and estimate > 4 * promised
