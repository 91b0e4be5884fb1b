"""Layers for a package: dropped one by one by the loss on public text, as a slow reference drops
them, and what becomes of a plan that asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch

from fedsp import api as commands
from fedsp.config_file import make_config
from fedsp.errors import AuxiliaryError, ConfigurationError, DataError
from fedsp.experiments import server_setup
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.plan import plan_run
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.callbacks import Callbacks
from fedsp.models.auxiliary import build_auxiliary, parse_plan
from fedsp.models.loading import load_tokenizer
from fedsp.training.layer_choice import drop_layers
from fedsp.training.loop import text_loss
from support.small_runs import settings
from support.tiny_models import FAMILIES, tiny_model

TOKENIZER = load_tokenizer(str(EMBEDDED / "model"))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_dropped_as_packages_without_them_say(family: str) -> None:
    """Every package that is smaller by one layer is built and read; the best of them is kept. One
    layer may not be dropped."""
    model = tiny_model(family)
    texts = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1)).tolist()
    layers, expected = list(range(4)), []
    for _ in range(2):
        losses = {}
        for layer in layers:
            rest = [one for one in layers if one != layer]
            package = build_auxiliary(model, parse_plan(rest, 4), TOKENIZER)
            losses[layer] = text_loss(package, texts)
        best = min((layer for layer in layers if layer != 2), key=lambda layer: losses[layer])
        expected.append((best, losses[best]))
        layers.remove(best)
    found = drop_layers(model, texts, 2, keep={2})
    assert [one.layer for one in found] == [layer for layer, _ in expected]
    assert [one.loss for one in found] == pytest.approx([loss for _, loss in expected], abs=1e-5)


def chosen(folder: Path, plan: str, **changes: Any) -> dict[str, Any]:
    messenger = {"kind": "adapter", "rank": 2, "layers": "all"}
    return settings(folder, auxiliary={"plan": plan}, messenger=messenger, **changes)


@pytest.mark.study
def test_a_plan_that_is_chosen_becomes_a_list_of_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    commands.run(chosen(tmp_path, "chosen(1, 1)"), callbacks=Callbacks(info=said.append))
    (told,) = [text for text in said if text.startswith("layers that are dropped")]
    plan = RunDirectory.open(tmp_path / "run").config.auxiliary.plan
    assert isinstance(plan, str) and plan.startswith("emulator(1, [")
    sources = parse_plan(plan, 8).sources
    assert len(sources) == 3 and (sources[0], sources[-1]) == (0, 7)
    assert all(f"{layer} (" in told for layer in set(range(8)) - set(sources))
    manifest = json.loads((tmp_path / "run" / "auxiliary" / "auxiliary.json").read_text())
    assert manifest["plan"]["frozen"] == [True, False, True]
    same = make_config(chosen(tmp_path, "chosen(1, 1)"))
    assert plan_run(same)["layers"] == list(sources)
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.setattr(server_setup, "drop_layers", lambda *_, **__: 1 / 0)  # nor on resuming
    assert commands.resume(tmp_path / "run", same)["best_round"] >= 0


@pytest.mark.study
def test_a_package_that_is_there_says_what_was_chosen(tmp_path: Path) -> None:
    package = tmp_path / "package"
    values = chosen(tmp_path, "chosen(3)")
    values["auxiliary"]["folder"] = str(package)
    planned = plan_run(make_config(values))["layers"]  # before there is a package
    with pytest.raises(AuxiliaryError, match="cannot be used.*`fedsp distill` makes one"):
        commands.run(values)
    commands.distill(make_config(chosen(tmp_path, "chosen(3)")), package)
    layers = json.loads((package / "auxiliary.json").read_text())["plan"]["sources"]
    assert layers == planned
    commands.run(values)
    assert RunDirectory.open(tmp_path / "run").config.auxiliary.plan == layers
    for other in ("chosen(4)", "chosen(1, 1)"):
        values["auxiliary"]["plan"] = other
        with pytest.raises(ConfigurationError, match="which are not those of chosen"):
            plan_run(make_config(values))


def test_a_package_whose_layers_share_was_not_chosen(tmp_path: Path) -> None:
    package = tmp_path / "package"
    commands.distill(make_config(chosen(tmp_path, "ends(1, 3)")), package)
    values = chosen(tmp_path, "chosen(3, 1)")
    values["auxiliary"]["folder"] = str(package)
    with pytest.raises(ConfigurationError, match="out of order|not those of chosen"):
        commands.run(values)


def test_what_flower_starts_chooses_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr", reason="simulations come with the flower extra")
    from fedsp.deployment import simulation

    (tmp_path / "run.toml").write_text(tomli_w.dumps(chosen(tmp_path, "chosen(2)")))
    begun: list[RunDirectory] = []
    monkeypatch.setattr(simulation, "run_experiment", lambda run, *_: begun.append(run))
    context: Any = SimpleNamespace(run_config={"config": str(tmp_path / "run.toml")})
    grid: Any = None
    simulation.server_main(grid, context)
    assert isinstance(begun[0].config.auxiliary.plan, list)


@pytest.mark.study
def test_a_method_without_a_package_chooses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("layers were chosen for a method that has no package")

    monkeypatch.setattr(server_setup, "drop_layers", never)
    values = settings(tmp_path, method="zero_shot", auxiliary={"plan": "chosen(3)"})
    assert "test" in commands.run(values)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("chosen(9)", "does not fit a model of 8 layers: expected 1 to 8 layers"),
        ("chosen(0, 1)", "expected 1 to 6 layers between its ends"),
        ("chosen(3, 9)", "at most 3 can stay at each end"),
        ("emulator(1, [0, 3])", "not between its ends: those are 1 to 6"),
        ("emulator(1, [3, 2])", "names layers twice or out of order"),
        ("emulator(1, [2, 2])", "names layers twice or out of order"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused(plan: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=says):
        plan_run(make_config(chosen(tmp_path, plan)))


def test_a_choice_needs_public_text(tmp_path: Path) -> None:
    distill = {"steps": 2, "batch_size": 2, "sequence_length": 32, "text": ["server"]}
    with pytest.raises(DataError, match="chosen.2. reads public text"):
        plan_run(make_config(chosen(tmp_path, "chosen(2)", distill=distill)))
    (tmp_path / "short.txt").write_text("A few words.")
    distill["text"] = [str(tmp_path / "short.txt")]
    with pytest.raises(DataError, match="has not the 32 tokens of one sequence"):
        plan_run(make_config(chosen(tmp_path, "chosen(2)", distill=distill)))
