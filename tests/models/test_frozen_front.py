"""What the blocks before a messenger make of texts, kept: the same loss and gradients as reading
them again, the same bits whether it was kept or not, and no work for those blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedsp.data.encoding import Encoded, collate
from fedsp.models import frozen_front
from fedsp.models.adapter import Adapter, AdapterSettings, global_blocks
from fedsp.models.messengers.making import layer_weights
from fedsp.models.prompted_lm import PromptedLM
from fedsp.training.loop import Optimisation, answer_loss
from fedsp.training.stage import Stage, train_stage
from support.tiny_families import tiny_causal_lm
from support.tiny_models import FAMILIES, tiny_model

DEPTH = 2
STAGE = Stage(
    name="prompt",
    seed_label="speak",
    steps=12,
    batch_size=4,
    optimisation=Optimisation(learning_rate=1e-2),
    reads=10_000,
)


def texts(count: int = 20) -> list[Encoded]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 14, (count,), generator=generator).tolist()
    return [
        Encoded(tuple(torch.randint(3, 97, (length,), generator=generator).tolist()), length - 2)
        for length in lengths
    ]


def adapter_in(model: PromptedLM) -> Adapter:
    settings = AdapterSettings(rank=4, alpha=8.0, train_first=True)
    made = Adapter(model, global_blocks([DEPTH, DEPTH + 1]), settings, seed=0)
    torch.manual_seed(5)
    for update in made.updates.values():
        torch.nn.init.normal_(update.second, std=0.05)
    return made


def trained(
    model: PromptedLM, stage: Stage = STAGE, messenger: Adapter | None = None
) -> dict[str, Tensor]:
    messenger = messenger or adapter_in(model)
    train_stage(
        stage, messenger, model, messenger, texts(), received=messenger.payload(), round=1, seed=7
    )
    return messenger.payload()


@contextmanager
def computed(model: PromptedLM, depth: int) -> Iterator[list[int]]:
    """How many rows each computation of a block reads."""
    calls: list[int] = []
    norm = model.blocks[depth].get_submodule("input_layernorm")
    handle = norm.register_forward_hook(
        lambda _module, _arguments, output: calls.append(len(output))
    )
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packs", [True, False])
def test_loss_and_gradients_are_those_of_reading_again(family: str, packs: bool) -> None:
    model = tiny_model(family)
    if not packs:
        model.__dict__["packs_branches"] = 0
    rows = texts()
    messenger, front = adapter_in(model), model.front(DEPTH)
    assert front.works and messenger.first_depth == DEPTH
    for parameter in messenger.trained().values():
        parameter.requires_grad_(True)
    ids, drawn = [row.ids for row in rows], [3, 11, 0, 7, 19]
    batch = collate([rows[number] for number in drawn])
    entry = front.entry(ids, front.groups(ids), drawn)
    found = []
    for given in (entry, None):
        loss = answer_loss(model, None, batch, given)
        gradients = torch.autograd.grad(loss, list(messenger.trained().values()))
        found.append([loss.detach()[None], *(gradient.flatten() for gradient in gradients)])
    torch.testing.assert_close(torch.cat(found[0]), torch.cat(found[1]), rtol=1e-4, atol=1e-6)


def test_training_is_that_of_reading_again_and_later_passes_leave_the_front_alone() -> None:
    model = tiny_model("llama")
    plain = trained(tiny_model("llama"), replace(STAGE, reads=39))  # 20 texts, not twice
    with computed(model, 0) as calls:
        messenger = adapter_in(model)
        start = messenger.payload()
        first = trained(model, STAGE, messenger)
        before = len(calls)
        messenger.load(start)
        again = trained(model, STAGE, messenger)
    assert len(calls) == before
    assert sorted(first) == sorted(plain)
    for name in plain:
        torch.testing.assert_close(first[name], plain[name], rtol=1e-3, atol=1e-5)
        assert torch.equal(first[name], again[name]), "kept states have other bits"
    with computed(tiny := tiny_model("llama"), 0) as calls:
        trained(tiny, replace(STAGE, reads=39))
    assert len(calls) >= STAGE.steps


def test_states_have_the_same_bits_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained(tiny_model("gpt2"))
    monkeypatch.setattr(frozen_front, "IN_MEMORY", 0)
    on_disk = trained(tiny_model("gpt2"))
    assert all(torch.equal(first[name], on_disk[name]) for name in first)


def test_a_text_has_the_same_states_whatever_is_asked_for_with_it() -> None:
    ids = [row.ids for row in texts()]
    together, alone = tiny_model("opt").front(DEPTH), tiny_model("opt").front(DEPTH)
    groups = together.groups(ids)
    whole = together.entry(ids, groups, range(len(ids))).states
    for number in (19, 0, 8):
        own = alone.entry(ids, groups, [number]).states[0]
        assert torch.equal(own, whole[number, : len(own)])


def test_a_model_whose_rotations_depend_on_the_length_of_a_call_is_read_again() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = PromptedLM(tiny_causal_lm("llama", rope_parameters=scaling).requires_grad_(False), "it")
    assert not model.front(1).works


def test_whole_layers_begin_where_they_stand() -> None:
    assert layer_weights(tiny_model("gpt2"), global_blocks([2, 3])).first_depth == 2


def test_a_model_whose_later_blocks_read_what_earlier_ones_left_is_read_again() -> None:
    model = tiny_model("llama")
    left: list[Tensor] = [torch.zeros(1)]
    model.blocks[0].get_submodule("mlp").register_forward_hook(
        lambda _module, _arguments, output: left.__setitem__(0, output)
    )
    model.blocks[3].get_submodule("mlp").register_forward_hook(
        lambda _module, _arguments, output: output + left[0]
    )
    assert not model.front(DEPTH).works
