"""The embedded default: what it holds, and that the recipe works. The recipe trains for real, three
seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsp import api as commands
from fedsp.data.dataset import load_dataset
from fedsp.experiments.demo import DEMO_ROWS, demo_config
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.server_setup import make_auxiliary, open_server, score_test
from fedsp.federation.callbacks import Callbacks


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


@pytest.mark.recipe
@pytest.mark.parametrize("seed", [0, 1])
def test_fedsp_beats_zero_shot_beyond_any_noise(seed: int, tmp_path: Path) -> None:
    """400 questions: the standard error of each accuracy is at most 2.5 points, so a margin of 30
    is twelve of them."""
    config = demo_config("fedsp", seed=seed, folder=tmp_path, auxiliary=None)
    server = open_server(config, load_dataset(config))
    make_auxiliary(server, tmp_path / "auxiliary", Callbacks())
    questions = server.dataset
    zero_shot, _ = score_test(
        server.model, None, questions.test, questions.task, server.tokenizer, server.max_tokens
    )
    assert zero_shot["examples"] == 400
    tuned = commands.run(
        demo_config("fedsp", seed=seed, folder=tmp_path, auxiliary=tmp_path / "auxiliary")
    )["test"]
    assert tuned["accuracy"] > zero_shot["accuracy"] + 0.3


def test_every_row_of_the_demo_is_a_configuration(tmp_path: Path) -> None:
    configs = {
        method: demo_config(method, seed=0, folder=tmp_path, auxiliary=tmp_path)
        for method in DEMO_ROWS
    }
    assert configs["clients-only"].server.steps == 0 and configs["server-only"].round.clients == 0
    assert configs["central"].server_share == 1.0 and configs["fedsp"].server.steps > 0
