"""What is exported, and what its model card says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsp import api
from fedsp.audit.model_card import _described, model_card
from fedsp.config_file import make_config
from fedsp.deployment.parties.admission import admit, init_party
from fedsp.deployment.parties.new_federation import init_federation
from fedsp.errors import DataError, ModelError, RunError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.start import open_run, open_runs
from fedsp.models.weights import Weights
from support.small_runs import ROWS, settings
from support.tiny_models import tiny_model

ADAPTERS: dict[str, Any] = {
    "preset": "messenger",
    "messenger": {"rank": 4, "alpha": 64.0},
    "round": {"rounds": 2},
    "client": {"prompt_steps": 4, "learning_rate": 0.02},
}


MADE: dict[str, Path] = {}
"""Finished runs by what they changed; tests get copies."""


def run_of(folder: Path, **changes: Any) -> Path:
    what = json.dumps(changes, sort_keys=True)
    if what not in MADE:
        values = settings(folder / "made", **{**ADAPTERS, **changes})
        del values["prompt"]
        MADE[what] = Path(api.run(values)["folder"])
    return Path(shutil.copytree(MADE[what], folder / "run"))


def answers(run: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a run's model with what it tuned best, and as it began."""
    opened = open_run(run)
    found = []
    for payload in (opened.best, opened.start):
        opened.messenger.load(payload)
        prefix = opened.messenger.prefix(opened.model)
        found.append(opened.model.logits(opened.model(ids, prefix=prefix))[0])
    return found[0], found[1]


LORA: dict[str, Any] = {"method": "lora", "lora": {"rank": 4}, "client": {"learning_rate": 0.02}}
WEIGHTS: dict[str, Any] = {"client": {"prompt_steps": 4, "learning_rate": 1e-3}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "merged model with a LoRA adapter (rank 4)"),
        (LORA, "merged model with a LoRA adapter (rank 4)"),
        ({**WEIGHTS, "messenger": {"kind": "layers"}}, "model with 24 tuned weight tensors"),
        ({**WEIGHTS, "method": "offsite_tuning"}, "model with 48 tuned weight tensors"),
    ],
)
def test_a_merged_model_answers_in_transformers_alone(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    run = run_of(tmp_path, **changes)
    figures = api.export(run, tmp_path / "merged", merged=True)
    assert figures["merged"] is True and figures["kind"] == said
    text = f"Question: {ROWS[0]['question']}\nAnswer:"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model(ids).logits[0]
        expected, untuned = answers(run, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - untuned).abs().max()) > 1e-2
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "EMBEDDED" not in card
    assert 'library_name: "transformers"' in card and f"# run: {said}" in card


def test_lora_of_the_whole_model_is_a_peft_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT comes with the study extra")
    run = run_of(tmp_path, **LORA)
    figures = api.export(run, tmp_path / "adapter")
    assert figures["kind"] == "PEFT LoRA adapter (rank 4)" and figures["rank"] == 4
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "model", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")(ids).logits[0]
        expected, untuned = answers(run, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((found - untuned).abs().max()) > 1e-2


def test_what_was_tuned_outlives_the_text_that_it_was_tuned_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with names relative to the working folder, used from another one, when its owner has
    deleted the text."""
    monkeypatch.chdir(tmp_path)
    values = settings(Path(), round={"rounds": 1}, data={"test_examples": 5})
    folder = tmp_path / api.run(values)["folder"]
    monkeypatch.chdir("/")
    before = api.evaluate(folder)
    assert before[0]["examples"] == 5
    kept = shutil.copy(tmp_path / "test.jsonl", tmp_path / "kept.jsonl")
    whole = api.evaluate(folder, data=kept)
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").unlink()
    assert api.evaluate(folder) == before, "the test has a file of its own"
    with pytest.raises(DataError, match=r"there is no file .*validation\.jsonl"):
        api.evaluate(folder, split="validation")
    (tmp_path / "test.jsonl").unlink()
    assert api.generate(folder, "The town of", most=2)
    api.export(folder, tmp_path / "adapter")
    assert open_runs([folder, folder])
    assert api.evaluate(folder, data=kept) == whole
    with pytest.raises(DataError, match=r"there is no file .*test\.jsonl"):
        api.evaluate(folder)


@pytest.mark.parametrize("labels", [[], ["b", "a"]])
def test_labels_come_from_the_text_where_they_are_not_listed(
    labels: list[str], tmp_path: Path
) -> None:
    rows = [
        {"text": row["question"], "label": "ab"[number % 2]} for number, row in enumerate(ROWS[:60])
    ]
    train = tmp_path / "rows.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = settings(tmp_path, round={"rounds": 1})
    values["data"] = {"task": "classification", "train": str(train), "labels": labels}
    folder = api.run(values)["folder"]
    kept = shutil.copy(train, tmp_path / "kept.jsonl")
    (row, _) = api.evaluate(folder, data=kept)
    assert 0.3 < row["accuracy"] < 0.7
    train.unlink()
    if labels:
        assert api.evaluate(folder, data=kept)[0] == row
    else:
        with pytest.raises(DataError, match=r"there is no file .*rows\.jsonl"):
            api.evaluate(folder, data=kept)


@pytest.mark.parametrize("kind", ["prompt", "prompt+adapter"])
def test_a_prompt_is_not_merged(kind: str, tmp_path: Path) -> None:
    run = Path(api.run(settings(tmp_path, round={"rounds": 1}, messenger={"kind": kind}))["folder"])
    with pytest.raises(ModelError, match="only adapters and weights can be merged into a model"):
        api.export(run, tmp_path / "out", merged=True)
    if kind == "prompt+adapter":
        with pytest.raises(ModelError, match="PEFT has no form for what this run tuned"):
            api.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_that_are_not_the_models_own_are_not_merged() -> None:
    """As of a messenger of one's own, whose hooks add what it holds."""
    model = tiny_model("gpt2")
    tuned = Weights({"layers.000.bias": torch.nn.Parameter(torch.ones(2))})
    with pytest.raises(ModelError, match="only adapters and weights can be merged"):
        tuned.merge(model)
    with pytest.raises(ModelError, match="export the whole model, merged, if they are its own"):
        tuned.export(model, Path("nowhere"))


def test_a_card_says_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    api.export(run, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    result = json.loads((run / "result.json").read_text())
    accuracy, untuned = result["test"]["accuracy"], result["zero_shot"]["accuracy"]
    for sentence in (
        '\nbase_model: "embedded"\nlibrary_name: "peft"\n',
        "| clients | 3 of 3 that were asked answered |",
        "| clients' examples | 48 in all, 16 to 16 each |",
        "Measured once, on 12 test questions, with one seed.",
        f"| accuracy | {untuned:.1%} | {accuracy:.1%} |",
        f"Clients held {result['disclosed_share']:.1%} of the global model's parameters",
        "No differential privacy: nothing is promised",
        "No audit was made of this run",
        'AutoModelForCausalLM.from_pretrained(EMBEDDED / "model")',
        "PeftModel.from_pretrained(model, ",
    ):
        assert sentence in card, sentence
    assert "client-0" not in card and str(tmp_path) not in card and "epsilon" not in card
    for row in [*ROWS[:60], *ROWS[200:212]]:
        assert row["question"] not in card

    disclosure = {"disclosed_share": 0.25, "nearly_disclosed_share": 0.5}
    (run / "disclosure.json").write_text(json.dumps(disclosure))
    found = model_card(RunDirectory.open(run), kind="a", base_model="b", use="c")
    assert "### Audit: disclosure" in found and "| 25.0% | 50.0% |" in found
    assert "No audit was made" not in found


def test_a_card_of_whoever_tuned_alone_tells_of_no_clients(tmp_path: Path) -> None:
    run = run_of(
        tmp_path, **LORA, round={"rounds": 2, "clients": 0}, server={"steps": 2, "batch_size": 4}
    )
    api.export(run, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| clients | none: the owner of the model tuned it alone |" in card
    assert "| clients hold | nothing |" in card and "answered |" not in card
    assert "clients' examples" not in card


def test_a_card_tells_of_the_clients_that_took_part(tmp_path: Path) -> None:
    run = run_of(tmp_path, round={"rounds": 1, "only": "client-1", "min_clients": 1})
    card = model_card(RunDirectory.open(run), kind="a", base_model="b", use="c")
    assert "| clients | 1 of 1 that were asked answered |" in card
    assert "| clients' examples | 16 in all, 16 to 16 each |" in card


def test_a_card_of_a_run_that_tunes_nothing_says_so(tmp_path: Path) -> None:
    values = settings(tmp_path / "made", method="zero_shot")
    run = RunDirectory.open(Path(api.run(values)["folder"]))
    card = model_card(run, kind="a", base_model="b", use="c")
    assert "| clients | none: nothing was tuned |" in card and "steps a round" not in card
    accuracy = run.result()["test"]["accuracy"]
    assert f"| accuracy | {accuracy:.1%} | not measured |" in card
    assert [row["prompt"] for row in api.evaluate(run.path, zero_shot=False)] == ["zero-shot"]
    for merged in (False, True):
        with pytest.raises(RunError, match="method = 'zero_shot', which tunes nothing to export"):
            api.export(run.path, tmp_path / "out", merged=merged)
    assert not (tmp_path / "out").exists()


def test_a_card_keeps_the_promise_that_it_tells_of(tmp_path: Path) -> None:
    """At client level neither clients nor their examples are counted."""
    private = {"unit": "client", "epsilon": 50.0, "delta": 1e-3, "clip": 0.1}
    run = run_of(
        tmp_path, privacy=private, round={"rounds": 1, "weighting": "uniform", "min_clients": 0}
    )
    promise = json.loads((run / "privacy_statement.json").read_text())
    card = model_card(RunDirectory.open(run), kind="a", base_model="b", use="c")
    assert f"for each client: epsilon {promise['epsilon']:.3g} at delta 0.001." in card
    assert promise["not_covered"][0] in card
    assert "| clients | not told, since each is promised privacy |" in card
    assert "clients' examples" not in card and "answered |" not in card


def test_a_card_of_an_epsilon_that_clients_alone_know_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a deployment with a noise multiplier; and what fails leaves no half of an adapter."""
    run = run_of(tmp_path)
    promise = {"unit": "example", "epsilon": None, "delta": 1e-3, "not_covered": ["all else"]}
    (run / "privacy_statement.json").write_text(json.dumps(promise))
    monkeypatch.setattr("fedsp.audit.model_card._table", None)
    with pytest.raises(TypeError):
        api.export(run, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    monkeypatch.undo()
    api.export(run, tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "for each example: epsilon that only its own ledger knows at delta 0.001" in card


def test_a_card_of_a_run_that_was_not_measured_says_so(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    figures = json.loads((run / "result.json").read_text())
    del figures["test"]
    (run / "result.json").write_text(json.dumps(figures))
    card = model_card(RunDirectory.open(run), kind="a", base_model="b", use="c")
    assert "There were no test questions: nothing was measured." in card
    (run / "result.json").unlink()
    card = model_card(RunDirectory.open(run), kind="a", base_model="b", use="c")
    assert "The run is not finished: nothing was measured" in card and "Clients held" not in card


def test_a_card_tells_what_the_parties_said_of_their_text(tmp_path: Path) -> None:
    """As their requests have it, once each, and not where a single client must not show."""
    folder = tmp_path / "federation" / "server"
    init_federation(tmp_path / "federation", ["a"], "localhost:8000")
    for name, about in (("b", "Letters | of 2024"), ("c", "Letters | of 2024"), ("d", "Notes")):
        init_party(tmp_path / name, name, "localhost:8000", about)
        admit(tmp_path / name / "request.json", folder)
    values = {
        "model": {"name": "embedded"},
        "data": {},
        "distill": {"text": ["x"]},
        "federation": {"folder": str(folder)},
    }
    assert _described(make_config(values)) == "Letters | of 2024; Notes"
    private = {
        "privacy": {"unit": "client", "noise_multiplier": 1.0},
        "round": {"weighting": "uniform", "min_clients": 0},
    }
    told = _described(make_config({**values, **private}))
    assert "Notes" not in told and "nothing of single clients" in told
    shutil.rmtree(folder)
    assert "the server's register is elsewhere" in _described(make_config(values))
