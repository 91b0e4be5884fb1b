"""Layer plans, the package that clients get, distillation, and the plan's figures against what
torch counts."""

from __future__ import annotations

import copy
import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaAttention

from fedsp.config_file import make_config
from fedsp.data.encoding import Encoded, collate
from fedsp.errors import AuxiliaryError, ConfigurationError, StorageError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.plan import make_plan
from fedsp.models.auxiliary import (
    build_auxiliary,
    disclosed_share,
    load_auxiliary,
    parse_plan,
    plan_of_package,
)
from fedsp.models.loading import load_model, load_tokenizer, reduce_precision
from fedsp.models.payload import PROMPT, pack
from fedsp.models.prompted_lm import PromptedLM, hidden_at_depths
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.models.trainable import trainable
from fedsp.storage import tensors_digest
from fedsp.training import distillation
from fedsp.training.distillation import Distillation, distill, masked_mse, packed
from fedsp.training.loop import Optimisation, answer_loss
from support.tiny_families import tiny_causal_lm
from support.tiny_models import FAMILIES, tiny_model

TOKENIZER = load_tokenizer(str(EMBEDDED / "model"))
TOKENS = torch.tensor([[5, 9, 33, 8, 71, 2, 60]])

PLANS: list[tuple[Any, int, list[int], list[int]]] = [
    ("shared(0)", 8, [0] * 8, list(range(8))),
    ("every(2)", 8, [0, 2, 4, 6], [0, 2, 4, 6]),
    ("every(1)", 4, [0, 1, 2, 3], [0, 1, 2, 3]),
    ("first(3)", 8, [0, 1, 2], [0, 1, 2]),
    ("cells(0-1)", 4, [0, 1, 0, 1], [0, 1, 2, 3]),
    ([0, 0, 5, 5, 7, 7], 8, [0, 0, 5, 5, 7, 7], [0, 0, 5, 5, 7, 7]),
    ("ends(2)", 8, [0, 1, 4, 4, 4, 4, 6, 7], list(range(8))),
    ("ends(1, 2)", 8, [0, 4, 4, 7], [0, 2, 5, 7]),
]


@pytest.mark.parametrize(
    ("text", "layers", "sources", "prompt_layers"), PLANS, ids=[str(plan[0]) for plan in PLANS]
)
def test_plans_say_what_stands_where(
    text: Any, layers: int, sources: list[int], prompt_layers: list[int]
) -> None:
    plan = parse_plan(text, layers)
    assert list(plan.sources) == sources and list(plan.prompt_layers) == prompt_layers
    assert any(plan.frozen) == str(text).startswith("ends")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("shared(9)", "names layers [9], but the model has layers 0 to 7"),
        ("cells(0-2)", "do not divide the model's 8"),
        ("ends(4)", "leaves no middle"),
        ("sharde(0)", "is not a valid layer plan: write shared"),
        ("every(0)", "is not a valid layer plan"),
        ([], "names layers []"),
        ([-1, 0, 0, -4], "names layers [-4, -1, 0]"),
        ("shared(-1)", "is not a valid layer plan"),
    ],
)
def test_plans_that_do_not_fit_are_refused(text: Any, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        parse_plan(text, 8)
    with pytest.raises(
        ConfigurationError, match="must give one layer from 0 to 7 for each of the 4 depths"
    ):
        parse_plan("every(2)", 8, [0, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_plan_is_the_global_model(family: str) -> None:
    model = tiny_model(family)
    auxiliary = build_auxiliary(model, parse_plan("every(1)", 4), TOKENIZER)
    prompt = SoftPrompt(
        PromptSpec(space="residual", length=3, model=model.shape), torch.randn(3, 4, 32)
    )
    with torch.no_grad():
        assert torch.equal(
            auxiliary(TOKENS, None, prompt.prefix(auxiliary)),
            model(TOKENS, None, prompt.prefix(model)),
        )
    assert disclosed_share(auxiliary, model) == 1.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", ["shared(0)", "ends(1)", "every(2)", [1, 1, 3]])
def test_shared_depths_share_parameters_and_keep_a_cache_slot_each(
    family: str, plan: Any, tmp_path: Path
) -> None:
    """The slow reference: the same blocks, unshared. Then a folder, and the same again from the
    folder alone."""
    model = tiny_model(family)
    layers = parse_plan(plan, 4)
    auxiliary = build_auxiliary(model, layers, TOKENIZER)
    prompt = SoftPrompt(
        PromptSpec(space="key_value", length=3, model=model.shape),
        torch.randn(3, 4, 2, model.shape.heads, model.shape.head_size),
    )
    unshared = (
        tiny_model(family)
        if layers.depth == 4
        else build_auxiliary(
            model, parse_plan(list(range(layers.depth)), 4, layers.prompt_layers), TOKENIZER
        )
    )
    for depth, source in enumerate(layers.sources):
        unshared.blocks[depth].load_state_dict(model.blocks[source].state_dict())
    with torch.no_grad():
        expected = unshared(TOKENS, None, prompt.prefix(unshared))
        found = auxiliary(TOKENS, None, prompt.prefix(auxiliary))
    torch.testing.assert_close(found, expected)
    for depth, group in enumerate(layers.groups):
        first = layers.groups.index(group)
        assert all(
            a is b
            for a, b in zip(
                auxiliary.blocks[first].parameters(),
                auxiliary.blocks[depth].parameters(),
                strict=True,
            )
        )
    assert sum(p.numel() for p in trainable(auxiliary.model).values()) < sum(
        p.numel() for p in trainable(model.model).values()
    )
    digest = auxiliary.save(tmp_path)
    read = load_auxiliary(
        tmp_path, device=torch.device("cpu"), positions="hugging_face", digest=digest
    )
    with torch.no_grad():
        assert torch.equal(read(TOKENS, None, prompt.prefix(read)), found)
    assert read.plan == layers and read.prompt_shape == model.shape


def test_a_package_that_was_changed_is_refused(tmp_path: Path) -> None:
    auxiliary = build_auxiliary(tiny_model("gpt2"), parse_plan("shared(0)", 4), TOKENIZER)
    auxiliary.save(tmp_path)
    where: dict[str, Any] = {"device": torch.device("cpu"), "positions": "hugging_face"}
    with pytest.raises(AuxiliaryError, match="SHA-256 digest"):
        load_auxiliary(tmp_path, digest="f" * 64, **where)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AuxiliaryError, match="digest that its header states"):
        load_auxiliary(tmp_path, **where)
    weights.write_bytes(content[:-9])
    with pytest.raises(AuxiliaryError, match="cut short"):
        load_auxiliary(tmp_path, **where)
    weights.write_bytes(content)
    manifest = json.loads((tmp_path / "auxiliary.json").read_text())
    plan = manifest["plan"]
    spoiled: list[dict[str, Any]] = [{}, {key: [] for key in plan}]
    for key, entries in plan.items():
        for changed in ([], entries[1:], ["0" for _ in entries]):
            spoiled.append({**plan, key: changed})
    for other in spoiled:
        (tmp_path / "auxiliary.json").write_text(json.dumps({**manifest, "plan": other}))
        with pytest.raises(AuxiliaryError, match="cannot be used"):
            load_auxiliary(tmp_path, **where)
        with pytest.raises(AuxiliaryError, match="cannot be used"):
            plan_of_package(tmp_path)
    with pytest.raises(AuxiliaryError, match="holds no auxiliary model"):
        load_auxiliary(tmp_path / "none", **where)


def of_these_layers(name: str, sources: list[int], **changes: Any) -> Any:
    """Last logits of the very layers of a model, in another list and not in another model."""
    model = tiny_causal_lm(name, **changes)
    layers = model.get_decoder().layers
    layers._modules = {
        str(place): copy.deepcopy(layers[source]) for place, source in enumerate(sources)
    }
    config = model.config
    config.layer_types = [config.layer_types[source] for source in sources]
    config.num_hidden_layers = len(sources)
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits[0, -1]


@pytest.mark.parametrize("plan", ["ends(1, 1)", "ends(1)", [3, 0], "shared(3)"])
def test_a_layer_keeps_its_own_settings_where_it_moves_to(plan: Any, tmp_path: Path) -> None:
    """SmolLM3 has no rotations in every fourth layer: which those are is a list in its
    configuration, and moves with the layers, into the package too."""
    changes: dict[str, Any] = {
        "no_rope_layers": [1, 1, 0, 0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "use_sliding_window": True,
    }
    model, layers = PromptedLM(tiny_causal_lm("smollm3", **changes), "smollm3"), parse_plan(plan, 4)
    auxiliary = build_auxiliary(model, layers, TOKENIZER)
    auxiliary.save(tmp_path)
    again = load_auxiliary(tmp_path, device=torch.device("cpu"), positions="hugging_face")
    expected = of_these_layers("smollm3", list(layers.sources), **changes)
    for made in (auxiliary, again):
        with torch.no_grad():
            torch.testing.assert_close(
                made.logits(made(TOKENS))[0, -1], expected, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(
    ("family", "changes", "plan", "sentence"),
    [
        (
            "diffllama",
            {},
            [2, 3],
            (
                r"layer 2 of a model is not of the kind that stands at depth 0:"
                r" self_attn.lambda_init is 0\.\d+ in the one and 0\.\d+ in the other"
            ),
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            [1, 2],
            r"layer 1 of a model is not of the kind.*attn.scaling is",
        ),
        (
            "glm4_moe",
            {},
            "shared(0)",
            (
                r"depths 0 and 1 cannot share a layer: mlp is Glm4MoeMLP in the one and Glm4MoeMoE"
                r" in the other"
            ),
        ),
        (
            "qwen3_moe",
            {"mlp_only_layers": [0]},
            [3, 0],
            (
                r"layer 3 of a model is not of the kind that stands at depth 0: mlp is"
                r" Qwen3MoeSparseMoeBlock"
            ),
        ),
        (
            "gpt_neox_japanese",
            {},
            [0, 1],
            r"is not of the kind that stands at depth 1: attention.dense_bias is",
        ),
    ],
)
def test_a_layer_whose_kind_hangs_on_its_place_is_refused_with_both_kinds(
    family: str, changes: dict[str, Any], plan: Any, sentence: str
) -> None:
    model = PromptedLM(tiny_causal_lm(family, **changes), "a model")
    with pytest.raises(AuxiliaryError, match=sentence):
        build_auxiliary(model, parse_plan(plan, 4), TOKENIZER)
    kept = build_auxiliary(model, parse_plan("every(1)", 4), TOKENIZER)
    with torch.no_grad():
        torch.testing.assert_close(
            kept.logits(kept(TOKENS)), model.logits(model(TOKENS)), rtol=1e-4, atol=1e-5
        )


def test_rotations_that_a_large_model_holds_rounded_are_no_difference_of_its_layers() -> None:
    """As in SmolLM2 in bfloat16: its attention is sharp enough that a rounded rotation shows."""
    made = tiny_causal_lm("llama")
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight *= 4
            layer.self_attn.k_proj.weight *= 4
    model = PromptedLM(made, "a model")
    reduce_precision(model, "bfloat16", "model.precision")
    package = build_auxiliary(model, parse_plan([0, 3], 4), TOKENIZER)
    exact, rounded = package.block_output(1), package.block_output(1, torch.bfloat16)
    assert float((exact - rounded).abs().max()) > 2e-3 * float(exact.abs().max()), (
        "what would be taken for another computation"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_computes_by_its_place_is_found_out_though_no_setting_says_so(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it adds little to what it is given, and in the precision in which large models are
    held."""
    attention = LlamaAttention.forward

    def by_place(self: Any, hidden_states: Any, *arguments: Any, **named: Any) -> Any:
        made, weights = attention(self, hidden_states, *arguments, **named)
        return made / (1 + self.layer_idx), weights

    monkeypatch.setattr(LlamaAttention, "forward", by_place)
    made = tiny_causal_lm("llama", dtype=dtype)
    with torch.no_grad():
        for parameter in made.model.layers.parameters():
            if parameter.dim() > 1:
                parameter *= 0.15
    model = PromptedLM(made, "a model")
    with pytest.raises(
        AuxiliaryError,
        match=(
            "layer 3 of a model gives other outputs at depth 1.*depends on its index; keep it at"
            " depth 3"
        ),
    ):
        build_auxiliary(model, parse_plan([0, 3], 4), TOKENIZER)


def test_the_plan_refuses_what_cannot_be_built(tmp_path: Path) -> None:
    tiny_causal_lm("glm4_moe").save_pretrained(tmp_path)
    with pytest.raises(AuxiliaryError, match="cannot share a layer: mlp is Glm4MoeMLP"):
        make_plan(config("shared(0)", str(tmp_path)), clients=2)


OPTIONS: list[dict[str, float]] = [{}, {"match_depths": 1.0}, {"match_logits": 1.0}]


@pytest.mark.parametrize("options", [{}, {"match_depths": 1.0}], ids=str)
def test_teacher_states_are_read_once_and_are_the_same_from_the_disk(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_model(str(EMBEDDED / "model"), device="cpu")
    texts = [list(range(5, 5 + length)) for length in (9, 12, 7, 12)]
    how = Distillation(
        steps=6, batch_size=2, optimisation=Optimisation(learning_rate=1e-3), **options
    )
    found = []
    read_again: Any = lambda kept, indices, read: read(indices)
    for bound in (1 << 30, 0, None):
        if bound is None:
            monkeypatch.setattr(distillation.TeacherStates, "get", read_again)
        monkeypatch.setattr(distillation, "IN_MEMORY", bound)
        read: list[int] = []
        auxiliary = build_auxiliary(teacher, parse_plan("ends(2)", 8), TOKENIZER)
        handle = teacher.backbone.register_forward_pre_hook(
            lambda *seen, rows=read: rows.append(len(seen[2]["input_ids"])), with_kwargs=True
        )
        found.append(
            (distill(auxiliary, teacher, texts, how, seed=0), tensors_digest(auxiliary.weights()))
        )
        handle.remove()
        assert sum(read) == (12 if bound is None else 4), (
            "six steps of two texts, and each of the four was read once"
        )
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(found[2][0], rel=1e-4), (
        "as if it were read again in each step"
    )


def test_states_are_kept_of_texts_that_are_read_twice_and_of_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, made = load_model(str(EMBEDDED / "model"), device="cpu"), []

    class Watched(distillation.TeacherStates):
        def __init__(self, drawn: Any, longest: int) -> None:
            made.append((sorted(drawn), longest))
            super().__init__(drawn, longest)

    monkeypatch.setattr(distillation, "TeacherStates", Watched)
    texts = [list(range(5, 5 + length)) for length in (3, 4, 9)]
    for steps in (3, 4):
        distill(
            build_auxiliary(teacher, parse_plan("ends(2)", 8), TOKENIZER),
            teacher,
            texts,
            Distillation(steps=steps, batch_size=1, optimisation=Optimisation(learning_rate=1e-3)),
            seed=0,
        )
    assert made == [([0, 1, 2], 9)], "three steps read each text once"


def test_no_room_for_teacher_states_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_model(str(EMBEDDED / "model"), device="cpu")
    monkeypatch.setattr(distillation, "IN_MEMORY", 0)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        StorageError,
        match=(
            r"the teacher's states need 0\.0 GiB in .* \(No space left on device\): set TMPDIR to a"
            r" folder with more room"
        ),
    ):
        distill(
            build_auxiliary(teacher, parse_plan("ends(2)", 8), TOKENIZER),
            teacher,
            [[5, 6, 7]],
            Distillation(steps=2, batch_size=1, optimisation=Optimisation(learning_rate=1e-3)),
            seed=0,
        )


def test_a_few_packed_texts_are_the_first_of_many() -> None:
    passages = (EMBEDDED / "public.txt").read_text().split("\n\n")
    assert (
        packed(TOKENIZER, passages, length=32, count=2, seed=0)
        == packed(TOKENIZER, passages, length=32, count=16, seed=0)[:2]
    )


@pytest.mark.parametrize("plan", ["shared(0)", "ends(2)"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_distillation_lowers_the_loss_and_keeps_verbatim_what_it_says(
    plan: str, options: dict[str, float]
) -> None:
    teacher = load_model(str(EMBEDDED / "model"), device="cpu")
    auxiliary = build_auxiliary(teacher, parse_plan(plan, 8), TOKENIZER)
    before = auxiliary.weights()
    texts = packed(
        TOKENIZER, (EMBEDDED / "public.txt").read_text().split("\n\n"), length=32, count=16, seed=0
    )
    batch = torch.tensor(texts[:8])

    def distance() -> float:
        with torch.no_grad():
            return float(masked_mse(auxiliary(batch), teacher(batch), torch.ones_like(batch)))

    start = distance()
    losses = distill(
        auxiliary,
        teacher,
        texts,
        Distillation(
            steps=12, batch_size=4, optimisation=Optimisation(learning_rate=1e-3), **options
        ),
        seed=0,
    )
    assert len(losses) == 12 and distance() < start
    changed = {
        name for name, value in auxiliary.weights().items() if not torch.equal(value, before[name])
    }
    if plan == "ends(2)":
        assert changed and all(".h.2." in name for name in changed)
        plain = {name: p.numel() for name, p in trainable(auxiliary.model).items()}
        share = sum(count for name, count in plain.items() if ".h.2." not in name) / sum(
            p.numel() for p in trainable(teacher.model).values()
        )
        assert disclosed_share(auxiliary, teacher) == pytest.approx(share, abs=1e-3)
    else:
        assert changed == set(before)
    assert not any(p.requires_grad for p in auxiliary.model.parameters())


def test_teacher_states_are_computed_once() -> None:
    teacher = tiny_model("gpt2")
    auxiliary = build_auxiliary(teacher, parse_plan("shared(0)", 4), TOKENIZER)
    read: list[int] = []
    teacher.backbone.register_forward_pre_hook(
        lambda *seen: read.append(len(seen[2]["input_ids"])), with_kwargs=True
    )
    texts = [[5, 6, 7 + n] for n in range(6)]
    distill(
        auxiliary,
        teacher,
        texts,
        Distillation(steps=12, batch_size=3, optimisation=Optimisation(learning_rate=1e-3)),
        seed=0,
    )
    assert sum(read) == len(texts)


def test_padding_does_not_count_in_distillation() -> None:
    student, teacher = (
        torch.zeros(1, 3, 2),
        torch.tensor([[[1.0, 1.0], [3.0, 3.0], [100.0, 100.0]]]),
    )
    assert float(masked_mse(student, teacher, torch.tensor([[1, 1, 0]]))) == 5.0


def config(plan: str, model: str, **sections: Any) -> Any:
    return make_config(
        {
            "preset": "prompt",
            "model": {"name": model},
            "data": {},
            "auxiliary": {"plan": plan},
            "distill": {"text": ["x"]},
            **sections,
        }
    )


def test_the_paper_s_sizes(tmp_path: Path) -> None:
    """GPT2-XL from its configuration alone: the counts of the paper's own package, and a prompt of
    12.3 MB in fp16."""
    from transformers import GPT2Config

    GPT2Config(n_embd=1600, n_layer=48, n_head=25).save_pretrained(tmp_path)
    plan = make_plan(
        make_config({"preset": "paper", "model": {"name": str(tmp_path)}, "data": {}}), clients=10
    )
    assert plan["global_parameters"] == 1_557_611_200
    assert plan["auxiliary_parameters"] == 112_793_600
    assert plan["messenger_parameters"] == 6_144_000
    assert plan["disclosed_share"] == 0.0 and plan["handed_out_share"] == pytest.approx(
        0.0724, abs=1e-4
    )
    assert (
        plan["bytes_in_all"] == 2 * 10 * 100 * plan["bytes_per_message"]
        and 0 < plan["bytes_per_message"] - 4 * 6_144_000 < 200
    )


def test_the_plan_agrees_with_what_is_built_and_what_torch_counts() -> None:
    model = load_model(str(EMBEDDED / "model"), device="cpu")
    plan = make_plan(
        config("ends(2)", "embedded", prompt={"length": 16}, client={"auxiliary_steps": 1}),
        clients=10,
    )
    auxiliary = build_auxiliary(model, parse_plan("ends(2)", 8), TOKENIZER)
    auxiliary.model.set_attn_implementation(
        "eager"
    )  # torch's counter does not know the fused kernel of the CPU
    assert plan["bytes_per_message"] == len(pack({PROMPT: torch.zeros(16, 8, 128)}))
    for name, built in (("global", model), ("auxiliary", auxiliary)):
        count = sum(parameter.numel() for parameter in trainable(built.model).values())
        assert plan[f"{name}_parameters"] == count
    prompt = SoftPrompt(PromptSpec(space="key_value", length=16, model=model.shape))
    batch = collate([Encoded(tuple(range(5, 69)), 57)])  # 64 tokens, 8 of them scored
    with FlopCounterMode(display=False) as counter:
        loss = answer_loss(auxiliary, prompt.prefix(auxiliary), batch)
    forward = counter.get_total_flops()
    assert forward * 2 * 16 == pytest.approx(plan["client_operations_prompt"], rel=0.03)
    with FlopCounterMode(display=False) as counter:
        loss.backward()  # type: ignore[no-untyped-call]
    assert (forward + counter.get_total_flops()) * 16 == pytest.approx(
        plan["client_operations_prompt"], rel=0.1
    )
    for parameter in trainable(auxiliary.model).values():
        parameter.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        answer_loss(auxiliary, prompt.prefix(auxiliary).detach(), batch).backward()  # type: ignore[no-untyped-call]
    assert counter.get_total_flops() * 16 == pytest.approx(
        plan["client_operations_auxiliary"], rel=0.1
    )


def test_a_tail_is_distilled_to_the_states_at_its_cut() -> None:
    """The last layers as they are, and a front whose target is what enters them: nothing behind the
    cut is read by the loss."""
    plan = parse_plan("tail(1, 2)", 4)
    assert plan.sources == (0, 2, 3) and plan.frozen == (False, False, True) and plan.cut == 2
    assert parse_plan("ends(1)", 4).cut is None and parse_plan("shared(0)", 4).cut is None
    for wrong in ("tail(0, 2)", "tail(4, 1)", "tail(2, 3)"):
        with pytest.raises(ConfigurationError, match=r"auxiliary\.plan: tail\("):
            parse_plan(wrong, 4)
    teacher = tiny_model("gpt2")
    auxiliary = build_auxiliary(teacher, plan, TOKENIZER)
    before = auxiliary.weights()
    texts = [
        torch.randint(3, 97, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in range(8)
    ]
    ids = torch.tensor(texts)
    mask = torch.ones_like(ids)

    def far() -> float:
        with torch.no_grad():
            mine = hidden_at_depths(auxiliary, ids, mask)[2]
            return float((mine - hidden_at_depths(teacher, ids, mask)[3]).square().mean())

    first = far()
    how = Distillation(
        steps=40, batch_size=8, optimisation=Optimisation(learning_rate=3e-3, weight_decay=0.0)
    )
    losses = distill(auxiliary, teacher, texts, how, seed=0)
    assert losses[0] == pytest.approx(first, rel=1e-4)
    assert far() < 0.7 * first and losses[-1] == pytest.approx(far(), rel=0.2)
    tail = [name for name in before if ".h.2." in name]
    assert tail and all(torch.equal(before[name], auxiliary.weights()[name]) for name in tail)
    changed = [name for name in before if not torch.equal(before[name], auxiliary.weights()[name])]
    assert changed and all(".h.0." in name or ".h.1." in name for name in changed)


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([3.0] * 20, 22),  # measured every 2 steps: a first time, and ten that are no lower
        ([9.0, 3.0, *[4.0] * 9, 2.9, *[3.0] * 20], 40),
        ([3.0 - 0.01 * place for place in range(20)], 40),
    ],
)
def test_distillation_ends_where_held_out_text_is_read_no_better_and_not_before(
    losses: list[float], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter(losses)
    held_out = [[5, 6, 7]]

    def text_loss(_: Any, texts: Any) -> float:
        assert texts is held_out
        return next(measured)

    monkeypatch.setattr(distillation, "text_loss", text_loss)
    teacher = load_model(str(EMBEDDED / "model"), device="cpu")
    how = Distillation(steps=40, batch_size=1, optimisation=Optimisation(learning_rate=1e-3))
    auxiliary = build_auxiliary(teacher, parse_plan("ends(1, 1)", 8), TOKENIZER)
    made = distill(auxiliary, teacher, [[8, 9, 10]], how, seed=0, held_out=held_out)
    assert len(made) == steps
