"""One step of each baseline against an independent computation: PEFT for LoRA and prefix-tuning,
loops over transformers' own models for the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from fedsp.data.encoding import Encoded
from fedsp.federation.aggregation.mean import weighted_mean
from fedsp.federation.messages import Request
from fedsp.federation.methods.base import Averaging
from fedsp.federation.methods.fedprompt_single import reading_one_layer
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.models.adapter import global_blocks
from fedsp.models.auxiliary import build_auxiliary, parse_plan
from fedsp.models.messengers.making import blocks_of, layer_weights
from fedsp.models.payload import PROMPT, Payload
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.models.trainable import Messenger, trainable
from fedsp.models.weights import Weights
from fedsp.training.loop import Optimisation
from fedsp.training.stage import Stage, validation_loss
from support.tiny_models import tiny_model

RATE, DECAY, LENGTH = 1e-2, 0.01, 3
ONE_STEP = Stage(
    name="client",
    seed_label="client",
    steps=1,
    batch_size=4,
    optimisation=Optimisation(learning_rate=RATE, weight_decay=DECAY, warmup=0.0, total_steps=0),
)
NOTHING = replace(ONE_STEP, steps=0)


def rows(seed: int, count: int = 4) -> list[Encoded]:
    """Rows of different length; all of them make one batch."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Encoded(tuple(torch.randint(1, 97, (8 + index,), generator=generator).tolist()), 4)
        for index in range(count)
    ]


def reference_loss(
    model: nn.Module, examples: Iterable[Encoded], prefix: Tensor | None = None
) -> Tensor:
    """The mean cross-entropy over answer tokens, by transformers' own forward pass on one row at a
    time, tokens behind the prefix."""
    losses = []
    for row in examples:
        ids = torch.tensor([row.ids])
        cache = None
        if prefix is not None:
            cache = DynamicCache(
                [
                    (layer[0][None].transpose(1, 2), layer[1][None].transpose(1, 2))
                    for layer in prefix.permute(1, 2, 0, 3, 4)
                ]
            )
        logits = model(input_ids=ids, past_key_values=cache).logits[0]
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[row.start - 1 : -1], ids[0, row.start :], reduction="none"
            )
        )
    return torch.cat(losses).mean()


def reference_step(parameters: Mapping[str, nn.Parameter], loss: Callable[[], Tensor]) -> Payload:
    """The parameters after one step of torch's AdamW; NaN where the gradient is no more than
    rounding (the bias of keys, by the softmax), of which AdamW's first step keeps the sign alone.
    """
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=DECAY)
    loss().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    gradients = {
        name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None
    }
    return {
        name: parameter.detach().masked_fill(gradients[name].abs() < 1e-6, float("nan"))
        for name, parameter in parameters.items()
    }


def one_round(
    method: Averaging, model: PromptedLM, tuned: Messenger, place: Path
) -> tuple[Payload, list[Payload]]:
    """What two clients of different size answer to what is there, and its weighted mean."""
    sent = tuned.payload()
    answers = []
    for index in range(2):
        client = Party(
            id=f"c{index}",
            model=model,
            messenger=tuned,
            examples=rows(index),
            store=StateStore(place / str(index)),
        )
        answers.append(
            method.client_update(
                client, Request(run="run", round=1, client=client.id, seed=0, payload=sent)
            ).payload
        )
    return weighted_mean({"c0": answers[0], "c1": answers[1]}, {"c0": 1.0, "c1": 3.0}), answers


def close(found: Payload, expected: Payload) -> None:
    assert sorted(found) == sorted(expected)
    compared = 0
    for name, tensor in found.items():
        known = ~expected[name].isnan()
        compared += int(known.sum())
        torch.testing.assert_close(tensor[known], expected[name][known], rtol=1e-5, atol=1e-5)
    assert compared > 0.5 * sum(tensor.numel() for tensor in found.values())


def mean_of(answers: list[Payload]) -> Payload:
    return {name: 0.25 * answers[0][name] + 0.75 * answers[1][name] for name in answers[0]}


def moved(one: Payload, other: Payload) -> bool:
    return all(not torch.allclose(one[name], other[name], atol=1e-4) for name in one)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_finetune_takes_torchs_step_on_all_weights_and_averages_them(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    start = copy.deepcopy(model.model)
    expected = []
    for index in range(2):
        plain = copy.deepcopy(start)
        expected.append(
            reference_step(
                dict(plain.named_parameters()),
                lambda plain=plain, index=index: reference_loss(plain, rows(index)),  # type: ignore[misc]
            )
        )
    mean, answers = one_round(
        Averaging(client_stage=ONE_STEP, server_stage=NOTHING),
        model,
        Weights(model.trained()),
        tmp_path,
    )
    close(answers[0], expected[0])
    close(mean, mean_of(expected))
    assert not torch.equal(
        answers[0]["lm_head.weight" if family == "llama" else "transformer.wte.weight"],
        start.get_output_embeddings().weight,
    )


@pytest.mark.parametrize("space", ["key_value", "residual"])
def test_fedprompt_tunes_the_prompt_through_the_frozen_model(space: Any, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    spec = PromptSpec(space=space, length=LENGTH, model=model.shape)
    prompt = SoftPrompt(
        spec, torch.randn(spec.shape, generator=torch.Generator().manual_seed(5)) * 0.3
    )

    def keys_and_values(inputs: Tensor) -> Tensor:
        """GPT-2's own norm and projection of each block's input (P, L, D)."""
        layers = []
        for layer, block in enumerate(model.model.transformer.h):
            _, keys, values = block.attn.c_attn(block.ln_1(inputs[:, layer])).split(32, dim=-1)
            layers.append(torch.stack([keys, values], dim=1).view(LENGTH, 2, 4, 8))
        return torch.stack(layers, dim=1)

    start, before = prompt.values().detach().clone(), copy.deepcopy(model.model.state_dict())
    expand: Callable[[Tensor], Tensor] = (
        keys_and_values if space == "residual" else lambda values: values
    )
    expected = [prompt_step(model.model, start, rows(index), expand) for index in range(2)]
    mean, answers = one_round(
        Averaging(client_stage=ONE_STEP, server_stage=NOTHING), model, prompt, tmp_path
    )
    close(answers[1], {PROMPT: expected[1]})
    close(mean, {PROMPT: 0.25 * expected[0] + 0.75 * expected[1]})
    assert all(
        torch.equal(before[name], tensor) for name, tensor in model.model.state_dict().items()
    )


def random_prompt(model: PromptedLM, length: int) -> SoftPrompt:
    spec = PromptSpec(space="key_value", length=length, model=model.prompt_shape)
    return SoftPrompt(
        spec, torch.randn(spec.shape, generator=torch.Generator().manual_seed(5)) * 0.3
    )


def prompt_step(
    model: nn.Module,
    start: Tensor,
    examples: list[Encoded],
    expand: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    values = nn.Parameter(start.clone())
    return reference_step(
        {"values": values}, lambda: reference_loss(model, examples, expand(values))
    )["values"]


def test_fedprompt_single_tunes_one_layer_that_every_layer_of_the_global_model_reads(
    tmp_path: Path,
) -> None:
    whole = tiny_model("gpt2")
    one = reading_one_layer(whole)
    small = build_auxiliary(whole, parse_plan([0], 4), None)
    small.prompt_shape = one.prompt_shape
    prompt = random_prompt(one, LENGTH)
    start = prompt.values().detach().clone()
    assert start.shape[1] == 1
    config = copy.deepcopy(whole.model.config)
    config.n_layer = 1
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(
        {
            name: tensor
            for name, tensor in whole.model.state_dict().items()
            if ".h." not in name or ".h.0." in name
        }
    )
    plain.eval()
    expected = [prompt_step(plain, start, rows(index)) for index in range(2)]
    mean, answers = one_round(
        Averaging(client_stage=ONE_STEP, server_stage=ONE_STEP), small, prompt, tmp_path
    )
    close(answers[0], {PROMPT: expected[0]})
    close(mean, {PROMPT: 0.25 * expected[0] + 0.75 * expected[1]})
    server = Party(
        id="server",
        model=one,
        messenger=random_prompt(one, LENGTH),
        examples=rows(9),
        store=StateStore(tmp_path / "server"),
    )
    after, _ = Averaging(client_stage=ONE_STEP, server_stage=ONE_STEP).server_update(
        server, mean, 1, 0
    )
    expand: Callable[[Tensor], Tensor] = lambda values: values.expand(-1, 4, -1, -1, -1)
    close(after, {PROMPT: prompt_step(whole.model, mean[PROMPT], rows(9), expand)})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prefix_tuning_is_pefts(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT comes with the study extra")
    model = tiny_model(family)
    shape = model.shape
    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=LENGTH,
        num_layers=shape.layers,
        num_attention_heads=shape.heads,
        token_dim=shape.heads * shape.head_size,
    )
    theirs = peft.get_peft_model(copy.deepcopy(model.model), settings).eval()
    embedding = theirs.prompt_encoder["default"].embedding
    prompt = random_prompt(model, LENGTH)
    with torch.no_grad():
        embedding.weight.copy_(prompt.values().reshape(LENGTH, -1))
    width = max(len(row.ids) for row in rows(0))
    ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows(0)])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows(0)])
    labels = torch.tensor(
        [
            [*[-100] * row.start, *row.ids[row.start :], *[-100] * (width - len(row.ids))]
            for row in rows(0)
        ]
    )
    expected = reference_step(
        {"weight": embedding.weight},
        lambda: theirs(input_ids=ids, attention_mask=mask, labels=labels).loss,
    )
    server = Party(
        id="server", model=model, messenger=prompt, examples=rows(0), store=StateStore(tmp_path)
    )
    after, loss = Averaging(client_stage=NOTHING, server_stage=ONE_STEP).server_update(
        server, prompt.payload(), 1, 0
    )
    assert loss is not None
    close(after, {PROMPT: expected["weight"].view(after[PROMPT].shape)})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_federated_lora_is_pefts_lora_averaged(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT comes with the study extra")
    from fedsp.models.messengers.peft_adapters import PeftAdapters

    model = tiny_model(family)
    start = copy.deepcopy(model.model)
    tuned = PeftAdapters(model, rank=2, alpha=8.0, targets=[], seed=3)
    first = tuned.payload()
    with torch.no_grad():
        first = {
            name: (
                tensor
                + 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
            )
            for name, tensor in first.items()
        }
    tuned.load(first)
    expected = []
    for index in range(2):
        theirs = peft.get_peft_model(
            copy.deepcopy(start),
            peft.LoraConfig(r=2, lora_alpha=8.0, lora_dropout=0.0, task_type="CAUSAL_LM"),
        ).eval()
        parameters = {
            name.removeprefix("base_model.model.").replace(".default", ""): parameter
            for name, parameter in theirs.named_parameters()
            if "lora_" in name
        }
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(first[name.replace(".weight", ".default.weight")])
        stepped = reference_step(
            parameters,
            lambda theirs=theirs, index=index: reference_loss(theirs, rows(index)),  # type: ignore[misc]
        )
        expected.append(
            {name.replace(".weight", ".default.weight"): tensor for name, tensor in stepped.items()}
        )
    mean, answers = one_round(
        Averaging(client_stage=ONE_STEP, server_stage=NOTHING), model, tuned, tmp_path
    )
    close(answers[0], expected[0])
    close(mean, mean_of(expected))
    base = dict(start.named_parameters())
    kept = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in model.model.named_parameters()
        if ".lora_" not in name
    }
    assert all(torch.equal(kept[name], parameter) for name, parameter in base.items())


def test_offsite_tuning_tunes_the_outer_layers_through_an_emulator_and_plugs_them_back(
    tmp_path: Path,
) -> None:
    whole = tiny_model("gpt2")
    plan = parse_plan("emulator(1, 1)", 4)
    assert plan.sources == (0, 2, 3) and plan.frozen == (True, False, True)
    emulator = build_auxiliary(whole, plan, None)
    config = copy.deepcopy(whole.model.config)
    config.n_layer = 3
    names = {source: depth for depth, source in enumerate(plan.sources)}
    state = {}
    for name, tensor in whole.model.state_dict().items():
        layer = int(name.split(".")[2]) if ".h." in name else None
        if layer is None or layer in names:
            state[
                name if layer is None else name.replace(f".h.{layer}.", f".h.{names[layer]}.")
            ] = tensor
    expected = []
    for index in range(2):
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(state)
        plain.eval().requires_grad_(False)
        outer = {
            name: parameter
            for name, parameter in plain.named_parameters()
            if ".h.0." in name or ".h.2." in name
        }
        stepped = reference_step(
            outer,
            lambda plain=plain, index=index: reference_loss(plain, rows(index)),  # type: ignore[misc]
        )
        expected.append(
            {
                name.replace("transformer.h.0.", "layers.000.").replace(
                    "transformer.h.2.", "layers.003."
                ): tensor
                for name, tensor in stepped.items()
            }
        )
    tuned = layer_weights(emulator, blocks_of(emulator.plan, "verbatim"))
    mean, answers = one_round(
        Averaging(client_stage=ONE_STEP, server_stage=NOTHING), emulator, tuned, tmp_path
    )
    close(answers[0], expected[0])
    close(mean, mean_of(expected))
    plugged = copy.deepcopy(whole.model)
    plugged.load_state_dict(
        {
            **whole.model.state_dict(),
            **{
                name.replace("layers.000.", "transformer.h.0.").replace(
                    "layers.003.", "transformer.h.3."
                ): t
                for name, t in mean.items()
            },
        }
    )
    layer_weights(whole, global_blocks([0, 3])).load(mean)
    server = Party(
        id="server",
        model=whole,
        messenger=layer_weights(whole, global_blocks([0, 3])),
        examples=rows(9),
        store=StateStore(tmp_path),
    )
    assert validation_loss(server.model, server.messenger, rows(9)) == pytest.approx(
        float(reference_loss(plugged, rows(9)).detach()), abs=1e-5
    )


def test_zero_shot_sends_nothing_and_is_the_model_itself(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    server = Party(
        id="server",
        model=model,
        messenger=Weights({}),
        examples=rows(9),
        store=StateStore(tmp_path),
    )
    assert Averaging(client_stage=NOTHING, server_stage=NOTHING).init(server) == {} and Averaging(
        client_stage=NOTHING, server_stage=NOTHING
    ).server_update(server, {}, 1, 0) == ({}, None)
    assert (
        Averaging(client_stage=NOTHING, server_stage=NOTHING)
        .client_update(server, Request(run="run", round=1, client="a", seed=0, payload={}))
        .payload
        == {}
    )
    assert validation_loss(server.model, server.messenger, rows(9)) == pytest.approx(
        float(reference_loss(model.model, rows(9)).detach()), abs=1e-5
    )


def test_fedprox_adds_half_mu_times_the_squared_distance(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    prompt = random_prompt(model, LENGTH)
    sent = prompt.payload()
    values = nn.Parameter(sent[PROMPT].clone())
    optimizer = torch.optim.AdamW([values], lr=RATE, weight_decay=DECAY)
    for _ in range(2):
        optimizer.zero_grad()
        loss = (
            reference_loss(model.model, rows(0), values)
            + 0.7 / 2 * (values - sent[PROMPT]).square().sum()
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    client = Party(
        id="a", model=model, messenger=prompt, examples=rows(0), store=StateStore(tmp_path)
    )
    method = Averaging(
        client_stage=Stage(
            name="client",
            seed_label="client",
            steps=2,
            batch_size=4,
            optimisation=Optimisation(
                learning_rate=RATE, weight_decay=DECAY, warmup=0.0, total_steps=0
            ),
            proximal=0.7,
        ),
        server_stage=NOTHING,
    )
    close(
        method.client_update(
            client, Request(run="run", round=1, client="a", seed=0, payload=sent)
        ).payload,
        {PROMPT: values.detach()},
    )
    without = Averaging(
        client_stage=Stage(
            name="client",
            seed_label="client",
            steps=2,
            batch_size=4,
            optimisation=Optimisation(
                learning_rate=RATE, weight_decay=DECAY, warmup=0.0, total_steps=0
            ),
        ),
        server_stage=NOTHING,
    )
    assert not torch.allclose(
        without.client_update(
            client, Request(run="run", round=1, client="a", seed=0, payload=sent)
        ).payload[PROMPT],
        values.detach(),
        atol=1e-5,
    )


def test_weights_refuse_what_is_not_theirs() -> None:
    from fedsp.errors import PayloadError

    weights = Weights(tiny_model("gpt2").trained())
    sent = weights.payload()
    with pytest.raises(PayloadError, match="expected exactly"):
        weights.load({**sent, "more": torch.zeros(1)})
    name = next(iter(sent))
    with pytest.raises(PayloadError, match="has shape"):
        weights.load({**sent, name: torch.zeros(2)})
    with pytest.raises(PayloadError, match="not finite"):
        weights.load({**sent, name: sent[name] * float("nan")})
    assert len(trainable(tiny_model("gpt2").model)) == len(sent)
