"""Gradient matching: the simulated client is the real one, and a text that is there is found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsp.audit.inversion.adapters import (
    adapter_gradient,
    input_dictionary,
    reads_tokens_alone,
)
from fedsp.audit.inversion.gradient_matching import (
    AdapterTarget,
    LocalSteps,
    PromptTarget,
    best_distances,
    local_change,
    match_embeddings,
    match_text,
    mismatch,
)
from fedsp.audit.inversion.scenarios import cut, guess_without_places, noised, recovery_of
from fedsp.data.encoding import Encoded, collate
from fedsp.models.adapter import Adapter, AdapterSettings, global_blocks
from fedsp.models.auxiliary import build_auxiliary, parse_plan
from fedsp.models.messengers.making import blocks_of
from fedsp.training.loop import Optimisation, answer_loss, fit
from fedsp.training.per_example_gradients import example_gradients
from support.attacked import TEXT, prompt_for
from support.tiny_models import tiny_model

pytestmark = pytest.mark.study

ROW = Encoded(TEXT[:4], 3)
ANSWER = torch.tensor(TEXT[3:4])


def embedded(model: Any, row: Encoded) -> torch.Tensor:
    table: torch.Tensor = model.model.get_input_embeddings()(torch.tensor(row.ids[:-1])).detach()
    return table[None, None]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("space", ["residual", "key_value"])
def test_the_simulated_client_is_the_real_one(family: str, space: Any) -> None:
    model = tiny_model(family)
    prompt = prompt_for(model, space, 5)
    seen = local_change(model, prompt, embedded(model, ROW), ANSWER, LocalSteps())[0]
    assert torch.allclose(
        -seen, example_gradients(model, prompt, collate([ROW]))[1][0], rtol=1e-3, atol=1e-5
    )
    optimisation = Optimisation(learning_rate=1e-2, weight_decay=0.1, warmup=0.5, total_steps=8)
    steps = LocalSteps(tuple(optimisation.rate(step) for step in range(3)), 0.1)
    changed = local_change(model, prompt, embedded(model, ROW), ANSWER, steps)[0]
    before = prompt.values().detach().clone()
    fit(
        prompt.trained(),
        lambda batch: answer_loss(model, prompt.prefix(model), batch),
        [collate([ROW])] * 3,
        optimisation,
    )
    assert torch.allclose(changed, prompt.values().detach() - before, rtol=1e-3, atol=1e-5)


def test_two_texts_are_one_client() -> None:
    model = tiny_model("gpt2")
    prompt = prompt_for(model, "residual", 5)
    other = Encoded((*TEXT[5:8], TEXT[9]), 3)
    both = torch.cat([embedded(model, ROW), embedded(model, other)], dim=1)
    answers = torch.tensor([TEXT[3], TEXT[9]])
    seen = local_change(model, prompt, both, answers, LocalSteps())[0]
    assert torch.allclose(
        -seen,
        example_gradients(model, prompt, collate([ROW, other]))[1].mean(dim=0),
        rtol=1e-3,
        atol=1e-5,
    )


@pytest.mark.parametrize("steps", [LocalSteps(), LocalSteps((5e-3, 1e-2), 0.01)])
def test_a_residual_prompt_gives_its_text_away_too(steps: LocalSteps) -> None:
    """What the span test cannot read, matching does; with noise it reads no more than a guess."""
    model = tiny_model("gpt2")
    prompt = prompt_for(model, "residual", 5)
    change = local_change(model, prompt, embedded(model, ROW), ANSWER, steps)[0].detach()
    target = PromptTarget(
        model=model, prompt=prompt, change=change, answers=ANSWER, tokens=3, steps=steps
    )
    assert recovery_of(match_text(target, iterations=150), ROW).exact
    hidden = match_text(replace(target, change=noised(change, 1.0)), iterations=20)
    assert recovery_of(hidden, ROW).tokens < 0.5


def test_texts_of_a_lot_are_found_together() -> None:
    model = tiny_model("gpt2")
    prompt = prompt_for(model, "residual", 5)
    rows = [Encoded(TEXT[:3], 2), Encoded(TEXT[5:8], 2)]
    change = -example_gradients(model, prompt, collate(rows))[1].mean(dim=0)
    answers = torch.tensor([row.ids[-1] for row in rows])
    target = PromptTarget(
        model=model, prompt=prompt, change=change, answers=answers, tokens=2, steps=LocalSteps()
    )
    found = match_embeddings(target, iterations=150, restarts=2, seed=0)
    nearest = best_distances(model, found).topk(2, largest=False).indices
    there = [{row.ids[position] for row in rows} for position in range(2)]
    assert (
        sum(len(set(some.tolist()) & tokens) for some, tokens in zip(nearest, there, strict=True))
        >= 3
    )


def adapted(model: Any, depths: list[int], rank: int) -> Adapter:
    settings = AdapterSettings(rank=rank, alpha=float(rank), train_first=True)
    return Adapter(model, global_blocks(depths), settings, seed=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_one_step_of_an_adapter_gives_its_text_away(family: str) -> None:
    """By the span of B's gradient in the first layer, up to as many tokens as it has ranks."""
    model = tiny_model(family)
    adapter = adapted(model, [0, 3], 8)
    row = Encoded(TEXT[:6], 5)
    dictionary = input_dictionary(model, adapter, 5)
    gradient = adapter_gradient(model, adapter, [row])
    assert dictionary.recovery(gradient, row).tokens == 1.0
    assert dictionary.placed == (family in ("gpt2", "opt")), "rotary embeddings come later"
    noise = {name: noised(tensor, 1.0) for name, tensor in gradient.items()}
    assert dictionary.recovery(noise, row).tokens < 0.5
    short = Encoded(TEXT[:2], 1)
    assert dictionary.recovery(adapter_gradient(model, adapter, [short]), short).tokens == 1.0, (
        "a first token is in the gradient of values"
    )


@pytest.mark.parametrize("plan", ["copies(1)", "shared(0)"])
def test_an_adapter_that_every_block_reads_gives_its_text_away_too(plan: str) -> None:
    """Each block adds its own vectors to the gradient of B, so the span is that much larger."""
    auxiliary = build_auxiliary(tiny_model("gpt2"), parse_plan(plan, 4), None)
    settings = AdapterSettings(rank=32, alpha=32.0, train_first=True)
    adapter = Adapter(auxiliary, blocks_of(auxiliary.plan, "all"), settings, seed=0)
    row = Encoded(TEXT[:5], 4)
    gradient = adapter_gradient(auxiliary, adapter, [row])
    assert input_dictionary(auxiliary, adapter, 4).recovery(gradient, row).tokens == 1.0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_what_reads_a_token_alone_has_a_dictionary(family: str) -> None:
    model = tiny_model(family)
    assert reads_tokens_alone(model, adapted(model, [0, 3], 4))
    assert not reads_tokens_alone(model, adapted(model, [3], 4))
    behind = {"gpt2": "c_fc", "llama": "down_proj"}[family]
    settings = AdapterSettings(rank=4, alpha=4.0, targets=[behind])
    assert not reads_tokens_alone(model, Adapter(model, global_blocks([0]), settings, seed=0))
    assert guess_without_places([[ROW]], [ROW]) == 1.0


def test_a_guess_without_places_takes_the_commonest_tokens() -> None:
    like = [Encoded((1, 1, 2, 9), 3), Encoded((1, 3, 3, 9), 3), Encoded((1, 3, 4, 9), 3)]
    assert guess_without_places([[like[0]], [like[2]]], like) == pytest.approx((0.5 + 2 / 3) / 2)


@pytest.mark.parametrize("depths", [[0], [3]])
def test_matching_the_gradient_of_an_adapter_finds_its_text(depths: list[int]) -> None:
    """In a later layer too, where there is no span test. The gradient is that of training."""
    model = tiny_model("gpt2")
    adapter = adapted(model, depths, 8)
    gradient = {
        name: tensor
        for name, tensor in adapter_gradient(model, adapter, [ROW]).items()
        if name.endswith(".B")
    }
    target = AdapterTarget(
        model=model, adapter=adapter, gradient=gradient, answers=ANSWER, tokens=3
    )
    assert float(target.how_far(embedded(model, ROW))) == pytest.approx(0.0, abs=1e-5)
    assert recovery_of(match_text(target, iterations=150), ROW).exact
    quiet = {name: noised(tensor, 1.0) for name, tensor in gradient.items()}
    read = match_text(replace(target, gradient=quiet), iterations=20)
    assert recovery_of(read, ROW).tokens < 0.5


def test_mismatch_looks_at_each_depth_alike() -> None:
    seen = torch.tensor([[[1.0, 0.0], [100.0, 0.0]]])  # (P, L, D)
    assert float(mismatch(seen[None], seen)) == pytest.approx(0.0, abs=1e-6)
    turned = torch.tensor([[[[0.0, 1.0], [100.0, 0.0]]]])
    assert float(mismatch(turned, seen)) == pytest.approx(0.5)


def test_what_was_read_is_scored() -> None:
    row = Encoded((1, 2, 3, 4, 9), 4)
    assert recovery_of([1, 2, 3, 4], row).exact and recovery_of([1, 2, 3, 4], row).rouge == 1.0
    part = recovery_of([2, 3, 4, 1], row)
    assert part.tokens == 0.0 and not part.exact and part.rouge == pytest.approx(0.75)
    assert cut(row, 3) == Encoded((1, 2, 3), 2)
