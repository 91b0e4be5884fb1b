"""Soft prompts in both spaces, on every family, against the model itself and against PEFT."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, MambaConfig, T5Config
from transformers.activations import NewGELUActivation

from fedsp.data.batching import pack, pad
from fedsp.errors import ModelError, PayloadError, PromptError
from fedsp.models.loading import load_model, require_vocabulary
from fedsp.models.payload import PROMPT, check
from fedsp.models.prompted_lm import ModelShape, PromptedLM, hidden_at_depths
from fedsp.models.soft_prompt import (
    PromptSpec,
    SoftPrompt,
    import_peft,
    initial_values,
    read_prompt,
)
from support.tiny_families import LONG_ROPE, tiny_causal_lm
from support.tiny_models import FAMILIES, tiny_model
from support.tokenizers_made import bpe

TOKENS = torch.tensor([[5, 9, 33, 8, 71, 2, 60]])


def random_prompt(
    model: PromptedLM, space: str, length: int = 3, projection: int = 0
) -> SoftPrompt:
    spec = PromptSpec(space=space, length=length, model=model.shape, projection=projection)  # type: ignore[arg-type]
    return SoftPrompt(spec, torch.randn(spec.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("space", ["key_value", "residual"])
def test_activations_as_a_prompt_are_the_text_itself(family: str, space: str) -> None:
    """A prompt made of the activations of some tokens must act exactly like those tokens:
    positions, rotations and masks included."""
    model = tiny_model(family)
    length = 3
    spec = PromptSpec(space=space, length=length, model=model.shape)  # type: ignore[arg-type]
    prompt = SoftPrompt(spec, initial_values(spec, model, scale=None, tokens=TOKENS[0], seed=0))
    with torch.no_grad():
        whole = model(TOKENS)[:, length:]
        behind = model(TOKENS[:, length:], None, prompt.prefix(model))
    torch.testing.assert_close(behind, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("space", ["key_value", "residual"])
def test_gradients_reach_every_layer(family: str, space: str) -> None:
    model = tiny_model(family)
    prompt = random_prompt(model, space)
    model.logits(model(TOKENS, None, prompt.prefix(model)))[0, -1, 3].backward()  # type: ignore[no-untyped-call]
    assert prompt.direct.grad is not None
    assert (
        prompt.direct.grad.abs().amax(dim=tuple(d for d in range(prompt.direct.dim()) if d != 1))
        > 0
    ).all()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["hugging_face", "from_zero"])
@pytest.mark.parametrize("space", ["key_value", "residual"])
def test_rows_side_by_side_are_rows_by_themselves(family: str, positions: str, space: str) -> None:
    """States and the prompt's gradient, of four rows in two; padding costs nothing, and a prompt of
    each row's own is read row by row."""
    model = tiny_model(family, positions=positions)
    prompt = random_prompt(model, space)
    padded = pad([[5, 9, 33, 8, 71, 2, 60], [7], [4, 3, 9], [8, 8, 2]], model.device)
    real = padded.mask.bool()
    read: list[int] = []
    model.backbone.register_forward_pre_hook(
        lambda *seen: read.append(seen[2]["input_ids"].numel()), with_kwargs=True
    )
    assert model.packs_branches
    found = []
    for rows in (model, model.read_padded):
        prompt.zero_grad()
        read.clear()
        states = rows(*padded, prompt.prefix(model))[real]
        (states * torch.arange(states.numel()).view_as(states).cos()).sum().backward()
        assert prompt.direct.grad is not None
        found.append((read[-1], states.detach(), prompt.direct.grad.clone()))
    assert [cells for cells, *_ in found] == [14, 28]
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    model(*padded, prompt.prefix(model)[None].expand(4, *prompt.prefix(model).shape))
    assert read[-1] == 28


def triangle(length: int) -> int:
    return length * (length + 1) // 2


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5000), st.integers(0, 60)
)
def test_packed_rows_hold_every_token_once(lengths: list[int], weight: int, more: int) -> None:
    rows = [[100 * row + place for place in range(length)] for row, length in enumerate(lengths)]
    padded = pad(rows, torch.device("cpu"))
    packed, cells = pack(padded, weight=weight, room=max(lengths) + more)
    real = padded.mask.bool()
    assert torch.equal(packed.ids.flatten()[cells][real], padded.ids[real])
    assert len(set(cells[real].tolist())) == sum(lengths)
    padding = packed.ids.numel() - sum(lengths)  # sees itself alone, and each token its own row
    assert int(packed.seen().sum()) == sum(map(triangle, lengths)) + padding
    assert torch.equal(packed.positions.flatten()[cells][real], padded.ids[real] % 100)
    count, width = packed.ids.shape
    assert width <= max(lengths) + more
    assert count * width * (weight + width) <= len(lengths) * max(lengths) * (
        weight + max(lengths)
    ), "never dearer than padding"


def test_gelu_is_one_operation() -> None:
    """GPT-2's own form of it is replaced when a model is opened, and computes the same."""
    torch.manual_seed(0)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(FAMILIES["gpt2"], dtype=torch.float32).eval()
        before = model(TOKENS).logits
        assert any(isinstance(module, NewGELUActivation) for module in model.modules())
        opened = PromptedLM(model, "gpt2")
        assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
        torch.testing.assert_close(opened.logits(opened(TOKENS)), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_gives_the_same_logits_in_peft(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT comes with the eval extra")
    model = tiny_model(family)
    model.model.save_pretrained(tmp_path / "model")
    prompt = random_prompt(model, "residual")
    prompt.export(model, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    mask = torch.ones_like(TOKENS)
    with torch.no_grad():
        ours = model.logits(model(TOKENS, mask, prompt.prefix(model)))
        theirs = adapted(input_ids=TOKENS, attention_mask=mask).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        generated = adapted.generate(
            input_ids=TOKENS,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert generated[0, TOKENS.shape[1] :].tolist() == model.generate(
            TOKENS[0], prompt.prefix(model), most=5
        )
    back = import_peft(tmp_path / "adapter", model)
    with torch.no_grad():
        torch.testing.assert_close(back.values(), prompt.prefix(model))


def test_export_refuses_positions_that_peft_does_not_know(tmp_path: Path) -> None:
    model = tiny_model("gpt2", positions="from_zero")
    with pytest.raises(PromptError, match="from_zero"):
        random_prompt(model, "key_value").export(model, tmp_path)


def test_a_projection_takes_up_trains_and_folds() -> None:
    model = tiny_model("gpt2")
    plain, projected = (
        random_prompt(model, "key_value"),
        random_prompt(model, "key_value", projection=16),
    )
    torch.testing.assert_close(projected.values(), plain.values(), rtol=1e-6, atol=1e-6)
    assert set(dict(projected.named_parameters())) == {
        "embedding",
        "projection.0.weight",
        "projection.0.bias",
        "projection.2.weight",
        "projection.2.bias",
    }
    optimizer = torch.optim.SGD(projected.parameters(), lr=0.1)
    model.logits(model(TOKENS, None, projected.prefix(model)))[0, -1, 3].backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    folded = projected.payload()
    assert list(folded) == [PROMPT] and not torch.equal(folded[PROMPT], plain.values())
    plain.load(folded)
    with torch.no_grad():
        torch.testing.assert_close(plain.prefix(model), projected.prefix(model))


def test_a_long_rope_generates_as_hugging_face_does_and_reads_each_row_by_itself() -> None:
    reference, model = (
        tiny_causal_lm("phi3", **LONG_ROPE),
        PromptedLM(tiny_causal_lm("phi3", **LONG_ROPE), "phi3"),
    )
    row = list(range(5, 17))
    theirs = reference.generate(
        torch.tensor([row]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert model.generate(torch.tensor(row), None, most=12) == theirs[0, len(row) :].tolist()
    rows = [list(range(5, 25)), [7, 8, 9], list(range(40, 57)), list(range(60, 76))]
    padded = pad(rows, model.device)
    depths = hidden_at_depths(model, *padded)
    with torch.no_grad():
        for states in (model(*padded), model.read_padded(*padded), depths[-1]):
            for found, alone in zip(model.logits(states), rows, strict=True):
                expected = reference(input_ids=torch.tensor([alone]), use_cache=False).logits[0]
                torch.testing.assert_close(found[: len(alone)], expected, rtol=1e-3, atol=1e-4)
        for place, row in enumerate(rows):
            for state, alone_state in zip(
                depths,
                hidden_at_depths(
                    model, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)
                ),
                strict=True,
            ):
                torch.testing.assert_close(
                    state[place, : len(row)], alone_state[0], rtol=1e-3, atol=1e-4
                )


def test_dynamic_rotations_end_the_room_where_every_length_has_its_own() -> None:
    """Hugging Face scales above `max_position_embeddings`, whatever the original length is said to
    be."""
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
    }
    reference, model = (
        tiny_causal_lm("llama", rope_parameters=rope),
        PromptedLM(tiny_causal_lm("llama", rope_parameters=rope), "llama"),
    )
    assert model.max_positions == 128
    with torch.no_grad():
        rows = torch.arange(128)[None] % 90 + 3
        torch.testing.assert_close(
            model.logits(model(rows)), reference(input_ids=rows).logits, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("family", "changes", "room"),
    [
        ("mpt", {"max_seq_len": 40}, 40),
        ("gpt2", {"n_ctx": 40}, 128),
        ("llama", {"max_sequence_length": 40}, 128),
        ("whisper", {"max_target_positions": 48}, 48),
        ("gpt2", {}, 128),
    ],
)
def test_a_model_is_read_as_far_as_it_was_made_for_under_whatever_name(
    family: str, changes: dict[str, Any], room: int
) -> None:
    model = PromptedLM(tiny_causal_lm(family, **changes), family)
    assert model.max_positions == room
    tokens = [3 + place % 90 for place in range(room - 4)]
    assert len(model.generate(torch.tensor(tokens), None, most=50)) == 5, (
        "the last one is read from the last position"
    )


@pytest.mark.parametrize("family", ["mpt", "bloom", "bart"])
def test_positions_from_zero_are_refused_where_they_change_nothing(family: str) -> None:
    with pytest.raises(
        ModelError,
        match=(
            "'from_zero' has no effect on a model .*always counts the prompt .*use 'hugging_face'"
        ),
    ):
        PromptedLM(tiny_causal_lm(family), "a model", positions="from_zero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("cohere", {"logit_scale": 0.0625}),
        ("cohere2", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("vaultgemma", {"final_logit_softcapping": 3.0}),
        ("nanochat", {"final_logit_softcapping": 3.0}),
    ],
)
def test_logits_are_scaled_and_capped_as_the_family_does(
    family: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    reference, model = (
        tiny_causal_lm(family, dtype=dtype, **changes),
        PromptedLM(tiny_causal_lm(family, dtype=dtype, **changes), family),
    )
    with torch.no_grad():
        theirs, ours = (
            reference(input_ids=TOKENS, use_cache=False).logits.float(),
            model.logits(model(TOKENS)),
        )
        bare = model.head(model(TOKENS)).float()
    torch.testing.assert_close(
        ours,
        theirs,
        rtol=1e-3 if dtype == torch.float32 else 0.05,
        atol=0.05 * float(theirs.abs().max()),
    )
    assert not torch.allclose(bare, theirs, rtol=0.1), "the head alone is something else"


def test_layers_are_those_that_read_text_where_pictures_have_as_many() -> None:
    model = PromptedLM(tiny_causal_lm("gemma3"), "gemma3")
    assert len(model.blocks) == 4 and all(
        block in list(model.model.get_decoder().modules()) for block in model.blocks
    )


def test_a_model_that_reads_a_text_otherwise_behind_its_beginning_is_refused() -> None:
    made = tiny_causal_lm("llama")
    forward = made.model.layers[2].forward

    def counts_places(
        hidden: Any, *arguments: Any, past_key_values: Any = None, **named: Any
    ) -> Any:
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        return forward(
            hidden + (0.5 if read == 3 else 0.0),
            *arguments,
            past_key_values=past_key_values,
            **named,
        )

    made.model.layers[2].forward = counts_places
    with pytest.raises(
        ModelError, match="computes other hidden states after cached keys and values"
    ):
        PromptedLM(made, "odd")


def test_files_round_trip(tmp_path: Path) -> None:
    prompt = random_prompt(tiny_model("llama"), "key_value")
    prompt.save(tmp_path / "p.safetensors")
    read = read_prompt(tmp_path / "p.safetensors")
    assert read.spec == prompt.spec and torch.equal(read.values(), prompt.values())


@given(numbers=st.lists(st.floats(width=32), min_size=1, max_size=6))
@example([3.4e38, 3.4e38])  # their sum is infinite
@example([float("inf"), float("-inf")])
def test_a_payload_is_taken_where_every_number_is_finite(numbers: list[float]) -> None:
    payload = {PROMPT: torch.tensor(numbers)}
    wrong = sum(not math.isfinite(number) for number in numbers)
    with (
        pytest.raises(PayloadError, match=f"holds {wrong} numbers that are not finite")
        if wrong
        else nullcontext()
    ):
        check(payload, {PROMPT: (len(numbers),)})


def test_bad_prompts_are_refused_in_a_sentence(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    prompt = random_prompt(model, "key_value")
    other = PromptSpec(
        space="key_value", length=3, model=ModelShape(layers=6, heads=4, head_size=8, hidden=32)
    )
    with pytest.raises(PromptError, match=r"made for 6 layers.*tiny gpt2 has 4 layers"):
        SoftPrompt(other).prefix(model)
    with pytest.raises(PayloadError, match=r"has shape \(2,\), expected \(3, 4, 2, 4, 8\)"):
        prompt.load({PROMPT: torch.zeros(2)})
    with pytest.raises(PayloadError, match="not finite"):
        prompt.load({PROMPT: torch.full(prompt.spec.shape, float("nan"))})
    with pytest.raises(PayloadError, match="names"):
        prompt.load({PROMPT: torch.zeros(prompt.spec.shape), "auxiliary.weight": torch.zeros(1)})
    with pytest.raises(PromptError, match="no such file"):
        read_prompt(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(PromptError, match="cut short"):
        read_prompt(tmp_path / "cut.safetensors")
    with pytest.raises(PromptError, match="2 tokens, a prompt of 3"):
        initial_values(prompt.spec, model, scale=None, tokens=TOKENS[0, :2], seed=0)


@pytest.mark.parametrize("how", ["a layer", "the head", "layers", "not finite"])
def test_a_model_that_lacks_weights_is_refused_and_not_filled_with_random_ones(
    how: str, tmp_path: Path
) -> None:
    made = tiny_causal_lm("llama")
    if how == "not finite":
        made.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    made.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    gone = {"a layer": "layers.2.self_attn", "the head": "lm_head"}.get(how, "nothing")
    save_file(
        {name: tensor for name, tensor in tensors.items() if gone not in name},
        path,
        {"format": "pt"},
    )
    if how == "layers":
        made.config.num_hidden_layers, made.config.layer_types = 6, None
        made.config.save_pretrained(tmp_path)
    if how == "not finite":
        with pytest.raises(ModelError, match="computes logits that are not finite"):
            load_model(str(tmp_path), device="cpu")
        return
    with pytest.raises(
        ModelError, match=r"lacks \d+ of its weights .first: .* which would be random"
    ):
        load_model(str(tmp_path), device="cpu")


def test_a_tokenizer_that_makes_more_tokens_than_a_model_has_is_refused() -> None:
    model = PromptedLM(tiny_causal_lm("llama"), "a model")
    require_vocabulary(model, bpe())
    with pytest.raises(
        ModelError,
        match="a model has embeddings for 97 tokens, but its tokenizer has 102: use the tokenizer",
    ):
        require_vocabulary(
            model, bpe([("a", letter) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"])
        )


def test_models_that_cannot_work_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the model 'no/such-model'"):
        load_model("no/such-model")
    T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_model(str(tmp_path))
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    with pytest.raises(ModelError, match="no key/value cache"):
        PromptedLM(mamba, "a state space model")
    bert = AutoModelForCausalLM.from_config(
        BertConfig(
            vocab_size=97,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    with pytest.raises(ModelError, match="a bidirectional model"):
        PromptedLM(bert, "a bidirectional model")
    model = tiny_model("gpt2").model
    model.transformer.h[2].attn.head_dim = 4
    model.transformer.h[2].attn.num_heads = 8
    with pytest.raises(ModelError, match=r"several key/value shapes.*\(4, 8\).*\(8, 4\)"):
        PromptedLM(model, "uneven")
