"""Soft prompts in both spaces, on every family, against the model itself and against PEFT."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BertConfig, MambaConfig, T5Config
from transformers.activations import NewGELUActivation

from conftest import FAMILIES, tiny_model
from fedsp.errors import ModelError, PayloadError, PromptError
from fedsp.loading import load_model
from fedsp.models import ModelShape, PromptedLM
from fedsp.payload import PROMPT, check
from fedsp.prompts import PromptSpec, SoftPrompt, export_peft, import_peft, initial_values, read_prompt
from fedsp.rows import pack, pad

TOKENS = torch.tensor([[5, 9, 33, 8, 71, 2, 60]])


def random_prompt(model: PromptedLM, space: str, length: int = 3, projection: int = 0) -> SoftPrompt:
    spec = PromptSpec(space, length, model.shape, projection)  # type: ignore[arg-type]
    return SoftPrompt(spec, torch.randn(spec.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("space", ["key_value", "residual"])
def test_activations_as_a_prompt_are_the_text_itself(family: str, space: str) -> None:
    """A prompt made of the activations of some tokens must act exactly like those tokens: positions, rotations and masks included."""
    model = tiny_model(family)
    length = 3
    spec = PromptSpec(space, length, model.shape)  # type: ignore[arg-type]
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
    assert (prompt.direct.grad.abs().amax(dim=tuple(d for d in range(prompt.direct.dim()) if d != 1)) > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["hugging_face", "from_zero"])
@pytest.mark.parametrize("space", ["key_value", "residual"])
def test_rows_side_by_side_are_rows_by_themselves(family: str, positions: str, space: str) -> None:
    """States and the prompt's gradient, of four rows in two; padding costs nothing, and a prompt of each row's own is read row by row."""
    model = tiny_model(family, positions=positions)
    prompt = random_prompt(model, space)
    padded = pad([[5, 9, 33, 8, 71, 2, 60], [7], [4, 3, 9], [8, 8, 2]], model.device)
    real = padded.mask.bool()
    read: list[int] = []
    model.backbone.register_forward_pre_hook(lambda *seen: read.append(seen[2]["input_ids"].numel()), with_kwargs=True)
    assert model.room_for_trees
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


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5000), st.integers(0, 60))
def test_packed_rows_hold_every_token_once(lengths: list[int], weight: int, more: int) -> None:
    rows = [[100 * row + place for place in range(length)] for row, length in enumerate(lengths)]
    padded = pad(rows, torch.device("cpu"))
    trees, cells = pack(padded, weight=weight, room=max(lengths) + more)
    real = padded.mask.bool()
    assert torch.equal(trees.ids.flatten()[cells][real], padded.ids[real])
    assert int((trees.branches > 0).sum()) == sum(lengths) == len(set(cells[real].tolist()))
    assert torch.equal(trees.positions.flatten()[cells][real], padded.ids[real] % 100)
    count, width = trees.ids.shape
    assert width <= max(lengths) + more
    assert count * width * (weight + width) <= len(lengths) * max(lengths) * (weight + max(lengths)), "never dearer than padding"


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
    export_peft(prompt, model, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    mask = torch.ones_like(TOKENS)
    with torch.no_grad():
        ours = model.logits(model(TOKENS, mask, prompt.prefix(model)))
        theirs = adapted(input_ids=TOKENS, attention_mask=mask).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        generated = adapted.generate(input_ids=TOKENS, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert generated[0, TOKENS.shape[1] :].tolist() == model.generate(TOKENS[0], prompt.prefix(model), most=5, stop=None)
    back = import_peft(tmp_path / "adapter", model)
    with torch.no_grad():
        torch.testing.assert_close(back.values(), prompt.prefix(model))


def test_export_refuses_positions_that_peft_does_not_know(tmp_path: Path) -> None:
    model = tiny_model("gpt2", positions="from_zero")
    with pytest.raises(PromptError, match="from_zero"):
        export_peft(random_prompt(model, "key_value"), model, tmp_path)


def test_a_projection_takes_up_trains_and_folds() -> None:
    model = tiny_model("gpt2")
    plain, projected = random_prompt(model, "key_value"), random_prompt(model, "key_value", projection=16)
    torch.testing.assert_close(projected.values(), plain.values(), rtol=1e-6, atol=1e-6)
    assert set(dict(projected.named_parameters())) == {"embedding", "projection.0.weight", "projection.0.bias", "projection.2.weight", "projection.2.bias"}
    optimizer = torch.optim.SGD(projected.parameters(), lr=0.1)
    model.logits(model(TOKENS, None, projected.prefix(model)))[0, -1, 3].backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    folded = projected.payload()
    assert list(folded) == [PROMPT] and not torch.equal(folded[PROMPT], plain.values())
    plain.load(folded)
    with torch.no_grad():
        torch.testing.assert_close(plain.prefix(model), projected.prefix(model))


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
    with pytest.raises(PayloadError, match=f"holds {wrong} numbers that are not finite") if wrong else nullcontext():
        check(payload, {PROMPT: (len(numbers),)})


def test_bad_prompts_are_refused_in_a_sentence(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    prompt = random_prompt(model, "key_value")
    other = PromptSpec("key_value", 3, ModelShape(6, 4, 8, 32))
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


def test_models_that_cannot_work_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the model 'no/such-model'"):
        load_model("no/such-model")
    T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_model(str(tmp_path))
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(ModelError, match="no key/value cache"):
        PromptedLM(mamba, "a state space model")
    bert = AutoModelForCausalLM.from_config(BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(ModelError, match="a bidirectional model"):
        PromptedLM(bert, "a bidirectional model")
    model = tiny_model("gpt2").model
    model.transformer.h[2].attn.head_dim = 4
    model.transformer.h[2].attn.num_heads = 8
    with pytest.raises(ModelError, match=r"several key/value shapes.*\(4, 8\).*\(8, 4\)"):
        PromptedLM(model, "uneven")
