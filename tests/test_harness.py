"""`lm_eval --model fedsp`: a run's prompt on the harness's own tasks, with the figures of our own evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import harness_task
from fedsp import commands
from fedsp.data.tasks import examples_of, find_task
from fedsp.errors import RunError
from fedsp.server import score_test
from test_evaluation import hub_schema, real_rows
from test_run import settings

pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with the eval extra")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    commands.run(settings(folder, server={"steps": 5, "batch_size": 4}))
    return folder / "run"


@pytest.mark.parametrize("name", ["arc_easy", "sciq"])
def test_the_harness_gives_the_figures_of_our_own_evaluation(name: str, run: Path, tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate

    import fedsp.harness  # noqa: F401 (it registers itself)

    rows = [hub_schema(name, row) for row in real_rows(name, 60)]
    theirs = simple_evaluate("fedsp", model_args={"run": str(run)}, tasks=[harness_task(name, rows, tmp_path)], bootstrap_iters=0)
    assert theirs is not None
    opened = commands.open_run(run)
    task, server = find_task(name), opened.server
    ours, _ = score_test(opened.model, opened.prefix(), examples_of(task, rows), task, server.tokenizer, server.max_tokens)
    assert theirs["results"][name]["acc,none"] == pytest.approx(ours["accuracy"])
    assert theirs["results"][name]["acc_norm,none"] == pytest.approx(ours["accuracy_norm"])


def asked(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_it_generates_what_fedsp_generate_does_and_stops_where_it_is_told(run: Path) -> None:
    from fedsp.harness import TunedPrompt

    model = TunedPrompt(run=str(run))
    (text,) = model.generate_until([asked("generate_until", "The town of Badiba:", {"until": [], "max_gen_toks": 12})])
    assert text == commands.generate(run, "The town of Badiba:", most=12)
    (cut,) = model.generate_until([asked("generate_until", "The town of Badiba:", {"until": [text[3:5]], "max_gen_toks": 12})])
    assert cut == text.split(text[3:5])[0]


def test_without_the_prompt_it_is_another_model_and_what_it_cannot_do_it_says(run: Path) -> None:
    from fedsp.harness import TunedPrompt

    request = [asked("loglikelihood", "The town of Badiba:", " Kelby"), asked("loglikelihood", "", "The")]
    assert TunedPrompt(run=str(run)).loglikelihood(request) != TunedPrompt(run=str(run), zero_shot="true").loglikelihood(request)
    with pytest.raises(RunError, match="choose a task with questions"):
        TunedPrompt(run=str(run)).loglikelihood_rolling([])
    with pytest.raises(RunError, match="there is no such folder"):
        TunedPrompt(run="nowhere")
