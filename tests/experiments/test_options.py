"""The options of ablations and heterogeneity: server optimizers, topics, unequal sizes,
distillation again, measured cost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp import api as commands
from fedsp.audit.layer_signals import measure_depths
from fedsp.audit.package_leakage import measure_disclosure
from fedsp.config import PartitionSection
from fedsp.config_file import make_config
from fedsp.data.encoding import Encoded
from fedsp.data.partition import make_partition
from fedsp.data.topics import find_topics
from fedsp.errors import ConfigurationError, DataError, ModelError, RunError
from fedsp.experiments import run_directory as runs
from fedsp.experiments.costs import measure
from fedsp.federation.methods.base import Averaging
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.models.auxiliary import (
    build_auxiliary,
    disclosed_share,
    load_auxiliary,
    parse_plan,
)
from fedsp.models.payload import PROMPT
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.models.weights import Weights
from fedsp.storage import read_tensors
from fedsp.training.evaluation import Scored, by_client
from fedsp.training.loop import Optimisation, TrainResult
from fedsp.training.stage import Stage
from support.small_runs import PAPER, ROWS, questions, settings
from support.tiny_models import tiny_model

OPTIONS: dict[str, dict[str, Any]] = {
    "momentum": {
        "round": {"rounds": 3, "optimizer": "momentum", "momentum": 0.5},
        "client": {"prompt_steps": 2, "batch_size": 4, "proximal": 0.1},
    },
    "compressed": {
        "compression": {"up": "sign", "down": "int4"},
        "server": {"steps": 1, "batch_size": 4},
    },
    "finetune": {
        "method": "finetune",
        "client": {"prompt_steps": 2, "batch_size": 4, "learning_rate": 1e-4},
    },
    "lora": {
        "method": "lora",
        "client": {
            "prompt_steps": 2,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "keep_optimizer": True,
        },
    },
    "fedprompt with projection": {"method": "fedprompt", "prompt": {"length": 4, "projection": 8}},
    "fedprompt_single": {
        "method": "fedprompt_single",
        "prompt": {"length": 4, "space": "key_value"},
        "server": {"steps": 1, "batch_size": 4},
    },
    "offsite_tuning": {
        "method": "offsite_tuning",
        "auxiliary": {"plan": "emulator(1, 2)"},
        "client": {"prompt_steps": 2, "batch_size": 4, "learning_rate": 1e-4},
    },
    "adapter": {
        "messenger": {"kind": "adapter", "rank": 2},
        "compression": {"up": "sign", "down": "int8"},
        "client": {"prompt_steps": 2, "batch_size": 4, "learning_rate": 1e-3, "proximal": 0.1},
        "server": {"steps": 1, "batch_size": 4},
    },
    "adapter, both factors": {
        "messenger": {"kind": "adapter", "rank": 2, "train_first": True},
        "client": {"prompt_steps": 2, "batch_size": 4, "keep_optimizer": True},
        "aggregation": {"rule": "median", "malicious": 0.34},
        "round": {"rounds": 3, "weighting": "uniform"},
    },
    "adapter in distilled layers too": {
        "messenger": {"kind": "adapter", "rank": 2, "layers": "all"},
        "compression": {"up": "int8", "down": "sign"},
        "round": {"rounds": 3, "optimizer": "line_search"},
    },
    "layers": {
        "messenger": {"kind": "layers"},
        "client": {"prompt_steps": 2, "batch_size": 4, "learning_rate": 1e-4},
        "validation": {"by": "clients"},
    },
    "input prompt": {
        "prompt": {"length": 4, "space": "input"},
        "server": {"steps": 1, "batch_size": 4},
    },
    "prompt and adapter": {
        "messenger": {"kind": "prompt+adapter", "targets": ["c_attn"]},
        "aggregation": {"max_loss_rise": 0.5},
    },
}


@pytest.mark.study
@pytest.mark.parametrize("name", OPTIONS)
def test_every_method_and_option_resumes_to_the_same_bits_and_evaluates_to_its_own_figures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun in one process, and resumed in two workers where that is possible."""
    whole = commands.run(settings(tmp_path / "whole", **OPTIONS[name]))
    original = runs.RunDirectory.save_round

    def stop(self: runs.RunDirectory, state: Any, *rest: Any) -> None:
        original(self, state, *rest)
        if state.round == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.RunDirectory, "save_round", stop)
    with pytest.raises(KeyboardInterrupt):
        commands.run(settings(tmp_path / "killed", **OPTIONS[name]))
    monkeypatch.setattr(runs.RunDirectory, "save_round", original)
    resumed = commands.resume(tmp_path / "killed" / "run", workers=2)
    assert (resumed["test"], resumed["validation_loss"]) == (
        whole["test"],
        whole["validation_loss"],
    )
    files = [
        read_tensors(tmp_path / place / "run" / "best.safetensors")[0]
        for place in ("whole", "killed")
    ]
    assert sorted(files[0]) == sorted(files[1]) and all(
        files[0][key].equal(files[1][key]) for key in files[0]
    )
    zero, tuned = commands.evaluate(tmp_path / "whole" / "run")
    assert tuned["answer_loss"] == pytest.approx(whole["test"]["answer_loss"], abs=1e-5)
    bare = commands.run(settings(tmp_path / "bare", method="zero_shot"))
    assert zero["answer_loss"] == pytest.approx(bare["test"]["answer_loss"], abs=1e-5)


def test_clients_have_whatever_names_a_column_of_theirs_gives_them(tmp_path: Path) -> None:
    """Longer than a file's name may be, alike in their first 299 letters, and like a way out of the
    run's folder: each client keeps its own optimizer's state."""
    names = ["x" * 300, "x" * 299 + "y", "../../out", "Zürich/Bern"]
    rows = [{**row, "office": names[place % 4]} for place, row in enumerate(ROWS[:40])]
    values = settings(
        tmp_path,
        partition={"kind": "natural", "column": "office", "server_share": 0.0},
        round={"rounds": 2},
        client={"prompt_steps": 1, "batch_size": 4, "keep_optimizer": True},
    )
    del values["partition"]["clients"]
    values["data"]["train"] = questions(tmp_path, "offices", rows)
    commands.run(make_config(values))
    records = runs.RunDirectory.open(tmp_path / "run").records()
    assert [sorted(record["answered"]) for record in records] == [sorted(names)] * 2
    kept = {path.parent for path in (tmp_path / "run" / "state").rglob("round-00002.safetensors")}
    assert len(kept) == 4 and {path.parent.name for path in kept} == {"state"}
    assert {path.name for path in tmp_path.iterdir()} <= {
        "run",
        "public.txt",
        *(f"{name}.jsonl" for name in ("train", "validation", "test", "offices")),
    }


def test_plans_of_copies_and_emulators() -> None:
    copies = parse_plan("copies(0)", 4)
    assert copies.sources == (0, 0, 0, 0) and len(set(copies.groups)) == 4
    auxiliary = build_auxiliary(tiny_model("gpt2"), copies, None)
    shared = build_auxiliary(tiny_model("gpt2"), parse_plan("shared(0)", 4), None)
    ids = torch.arange(6)[None]
    torch.testing.assert_close(auxiliary(ids), shared(ids))
    assert auxiliary.bytes > shared.bytes
    emulator = parse_plan("emulator(1, 2)", 8)
    assert (
        emulator.sources == (0, 2, 5, 7)
        and emulator.frozen == (True, False, False, True)
        and len(set(emulator.groups)) == 4
    )
    with pytest.raises(ConfigurationError, match=r"emulator\(1, 9\) leaves no middle"):
        parse_plan("emulator(1, 9)", 8)


TOPICS = {
    "river": "the water of the river flows to the sea",
    "metal": "iron and copper are heavy metals",
    "bird": "birds lay eggs in nests and sing",
}


def test_topics_are_found_and_divide_the_questions() -> None:
    train = [f"{text} number {index}" for index in range(12) for text in TOPICS.values()]
    test = list(TOPICS.values())
    found, of_test = find_topics(tuple(train), tuple(test), count=3, seed=0)
    assert len(set(of_test)) == 3 and all(found[index] == of_test[index % 3] for index in range(36))
    assert find_topics(tuple(train), tuple(test), count=3, seed=0) == (found, of_test)
    with pytest.raises(
        DataError, match="partition.topics = 99, but there are only 36 different questions"
    ):
        find_topics(tuple(train), tuple(test), count=99, seed=0)


def test_figures_per_client_weight_each_kind_by_the_clients_own_share() -> None:
    def scored(right: bool) -> Scored:
        return Scored(
            id="x",
            log_likelihoods=[0.0, -1.0] if right else [-2.0, -1.0],
            greedy=[False, False],
            tokens=[1, 1],
            characters=[1, 1],
            gold=(0,),
        )

    rows = [scored(True), scored(True), scored(False), scored(True), scored(False)]
    figures = by_client(
        rows,
        ["a", "a", "a", "b", "b"],
        {"one": ["a", "a", "a", "b"], "two": ["b"], "none": ["c"]},
    )
    assert (
        figures["one"]["accuracy"] == pytest.approx(0.75 * 2 / 3 + 0.25 * 0.5)
        and figures["two"]["accuracy"] == 0.5
    )
    assert (
        figures["one"]["answer_loss"] == pytest.approx(0.75 * 2 / 3 + 0.25 * 1.0)
        and "none" not in figures
    )


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_clients_of_unequal_size(kind: Any) -> None:
    section = PartitionSection(clients=5, kind=kind)
    partition = make_partition(ROWS, section, server_share=0.1, holdout=0.0, seed=0)
    sizes = [len(rows) for rows in partition.clients.values()]
    assert (
        len(sizes) == 5
        and max(sizes) >= 3 * min(sizes)
        and max(Counter(sum(partition.clients.values(), partition.server)).values()) == 1
    )


def test_a_run_over_topics_gives_figures_for_each_client(tmp_path: Path) -> None:
    figures = commands.run(
        settings(
            tmp_path,
            partition={
                "clients": 3,
                "server_share": 0.2,
                "kind": "dirichlet",
                "topics": 4,
                "alpha": 5.0,
            },
        )
    )
    assert sorted(figures["clients"]) == ["client-0", "client-1", "client-2"]
    records = runs.RunDirectory.open(tmp_path / "run").records()
    assert all(-1 <= record["update_cosine"] <= 1 for record in records)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"partition": {"kind": "dirichlet"}}, "needs the name of a column, or partition.topics"),
        (
            {"partition": {"column": "x", "topics": 3}},
            "partition.topics: examples are divided by a column or by topics",
        ),
        ({"method": "prefix_tuning"}, "partition.clients: prefix_tuning has all text in one place"),
        (
            {"method": "lora", "client": {"auxiliary_steps": 2}},
            "client.auxiliary_steps: needs method = 'fedsp', but method is 'lora'",
        ),
        ({"method": "fedpromt"}, "method: "),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    values = settings(tmp_path)
    merged = {
        **values,
        **{
            key: {**values.get(key, {}), **change} if isinstance(change, dict) else change
            for key, change in changes.items()
        },
    }
    with pytest.raises(ConfigurationError, match=sentence):
        make_config(merged)


@pytest.mark.study
def test_baselines_run_in_one_process_alone(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError,
        match="method = 'lora' is for experiments only and runs in one process: use engine local",
    ):
        commands.run(settings(tmp_path, method="lora"), engine="flower")
    commands.run(
        settings(
            tmp_path,
            method="finetune",
            client={"prompt_steps": 1, "batch_size": 4, "learning_rate": 1e-4},
        )
    )
    with pytest.raises(ModelError, match="PEFT has no form for weights that were tuned"):
        commands.export(tmp_path / "run", tmp_path / "adapter")
    assert commands.generate(tmp_path / "run", "Who", most=3)


def party(model: Any, tuned: Any, place: Path) -> Party:
    rows = [Encoded(tuple(range(1, 25)), 20) for _ in range(8)]
    return Party(id="a", model=model, messenger=tuned, examples=rows, store=StateStore(place))


def test_operations_are_those_of_the_matrix_products(tmp_path: Path) -> None:
    """Two operations per weight and token forward, two more for the gradient of inputs and two for
    that of weights; attention on top."""
    model = tiny_model("gpt2")
    stage = Stage(
        name="client",
        seed_label="client",
        steps=2,
        batch_size=4,
        optimisation=Optimisation(learning_rate=1e-3),
    )
    tokens, length, layers, hidden = 2 * 4 * 24, 3, 4, 32
    blocks = 12 * hidden**2 * layers * tokens
    head = 97 * hidden * 2 * 4 * 4  # four answer tokens a row
    weights = measure(
        Averaging(client_stage=stage, server_stage=stage),
        party(model, Weights(model.trained()), tmp_path),
        "client",
        0,
    )
    attention = (
        2 * 2 * 4 * layers * hidden * 24 * 24 * 2
    )  # rows x (scores and values) forward; the backward pass takes 2.5 times as much
    assert weights["operations"] == pytest.approx(6 * (blocks + head) + 3.5 * attention, rel=0.02)
    prompt = SoftPrompt(PromptSpec(space="key_value", length=length, model=model.shape))
    only = measure(
        Averaging(client_stage=stage, server_stage=stage),
        party(model, prompt, tmp_path),
        "client",
        0,
    )
    assert only["operations"] < 0.8 * weights["operations"]
    assert (only["parameters_trained"], only["parameters_sent"]) == (
        3 * 4 * 2 * 32,
        3 * 4 * 2 * 32,
    ) and weights["parameters_sent"] == weights["parameters_held"]
    assert only["tokens"] == tokens and only["memory_bytes"] > 4 * only["parameters_held"]
    assert weights["memory_bytes"] > 16 * weights["parameters_held"]


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    prompt = SoftPrompt(
        PromptSpec(space="key_value", length=3, model=model.shape),
        torch.randn(3, 4, 2, 4, 8, generator=torch.Generator().manual_seed(0)),
    )
    before = prompt.payload()[PROMPT].clone()
    stage = Stage(
        name="client",
        seed_label="client",
        steps=2,
        batch_size=4,
        optimisation=Optimisation(learning_rate=1e-3),
    )
    first = measure(
        Averaging(client_stage=stage, server_stage=stage),
        party(model, prompt, tmp_path),
        "client",
        0,
    )
    again = measure(
        Averaging(client_stage=stage, server_stage=stage),
        party(model, prompt, tmp_path),
        "client",
        0,
    )
    assert (
        torch.equal(prompt.payload()[PROMPT], before)
        and first["operations"] == again["operations"]
        and first["memory_bytes"] == again["memory_bytes"]
    )
    assert all(parameter.grad is None for parameter in [*model.parameters(), *prompt.parameters()])


def test_spikes_are_steps_far_above_the_median() -> None:
    assert (
        TrainResult([1.0, 1.1, 0.9, 2.0, 1.0], {}).spikes == 1 and TrainResult([], {}).spikes == 0
    )


@pytest.mark.study
def test_what_is_nearly_disclosed_is_found(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    auxiliary = build_auxiliary(model, parse_plan("every(2)", 4), None)
    whole = disclosed_share(auxiliary, model)
    with torch.no_grad():
        for parameter in auxiliary.model.parameters():
            parameter.mul_(1.02)
    assert disclosed_share(auxiliary, model) < 0.05 < whole  # biases of zero stay what they were
    assert (
        disclosed_share(auxiliary, model, 0.1) == pytest.approx(whole, abs=1e-9)
        and disclosed_share(auxiliary, model, 0.01) < 0.05
    )
    commands.run(settings(tmp_path, **PAPER))
    figures = measure_disclosure(tmp_path / "run")
    assert (
        figures["disclosed_share"] < 0.01 and 0.2 < figures["nearly_disclosed_share"] < 0.5
    )  # embeddings and one layer, a little moved
    write = commands.run(settings(tmp_path / "whole", method="fedprompt"))
    assert (
        measure_disclosure(tmp_path / "whole" / "run")["nearly_disclosed_share"]
        == write["disclosed_share"]
        == 1
    )


@pytest.mark.study
def test_depths_of_a_shared_auxiliary_model(tmp_path: Path) -> None:
    commands.run(settings(tmp_path, **PAPER))
    rows = measure_depths(tmp_path / "run")
    assert [row["depth"] for row in rows] == [*range(9), *range(9)] and all(
        row["gradient_norm"] > 0 for row in rows
    )
    package, client = (
        [row["hidden_scale"] for row in rows if row["weights"] == kind]
        for kind in ("package", "client")
    )
    assert package != client  # stage 1 has moved the client's own weights
    auxiliary = load_auxiliary(
        tmp_path / "run" / "auxiliary", device=torch.device("cpu"), positions="hugging_face"
    )
    assert auxiliary.plan.sources == (0,) * 8
    with pytest.raises(RunError, match="has no soft prompts of clients: this audit needs"):
        commands.run(settings(tmp_path / "zero", method="zero_shot"))
        measure_depths(tmp_path / "zero" / "run")
