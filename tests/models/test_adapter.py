"""Adapters as messengers: equal to PEFT's, the same on both sides, apart example by example."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsp import api as commands
from fedsp.config_file import make_config
from fedsp.data.encoding import Batch, Encoded, collate
from fedsp.errors import (
    ConfigurationError,
    ModelError,
    PayloadError,
    PrivacyError,
    TooFewClients,
)
from fedsp.experiments.plan import make_plan, plan_run
from fedsp.experiments.server_setup import open_server
from fedsp.federation.callbacks import Callbacks
from fedsp.models.adapter import Adapter, AdapterSettings, global_blocks
from fedsp.models.auxiliary import build_auxiliary, parse_plan
from fedsp.models.messengers.making import blocks_of, client_messenger, make_messenger
from fedsp.models.messengers.prompt_and_adapter import PromptAndAdapter
from fedsp.models.messengers.registry import Place
from fedsp.models.payload import PROMPT, pack
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt, import_peft
from fedsp.models.trainable import Messenger
from fedsp.privacy import clipped_sum
from fedsp.training import dp_sgd
from fedsp.training.dp_sgd import PrivateSteps, examples_together, private_gradient
from fedsp.training.loop import Optimisation, answer_loss, fit
from fedsp.training.per_example_gradients import example_gradients
from support.small_runs import settings
from support.tiny_families import tiny_causal_lm

FAMILIES = ["gpt2", "llama", "gemma2", "opt"]
DEPTHS = [0, 3]


def own(family: str) -> PromptedLM:
    """A model of this test's own: adapters stay in it."""
    return PromptedLM(tiny_causal_lm(family).requires_grad_(False), family)


def adapter(model: PromptedLM, *, seed: int = 3, **changes: Any) -> Adapter:
    given: dict[str, Any] = {"rank": 2, "alpha": 8.0, "train_first": False, **changes}
    return Adapter(model, global_blocks(DEPTHS), AdapterSettings(**given), seed=seed)


def moved(messenger: Messenger) -> None:
    """Load numbers that are not the first ones."""
    generator = torch.Generator().manual_seed(1)
    messenger.load(
        {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in messenger.payload().items()
        }
    )


def batch(count: int = 4) -> Batch:
    drawn = torch.randint(3, 97, (count, 9), generator=torch.Generator().manual_seed(5)).tolist()
    return collate([Encoded(tuple(row[: 5 + place]), 3) for place, row in enumerate(drawn)])


def one_of(some: Batch, index: int) -> Batch:
    rows = slice(index, index + 1)
    return Batch(some.input_ids[rows], some.attention_mask[rows], some.labels[rows])


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_first", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_and_the_exported_adapter_are_pefts(
    family: str, train_first: bool, tmp_path: Path
) -> None:
    """The same A and B, one step of AdamW on the same batch, the same logits; and merged."""
    peft = pytest.importorskip("peft", reason="PEFT comes with the study extra")
    model = own(family)
    start = copy.deepcopy(model.model)
    mine = adapter(model, train_first=train_first)
    moved(mine)
    mine.export(model, tmp_path / "before")
    theirs = peft.PeftModel.from_pretrained(start, tmp_path / "before", is_trainable=True)
    some = batch()
    given = {"input_ids": some.input_ids, "attention_mask": some.attention_mask}
    real = some.attention_mask.bool()
    close(
        model.logits(model.read_padded(some.input_ids, some.attention_mask))[real],
        theirs(**given).logits.float()[real],
    )
    trained = {
        name: parameter
        for name, parameter in theirs.named_parameters()
        if ".lora_B." in name or (train_first and ".lora_A." in name)
    }
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.01)
    theirs(**given, labels=some.labels).loss.backward()
    optimizer.step()
    how = Optimisation(learning_rate=1e-2, weight_decay=0.01)
    fit(mine.trained(), lambda one: answer_loss(model, None, one), [some], how)
    after = {name: parameter.detach() for name, parameter in trained.items()}
    for name, tensor in mine.trained().items():
        path, _, part = name.rpartition(".")
        close(
            tensor.detach(),
            after[f"base_model.model.{mine.paths[path]}.lora_{part}.default.weight"],
        )
    mine.export(model, tmp_path / "after")
    merged = peft.PeftModel.from_pretrained(
        tiny_causal_lm(family), tmp_path / "after"
    ).merge_and_unload()
    close(
        merged(**given).logits.float()[real],
        model.logits(model.read_padded(some.input_ids, some.attention_mask))[real],
    )


def test_it_changes_nothing_at_first_and_both_sides_draw_the_same() -> None:
    model = own("gpt2")
    before = model(batch().input_ids)
    one = adapter(model)
    assert torch.equal(model(batch().input_ids), before)
    other, third = adapter(own("gpt2")), adapter(own("gpt2"), seed=4)
    name = "layers.003.attn.c_attn"
    assert torch.equal(one.updates[name].first, other.updates[name].first)
    assert not torch.equal(one.updates[name].first, third.updates[name].first)
    assert all(key.endswith(".B") for key in one.payload())
    first = one.updates[name].first
    assert float(first.abs().max()) <= 1 / math.sqrt(first.shape[1])


def test_what_is_tuned_in_the_auxiliary_model_is_the_same_in_the_global_one() -> None:
    """A package that is the whole model: its loss behind the clients' adapter is the server's."""
    model = own("llama")
    auxiliary = build_auxiliary(model, parse_plan("ends(1, 2)", 4), None)
    kinds: dict[str, Any] = {
        "kind": "adapter",
        "layers": "verbatim",
        "rank": 2,
        "alpha": 4.0,
        "targets": [],
    }
    spec = PromptSpec(space="residual", length=2, model=model.shape)
    client = client_messenger(auxiliary, spec, {**kinds, "train_first": False}, 7)()
    place = Place(
        model=model,
        blocks=global_blocks([0, 3]),
        prompt=lambda: SoftPrompt(spec),
        settings={**kinds, "train_first": False},
        seed=7,
    )
    server = make_messenger(place)
    moved(client)
    server.load(client.payload())
    for depth, source in ((0, 0), (3, 3)):
        torch.testing.assert_close(auxiliary.block_output(depth), model.block_output(source))
    with pytest.raises(PayloadError, match="expected exactly"):
        server.load({PROMPT: torch.zeros(2, 4, 32)})


@pytest.mark.parametrize(
    ("plan", "verbatim", "every"),
    [
        ("ends(1, 3)", {0: [0], 3: [4]}, {0: [0], 2: [1, 2, 3], 3: [4]}),
        ("tail(1, 2)", {3: [2]}, {0: [0], 2: [1], 3: [2]}),
        ("copies(1)", {}, {1: [0, 1, 2, 3]}),
        ("[0, 0, 3]", {}, {0: [0, 1], 3: [2]}),
    ],
)
def test_adapters_are_in_the_layers_that_a_plan_keeps_or_in_all(
    plan: str, verbatim: dict[int, list[int]], every: dict[int, list[int]]
) -> None:
    """By the global layer that a block stands for."""
    parsed = parse_plan(json.loads(plan) if plan.startswith("[") else plan, 4)
    assert blocks_of(parsed, "verbatim") == verbatim and blocks_of(parsed, "all") == every


@pytest.mark.parametrize("plan", ["ends(1, 3)", "copies(1)"])
def test_an_adapter_of_a_distilled_layer_is_read_in_the_layer_that_it_is_distilled_of(
    plan: str,
) -> None:
    """In the auxiliary model at every depth of it; examples are told apart there as anywhere."""
    model = own("gpt2")
    auxiliary = build_auxiliary(model, parse_plan(plan, 4), None)
    settings = AdapterSettings(rank=2, alpha=8.0, train_first=True)
    blocks = blocks_of(auxiliary.plan, "all")
    client = Adapter(auxiliary, blocks, settings, seed=7)
    server = Adapter(model, global_blocks(blocks), settings, seed=7)
    first, same = client.payload(), server.payload()
    assert all(torch.equal(first[name], same[name]) for name in first)
    moved(client)
    server.load(client.payload())
    linear = "attn.c_attn"
    text = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    for depth, number in enumerate(auxiliary.plan.sources):
        here = model.blocks[number].get_submodule(linear)(text)
        there = auxiliary.blocks[depth].get_submodule(linear)(text)
        torch.testing.assert_close(there, here)
    bare = own("gpt2").blocks[1].get_submodule(linear)(text)
    assert torch.equal(model.blocks[1].get_submodule(linear)(text), bare) == (1 not in blocks)
    examples_are_told_apart(auxiliary, client, batch())


@pytest.mark.parametrize("train_first", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_examples_are_those_of_a_loop(family: str, train_first: bool) -> None:
    model = own(family)
    mine = adapter(model, train_first=train_first)
    moved(mine)
    examples_are_told_apart(model, mine, batch())


def examples_are_told_apart(model: PromptedLM, mine: Adapter, some: Batch) -> None:
    losses, rows = example_gradients(model, mine, some)
    assert rows.shape == (4, sum(one.numel() for one in mine.trained().values()))
    for index in range(4):
        alone = one_of(some, index)
        parameters = [one.requires_grad_(True) for one in mine.trained().values()]
        loss = answer_loss(model, None, alone)
        found = torch.autograd.grad(loss, parameters)
        close(losses[index], loss.detach())
        close(rows[index], torch.cat([part.flatten() for part in found]))


def test_a_prompt_and_an_adapter_are_told_apart_together() -> None:
    model = own("llama")
    spec = PromptSpec(space="residual", length=3, model=model.shape)
    prompt = SoftPrompt(spec, torch.randn(spec.shape, generator=torch.Generator().manual_seed(2)))
    both = PromptAndAdapter(prompt, adapter(model))
    moved(both)
    assert sorted(both.payload()) == list(both.payload()) and PROMPT in both.payload()
    some = batch()
    losses, rows = example_gradients(model, both, some)
    for index in range(4):
        alone = one_of(some, index)
        parameters = [one.requires_grad_(True) for one in both.trained().values()]
        loss = answer_loss(model, both.prefix(model), alone)
        close(losses[index], loss.detach())
        found = torch.autograd.grad(loss, parameters)
        close(rows[index], torch.cat([part.flatten() for part in found]))


def most_that_one_moves(model: PromptedLM, mine: Adapter) -> float:
    """How far leaving out one of eight examples moves a clipped sum, in units of the bound."""
    together = examples_together(model, mine, 40)
    drawn = torch.randint(3, 97, (8, 12), generator=torch.Generator().manual_seed(5)).tolist()
    lot = [Encoded(tuple(row[: 6 + place % 7]), 3) for place, row in enumerate(drawn)]
    quiet = PrivateSteps(bound=1e-2, noise_multiplier=0.0, sampling_rate=1.0, count=1)
    whole, *without = (
        private_gradient(model, mine, some, 1, quiet, together).double()
        for some in (lot, *(lot[:out] + lot[out + 1 :] for out in range(8)))
    )
    return max(float((whole - rest).norm()) for rest in without) / 1e-2


@pytest.mark.parametrize("train_first", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gemma2"])
def test_one_example_moves_a_clipped_sum_by_the_bound_at_most(
    family: str, train_first: bool
) -> None:
    """All tensors are clipped together: each by itself would let one example move their sum by
    more."""
    model = own(family)
    mine = adapter(model, train_first=train_first)
    moved(mine)
    assert 0.5 < most_that_one_moves(model, mine) <= 1.0005


def test_broken_private_builds_of_an_adapter_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without clipping; and with each tensor clipped by itself."""
    model = own("gpt2")
    mine = adapter(model)
    moved(mine)
    clipped = clipped_sum
    with monkeypatch.context() as broken:
        broken.setattr(dp_sgd, "clipped_sum", lambda rows, bound: rows.double().sum(dim=0))
        assert most_that_one_moves(model, mine) > 2.0
    sizes = [one.numel() for one in mine.trained().values()]

    def each_by_itself(rows: Tensor, bound: float) -> Tensor:
        return torch.cat([clipped(part, bound) for part in torch.split(rows, sizes, dim=1)])

    monkeypatch.setattr(dp_sgd, "clipped_sum", each_by_itself)
    assert most_that_one_moves(model, mine) > 2.0


def test_what_reads_examples_in_another_form_is_refused() -> None:
    """Rows that a module has flattened would take each other's copies."""
    model = own("gpt2")
    mine = adapter(model)
    linear = torch.nn.Linear(4, 4)
    first = torch.zeros(2, 4)
    from fedsp.models.adapter import LowRank

    update = LowRank(linear, first, 1.0)
    linear.register_forward_hook(update)
    update.copies = {"B": torch.zeros(3, 4, 2)}
    with pytest.raises(PrivacyError, match=r"name other modules in messenger\.targets"):
        linear(torch.zeros(7, 4))
    assert mine.updates


def test_what_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"messenger\.targets: gpt2 has no linear module named q"):
        adapter(own("gpt2"), targets=["q"])
    assert set(adapter(own("gpt2"), targets=["c_proj"]).updates) == {
        f"layers.{layer:03d}.{part}.c_proj" for layer in DEPTHS for part in ("attn", "mlp")
    }
    for changes, match in (
        ({"auxiliary": {"plan": "shared(0)"}}, r"messenger\.kind: 'adapter' lives in layers"),
        ({"client": {"auxiliary_steps": 1, "prompt_steps": 1}}, r"client\.auxiliary_steps: alt"),
        ({"method": "fedprompt"}, r"messenger\.kind: needs method = 'fedsp'"),
        (
            {"messenger": {"kind": "layers", "layers": "all"}},
            r"messenger\.layers: 'all' is for 'adapter' or 'prompt\+adapter', and .* is 'layers'",
        ),
    ):
        with pytest.raises(ConfigurationError, match=match):
            commands.run(settings(tmp_path, **{"messenger": {"kind": "adapter"}, **changes}))
    private = {"unit": "example", "epsilon": 8.0}
    with pytest.raises(
        ConfigurationError, match="'layers' does not give; take 'prompt', 'adapter' or"
    ):
        commands.run(settings(tmp_path, messenger={"kind": "layers"}, privacy=private))


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        ("adapter", "verbatim"),
        ("adapter", "all"),
        ("layers", "verbatim"),
        ("prompt+adapter", "all"),
    ],
)
def test_the_plan_says_what_travels(kind: str, which: Any) -> None:
    values: dict[str, Any] = {
        "model": {"name": "embedded"},
        "data": {},
        "auxiliary": {"plan": "ends(1)"},
        "prompt": {"length": 4, "init": "normal"},
        "messenger": {"kind": kind, "layers": which, "rank": 3, "train_first": kind == "adapter"},
        "distill": {"text": ["x"]},
    }
    from fedsp.experiments.embedded import EMBEDDED
    from fedsp.models.loading import load_model

    model = load_model(str(EMBEDDED / "model"), device="cpu")
    config = make_config(values)
    spec = PromptSpec(space="residual", length=4, model=model.shape)
    messenger = make_messenger(
        Place(
            model=model,
            blocks=global_blocks(blocks_of(parse_plan("ends(1)", 8), which)),
            prompt=lambda: SoftPrompt(spec),
            settings=config.messenger.model_dump(),
            seed=0,
        )
    )
    plan = make_plan(config, 3)
    payload = messenger.payload()
    assert plan["messenger_parameters"] == sum(one.numel() for one in payload.values())
    assert plan["bytes_per_message"] == len(pack(payload))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_an_input_prompt_is_pefts_prompt_tuning(family: str, tmp_path: Path) -> None:
    """The exported prompt gives the same logits, its gradients are those of a loop, and it comes
    back."""
    peft = pytest.importorskip("peft", reason="PEFT comes with the study extra")
    model = own(family)
    spec = PromptSpec(space="input", length=3, model=model.shape)
    values = torch.randn(spec.shape, generator=torch.Generator().manual_seed(2))
    prompt = SoftPrompt(spec, values)
    prompt.export(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_causal_lm(family), tmp_path)
    some = batch()
    real = some.attention_mask.bool()
    hidden = model.read_padded(some.input_ids, some.attention_mask, prompt.prefix(model))
    with torch.no_grad():
        expected = theirs(input_ids=some.input_ids, attention_mask=some.attention_mask).logits
    close(model.logits(hidden)[real].detach(), expected[:, 3:][real].float())
    losses, rows = example_gradients(model, prompt, some)
    assert rows.shape == (4, 3, model.shape.hidden)
    for index in range(4):
        loss = answer_loss(model, prompt.prefix(model), one_of(some, index))
        (found,) = torch.autograd.grad(loss, prompt.direct)
        close(losses[index], loss.detach())
        close(rows[index], found)
    assert torch.equal(import_peft(tmp_path, model).values(), values)


def test_what_a_plan_says_of_a_run_is_what_it_costs(tmp_path: Path) -> None:
    """With one client alone, clients that judge, layers whose weights are trained, and the last
    layers alone, whose backward pass ends early."""
    judged = {"validation": {"by": "clients"}, "round": {"rounds": 2, "min_clients": 1}}
    changes: dict[str, dict[str, Any]] = {
        "only": {"round": {"rounds": 2, "only": "client-1", "min_clients": 1}},
        "judged": judged,
        "layers": {"messenger": {"kind": "layers"}, "server": {"steps": 1, "batch_size": 4}},
        "tail": {
            "auxiliary": {"plan": "tail(2, 1)"},
            "messenger": {"kind": "adapter"},
            "server": {"steps": 1, "batch_size": 4},
        },
        "alone": {"round": {"rounds": 2, "clients": 0}, "server": {"steps": 1, "batch_size": 4}},
    }
    for name, change in changes.items():
        values = settings(tmp_path / name, **{"messenger": {"kind": "adapter"}, **change})
        del values["prompt"]
        planned = plan_run(make_config(values))
        run = commands.run(values)
        sent = run["bytes_up"] + run["bytes_down"]
        assert planned["bytes_in_all"] == pytest.approx(sent, rel=0.01), name
        assert planned["package_bytes"] == pytest.approx(run["package_bytes"], rel=0.01), name
        assert planned["disclosed_share"] == pytest.approx(run["disclosed_share"], abs=1e-3), name


@pytest.mark.parametrize(
    ("plan", "kind", "side", "share"),
    [
        ("emulator(2, 2)", "adapter", "client", (2.0, 2.0)),
        ("emulator(2, 2)", "layers", "client", (2.0, 3.0)),
        ("tail(2, 1)", "adapter", "server", (1.0, 1.5)),
        ("tail(2, 1)", "adapter", "client", (1.0, 2.0)),
    ],
)
def test_a_backward_pass_is_planned_as_far_as_it_goes(
    plan: str, kind: str, side: str, share: tuple[float, float], tmp_path: Path
) -> None:
    """In forward passes of a prompt's step, which are two."""
    values = settings(tmp_path, auxiliary={"plan": plan}, messenger={"kind": kind})
    values["server"] = {"steps": 1, "batch_size": 4}
    del values["prompt"]
    key = "client_operations_prompt" if side == "client" else "server_operations"
    planned = make_plan(make_config(values), 3)[key]
    whole = settings(tmp_path, auxiliary={"plan": plan}, messenger={"kind": "prompt"})
    whole["server"] = values["server"]
    whole["prompt"] = {"length": 1}
    forward = make_plan(make_config(whole), 3)[key] / 2
    assert share[0] - 0.1 <= planned / forward <= share[1] + 0.1


def test_a_rule_that_one_client_cannot_keep_is_refused_before_anything_is_made(
    tmp_path: Path,
) -> None:
    values = settings(
        tmp_path,
        round={"rounds": 1, "only": "client-1", "min_clients": 1, "weighting": "uniform"},
        aggregation={"rule": "krum", "malicious": 1},
    )
    with pytest.raises(TooFewClients):
        plan_run(make_config(values))
    said: list[str] = []
    with pytest.raises(TooFewClients):
        commands.run(values, callbacks=Callbacks(info=said.append))
    assert not any("distill" in text for text in said)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"name": "embedded", "precision": "bfloat16"}},
        {"model": {"name": "embedded", "precision": "8bit"}, "auxiliary": {"folder": "there"}},
        {"auxiliary": {"precision": "bfloat16"}},
        {"auxiliary": {"precision": "4bit"}},
    ],
)
def test_layers_are_trained_in_float32_or_not_at_all(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small steps vanish in rounded weights; and where a GPU would round them by default, a server
    does not."""
    layers = {"messenger": {"kind": "layers"}}
    with pytest.raises(ConfigurationError, match=r"precision: messenger.kind = 'layers' trains"):
        make_config(settings(tmp_path, **layers, **change))
    adapters = settings(tmp_path, messenger={"kind": "adapter"}, **change)
    del adapters["prompt"]
    make_config(adapters)
    loaded: list[str] = []

    def load(name: str, *, precision: str, **how: Any) -> Any:
        loaded.append(precision)
        raise KeyboardInterrupt

    monkeypatch.setattr("fedsp.experiments.server_setup.load_model", load)
    for kind, expected in (("layers", "float32"), ("adapter", "auto")):
        values = settings(tmp_path, messenger={"kind": kind})
        del values["prompt"]
        with pytest.raises(KeyboardInterrupt):
            open_server(make_config(values), lambda: None)  # type: ignore[arg-type,return-value]
        assert loaded.pop() == expected
