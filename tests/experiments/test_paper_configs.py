"""The authors' settings in configs/paper: every file is planned, without weights and without a
network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedsp.cli import app
from fedsp.config_file import read_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "paper"
COUNTS = {  # all parameters, auxiliary model, prompt of 40 tokens
    "gpt2-xl": (1_557_611_200, 112_793_600, 6_144_000),
    "opt-1.3b": (1_315_758_080, 157_517_824, 3_932_160),
}
TASKS = ["arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "race", "sciq", "webqs"]


@pytest.mark.parametrize("model", COUNTS)
def test_there_is_a_file_for_each_task(model: str) -> None:
    assert sorted(path.stem for path in (CONFIGS / model).glob("*.toml")) == TASKS


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", COUNTS)
def test_fedsp_plan_counts_what_the_paper_describes(model: str, task: str, tmp_path: Path) -> None:
    figures = tmp_path / "plan.json"
    own = []
    if task == "race":  # whose files one makes oneself
        row = {"article": "It is.", "question": "Is it?", "options": ["Yes", "No"], "answer": "A"}
        (tmp_path / "race.jsonl").write_text((json.dumps(row) + "\n") * 40)
        own = [f"data.train={tmp_path / 'race.jsonl'}"]
    arguments = [
        "plan",
        str(CONFIGS / model / f"{task}.toml"),
        f"model.name={CONFIGS / model / 'model'}",
        *own,
        "--json",
        str(figures),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    plan = json.loads(figures.read_text())
    assert (
        plan["global_parameters"],
        plan["auxiliary_parameters"],
        plan["messenger_parameters"],
    ) == COUNTS[model]
    assert plan["ratio"] == pytest.approx({"gpt2-xl": 13.8, "opt-1.3b": 8.35}[model], abs=0.02)
    assert (
        set(plan["layers"]) == {0}
        and plan["bytes_in_all"] == 2 * 10 * 100 * plan["bytes_per_message"]
    )


@pytest.mark.parametrize("model", COUNTS)
def test_the_settings_are_those_of_the_authors_code(model: str) -> None:
    for task in TASKS:
        config = read_config(CONFIGS / model / f"{task}.toml")
        assert (config.partition.clients, config.prompt.length, config.client.batch_size) == (
            10,
            40,
            16,
        )
        assert (
            config.client.learning_rate
            == config.server.learning_rate
            == (1e-4 if task == "hellaswag" else 5e-4)
        )
        assert bool(config.prompt.projection) == (
            task in ("hellaswag", "race") or (model, task) == ("gpt2-xl", "sciq")
        )
        assert config.server_share == pytest.approx(1 / 11) and config.distill.steps == 5000
