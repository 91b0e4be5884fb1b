"""The embedded default: what it holds, and that the recipe works. The recipe trains for real."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp.errors import ConfigurationError
from fedsp.experiments.demo import DEMO, DEMO_ROWS, demo, demo_config, write_forms
from fedsp.experiments.embedded import EMBEDDED


def rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EMBEDDED / f"{split}.jsonl").read_text().splitlines()]


def people(split: str) -> set[str]:
    return {str(row["id"]).split("-")[0] for row in rows(split)}


def test_what_is_embedded_is_small_and_whole() -> None:
    assert (EMBEDDED / "model" / "model.safetensors").stat().st_size <= 4_000_000
    assert len({row["owner"] for row in rows("train")}) == 10
    assert all(
        row["choices"][row["answer"]] and len(set(row["choices"])) == 4
        for split in ("train", "validation", "test")
        for row in rows(split)
    )


def test_the_demo_asks_for_its_libraries_before_it_works_and_its_setup_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).resolve().parents[2]
    setup = (root / "Makefile").read_text().partition("\n.venv/ready:")[2].partition("\n\n")[0]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert "-e '.[study]'" in setup
    assert any(name.startswith("peft") for name in extras["optional-dependencies"]["study"])
    monkeypatch.setattr("fedsp.errors.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"peft is not installed: .*\[study\]"):
        demo(folder=tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_nobody_who_is_asked_about_in_the_test_is_anybody_s_data() -> None:
    assert not people("test") & people("train")
    assert not people("test") & people("validation")
    public = (EMBEDDED / "public.txt").read_text()
    assert not any(f"{person} " in public for person in people("test"))


def test_the_question_form_was_not_in_the_training_text() -> None:
    import importlib.util

    path = Path(__file__).resolve().parents[2] / "scripts" / "make_demo.py"
    spec = importlib.util.spec_from_file_location("make_demo", path)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for _, statements, question in script.RELATIONS.values():
        assert question.endswith(":") and all(":" not in statement for statement in statements)


def test_every_form_is_known_to_one_office_and_asks_for_one_fact_of_a_person(
    tmp_path: Path,
) -> None:
    offices = write_forms(tmp_path)
    assert len(offices) == 10
    asked: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for line in (tmp_path / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            name, kind = row["id"].split("-")
            asked.setdefault(row["question"].replace(name, "NAME"), set()).add(row["owner"])
            assert row["owner"].startswith(f"{kind}-") and len(set(row["choices"])) == 4
    assert sorted(owner for owners in asked.values() for owner in owners) == offices
    articles = (EMBEDDED / "public.txt").read_text()
    assert not any(form.partition("NAME")[0].strip(" ,") in articles for form in asked)


@pytest.mark.recipe
def test_all_offices_together_answer_what_none_can_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 12 of the demo's 20 rounds, by two workers. 400 questions: the standard error of a
    difference is at most 3.5 points, so 20 points are six of them."""
    torch.set_num_threads(2)  # of which the demo makes two workers, with one each
    monkeypatch.setitem(DEMO, "round", {"rounds": 12})
    monkeypatch.setitem(DEMO, "validation", DEMO["validation"] | {"every": 4})
    monkeypatch.setattr("fedsp.experiments.run.measure", lambda *_: {})
    rows = {row["method"]: row for row in demo(seed=0, folder=tmp_path / "demo")}
    assert list(rows) == [
        "zero-shot",
        "best office alone",
        "prompt",
        "adapter",
        "its auxiliary model",
        "central",
    ]
    adapter, alone = rows["adapter"]["accuracy"], rows["best office alone"]["accuracy"]
    value, low, high = rows["adapter"]["benefit"]
    assert value == pytest.approx(adapter - alone) and low < value < high
    assert low > 0.15 and adapter > rows["prompt"]["accuracy"] + 0.15
    assert alone < 0.4 and rows["zero-shot"]["accuracy"] < 0.3


def test_every_row_of_the_demo_is_a_configuration(tmp_path: Path) -> None:
    configs = {
        method: demo_config(method, seed=0, folder=tmp_path, auxiliary=tmp_path)
        for method in DEMO_ROWS
    }
    assert configs["adapter"].server.steps == 0 and configs["adapter"].messenger.kind == "adapter"
    assert configs["central"].server_share == 1.0 and configs["central"].server.steps > 0
    alone = demo_config("one office alone", seed=0, folder=tmp_path, auxiliary=None, only="dish-1")
    assert alone.round.only == "dish-1" and alone.output.endswith("one-office-alone,-dish-1")
