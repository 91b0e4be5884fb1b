"""Rows, tasks, encoding and partition: what users bring, and what must hold whatever they bring."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import harness_task
from fedsp.config import PartitionSection
from fedsp.data.encoding import IGNORED, Encoded, collate, encode_pairs, training_batches
from fedsp.data.files import read_passages, read_rows
from fedsp.data.partition import make_partition
from fedsp.data.tasks import TASKS, examples_of, find_task
from fedsp.errors import DataError
from fedsp.loading import load_tokenizer
from fedsp.server import EMBEDDED

TOKENIZER = load_tokenizer(str(EMBEDDED / "model"))

HUB_ROWS: dict[str, tuple[dict[str, Any], str, list[str], list[int]]] = {
    "arc_easy": ({"question": "Why?", "choices": {"text": ["a b", "c"], "label": ["1", "2"]}, "answerKey": "2"}, "Question: Why?\nAnswer:", ["a b", "c"], [1]),
    "openbookqa": (
        {"question_stem": "Plants need", "choices": {"text": ["sun", "tar"], "label": ["A", "B"]}, "answerKey": " A"},
        "Plants need",
        ["sun", "tar"],
        [0],
    ),
    "piqa": ({"goal": "Boil", "sol1": "heat it", "sol2": "cool it", "label": 0}, "Question: Boil\nAnswer:", ["heat it", "cool it"], [0]),
    "sciq": (
        {"support": " It is.", "question": "What?", "distractor1": "x", "distractor2": "y", "distractor3": "z", "correct_answer": "w"},
        "It is.\nQuestion: What?\nAnswer:",
        ["x", "y", "z", "w"],
        [3],
    ),
    "hellaswag": (
        {"activity_label": "Roof", "ctx_a": "A man.", "ctx_b": "he [step] sits", "endings": ["falls [title] down", " goes"], "label": "1"},
        "Roof: A man. He sits",
        ["falls. down", "goes"],
        [1],
    ),
    "race": (
        {
            "article": "Text.",
            "problems": str(
                [
                    {"question": "It was  _  .", "answer": "B", "options": ["a", "bee", "c", "d"]},
                    {"question": "Who?", "answer": "A", "options": ["he", "b", "c", "d"]},
                    {"question": "Why?", "answer": "D", "options": ["1", "2", "3", "4"]},
                ]
            ),
        },
        "Article: Text.\n\nIt was bee\nQuestion: Who?\nAnswer: he\nWhy?",
        ["1", "2", "3", "4"],
        [3],
    ),
    "webqs": ({"question": "where?", "answers": ["Paris, France", "Lyon", "Paris"]}, "Question: where?\nAnswer:", ["Lyon", "Paris"], [0, 1]),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_rows_are_rendered_as_the_harness_renders_them(name: str) -> None:
    row, context, choices, gold = HUB_ROWS[name]
    (example,) = examples_of(find_task(name), [row])
    assert example.context == context
    assert example.choices == tuple(f" {choice}" for choice in choices)
    assert example.gold == tuple(gold)


@pytest.mark.parametrize("name", ["arc_easy", "openbookqa", "piqa", "sciq", "hellaswag", "race", "webqs"])
def test_rendering_equals_the_harness(name: str, tmp_path: Path) -> None:
    """The same rows through lm-evaluation-harness's own task files."""
    row = HUB_ROWS[name][0]
    task = harness_task(name, [row], tmp_path)
    (document,) = task.test_docs()
    (example,) = examples_of(find_task(name), [row])
    assert example.context == task.doc_to_text(document)
    assert [choice[1:] for choice in example.choices] == list(task.doc_to_choice(document))
    target = task.doc_to_target(document)
    assert list(example.gold) == (target if isinstance(target, list) else [int(target)])


def test_own_rows_multiple_choice_and_completion() -> None:
    question, completion = find_task("multiple_choice"), find_task("completion")
    (example,) = examples_of(question, [{"context": "Facts.", "question": "So?", "choices": [" yes", "no"], "answer": 1, "id": "q"}])
    assert (example.context, example.choices, example.target) == ("Facts.\nQuestion: So?\nAnswer:", (" yes", " no"), " no")
    (example,) = examples_of(completion, [{"prompt": "Dear ", "completion": "Sir"}])
    assert (example.context, example.target) == ("Dear", " Sir")


def test_files_in_every_form(tmp_path: Path) -> None:
    row = {"question": "q", "choices": ["a", "b"], "answer": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(row))
    (tmp_path / "a.csv").write_text('question,choices,answer\nq,"[""a"", ""b""]",1\n')
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv"):
        (example,) = examples_of(TASKS["multiple_choice"], read_rows(tmp_path / name))
        assert example.target == " b"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"question": "q"}\nnot json\n', r"line 2 is not JSON"),
        ('{"question": "q"}\n[1]\n', r"line 2 is a JSON list"),
        ("", "holds no rows"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "line 1 has answer 2 but 2 choices: expected an index from 0 to 1"),
        ('{"question": "q", "choices": ["a", "b"], "answer": -1}', "line 1 has answer -1"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "b"}', "line 1 cannot be read.*answer is a str, not an index"),
        ('{"question": "q", "choices": "Anna Q has it", "answer": 0}', "line 1 cannot be read.*choices is a str, not a list"),
        ('{"question": "q", "choices": ["a"]}', "line 1 has no field 'answer'.*needs question"),
        ('{"question": "q", "choices": ["a", " "], "answer": 0}', "line 1 has no choices, or an empty one"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=sentence) as error:
        examples_of(TASKS["multiple_choice"], read_rows(path))
    assert "Anna" not in str(error.value), "no example text is in an error"


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "x.jsonl.gz")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "x.jsonl")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        read_passages([tmp_path / "empty.txt"])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "rows.jsonl"
    path.write_bytes(content)
    try:
        examples_of(TASKS["multiple_choice"], read_rows(path))
    except DataError as error:
        assert str(path) in str(error)


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(st.text(max_size=60) | st.just("one context "), st.text(min_size=1, max_size=20)), max_size=5), limit=st.integers(2, 40))
def test_a_long_example_loses_old_context_and_never_the_answer(pairs: list[tuple[str, str]], limit: int) -> None:
    """And pairs that are encoded together have the tokens that each has alone."""
    asked = [(context, f" {continuation}") for context, continuation in pairs]
    for (context, continuation), full, cut in zip(asked, encode_pairs(TOKENIZER, asked, 10_000), encode_pairs(TOKENIZER, asked, limit), strict=True):
        bare = context.rstrip()
        before = TOKENIZER.encode(bare) or [TOKENIZER.bos_token_id]
        assert full.start == len(before)
        assert full.ids == tuple(
            TOKENIZER.encode(context + continuation) if bare else before + TOKENIZER.encode(context + continuation, add_special_tokens=False)
        )
        assert len(cut.ids) <= limit and cut.ids == full.ids[-len(cut.ids) :] and cut.dropped == len(full.ids) - len(cut.ids)
        answer = full.ids[full.start :]
        if len(answer) < limit:
            assert cut.ids[cut.start :] == answer


def test_batches_are_padded_to_their_own_longest_and_cover_every_row() -> None:
    rows = [Encoded(tuple(range(1, 3 + n)), 1 + n // 2) for n in range(12)]
    batches = list(training_batches(rows, steps=4, batch_size=3, seed=0))
    assert sorted(int(n) for batch in batches for n in batch.attention_mask.sum(dim=1)) == [len(row.ids) for row in rows]
    assert sum(batch.input_ids.numel() for batch in batches) < 12 * 13
    again = list(training_batches(rows, steps=4, batch_size=3, seed=0))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))
    batch = collate([rows[4]])
    assert batch.labels[0].tolist() == [IGNORED] * rows[4].start + list(rows[4].ids[rows[4].start :])


ROWS = [{"topic": f"t{index % 7}", "question": "q"} for index in range(210)]


@pytest.mark.parametrize(
    "section",
    [
        PartitionSection(clients=10),
        PartitionSection(clients=10, kind="dirichlet", column="topic", alpha=0.5),
        PartitionSection(kind="natural", column="topic"),
        PartitionSection(clients=7, kind="pathological", column="topic", values_per_client=2),
    ],
    ids=lambda section: section.kind,
)
def test_partitions_are_seeded_and_give_each_row_one_holder(section: PartitionSection) -> None:
    one, same, other = (make_partition(ROWS, section, server_share=0.1, holdout=0.1, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    held = sorted([*one.server, *one.validation, *(row for rows in one.clients.values() for row in rows)])
    assert held == list(range(210))
    assert len(one.server) == len(one.validation) == 21
    if section.kind == "natural":
        assert sorted(one.clients) == [f"t{index}" for index in range(7)]
        assert all({ROWS[row]["topic"] for row in rows} == {client} for client, rows in one.clients.items())
    if section.kind == "pathological":
        assert all(len({ROWS[row]["topic"] for row in rows}) <= 2 for rows in one.clients.values())


def test_partitions_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(DataError, match=r"partition.clients = 300, but only 210"):
        make_partition(ROWS, PartitionSection(clients=300), server_share=0, holdout=0, seed=0)
    with pytest.raises(DataError, match="has no column 'colour'"):
        make_partition(ROWS, PartitionSection(kind="natural", column="colour"), server_share=0, holdout=0, seed=0)
    with pytest.raises(DataError, match="values_per_client = 9"):
        make_partition(ROWS, PartitionSection(kind="pathological", column="topic", values_per_client=9), server_share=0, holdout=0, seed=0)
    with pytest.raises(DataError, match="cannot be made"):
        make_partition(ROWS[:12], PartitionSection(clients=10, kind="dirichlet", column="topic", alpha=0.001), server_share=0, holdout=0, seed=0)
