"""`lm_eval --model fedsp`: a run's prompt on the harness's own tasks, with the figures of our own
evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp import api as commands
from fedsp.data.tasks import examples_of, find_task
from fedsp.errors import DataError, RunError
from fedsp.experiments.server_setup import score_test
from fedsp.experiments.start import open_run
from fedsp.models.prompted_lm import PromptedLM
from fedsp.training.answers import Side
from support.real_rows import hub_schema, real_rows
from support.reference import harness_task
from support.small_runs import settings
from support.tiny_families import tiny_causal_lm
from support.tokenizers_made import bpe

pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with the eval extra")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    commands.run(settings(folder, server={"steps": 5, "batch_size": 4}))
    return folder / "run"


@pytest.mark.harness
@pytest.mark.parametrize("name", ["arc_easy", "sciq"])
def test_the_harness_gives_the_figures_of_our_own_evaluation(
    name: str, run: Path, tmp_path: Path
) -> None:
    from lm_eval.evaluator import simple_evaluate

    import fedsp.experiments.lm_eval_model  # noqa: F401 (it registers itself)

    rows = [hub_schema(name, row) for row in real_rows(name, 60)]
    theirs = simple_evaluate(
        "fedsp",
        model_args={"run": str(run)},
        tasks=[harness_task(name, rows, tmp_path)],
        bootstrap_iters=0,
    )
    assert theirs is not None
    opened = open_run(run)
    task, server = find_task(name), opened.server
    ours, _ = score_test(
        opened.model,
        opened.prefix(),
        examples_of(task, rows),
        server.tokenizer,
        server.max_tokens,
    )
    assert theirs["results"][name]["acc,none"] == pytest.approx(ours["accuracy"])
    assert theirs["results"][name]["acc_norm,none"] == pytest.approx(ours["accuracy_norm"])


def asked(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_it_generates_what_fedsp_generate_does_and_stops_where_it_is_told(run: Path) -> None:
    from fedsp.experiments.lm_eval_model import TunedPrompt

    model = TunedPrompt(run=str(run))
    (text,) = model.generate_until(
        [asked("generate_until", "The town of Badiba:", {"until": [], "max_gen_toks": 12})]
    )
    assert text == commands.generate(run, "The town of Badiba:", most=12)
    (cut,) = model.generate_until(
        [asked("generate_until", "The town of Badiba:", {"until": [text[3:5]], "max_gen_toks": 12})]
    )
    assert cut == text.split(text[3:5])[0]


def test_both_models_answer_the_harness_together(run: Path) -> None:
    from fedsp.experiments.lm_eval_model import TunedPrompt

    question = [asked("loglikelihood", "The town of Badiba:", " Kelby")]
    told = {"until": [], "max_gen_toks": 8}
    written = [asked("generate_until", "The town of Badiba:", told)]
    alone, own, mean = (
        TunedPrompt(run=str(run), answers=answers) for answers in ("global", "auxiliary", "mean")
    )
    probabilities = [math.exp(model.loglikelihood(question)[0][0]) for model in (alone, own, mean)]
    assert len(set(probabilities)) == 3 and probabilities[1] != pytest.approx(probabilities[0])
    proxy = TunedPrompt(run=str(run), answers="proxy", weight="0.5").generate_until(written)
    assert proxy == [
        commands.generate(run, "The town of Badiba:", most=8, answers="proxy", weight=0.5)
    ]


def opened_with(tokenizer: Any) -> tuple[Any, Any]:
    """Our model of the harness over a tiny Llama, and lm-evaluation-harness's own over the same."""
    from lm_eval.models.huggingface import HFLM

    from fedsp.experiments.lm_eval_model import TunedPrompt

    ours = TunedPrompt.__new__(TunedPrompt)
    model = PromptedLM(tiny_causal_lm("llama"), "a model")
    ours._model, ours._tokenizer, ours._max_tokens = model, tokenizer, 128
    ours._answers = Side(model, lambda: None)
    return ours, HFLM(
        pretrained=tiny_causal_lm("llama"),
        tokenizer=tokenizer,
        batch_size=1,
        device="cpu",
        max_length=128,
    )


@pytest.mark.parametrize("begins", [False, True])
def test_texts_begin_as_in_the_harness_own_model(begins: bool) -> None:
    """Empty contexts, contexts that begin with the first token written out, answers that do, merges
    over the cut."""
    ours, theirs = opened_with(bpe([("b", " "), ("y", "y")], begins=begins))
    pairs = [
        ("", " yes"),
        ("abc", " yes"),
        ("<s>abc", " yes"),
        ("", "<s>yes"),
        ("ab ", "yyes"),
        ("ab", " yyes"),
    ]
    asked_for = [asked("loglikelihood", *pair) for pair in pairs]
    for (found, greedy), (expected, theirs_greedy) in zip(
        ours.loglikelihood(asked_for), theirs.loglikelihood(asked_for), strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-3) and greedy == theirs_greedy


def test_what_is_generated_is_what_the_harness_own_model_generates() -> None:
    tokenizer = bpe(begins=True)
    tokenizer.pad_token = "</s>"
    ours, theirs = opened_with(tokenizer)
    for settings_asked in (
        {"max_gen_toks": 40, "until": []},
        {"max_gen_toks": 50, "until": ["zz"]},
        {"until": ["q"], "max_tokens": 30, "do_sample": False, "temperature": 0.7},
    ):
        for context in (
            "abc",
            "a long one, of which the beginning gives way to what is said",
            "<s>abc",
        ):
            request = [asked("generate_until", context, dict(settings_asked))]
            assert ours.generate_until(request) == theirs.generate_until(request)


def test_drawn_tokens_follow_the_temperature_and_the_seed() -> None:
    ours, _ = opened_with(bpe(begins=True))

    def drawn(temperature: float, seed: int) -> str:
        torch.manual_seed(seed)
        (text,) = ours.generate_until(
            [
                asked(
                    "generate_until",
                    "abc",
                    {"do_sample": True, "temperature": temperature, "max_gen_toks": 20},
                )
            ]
        )
        return str(text)

    (greedy,) = ours.generate_until([asked("generate_until", "abc", {"max_gen_toks": 20})])
    assert drawn(1e-4, 0) == drawn(1e-4, 1) == greedy
    assert drawn(1.0, 0) == drawn(1.0, 0) != drawn(1.0, 1)


@pytest.mark.parametrize(
    ("settings_asked", "sentence"),
    [
        (
            {"max_gen_toks": 128},
            (
                "the task asks for 128 tokens, but the model reads 128 behind the prompt.*set"
                " max_gen_toks lower"
            ),
        ),
        ({}, "does not say how many, and the harness asks for 256 tokens, but the model reads 128"),
        (
            {"max_gen_toks": 5, "top_p": 0.9, "num_beams": 2},
            "asks for num_beams, top_p in generation",
        ),
        ({"max_gen_toks": 5, "do_sample": True}, "do_sample without a temperature"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    settings_asked: dict[str, Any], sentence: str
) -> None:
    ours, _ = opened_with(bpe())
    with pytest.raises(RunError, match=sentence):
        ours.generate_until([asked("generate_until", "abc", settings_asked)])


def test_an_empty_context_needs_a_token_that_can_stand_there() -> None:
    ours, _ = opened_with(bpe(tokens=False))
    with pytest.raises(
        RunError, match="empty context, and this tokenizer has no token that begins or ends a text"
    ):
        ours.generate_until([asked("generate_until", "", {"max_gen_toks": 5})])
    with pytest.raises(DataError, match="this tokenizer has neither BOS nor EOS"):
        ours.loglikelihood([asked("loglikelihood", "", " a")])


def test_without_the_prompt_it_is_another_model_and_what_it_cannot_do_it_says(run: Path) -> None:
    from fedsp.experiments.lm_eval_model import TunedPrompt

    request = [
        asked("loglikelihood", "The town of Badiba:", " Kelby"),
        asked("loglikelihood", "", "The"),
    ]
    assert TunedPrompt(run=str(run)).loglikelihood(request) != TunedPrompt(
        run=str(run), zero_shot="true"
    ).loglikelihood(request)
    with pytest.raises(RunError, match="choose a task with questions"):
        TunedPrompt(run=str(run)).loglikelihood_rolling([])
    with pytest.raises(RunError, match="there is no such folder"):
        TunedPrompt(run="nowhere")
