"""A package made to tell words: it does where nothing protects the text, noise takes that away, and
who looks at the package sees what it is."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedsp import api as commands
from fedsp.audit.inspection import LIMITS, inspect_auxiliary
from fedsp.audit.registry import AUDITS, audit
from fedsp.audit.shadows import Options
from fedsp.audit.summary import account
from fedsp.audit.trap import Trap, draw_words, make_trap, right_words, room_for_words
from fedsp.cli import app
from fedsp.data.encoding import Encoded
from fedsp.errors import AuxiliaryError, DataError, FedspError, RunError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.federation.messages import Request
from fedsp.federation.methods.base import Averaging
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.models.auxiliary import AuxiliaryModel, build_auxiliary, parse_plan
from fedsp.models.loading import load_model, load_tokenizer
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.training.dp_sgd import ExamplePrivacy
from fedsp.training.loop import Optimisation
from fedsp.training.stage import Stage
from support.small_runs import settings
from support.tiny_models import tiny_model

pytestmark = pytest.mark.study

WORDS = (10, 21, 32, 43, 54, 65)
TEXT = (EMBEDDED / "public.txt").read_text()


def tiny_auxiliary(plan: Any, family: str = "gpt2") -> AuxiliaryModel:
    return build_auxiliary(
        tiny_model(family), parse_plan(plan, 4), load_tokenizer(str(EMBEDDED / "model"))
    )


def texts_with(*words: int) -> list[Encoded]:
    """Each word in one of eight texts of other tokens, at a place of its own, in front of two
    answer tokens."""
    rng = random.Random(0)
    texts = [
        [
            rng.choice([token for token in range(1, 96) if token not in WORDS])
            for _ in range(6 + number)
        ]
        for number in range(8)
    ]
    for number, word in enumerate(words):
        texts[number][number % 5] = word
    return [Encoded(tuple(text), len(text) - 2) for text in texts]


def scores_after_a_round(
    trap: Trap,
    spec: PromptSpec,
    texts: Sequence[Encoded],
    folder: Path,
    privacy: ExamplePrivacy | None = None,
) -> list[float]:
    stage = Stage(
        name="client",
        seed_label="client",
        steps=3,
        batch_size=4,
        optimisation=Optimisation(learning_rate=0.1, weight_decay=0.01),
        privacy=privacy,
    )
    party = Party(
        id="a",
        model=trap.auxiliary,
        messenger=SoftPrompt(spec),
        examples=texts,
        store=StateStore(folder),
    )
    update = Averaging(client_stage=stage, server_stage=stage).client_update(
        party, Request(run="run", round=1, client="a", seed=0, payload=trap.payload)
    )
    return trap.read(update.payload).tolist()


@pytest.mark.parametrize("space", ["residual", "key_value"])
@pytest.mark.parametrize("plan", ["shared(0)", "ends(1)", "copies(0)", [0, 3]])
def test_each_word_s_number_moves_if_and_only_if_the_word_stands_there(
    plan: Any, space: Any, tmp_path: Path
) -> None:
    honest = tiny_auxiliary(plan)
    spec = PromptSpec(space=space, length=8, model=honest.prompt_shape)
    assert room_for_words(spec) == len(WORDS)
    trap = make_trap(honest, spec, WORDS)
    there = (WORDS[0], WORDS[2], WORDS[5])
    scores = scores_after_a_round(trap, spec, texts_with(*there), tmp_path)
    assert [score > 0.05 for score in scores] == [word in there for word in WORDS], scores
    assert (
        max(abs(score) for word, score in zip(WORDS, scores, strict=True) if word not in there)
        < 1e-6
    )
    trap.auxiliary.load_weights(honest.weights())
    plain = scores_after_a_round(trap, spec, texts_with(*there), tmp_path)
    assert min(abs(score) for score in plain) > 1e-6, (
        "the package that the run is made with moves all numbers, whatever stands there"
    )


def test_noise_at_the_client_takes_it_away(tmp_path: Path) -> None:
    honest = tiny_auxiliary("ends(1)")
    spec = PromptSpec(space="residual", length=8, model=honest.prompt_shape)
    trap = make_trap(honest, spec, WORDS)
    told = []
    for number in range(6):
        there = random.Random(number).sample(WORDS, 3)
        promise = ExamplePrivacy(bound=1.0, delta=1e-3, rounds=1, noise_multiplier=20.0)
        told.append(
            right_words(
                torch.tensor(
                    scores_after_a_round(trap, spec, texts_with(*there), tmp_path, promise)
                ),
                [word in there for word in WORDS],
            )
        )
    assert sum(told) <= 30, (
        "of 36 words half are right by guessing: noise that takes nothing away would leave 36"
    )


def test_an_architecture_without_a_trap_is_named() -> None:
    llama = tiny_auxiliary("ends(1)", "llama")
    with pytest.raises(RunError, match="made for GPT-2's architecture, not for llama"):
        make_trap(llama, PromptSpec(space="residual", length=8, model=llama.prompt_shape), WORDS)
    for plan, length in (([0], 8), ("ends(1)", 2)):
        honest = tiny_auxiliary(plan)
        with pytest.raises(RunError, match="needs two layers, two heads and three virtual tokens"):
            make_trap(
                honest,
                PromptSpec(space="residual", length=length, model=honest.prompt_shape),
                WORDS[:1],
            )


def test_words_are_drawn_from_what_stands_in_front_of_answers() -> None:
    tokenizer = load_tokenizer(str(EMBEDDED / "model"))
    known = [
        token
        for token in range(len(tokenizer))
        if tokenizer.decode([token])[1:].isalpha() and tokenizer.decode([token])[0] == " "
    ]
    long = [token for token in known if len(tokenizer.decode([token])) > 4]
    short = next(token for token in known if len(tokenizer.decode([token])) == 3)
    mine = [Encoded((long[0], long[1], short, long[2]), 3), Encoded((long[0], long[3], long[2]), 2)]
    others = [Encoded((long[1], long[4], long[5], short, long[6]), 4)]
    words, there = draw_words(mine, others, tokenizer, 4, random.Random(0))
    drawn = dict(zip(words, there, strict=True))
    assert drawn == {
        long[1]: True,
        long[3]: True,
        long[4]: False,
        long[5]: False,
    }, "neither what stands in every text, nor answers, nor short words"
    assert len(draw_words(mine, others, tokenizer, 2, random.Random(0))[0]) == 2
    words, there = draw_words(mine, [], tokenizer, 16, random.Random(0))
    assert sum(there) == 2 and all(word in long for word in words), (
        "nobody else has words: they are the tokenizer's"
    )
    with pytest.raises(RunError, match="0 usable words occur in a client's text and"):
        draw_words(mine[:1], others, tokenizer, 16, random.Random(0))


def test_words_are_right_by_the_better_half_and_ties_are_drawn() -> None:
    there = [True, False, True, False]
    assert right_words(torch.tensor([0.4, 0.0, 0.3, 0.0]), there) == 4
    assert right_words(torch.tensor([0.0, 0.4, 0.1, 0.3]), there) == 0
    assert right_words(torch.zeros(4), there) == 2
    assert right_words(torch.tensor([0.4, 0.0, 0.0, 0.0]), there) == pytest.approx(
        1 + 1 / 3 + 4 / 3
    )


def test_the_audit_of_a_run_says_what_was_told_and_what_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(
        commands.run(
            settings(tmp_path, prompt={"length": 9}, client={"prompt_steps": 5, "batch_size": 16})
        )["folder"]
    )
    figures = audit(folder, {"trap": ""}, Options())["trap"]
    assert (
        [row["right"][0] for row in figures["rows"]] == [1.0, 1.0]
        and figures["rows"][0]["words"] >= 12
        and figures["rows"][0]["examples"] == 16
    )
    assert not figures["unusual"]["the run's own"] and len(figures["unusual"]["the trap"]) >= 3
    tables = AUDITS["trap"].tables(figures)
    assert (
        tables[0].rows[0]["told rightly"].startswith("100%")
        and "no differential privacy" in tables[0].title
    )
    assert "a malicious model owner correctly infers for 100%" in account(folder).rows[1]["answer"]
    private = Path(
        commands.run(
            settings(
                tmp_path / "private",
                prompt={"length": 9},
                privacy={"unit": "example", "epsilon": 0.1, "delta": 1e-3},
            )
        )["folder"]
    )
    told = AUDITS["trap"].measure(private, Options())
    assert told["privacy"] == "epsilon = 0.1" and max(row["right"][0] for row in told["rows"]) < 0.9


@lru_cache(maxsize=1)
def embedded_package() -> AuxiliaryModel:
    model = load_model(str(EMBEDDED / "model"), precision="float32")
    return build_auxiliary(
        model, parse_plan("first(8)", 8), load_tokenizer(str(EMBEDDED / "model"))
    )


@pytest.mark.parametrize("refuses", [True, False])
def test_attention_that_a_family_does_not_show_is_not_called_usual(
    monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    class WithoutAttention:
        attentions = None

    def backbone(**inputs: object) -> WithoutAttention:
        if refuses:
            raise ValueError("this family has no eager attention")
        return WithoutAttention()

    package = embedded_package()
    monkeypatch.setattr(package.backbone, "forward", backbone)
    monkeypatch.setattr("fedsp.audit.inspection._losses", lambda *arguments: (1.0, 2.0, 3.0))
    monkeypatch.setattr("fedsp.audit.inspection._gradients", lambda *arguments: (0.0, 0.0))
    found = inspect_auxiliary(package, TEXT)
    assert found["attention"] == [] and not found["unusual"]
    assert set(LIMITS) - set(found["figures"]) == {"dead_head_share", "saturated_head_share"}


@pytest.mark.parametrize("how", list(LIMITS))
def test_each_figure_of_an_inspection_sees_what_it_is_for(how: str) -> None:
    honest = embedded_package()
    usual = inspect_auxiliary(honest, TEXT)
    assert (
        not usual["unusual"]
        and usual["figures"]["perplexity"] < usual["figures"]["unigram_perplexity"]
    )
    assert len(usual["attention"]) == 8 and usual["attention"][0]["heads"] == 4
    weights = honest.weights()
    names = [name for name in weights if name.endswith(".weight")]
    try:
        spoilt = {name: tensor.clone() for name, tensor in weights.items()}
        if how == "tensor_distance":
            tensor = spoilt[next(name for name in names if "c_attn" in name)]
            tensor[:] = tensor[:, :1] @ tensor[:1]
        elif how == "zero_share":
            spoilt[next(name for name in names if "c_fc" in name)][:, :100] = 0.0
        elif how == "excess_loss":
            spoilt["transformer.wte.weight"] *= -20
        elif how == "dead_head_share":
            for name in names:
                if "c_attn" in name:
                    spoilt[name][:, :128] = 0.0
                    spoilt[name.replace("weight", "bias")][:128] = 0.0
        elif how == "saturated_head_share":
            for name in names:
                if "c_attn" in name:
                    spoilt[name][:, :256] *= 60
        elif how == "silent_gradient_share":
            for name in names:
                if "c_attn" in name:
                    spoilt[name][:, 128:] = 0.0
        else:
            for name in names:
                if "c_attn" in name:
                    spoilt[name][:, :128] = 0.0
                    spoilt[name.replace("weight", "bias")][:128] = 0.0
            spoilt["transformer.wte.weight"][:] = (
                spoilt["transformer.wte.weight"].mean(dim=0)
                + 0.001 * spoilt["transformer.wte.weight"]
            )
            spoilt["transformer.wte.weight"][0] *= 50
        honest.load_weights(spoilt)
        found = inspect_auxiliary(honest, TEXT)
        assert found["figures"][how] > LIMITS[how][0] and any(
            f"({how} " in sentence for sentence in found["unusual"]
        ), found["figures"]
    finally:
        honest.load_weights(weights)


def test_a_model_that_is_trusted_shows_a_layer_that_is_not_its_own() -> None:
    honest = embedded_package()
    trusted = load_model(str(EMBEDDED / "model"), precision="float32")
    assert max(
        row["from_reference"] for row in inspect_auxiliary(honest, TEXT, trusted)["tensors"]
    ) == pytest.approx(0.0, abs=1e-6)
    weights = honest.weights()
    name = next(name for name in weights if "c_fc.weight" in name)
    try:
        honest.load_weights({**weights, name: weights[name] * 40})
        row = inspect_auxiliary(honest, TEXT, trusted)["tensors"][0]
        assert (
            row["tensor"] == name
            and row["from_reference"] > LIMITS["tensor_distance"][0]
            and row["from_family"] < 1.0
        )
    finally:
        honest.load_weights(weights)


def test_whoever_is_handed_a_package_can_look_at_it(tmp_path: Path) -> None:
    honest = embedded_package()
    honest.save(tmp_path / "package")
    found = commands.inspect(tmp_path / "package")
    assert (
        not found["unusual"]
        and found["differential_privacy"] is False
        and len(found["sha256"]) == 64
    )
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(
        DataError,
        match=(
            "the text to inspect with has .* tokens, expected at least 1024: give a longer one with"
            " --text"
        ),
    ):
        commands.inspect(tmp_path / "package", text=tmp_path / "short.txt")
    with pytest.raises(AuxiliaryError, match="there is no package"):
        commands.inspect(tmp_path / "nothing")
    shutil.copy(tmp_path / "short.txt", tmp_path / "package" / "run.py")
    with pytest.raises(AuxiliaryError, match=r"holds 'run\.py', which is not allowed"):
        commands.inspect(tmp_path / "package")
    spec = PromptSpec(space="residual", length=17, model=honest.prompt_shape)
    make_trap(honest, spec, range(16)).auxiliary.save(tmp_path / "trap")
    assert len(commands.inspect(tmp_path / "trap")["unusual"]) >= 4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"vocab_size": None}),
        ("config.json", {"n_head": "a"}),
        ("config.json", {"dtype": "nope"}),
        ("tokenizer_config.json", {"model_max_length": "a"}),
        ("auxiliary.json", {"plan": {"prompt_layers": [-5]}}),
    ],
    ids=["vocabulary", "heads", "type", "length", "layers"],
)
def test_whatever_a_package_holds_looking_at_it_ends_with_a_sentence(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    embedded_package().save(tmp_path / "package")
    path = tmp_path / "package" / name
    held = json.loads(path.read_text())
    plan = change.get("plan")
    if plan:
        change = {"plan": {**held["plan"], "prompt_layers": [-5] * len(held["plan"]["groups"])}}
    path.write_text(json.dumps({**held, **change}))
    with contextlib.suppress(FedspError):
        commands.inspect(tmp_path / "package")


def test_the_command_says_what_is_unusual_and_ends_with_code_2(tmp_path: Path) -> None:
    honest = embedded_package()
    honest.save(tmp_path / "package")
    figures = tmp_path / "found.json"
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "package"), "--json", str(figures)])
    assert told.exit_code == 0, told.output
    assert "Nothing unusual was found, which is no guarantee" in told.output
    found = json.loads(figures.read_text())
    assert found["sha256"] in told.output and found["unusual"] == []
    spec = PromptSpec(space="residual", length=17, model=honest.prompt_shape)
    make_trap(honest, spec, range(16)).auxiliary.save(tmp_path / "trap")
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "trap"), "--json", str(figures)])
    found = json.loads(figures.read_text())["unusual"]
    assert len(found) >= 4 and told.output.count("unusual: ") == len(found)
    assert isinstance(told.exception, AuxiliaryError), "code 2"
    assert f"is unusual in {len(found)} ways: ask the owner" in str(told.exception)
