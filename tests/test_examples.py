"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fedsp
from fedsp.data.tasks import TASKS
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.methods.registry import find_method
from fedsp.testing import check_messenger, check_method, check_task
from support.gguf_made import tiny_llama, write_gguf

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    ours = {"new_messenger", "new_method", "new_task"}
    tested = {"algorithm", "federation", "smollm2", "tickets"} | ours
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_a_method_needs_no_language_model() -> None:
    """Full participation and equal weights: the mean of the targets is the optimum."""
    assert torch.allclose(example("algorithm").main(), torch.tensor([1.0, 1.0]), atol=1e-4)


@pytest.mark.recipe
def test_a_whole_federation(tmp_path: Path) -> None:
    accuracy = example("federation").main(tmp_path)
    assert accuracy["tuned weights"] > accuracy["zero-shot"] + 0.05
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.recipe
def test_a_new_method_runs_by_its_name(tmp_path: Path) -> None:
    module = example("new_method")
    figures = module.main(tmp_path)
    assert figures["best_round"] == 3
    check_method(find_method("damped"))
    with pytest.raises(fedsp.FedspError, match="a method named 'damped' is registered already"):
        fedsp.register_method(fedsp.MethodEntry(name="damped", title="", paper="", clients_hold=""))


@pytest.mark.recipe
def test_a_new_messenger_runs_by_its_name(tmp_path: Path) -> None:
    module = example("new_messenger")
    figures = module.main(tmp_path)
    assert figures["best_round"] > 0 and figures["numbers_sent"] == 2816
    check_messenger(module.BIASES)
    with pytest.raises(fedsp.FedspError, match="a messenger named 'biases' is registered already"):
        fedsp.register_messenger(replace(module.BIASES))


@pytest.mark.recipe
def test_a_new_task_runs_by_its_name(tmp_path: Path) -> None:
    module = example("new_task")
    rows = module.main(tmp_path)
    assert rows[1]["answer_loss"] < rows[0]["answer_loss"]
    check_task(TASKS["true_or_false"], module.statements("test", 2))
    task = fedsp.Task(name="true_or_false", plain=module.render)
    with pytest.raises(fedsp.FedspError, match="a task named 'true_or_false' is registered"):
        fedsp.register_task(task)
    with pytest.raises(fedsp.FedspError, match="needs statement .text. and true"):
        task_of_the_example = fedsp.Task(
            name="x", plain=module.render, schema="needs statement (text) and true (true or false)"
        )
        task_of_the_example.example({"question": "?"}, 0)


def test_everything_public_can_be_imported() -> None:
    assert all(getattr(fedsp, name) is not None for name in fedsp.__all__)
    with pytest.raises(AttributeError, match="module 'fedsp' has no attribute 'nothing'"):
        _ = fedsp.nothing


def test_an_unknown_method_is_a_sentence() -> None:
    with pytest.raises(fedsp.FedspError, match="there is no method 'fedpromt'.*did you mean"):
        fedsp.run({"method": "fedpromt", "model": {"name": "embedded"}, "distill": {"text": ["x"]}})


def test_every_office_has_ten_tickets_of_each_of_four_kinds() -> None:
    tickets = example("tickets").TICKETS
    assert [len(kinds) for kinds in tickets.values()] == [4] * 5
    sentences = [text for kinds in tickets.values() for some in kinds.values() for text in some]
    assert len(set(sentences)) == len(sentences) == 200
    labels = [label for kinds in tickets.values() for label in kinds]
    assert len(set(labels)) == 20
    for office, kinds in tickets.items():
        assert {len(some) for some in kinds.values()} == {10}, office


@pytest.mark.recipe
def test_a_federation_of_a_model_in_a_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `make smollm2` does, with a tiny model and few steps."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = example("smollm2")
    model = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    settings = module.settings_of(model, tmp_path, "ends(1)", distill=2, rounds=1)
    rows = module.rows_of(settings, tmp_path, None, Callbacks())
    names = [row["who trains"].partition(":")[0] for row in rows]
    assert names == [
        "nobody",
        "the best office alone",
        "all offices",
        "  ... in the small model itself",
        "one party with all tickets and the model",
    ]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert rows[2]["traffic, MB"] > rows[1]["traffic, MB"] > 0
