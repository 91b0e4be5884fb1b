"""Runs whose rows carry labels, name their tasks, or are conversations: what is measured, and what
is written."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score, precision_recall_fscore_support

from fedsp import api as commands
from fedsp.config_file import make_config
from fedsp.data.dataset import load_dataset
from fedsp.errors import ConfigurationError, DataError
from fedsp.experiments import start
from fedsp.storage import parse_json
from fedsp.training.generation import normalised, sampler, token_f1, written_figures
from support import gguf_made
from support.gguf_made import tiny_llama, write_gguf
from support.small_runs import ROWS, questions, settings

KINDS = ["where", "who", "when"]
TEXTS = [
    {"text": f"{row['question']} ({number})", "label": KINDS[number % 3], "office": number % 2}
    for number, row in enumerate(ROWS[:90])
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["choices"][row["answer"]]},
        ]
    }
    for row in ROWS[:70]
]


def run_of(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    data = {
        "train": questions(folder, "own", rows[:-30]),
        "validation": questions(folder, "checked", rows[-30:-20]),
        "test": questions(folder, "asked", rows[-20:]),
    }
    changes["data"] = data | changes.get("data", {})
    return settings(folder, round={"rounds": 1}, **changes)


def test_labels_are_measured_by_class_and_client_as_scikit_learn_does(tmp_path: Path) -> None:
    figures = commands.run(
        run_of(
            tmp_path,
            TEXTS,
            data={"task": "classification", "template": "{text}\nKind:"},
            partition={"kind": "natural", "column": "office", "clients": 2, "server_share": 0.0},
        )
    )
    scores = (Path(figures["folder"]) / "scores.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in scores]
    own = [row["gold"][0] for row in rows]
    given = [max(range(3), key=row["log_likelihoods"].__getitem__) for row in rows]
    labels = sorted(KINDS)
    assert figures["test"]["macro_f1"] == pytest.approx(
        f1_score(own, given, average="macro", zero_division=0)
    )
    theirs = precision_recall_fscore_support(own, given, labels=[0, 1, 2], zero_division=0)
    for number, label in enumerate(labels):
        if label in figures["labels"]:
            ours = figures["labels"][label]
            assert [ours[key] for key in ("precision", "recall", "f1", "examples")] == (
                pytest.approx([float(column[number]) for column in theirs])
            )
    assert 0 <= figures["test"]["exact_match"] <= 1 and set(figures["clients"]) == {"0", "1"}
    (zero, tuned) = commands.evaluate(figures["folder"])
    assert tuned["accuracy"] == figures["test"]["accuracy"] and "labels" in zero
    other = questions(tmp_path, "later", TEXTS[-20:])
    assert commands.evaluate(figures["folder"], data=other) == [zero, tuned]
    with pytest.raises(DataError, match="there is no file .*never.jsonl"):
        commands.evaluate(figures["folder"], data=tmp_path / "never.jsonl")


def test_labels_that_are_not_known_are_refused(tmp_path: Path) -> None:
    given = run_of(tmp_path, TEXTS, data={"task": "classification"})
    given["data"]["train"] = questions(tmp_path, "none", [TEXTS[0] | {"label": "else"}])
    with pytest.raises(DataError, match=r"checked\.jsonl, line 1 .*not one of the 1 to choose"):
        commands.run(given)
    del given["data"]["train"]  # a server whose clients hold all examples
    given["partition"] = {}
    config = make_config(given | {"federation": {"folder": str(tmp_path)}})
    with pytest.raises(DataError, match=r"data\.labels: the server holds no training examples"):
        load_dataset(config)
    listed = config.model_copy(update={"data": config.data.model_copy(update={"labels": KINDS})})
    assert load_dataset(listed).test[0].choices == tuple(f" {kind}" for kind in KINDS)


@pytest.mark.parametrize("unit", ["client", "example"])
def test_a_private_run_takes_no_labels_from_private_examples(unit: str, tmp_path: Path) -> None:
    """One client's label, by being one to choose, would change figures that are published."""
    pytest.importorskip("dp_accounting", reason="dp-accounting comes with the privacy extra")
    privacy = {"unit": unit, "noise_multiplier": 1.0}
    given = run_of(tmp_path, TEXTS, data={"task": "classification"}, privacy=privacy)
    given["round"] |= {"weighting": "uniform", "min_clients": 0}
    with pytest.raises(DataError, match=r"data\.labels: .*would be those of private examples"):
        load_dataset(make_config(given))
    given["data"]["labels"] = KINDS
    assert load_dataset(make_config(given)).train


def test_examples_held_out_for_validation_have_all_labels_to_choose_from(tmp_path: Path) -> None:
    given = run_of(tmp_path, TEXTS, data={"task": "classification", "holdout": 0.2})
    del given["data"]["validation"]
    found = load_dataset(make_config(given))
    assert len(found.validation) == 12
    assert {row.choices for row in found.validation} == {(" when", " where", " who")}
    own = [found.train[index] for index in found.partition.validation]
    assert [(row.id, row.context, row.target) for row in found.validation] == [
        (row.id, row.context, row.target) for row in own
    ]


def test_several_tasks_in_one_federation_are_measured_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        dict(ROWS[number], kind="arc_easy", silo="a")
        if number % 2
        else {"kind": "completion", "prompt": "Say", "completion": "yes", "silo": "b"}
        for number in range(80)
    ]
    figures = commands.run(
        run_of(
            tmp_path,
            rows,
            data={"task_column": "kind"},
            partition={"kind": "natural", "column": "silo", "server_share": 0.0},
        )
    )
    tasks = figures["tasks"]
    assert set(tasks) == {"arc_easy", "completion"}
    assert sum(one["examples"] for one in tasks.values()) == figures["test"]["examples"] == 20
    mean = (tasks["arc_easy"]["accuracy"] + tasks["completion"]["exact_match"]) / 2
    assert figures["test"]["accuracy"] == pytest.approx(mean)
    monkeypatch.setattr(start.OpenRun, "write", lambda *words: ["yes"] * len(words[2]))
    found = commands.evaluate(figures["folder"], zero_shot=False, write=3)
    names = [row["prompt"] for row in found]
    assert names == ["tuned prompt", "tuned prompt, arc_easy", "tuned prompt, completion"]
    parts = [(row["examples"], row["written_exact_match"]) for row in found]
    assert parts == [(20, 0.5), (10, 0.0), (10, 1.0)]


def test_a_plan_sees_that_a_model_has_no_chat_template(tmp_path: Path) -> None:
    given = run_of(tmp_path, CHATS, data={"task": "chat"})
    with pytest.raises(DataError, match="the model's tokenizer has no chat template"):
        commands.plan(given)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of conversations with a model in a GGUF file."""
    folder = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        figures = commands.run(
            run_of(
                folder,
                CHATS,
                model={"name": str(write_gguf(folder / "tiny.gguf", tiny_llama()))},
                auxiliary={"plan": "ends(1)"},
                data={"task": "chat"},
            )
        )
    assert figures["test"]["exact_match"] == 0.0 and figures["test"]["answer_loss"] > 0
    return Path(figures["folder"])


def test_a_chat_is_answered_in_its_template(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(chat.parent / "cache"))
    greedy = commands.generate(chat, "Who is it?", most=6)
    assert greedy == commands.generate(chat, "Who is it?", most=6, temperature=0.0, seed=3)
    drawn = [
        commands.generate(chat, "Who is it?", most=6, temperature=2.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert commands.generate(chat, "Who?", most=6, system="Be odd.") != commands.generate(
        chat, "Who?", most=6
    )
    for wrong, sentence in (
        ({"temperature": -1.0}, "temperature = -1.0: it must be 0"),
        ({"top_p": 0.0}, r"top_p = 0\.0: it must be above 0 and at most 1"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            commands.generate(chat, "Who?", **wrong)  # type: ignore[arg-type]


def test_an_answer_ends_before_a_text_to_stop_at(
    chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever tokens are cut, the first of several counts, and no token behind it is read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(chat.parent / "cache"))
    drawn = partial(commands.generate, chat, "Who is it?", most=12, temperature=2.0, seed=1)
    whole = drawn()
    middle = whole[len(whole) // 2 :][:2]
    cut = drawn(stop=[middle, "nowhere"])
    assert cut == whole[: whole.index(middle)] and 0 < len(cut) < len(whole)
    assert drawn(stop=[middle, whole[0]]) == ""
    assert drawn(stop=["nowhere"]) == whole
    with pytest.raises(ConfigurationError, match="an empty text would end every answer"):
        commands.generate(chat, "Who is it?", stop=[""])


def test_answers_in_every_alphabet_and_of_one_letter_are_measured() -> None:
    figures = written_figures(["", "B", "+"], [["A"], ["B"], ["+"]])
    assert figures["written_exact_match"] == figures["written_token_f1"] == pytest.approx(2 / 3)
    pairs = ["Москва", "東京", "Ζεστό νερό", "Münze gefüllt"]
    assert written_figures(pairs, [[one] for one in pairs])["written_rouge_l"] == 1.0
    assert written_figures(["Münze gefüllt"], [["Mänze gefällt"]])["written_rouge_l"] == 0.0


def test_an_empty_prompt_is_answered_behind_the_token_that_begins_a_text(tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": f"yes {number}"} for number in range(60)]
    figures = commands.run(run_of(tmp_path, rows, data={"task": "completion"}))
    (row,) = commands.evaluate(figures["folder"], zero_shot=False, write=2)
    assert len(row["written"]) == 20 and len(set(row["written"])) == 1


def test_what_is_written_is_measured(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(chat.parent / "cache"))
    (row,) = commands.evaluate(chat, zero_shot=False, write=5)
    lines = (chat.parent / "asked.jsonl").read_text().splitlines()
    asked = [parse_json(line)["messages"] for line in lines]
    expected = [[messages[-1]["content"]] for messages in asked]
    assert row["written"][0] == commands.generate(chat, asked[0][0]["content"], most=5).strip()
    measured = written_figures(row["written"], expected)
    assert {name: row[name] for name in measured} == measured


def test_written_answers_are_compared_as_squad_and_rouge_score_do() -> None:
    assert normalised("  The quick, brown   FOX! ") == "quick brown fox"
    assert token_f1("the cat sat", "a cat") == pytest.approx(2 / 3)
    assert token_f1("", "") == 1.0 and token_f1("a", "x") == 0.0
    written, expected = ["The cat sat.", "no"], [["a dog", "cat sat"], ["yes"]]
    figures = written_figures(written, expected)
    best = RougeScorer(["rougeL"]).score("cat sat", "The cat sat.")["rougeL"].fmeasure
    assert figures == {
        "written_exact_match": 0.5,
        "written_token_f1": 0.5,
        "written_rouge_l": pytest.approx(best / 2),
    }


def test_what_is_drawn_is_among_the_likeliest_and_by_their_shares() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -9.0]).log_softmax(dim=0)
    assert sampler(0.0, 1.0, 5)(scores) == 0
    draw = sampler(1.0, 0.9, 5)
    counts = torch.bincount(torch.tensor([draw(scores) for _ in range(3000)]), minlength=4)
    assert counts[2:].tolist() == [0, 0]  # the first two add up to 0.9
    share = float(scores[:2].softmax(dim=0)[0])
    assert float(counts[0]) / 3000 == pytest.approx(share, abs=0.03)


def test_an_adapter_of_a_gguf_file_is_used_as_its_card_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT comes with the study extra")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    given = settings(
        tmp_path,
        model={"name": "tiny.gguf"},
        auxiliary={"plan": "ends(1)"},
        messenger={"kind": "adapter", "rank": 2},
        round={"rounds": 1},
    )
    commands.export(commands.run(given)["folder"], "adapter")
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == "tiny.gguf"
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in card
    found: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], found)
    assert isinstance(found["model"], peft.PeftModel)
    run = start.open_run(tmp_path / "run")
    run.messenger.load(run.best)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = run.model.logits(run.model(tokens))
        torch.testing.assert_close(found["model"](tokens).logits, ours, rtol=1e-3, atol=1e-4)


def test_in_a_run_of_several_tasks_a_system_message_makes_a_text_a_chat(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [dict(CHATS[number % len(CHATS)], kind="chat") for number in range(40)]
    rows += [{"kind": "", "prompt": "Say", "completion": "yes"} for _ in range(40)]
    folder = commands.run(
        run_of(
            tmp_path,
            [rows[number // 2 + 40 * (number % 2)] for number in range(80)],
            model={"name": str(chat.parent / "tiny.gguf")},
            auxiliary={"plan": "ends(1)"},
            data={"task": "completion", "task_column": "kind"},
        )
    )["folder"]
    asked: list[Any] = []

    def question_ids(_: object, turns: Any) -> list[int]:
        asked.append(list(turns))
        return [3, 4, 5]

    monkeypatch.setattr("fedsp.api.question_ids", question_ids)
    commands.generate(folder, "Who?", most=2, system="Be odd.")
    commands.generate(folder, "Who?", most=2)
    assert asked == [[("system", "Be odd."), ("user", "Who?")]]


@pytest.mark.parametrize(
    ("most", "sentence"),
    [
        (250, "answers of up to 250 tokens leave 6 of the model's 256 positions for the question"),
        (10000, "leave 0 of the model's 256 positions for the question: let it write fewer"),
    ],
)
def test_answers_that_leave_no_room_for_the_question_are_refused(
    most: int, sentence: str, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(chat.parent / "cache"))
    with pytest.raises(DataError, match=sentence):
        commands.evaluate(chat, zero_shot=True, write=most)


def test_numbers_that_nothing_can_be_drawn_or_written_by_are_refused(
    chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(chat.parent / "cache"))
    with pytest.raises(ConfigurationError, match="write = -1: answers have at least one token"):
        commands.evaluate(chat, write=-1)
    with pytest.raises(ConfigurationError, match="it must be a number of at most 63 bits"):
        commands.generate(chat, "Who?", temperature=1.0, seed=1 << 63)


def test_a_conversation_that_is_refused_is_found_out_before_a_package_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds it, and no folder stays behind that would stand in the mended run's way."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("fedsp.experiments.server_setup.build_auxiliary", lambda *_, **__: 1 / 0)
    refuses = "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}"
    monkeypatch.setattr("support.gguf_made.CHAT", refuses + gguf_made.CHAT)
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    asked = [{"role": "user", "content": "a"}] * 2
    wrong = {"messages": [*asked, {"role": "assistant", "content": "x"}]}
    for split in ("own", "checked", "asked"):
        given = run_of(
            tmp_path,
            CHATS,
            model={"name": str(tmp_path / "tiny.gguf")},
            auxiliary={"plan": "ends(1)"},
            data={"task": "chat"},
        )
        path = tmp_path / f"{split}.jsonl"
        path.write_text(path.read_text() + json.dumps(wrong) + "\n")
        with pytest.raises(DataError, match=rf"{split}\.jsonl, line \d+: .*too many"):
            commands.run(given)
        assert not (tmp_path / "run").exists()


def test_a_column_of_tasks_that_no_row_has_is_refused(tmp_path: Path) -> None:
    given = run_of(tmp_path, TEXTS, data={"task": "classification", "task_column": "kindd"})
    with pytest.raises(DataError, match=r"data.task_column = 'kindd': no row has such a column"):
        load_dataset(make_config(given))
    rows = [{**row, "kindd": "classification"} for row in TEXTS[-30:-20]]
    questions(tmp_path, "checked", rows)
    assert load_dataset(make_config(given)).validation


def test_a_system_message_is_for_chats(tmp_path: Path) -> None:
    folder = commands.run(settings(tmp_path, round={"rounds": 1}))["folder"]
    with pytest.raises(ConfigurationError, match="is of the task 'multiple_choice', which has no"):
        commands.generate(folder, "Who?", system="Be odd.")


@pytest.mark.recipe
def test_a_completion_that_was_learned_ends(tmp_path: Path) -> None:
    row, answer = ROWS[0], ROWS[0]["choices"][ROWS[0]["answer"]]
    rows = [{"prompt": row["question"], "completion": answer}] * 40

    def written(ends: bool) -> str:
        given = run_of(tmp_path / str(ends), rows, data={"task": "completion", "ends": ends})
        given |= {
            "preset": "messenger",
            "method": "lora",
            "lora": {"rank": 8, "alpha": 16.0, "targets": ["c_attn", "c_proj", "c_fc"]},
            "client": {"prompt_steps": 40, "batch_size": 4, "learning_rate": 1e-2},
        }
        del given["prompt"]
        return commands.generate(commands.run(given)["folder"], rows[0]["prompt"], most=12)

    goes_on = written(False)
    assert written(True) == f" {answer}"
    assert goes_on.startswith(f" {answer}") and len(goes_on) > len(answer) + 1
