"""Adaptation at the server: it brings the model nearer to its teacher, reads no label, keeps
nothing that is worse, and what it writes is a LoRA adapter for PEFT."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fedsp import api as commands
from fedsp.cli import app
from fedsp.config import TaskSection
from fedsp.data.encoding import Encoded
from fedsp.data.rendering import Rendering
from fedsp.data.tasks import Example
from fedsp.errors import ConfigurationError, DataError, RunError
from fedsp.experiments import adaptation
from fedsp.experiments.adaptation import TEACHERS
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import score_test, validation_sample
from fedsp.experiments.start import OpenRun, answers_of, open_run
from fedsp.models.adapter import Adapter, AdapterSettings, global_blocks
from fedsp.models.prompted_lm import PromptedLM, continue_text
from fedsp.training import server_adaptation
from fedsp.training.answers import Answers, Side
from fedsp.training.generation import write
from fedsp.training.loop import Optimisation
from fedsp.training.server_adaptation import Adaptation, adapt, distance, lessons
from support.small_runs import ROWS, settings
from support.tiny_models import tiny_model

TEXTS = [Encoded((5, 6, 7, 8, 9, 10), 3), Encoded((11, 12, 13), 1), Encoded((20, 21, 22, 23), 3)]


def changed(model: PromptedLM, scale: float) -> Adapter:
    """An adapter in the first layer that changes what the model says."""
    adapter = Adapter(
        model,
        global_blocks([0]),
        AdapterSettings(rank=2, alpha=2.0, train_first=True),
        seed=scale != 0,
    )
    generator = torch.Generator().manual_seed(3)
    adapter.load(
        {
            name: scale * torch.randn(tensor.shape, generator=generator)
            for name, tensor in adapter.payload().items()
        }
    )
    return adapter


def other(scale: float = 0.5) -> Side:
    model = tiny_model("gpt2")
    changed(model, scale)
    return Side(model, lambda: None)


@pytest.mark.parametrize("likeliest", [1000, 5])
def test_the_divergence_is_that_of_all_tokens_but_those_that_count_as_one(
    likeliest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop over texts and answer tokens, the teacher's text read as a whole."""
    monkeypatch.setattr(server_adaptation, "LIKELIEST", likeliest)
    teacher, student = other(), Side(tiny_model("gpt2"), lambda: None)
    said = lessons(teacher, TEXTS, 2.0)
    terms = []
    for text in TEXTS:
        ids = torch.tensor([text.ids])
        theirs, ours = (
            torch.softmax(side.model.logits(side.model(ids))[0] / 2.0, dim=-1).double()
            for side in (teacher, student)
        )
        for place in range(text.start - 1, len(text.ids) - 1):
            named = theirs[place].topk(min(likeliest, theirs.shape[1] - 1)).indices
            rest = torch.ones(theirs.shape[1], dtype=torch.bool).index_fill(0, named, False)
            p = torch.cat([theirs[place][named], theirs[place][rest].sum()[None]])
            q = torch.cat([ours[place][named], ours[place][rest].sum()[None]])
            terms.append(float((p * (p / q).log()).sum()))
    assert float(distance(student, said, 2.0)) == pytest.approx(sum(terms) / 6, rel=1e-3)
    assert float(distance(teacher, said, 2.0)) == pytest.approx(0.0, abs=1e-5)


def test_the_student_comes_to_answer_as_its_teacher_does() -> None:
    teacher, model = other(), tiny_model("gpt2")
    student = Adapter(
        model,
        global_blocks(range(4)),
        AdapterSettings(rank=4, alpha=4.0, train_first=True),
        seed=0,
    )
    said = lessons(teacher, TEXTS, 1.0)
    answers = Side(model, lambda: None)
    before = float(distance(answers, said, 1.0))
    how = Adaptation(
        steps=60, batch_size=2, optimisation=Optimisation(learning_rate=1e-2), temperature=1.0
    )
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    adapt(model, student, said, how, seed=0)
    assert float(distance(answers, said, 1.0)) < before / 4
    assert all(tensor.equal(weights[name]) for name, tensor in model.model.state_dict().items())


def test_what_the_teacher_writes_is_what_it_would_say_token_by_token() -> None:
    teacher = other()
    texts = [(5, 6, 7), (11,), (20, 21, 22, 23)]
    stop = continue_text(teacher.reader(), torch.tensor(texts[0]), most=3, room=99)[2]
    for row, text in zip(write(teacher, texts, 6, {stop}), texts, strict=True):
        assert row.ids[: row.start] == text
        assert list(row.ids[row.start :]) == continue_text(
            teacher.reader(), torch.tensor(text), most=6, room=99, stop={stop}
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adaptation")
    values = settings(
        folder,
        auxiliary={"plan": "emulator(1, 1)"},
        messenger={"kind": "adapter", "rank": 8, "train_first": True},
        round={"rounds": 4},
        client={"prompt_steps": 8, "batch_size": 8, "learning_rate": 5e-3},
    )
    return Path(commands.run(values)["folder"])


def validation_of(opened: OpenRun, answers: Answers) -> float:
    server = opened.server
    examples = validation_sample(server)
    figures, _ = score_test(
        opened.model, None, examples, server.tokenizer, server.max_tokens, answers.scorer()
    )
    return figures["answer_loss"]


def asked(folder: Path, count: int = 40, **label: Any) -> Path:
    path = folder / "asked.jsonl"
    keep = [{key: row[key] for key in ("question", "choices")} | label for row in ROWS[:count]]
    path.write_text("".join(json.dumps(row) + "\n" for row in keep))
    return path


@pytest.mark.study
def test_an_adaptation_is_kept_where_validation_falls_and_reads_no_label(
    run: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"steps": 12, "batch_size": 8, "learning_rate": 2e-3}
    figures = commands.adapt(run, asked(tmp_path), tmp_path / "lora", **how)
    assert figures["kept"] and figures["measure"] == "validation loss"
    assert figures["after"] < figures["before"]
    assert figures["test_teacher"]["answer_loss"] < figures["test_before"]["answer_loss"]
    assert figures["before"] == pytest.approx(
        commands.evaluate(run, split="validation")[1]["answer_loss"], abs=1e-5
    )
    opened = open_run(run)
    losses = {who: validation_of(opened, answers_of(opened, who, 1.0)) for who in TEACHERS}
    assert losses[figures["teacher"]] == min(losses.values())
    asked(tmp_path, answer=3)
    words = ["adapt", run, tmp_path / "asked.jsonl", tmp_path / "other"]
    words += [word for key, value in how.items() for word in (f"--{key.replace('_', '-')}", value)]
    told = CliRunner().invoke(app, [*map(str, words), "--json", str(tmp_path / "figures.json")])
    assert told.exit_code == 0 and f"{tmp_path / 'other'} is a PEFT adapter" in told.output
    labelled = json.loads((tmp_path / "figures.json").read_text())
    assert labelled == json.loads(json.dumps(figures)), "a label, right or wrong, changes nothing"
    peft = pytest.importorskip("peft", reason="PEFT comes with the study extra")
    peft.PeftModel.from_pretrained(opened.model.model, tmp_path / "lora")  # in place
    opened.prefix(zero_shot=True)
    assert validation_of(opened, Side(opened.model, lambda: None)) == pytest.approx(
        figures["after"], abs=1e-5
    )


@pytest.mark.study
def test_questions_in_a_table_need_no_answer_either(run: Path, tmp_path: Path) -> None:
    table = tmp_path / "asked.csv"
    with table.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["question", "choices"])
        out.writerows([row["question"], json.dumps(row["choices"])] for row in ROWS[:12])
    figures = commands.adapt(run, table, tmp_path / "lora", steps=1, batch_size=2)
    assert figures["questions"] == 12
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"\(answer is not read here\); it has prompt$"):
        commands.adapt(run, other, tmp_path / "another")


@pytest.mark.study
def test_adapters_of_distilled_layers_carry_where_no_layer_is_verbatim(tmp_path: Path) -> None:
    """The global model reads them in the layers that they were distilled of, and learns there what
    it does not read."""
    values = settings(
        tmp_path,
        auxiliary={"plan": [0, 4, 7]},
        messenger={"kind": "adapter", "rank": 8, "train_first": True, "layers": "all"},
        round={"rounds": 4},
        client={"prompt_steps": 8, "batch_size": 8, "learning_rate": 5e-3},
    )
    folder = Path(commands.run(values)["folder"])
    run = open_run(folder)
    assert RunDirectory.open(folder).result()["disclosed_share"] < 0.01
    zero = validation_of(run, run.side(zero_shot=True))
    tuned = validation_of(run, run.side())
    assert tuned < 0.9 * zero
    how: dict[str, Any] = {"steps": 12, "batch_size": 8, "learning_rate": 2e-3}
    figures = commands.adapt(folder, asked(tmp_path), tmp_path / "lora", **how)
    assert figures["before"] == pytest.approx(tuned, abs=1e-5)
    assert figures["kept"] and figures["after"] < figures["before"]


@pytest.mark.study
def test_what_is_not_better_is_not_written(run: Path, tmp_path: Path) -> None:
    figures = commands.adapt(
        run, asked(tmp_path), tmp_path / "lora", steps=3, batch_size=4, learning_rate=1.0
    )
    assert not figures["kept"] and figures["after"] > figures["before"]
    assert not (tmp_path / "lora").exists()


@pytest.mark.study
def test_an_answer_that_the_teacher_ends_is_taught_to_its_end(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run trains the end of its choices, and where the teacher stops writing."""
    opened = open_run(run)
    end = opened.server.tokenizer.eos_token_id
    asked = [{"text": "Who?"}]
    choices = [
        Rendering(TaskSection(task="classification", ends=ends), ("she",)).questions(asked)[0]
        for ends in (True, False)
    ]
    written = [
        Example(id=str(number), context=text, choices=(" x",), gold=(0,), metric="exact_match")
        for number, text in enumerate(("Where?", "When?"))
    ]
    monkeypatch.setattr(
        adaptation,
        "write",
        lambda _, texts, most, stop: [
            Encoded((*text, *[7] * count), len(text))
            for text, count in zip(texts, (2, most), strict=True)
        ],
    )
    rows = adaptation._answered(opened, [*written, *choices], opened.side())
    assert [row.ids[-1] == end for row in rows] == [True, False, True, False]
    assert [len(row.ids) - row.start for row in rows[2:]] == [3, adaptation.LONGEST_ANSWER]


@pytest.mark.study
def test_a_teacher_that_says_nothing_teaches_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsp.experiments.adaptation._answered", lambda *_: [])
    with pytest.raises(DataError, match="the teacher answers 0 times: give at least 10"):
        commands.adapt(run, asked(tmp_path), tmp_path / "lora")


@pytest.mark.study
def test_without_validation_questions_the_teacher_itself_is_the_measure(tmp_path: Path) -> None:
    """Completions: the teacher writes them."""
    values = settings(
        tmp_path,
        auxiliary={"plan": "emulator(1, 1)"},
        messenger={"kind": "adapter", "rank": 8, "train_first": True},
        client={"prompt_steps": 8, "batch_size": 8, "learning_rate": 5e-3},
        validation={"by": "none"},
    )
    rows = [
        {"prompt": row["question"], "completion": row["choices"][row["answer"]]} for row in ROWS
    ]
    train = tmp_path / "completions.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows[:60]))
    values["data"] = {
        "task": "completion",
        "train": str(train),
        "holdout": 0.0,
        "test_holdout": 0.0,
    }
    folder = Path(commands.run(values)["folder"])
    questions = tmp_path / "asked.jsonl"
    questions.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:20]))
    figures = commands.adapt(
        folder, questions, tmp_path / "lora", steps=12, batch_size=8, answers="auxiliary"
    )
    assert figures["measure"] == "divergence from the teacher" and figures["test_after"] == {}
    assert figures["kept"] and figures["after"] < figures["before"]
    assert (tmp_path / "lora" / "adapter_config.json").exists()


@pytest.mark.study
def test_what_cannot_be_adapted_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match="has 9 questions that are none of the run's own for",
    ):
        commands.adapt(run, asked(tmp_path, 9), tmp_path / "lora")
    known = tmp_path / "known.jsonl"
    known.write_text("".join(json.dumps(row) + "\n" for row in ROWS[100:112]))
    with pytest.raises(DataError, match=r"known.jsonl has 0 questions that are none of the"):
        commands.adapt(run, known, tmp_path / "lora")
    wrong: list[dict[str, Any]] = [{"learning_rate": -1.0}, {"temperature": 0.0}, {"steps": 0}]
    for settings_ in wrong:
        ((setting, _),) = settings_.items()
        with pytest.raises(ConfigurationError, match=f"{setting} = .*: it must be a number above"):
            commands.adapt(run, asked(tmp_path), tmp_path / "lora", **settings_)
    with pytest.raises(RunError, match="is in use: give a new folder"):
        commands.adapt(run, asked(tmp_path), tmp_path)
    with pytest.raises(ConfigurationError, match="the global model is its own teacher"):
        commands.adapt(run, asked(tmp_path), tmp_path / "lora", answers="global")
    prompted = settings(tmp_path / "prefix", method="fedprompt")
    other_run = commands.run(prompted)["folder"]
    with pytest.raises(RunError, match="has no auxiliary model to answer with"):
        commands.adapt(other_run, asked(tmp_path), tmp_path / "lora")
    assert not (tmp_path / "lora").exists() and answers_of(open_run(run), "mean", 1.0).room()
