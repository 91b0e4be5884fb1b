"""Configurations: presets, overrides, every fault at once."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedsp.config import RunConfig
from fedsp.config_file import (
    PRESETS,
    PROFILES,
    apply_override,
    make_config,
    makes_package,
    read_config,
    template,
)
from fedsp.data.dataset import load_dataset
from fedsp.errors import ConfigurationError, DataError
from fedsp.experiments.plan import check_examples

SMALL = {"model": {"name": "embedded"}, "data": {}, "distill": {"text": ["x.txt"]}}


WRONG: tuple[Any, ...] = (
    None,
    True,
    3,
    -1,
    2.5,
    float("inf"),
    "zzz",
    "",
    [],
    ["zzz"],
    {},
    {"zzz": 1},
    [[1]],
)


@pytest.mark.parametrize("key", ["a[b", "str", "list", "columns[0]"])
def test_an_unknown_key_is_named_whatever_it_says(key: str) -> None:
    for values in ({**SMALL, key: 1}, {**SMALL, "data": {key: 1}}):
        with pytest.raises(ConfigurationError, match="unknown key") as refused:
            make_config(values)
        assert f"{key}: unknown key" in str(refused.value)


def test_no_fault_is_told_in_the_words_of_the_library_underneath() -> None:
    """Every key, with a value of every kind."""
    told = 0
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        keys = getattr(section, "model_fields", None)
        for key in keys or [None]:
            for wrong in WRONG:
                change: dict[str, Any] = {name: wrong if key is None else {key: wrong}}
                try:
                    make_config({**SMALL, **change})
                except ConfigurationError as error:
                    told += 1
                    for word in ("Input", "instance", "Section", "pydantic", "dictionary", "None"):
                        assert word not in str(error).replace(repr(wrong), ""), str(error)
    assert told > 500


@pytest.mark.parametrize("name", ["gpt2", "someone/model", "x" * 300])
def test_offline_no_name_of_a_hub_is_taken(name: str, tmp_path: Path) -> None:
    """Even where the model was fetched before: what a folder holds can be looked at."""
    offline = {**SMALL, "model": {"name": name, "offline": True}}
    with pytest.raises(ConfigurationError, match="no folder or file of this machine") as refused:
        make_config(offline)
    assert "model.offline = true allows no hub name" in str(refused.value)
    for here in ("embedded", str(tmp_path)):
        assert make_config({**SMALL, "model": {"name": here, "offline": True}}).model.offline


@pytest.mark.parametrize("use", [load_dataset, check_examples])
def test_offline_no_data_of_a_hub_is_taken(use: Any) -> None:
    offline = {**SMALL, "model": {"name": "embedded", "offline": True}}
    config = make_config({**offline, "data": {"task": "arc_easy"}})
    with pytest.raises(DataError, match="model.offline = true lets nothing of the task 'arc_easy'"):
        use(config)


def test_presets_fill_in_and_what_is_written_wins() -> None:
    paper = make_config(
        {"preset": "paper", "model": {"name": "m"}, "data": {}, "client": {"auxiliary_steps": 3}}
    )
    assert (paper.prompt.space, paper.prompt.length, paper.auxiliary.plan) == (
        "key_value",
        40,
        "shared(0)",
    )
    assert (
        paper.client.auxiliary_steps,
        paper.client.prompt_steps,
        paper.client.keep_optimizer,
    ) == (3, 10, True)
    assert (
        paper.distill.steps == 5000
        and paper.distill.text == ["server"]
        and paper.server_share == pytest.approx(1 / 11)
    )
    prompt = make_config({**SMALL, "preset": "prompt"})
    assert (prompt.prompt.space, prompt.auxiliary.plan, prompt.client.auxiliary_steps) == (
        "residual",
        "ends(2)",
        0,
    )
    assert prompt.messenger.kind == "prompt" and prompt.client.learning_rate == 3e-2
    messenger = make_config(SMALL)
    assert (messenger.messenger.kind, messenger.auxiliary.plan, messenger.client.learning_rate) == (
        "adapter",
        "emulator(1, 3)",
        5e-3,
    )
    assert messenger.server.steps == 0 and messenger.server_share == 0


def test_all_faults_at_once_with_suggestions() -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_config(
            {
                "modle": {},
                "model": {"nmae": "x"},
                "data": {"max_tokens": 2},
                "client": {"batch_size": 0},
                "prompt": {"space": "keyvalue"},
                "auxiliary": {"plan": 3},
            },
            "run.toml",
        )
    message = str(caught.value)
    assert message.startswith("run.toml has 7 faults:") or message.startswith(
        "run.toml has 8 faults:"
    )
    for part in [
        "modle: unknown key; did you mean 'model'?",
        "model.nmae: unknown key; did you mean 'name'?",
        "model.name: missing; Hugging Face hub name or folder",
        "data.max_tokens: expected at least 8, not 2",
        "client.batch_size: expected at least 1, not 0",
        (
            "prompt.space: expected 'key_value', 'residual' or 'input', not 'keyvalue'; did"
            " you mean 'key_value'?"
        ),
        "auxiliary.plan:",
    ]:
        assert part in message


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"model": {"name": "m"}, "data": {}, "distill": {"text": []}},
            "distill.text: distillation needs text",
        ),
        (
            {**SMALL, "partition": {"kind": "natural"}},
            "partition.column: partition.kind = 'natural' needs the name of a column",
        ),
        (
            {
                "preset": "prompt",
                "model": {"name": "m"},
                "data": {},
                "distill": {"steps": 0, "text": []},
            },
            "prompt.init_text: prompt.init = 'text' needs a text",
        ),
        ({**SMALL, "preset": "papre"}, "preset: expected 'messenger'"),
        (
            {**SMALL, "round": {"optimizer": "line_search"}, "validation": {"by": "none"}},
            "round.optimizer: a line search compares validation losses at the server",
        ),
        ({**SMALL, "round": 3}, "round: expected a table of keys, not 3"),
    ],
)
def test_what_no_key_can_say_alone(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_config(values)
    assert sentence in str(caught.value)


def test_a_name_that_nobody_knows_hides_no_other_fault() -> None:
    wrong = {
        **SMALL,
        "messenger": {"kind": "adaptor", "rank": -3},
        "aggregation": {"rule": "medain"},
        "bogus": 1,
    }
    with pytest.raises(ConfigurationError) as refused:
        make_config(wrong, "run.toml")
    first, *faults = str(refused.value).splitlines()
    assert first == "run.toml has 4 faults:"
    for said in (
        "did you mean 'adapter'?",
        "did you mean 'median'?",
        "messenger.rank: ",
        "bogus: ",
    ):
        assert sum(said in fault for fault in faults) == 1


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"messenger": {"kind": "layers", "layers": "all"}}, "messenger.layers: 'all' is for"),
        ({"validation": {"by": "none", "patience": 2}}, "validation.patience: it counts the"),
    ],
)
def test_what_two_keys_of_a_section_cannot_say_together_is_said_of_the_key(
    values: dict[str, Any], sentence: str
) -> None:
    """Without the section's whole text."""
    with pytest.raises(ConfigurationError) as refused:
        make_config({**SMALL, **values}, "run.toml")
    first, fault = str(refused.value).splitlines()
    assert first == "run.toml has 1 fault:" and fault.startswith(f"  {sentence}")
    assert "{" not in fault


def test_defaults_suit_what_is_tuned() -> None:
    rates = {
        kind: make_config({**SMALL, "messenger": {"kind": kind}}).client.learning_rate
        for kind in ("prompt", "adapter", "layers", "prompt+adapter")
    }
    assert rates == {"prompt": 3e-2, "adapter": 5e-3, "layers": 1e-3, "prompt+adapter": 5e-3}
    own = make_config({**SMALL, "messenger": {"kind": "layers"}, "client": {"learning_rate": 0.5}})
    assert (own.client.learning_rate, own.server.learning_rate) == (0.5, 1e-3)
    baseline = make_config({**SMALL, "method": "fedprompt", "prompt": {"length": 5}})
    assert (baseline.messenger.kind, baseline.client.learning_rate) == ("prompt", 3e-2)
    with pytest.raises(
        ConfigurationError, match=r"prompt\.length: by default adapters travel and no soft prompt"
    ):
        make_config({**SMALL, "prompt": {"length": 5}})
    described = make_config({**SMALL, "messenger": {"kind": "prompt"}, "prompt": {"length": 5}})
    assert described.prompt.length == 5
    assert make_config(make_config(SMALL).model_dump(exclude_none=True)) == make_config(SMALL)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_written_template_is_the_preset(preset: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(template(preset))
    assert "# Hugging Face hub name or folder" in path.read_text()
    text = "" if preset == "paper" else 'distill.text=["x.txt"]'
    read = read_config(path, ["model.name=embedded", *([text] if text else [])])
    assert read == make_config(
        {
            "preset": preset,
            "model": {"name": "embedded"},
            "data": {},
            **({} if preset == "paper" else {"distill": {"text": ["x.txt"]}}),
        }
    )
    set_there = tomllib.loads(path.read_text())
    assert (
        set_there.pop("preset") == preset
        and set(set_there) >= {"data", "round", "client"}
        and not any(set_there.values())
    ), "only the preset is set"
    for line in path.read_text().splitlines()[2:]:
        assert re.match(r"(# )?\w+ = .*  # .+|\[\w+\]  # .+|$", line), line


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_profile_or_preset_given_beside_a_written_template_counts(
    preset: str, profile: str, tmp_path: Path
) -> None:
    """A template that set every default would silently overrule both."""
    path = tmp_path / "run.toml"
    path.write_text(template("messenger"))
    set_here = [
        "model.name=embedded",
        'distill.text=["x.txt"]',
        f"preset={preset}",
        f"profile={profile}",
        *(["client.auxiliary_steps=0"] if profile == "dp-example" else []),
    ]
    read = read_config(path, set_here)
    for section, values in {**PRESETS[preset], **PROFILES[profile]}.items():
        expected = {
            **PRESETS[preset].get(section, {}),
            **PROFILES[profile].get(section, {}),
            **({"text": ["x.txt"]} if section == "distill" else {}),
        }
        assert getattr(read, section).model_dump().items() >= expected.items(), (section, values)


def test_overrides_are_toml_and_paths_follow_the_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nname = "embedded"\n[data]\ntrain = "train.jsonl"\n[distill]\ntext = ["a.txt"]\n'
    )
    read = read_config(
        path, ["round.rounds=5", "auxiliary.plan=[0, 0, 3]", "distill.steps=9", "seed=7"]
    )
    assert (read.round.rounds, read.auxiliary.plan, read.distill.steps, read.seed) == (
        5,
        [0, 0, 3],
        9,
        7,
    )
    assert read.data.train == str(tmp_path / "train.jsonl")
    with pytest.raises(
        ConfigurationError, match=r"'rounds' is not an override: write section\.key=value"
    ):
        read_config(path, ["rounds"])
    with pytest.raises(ConfigurationError, match="round.ronds: unknown key; did you mean 'rounds'"):
        read_config(path, ["round.ronds=5"])
    with pytest.raises(ConfigurationError, match="there is no file .*fedsp init"):
        read_config(tmp_path / "none.toml")
    path.write_text("[model\n")
    with pytest.raises(ConfigurationError, match="is not a TOML file"):
        read_config(path)


@pytest.mark.parametrize(
    ("partition", "why"),
    [
        ({"server_values": ["a"]}, r"partition\.server_values: they need partition\.column"),
        (
            {"kind": "natural", "column": "x", "server_values": ["a"], "server_share": 0.1},
            r"partition\.server_share: the server's own examples are a fraction or those of",
        ),
    ],
)
def test_what_the_server_owns_is_said_once(partition: dict[str, Any], why: str) -> None:
    values = {"model": {"name": "x"}, "data": {}, "distill": {"text": ["x"]}}
    with pytest.raises(ConfigurationError, match=why):
        make_config({**values, "partition": partition})


def test_a_preset_that_is_not_known_is_the_only_fault() -> None:
    with pytest.raises(ConfigurationError) as raised:
        make_config({"model": {"name": "x"}, "preset": "mesenger", "distill": {"text": ["a"]}})
    assert str(raised.value).count("\n") == 1 and "did you mean 'messenger'?" in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("round.rounds", "true", "a whole number, not True"),
        ("seed", "false", "a whole number, not False"),
        ("client.learning_rate", "true", "a number, not True"),
        ("validation.patience", "true", "a whole number, not True"),
        ("privacy.noise_multiplier", "true", "a number, not True"),
        ("model.name", "true", "a text, not True"),
        ("model.precision", "true", "'auto', 'float32', 'bfloat16', '8bit' or '4bit', not True"),
        ("auxiliary.plan", "true", "a text or a list, not True"),
        ("auxiliary.plan", "[true, 2]", "a whole number, not [True, 2]"),
        ("auxiliary.prompt_layers", "[1, true]", "a whole number, not [1, True]"),
        ("distill.text", "[true]", "a text, not True"),
        ("model.offline", "1.5", "true or false, not 1.5"),
    ],
)
def test_true_is_no_number_and_no_text(key: str, value: str, expected: str) -> None:
    """Pydantic would take true as 1, in lists too."""
    values: dict[str, Any] = {"model": {"name": "x"}, "distill": {"text": ["a"]}}
    apply_override(values, f"{key}={value}")
    with pytest.raises(ConfigurationError) as raised:
        make_config(values)
    assert re.search(rf"{key}\S*: expected {re.escape(expected)}", str(raised.value)), raised.value


def test_a_tilde_is_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = make_config(
        {
            "model": {"name": "~/model.gguf"},
            "output": "~/run",
            "distill": {"text": ["~/public.txt", "server"]},
            "data": {"train": "~/own.jsonl"},
        }
    )
    assert (
        config.model.name == "/home/somebody/model.gguf" and config.output == "/home/somebody/run"
    )
    assert config.distill.text == ["/home/somebody/public.txt", "server"]
    assert config.data.train == "/home/somebody/own.jsonl"


def test_adapters_through_layers_as_they_are_need_no_text() -> None:
    values: dict[str, Any] = {"model": {"name": "x"}, "distill": {"steps": 0, "text": []}}
    assert make_config(values).messenger.kind == "adapter"
    with pytest.raises(ConfigurationError, match=r"prompt\.init_text: prompt\.init = 'text' needs"):
        make_config(values | {"preset": "prompt"})


def test_a_folder_with_the_name_of_a_special_text_is_a_folder(tmp_path: Path) -> None:
    """`model` and `server` are words of distill.text alone."""
    for name in ("model", "server"):
        (tmp_path / name).mkdir()
    (tmp_path / "run.toml").write_text(
        '[model]\nname = "model"\n[data]\ntrain = "server"\n[distill]\ntext = ["model"]\n'
    )
    config = read_config(tmp_path / "run.toml")
    assert config.model.name == str(tmp_path / "model")
    assert config.data.train == str(tmp_path / "server")
    assert config.distill.text == ["model"]


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (["a", "b", " a"], "data.labels: 'a' stands there twice: name each label once"),
        (["a", " "], "data.labels: one label is empty: take it out"),
    ],
)
def test_labels_are_different_and_not_empty(labels: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        make_config(
            {"model": {"name": "x"}, "distill": {"text": ["a"]}, "data": {"labels": labels}}
        )
    given = {"model": {"name": "x"}, "distill": {"text": ["a"]}, "data": {"labels": [" a", "b "]}}
    assert make_config(given).data.labels == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "asks", "makes"),
    [
        ({}, True, True),
        ({"partition": {"clients": 0}}, False, False),
        ({"round": {"clients": 0}}, False, False),
        ({"partition": {"clients": 0}, "federation": {"folder": "."}}, True, True),
        ({"auxiliary": {"folder": "package"}}, True, False),
        ({"method": "fedprompt"}, True, False),
    ],
)
def test_who_has_clients_and_makes_them_a_package(
    changes: dict[str, Any], asks: bool, makes: bool
) -> None:
    """The clients of a deployment are in its register, whatever `partition` says."""
    given = {"validation": {"by": "server"}, **changes}
    config = make_config({"model": {"name": "x"}, "distill": {"text": ["a"]}, **given})
    assert (config.asks_clients, makes_package(config)) == (asks, makes)
