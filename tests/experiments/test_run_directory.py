"""A run's folder: what is written, what is read again, and what is refused."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp.config import RunConfig
from fedsp.config_file import make_config
from fedsp.errors import ConfigurationError, RunError, StorageError
from fedsp.experiments import run_directory as runs
from fedsp.experiments.run_directory import (
    RunDirectory,
    differing_keys,
    find_runs,
    read_json,
    source_commit,
    versions,
)
from fedsp.federation.loop import RunState
from fedsp.federation.messages import RoundRecord
from fedsp.models.payload import PROMPT
from fedsp.models.prompted_lm import ModelShape
from fedsp.models.soft_prompt import PromptSpec, read_prompt
from fedsp.storage import read_tensors

SPEC = PromptSpec(
    space="residual", length=2, model=ModelShape(layers=3, heads=1, head_size=4, hidden=4)
)


def configuration(folder: Path, **changes: Any) -> RunConfig:
    return make_config(
        {
            "output": str(folder / "run"),
            "model": {"name": "embedded"},
            "data": {},
            "distill": {"text": ["x.txt"]},
            **changes,
        }
    )


def payload(value: float) -> dict[str, torch.Tensor]:
    return {PROMPT: torch.full(SPEC.shape, value)}


def state(round: int) -> RunState:
    rest = {"first.x": torch.tensor([float(round)])}
    return RunState(
        round=round,
        payload=payload(float(round)),
        best=payload(round / 2),
        best_round=round - 1,
        best_loss=round / 10,
        optimizer=rest,
        residual={f"residual.{round}": torch.ones(2)},
    )


def record(round: int) -> RoundRecord:
    return RoundRecord(
        round=round,
        asked=["a", "b"],
        answered=["a"],
        failed={"b": "late"},
        bytes_down=10,
        bytes_up=20,
        client_losses={"prompt": 1.5},
        server_loss=None,
        validation=0.5,
        best_round=round,
        shortened_examples=0,
        seconds=1.0,
        seconds_training=0.5,
    )


def test_a_new_run_holds_its_configuration_and_an_identity_of_its_own(tmp_path: Path) -> None:
    config = configuration(tmp_path, seed=5)
    run = RunDirectory.create(config)
    again = RunDirectory.open(tmp_path / "run")
    assert (
        again.config == config
        and again.identity == run.identity
        and len(bytes.fromhex(run.identity)) == 8
    )
    about = again.about()
    assert (about["seed"], about["threads"], again.threads) == (
        5,
        torch.get_num_threads(),
        torch.get_num_threads(),
    ) and about["versions"] == versions()
    assert (
        sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.toml", "run.json"]
        and not run.finished
    )
    before = run.identity
    assert RunDirectory.create(config).identity != before, (
        "where nothing was done it may be made anew, and is another run to its clients"
    )


def test_a_folder_that_is_in_use_is_not_written_into(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    run = RunDirectory.create(config)
    run.write_partition({"server": [1], "clients": {}})
    whole = {path.name: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(
        RunError,
        match=(
            r"holds this very run, unfinished: resume it with `fedsp run --resume .*run`, or give"
            r" another folder with output=\.\.\."
        ),
    ):
        RunDirectory.create(config)
    with pytest.raises(
        RunError,
        match=(
            r"holds a run of another configuration \(seed, round\.rounds differ\): give another"
            r" folder"
        ),
    ):
        RunDirectory.create(configuration(tmp_path, seed=1, round={"rounds": 3}))
    with pytest.raises(
        RunError, match=r"holds a run of another configuration \(seed differs\): give another"
    ):
        RunDirectory.create(configuration(tmp_path, seed=1))
    deployed = {"federation": {"folder": "."}, "auxiliary": {"folder": "package"}}
    (tmp_path / "deployed").mkdir()
    served = RunDirectory.create(configuration(tmp_path / "deployed", **deployed))
    served.write_partition({})
    with pytest.raises(RunError, match="resume it with `fedsp serve --resume"):
        RunDirectory.create(configuration(tmp_path / "deployed", **deployed))
    run.finish(payload(1.0), 1, {"best_round": 1, "disclosed_share": 0.5}, SPEC)
    with pytest.raises(RunError, match="holds this very run, finished: give another folder"):
        RunDirectory.create(config)
    assert {name: (run.path / name).read_bytes() for name in whole} == whole
    for name in ("a file", "a folder"):
        (
            (tmp_path / name).write_text("x")
            if name == "a file"
            else (tmp_path / name / "x").mkdir(parents=True)
        )
        with pytest.raises(
            RunError,
            match=(
                f"{name} is in use and does not hold a run: give an empty or a new folder with"
                " output="
            ),
        ):
            RunDirectory.create(config.model_copy(update={"output": str(tmp_path / name)}))


def test_a_folder_without_a_run_says_so_and_names_what_is_below(tmp_path: Path) -> None:
    with pytest.raises(
        RunError,
        match=r"holds no run: its config\.toml cannot be read \(No such file or directory\)$",
    ):
        RunDirectory.open(tmp_path)
    for name in ("b", "a"):
        RunDirectory.create(
            configuration(tmp_path).model_copy(update={"output": str(tmp_path / name)})
        )
    with pytest.raises(RunError, match=r"; there are 2 in it: name one, such as .*/a$"):
        RunDirectory.open(tmp_path)
    (tmp_path / "a" / "config.toml").write_text("[")
    with pytest.raises(
        RunError, match=r"holds no run: its config\.toml cannot be read \(Invalid initial character"
    ):
        RunDirectory.open(tmp_path / "a")
    (tmp_path / "b" / "config.toml").write_text(
        (tmp_path / "b" / "config.toml").read_text() + "\n[more]\n"
    )
    with pytest.raises(
        ConfigurationError, match=r"b/config\.toml has 1 fault:\n  more: unknown key"
    ):
        RunDirectory.open(tmp_path / "b")
    (tmp_path / "a" / "run.json").unlink()
    (tmp_path / "c").mkdir()
    assert find_runs(tmp_path) == [tmp_path / "b"]


def test_a_round_that_was_kept_is_read_again_whole(tmp_path: Path) -> None:
    run = RunDirectory.create(configuration(tmp_path))
    assert run.state(lambda text: None) is None and run.records() == []
    for round in (1, 2, 3):
        run.save_round(state(round), record(round), payload(round / 4), SPEC)
    found = run.state(lambda text: pytest.fail(text))
    assert found is not None and (found.round, found.best_round, found.best_loss) == (3, 2, 0.3)
    expected = state(3)
    for part in ("payload", "best", "optimizer", "residual"):
        mine, theirs = getattr(found, part), getattr(expected, part)
        assert mine.keys() == theirs.keys() and all(
            torch.equal(mine[name], theirs[name]) for name in mine
        ), part
    assert sorted(path.name for path in (run.path / "checkpoint").iterdir()) == [
        "round-00002.safetensors",
        "round-00003.safetensors",
    ]
    assert [
        float(
            read_prompt(run.path / "prompts" / f"round-0000{round}.safetensors")
            .payload()[PROMPT]
            .mean()
        )
        for round in (1, 2, 3)
    ] == [1.0, 2.0, 3.0]
    assert (
        float(read_prompt(run.best).payload()[PROMPT].mean()) == 0.75
        and read_tensors(run.best)[1]["round"] == "2"
    )
    assert [line["round"] for line in run.records()] == [1, 2, 3] and RoundRecord(
        **run.records()[0]
    ) == record(1)


def test_the_journal_is_written_alike_and_a_line_without_its_checkpoint_is_dropped(
    tmp_path: Path,
) -> None:
    run = RunDirectory.create(configuration(tmp_path))
    run.save_round(state(1), record(1), payload(1.0), SPEC)
    line = json.dumps(asdict(record(1)), sort_keys=True) + "\n"
    assert (run.path / "rounds.jsonl").read_text() == line
    assert (
        run.state(lambda text: None) is not None and (run.path / "rounds.jsonl").read_text() == line
    )
    (run.path / "checkpoint" / "round-00001.safetensors").unlink()
    assert run.state(lambda text: None) is None and run.records() == [], "its round is done again"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_counts(tmp_path: Path) -> None:
    run = RunDirectory.create(configuration(tmp_path))
    for round in (1, 2, 3):
        run.save_round(state(round), record(round), payload(1.0), SPEC)
    newest = run.path / "checkpoint" / "round-00003.safetensors"
    newest.write_bytes(newest.read_bytes()[:50])
    said: list[str] = []
    found = run.state(said.append)
    assert found is not None and found.round == 2 and not newest.exists()
    assert (
        len(said) == 1
        and "round-00003.safetensors is damaged and is not used; the one before it is" in said[0]
    )
    assert [line["round"] for line in run.records()] == [
        1,
        2,
    ], "the round is done again, and so is its line"


def test_weights_are_kept_without_a_prompt_and_their_checkpoints_go_at_the_end(
    tmp_path: Path,
) -> None:
    run = RunDirectory.create(configuration(tmp_path))
    weights = {"layer.weight": torch.arange(4.0)}
    run.save_round(
        RunState(round=1, payload=weights, best=weights, best_round=1, best_loss=None),
        record(1),
        weights,
        None,
    )
    assert not (run.path / "prompts").exists() and torch.equal(
        read_tensors(run.best)[0]["layer.weight"], weights["layer.weight"]
    )
    run.finish(weights, 1, {"best_round": 1, "disclosed_share": 0.0}, None)
    assert (
        list((run.path / "checkpoint").iterdir()) == []
        and run.finished
        and read_tensors(run.best)[1]["round"] == "1"
    )
    with_prompt = RunDirectory.create(configuration(tmp_path / "other"))
    with_prompt.save_round(state(1), record(1), payload(1.0), SPEC)
    with_prompt.finish(payload(7.0), 1, {"best_round": 1, "disclosed_share": 0.0}, SPEC)
    assert with_prompt.result() == {"best_round": 1, "disclosed_share": 0.0}
    assert (
        len(list((with_prompt.path / "checkpoint").iterdir())) == 1
        and float(read_prompt(with_prompt.best).payload()[PROMPT].mean()) == 7.0
    )


def test_results_scores_and_traffic_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = RunDirectory.create(configuration(tmp_path))
    with pytest.raises(
        RunError, match=r"holds no finished run: finish it with `fedsp run --resume .*run`"
    ):
        run.result()
    (tmp_path / "deployed").mkdir()
    served = RunDirectory.create(
        configuration(
            tmp_path / "deployed", federation={"folder": "."}, auxiliary={"folder": "package"}
        )
    )
    with pytest.raises(RunError, match="finish it with `fedsp serve --resume"):
        served.result()
    for missing in ("best_round", "disclosed_share"):
        figures = {"best_round": 1, "disclosed_share": 0.5, "more": [1]}
        (run.path / "result.json").write_text(
            json.dumps({name: value for name, value in figures.items() if name != missing})
        )
        with pytest.raises(
            RunError,
            match=(
                rf"holds no usable run: .*result\.json is not what fedsp wrote: {missing} is"
                r" missing"
            ),
        ):
            run.result()
    (run.path / "result.json").write_text(json.dumps(figures))
    assert run.result() == figures
    assert run.scores() == [] and run.traffic() == [] and run.proxy_counts() == []
    run.write_scores([{"id": "1", "gold": [0]}, {"id": "2"}])
    run.write_scores([{"id": "3"}, {"id": "4"}])
    assert run.scores() == [{"id": "3"}, {"id": "4"}]
    run.log_traffic(1, "a", "up", {"header": 5})
    run.log_traffic(2, "b", "down", {"prompt": 7})
    lines = [
        {"round": 1, "client": "a", "direction": "up", "bytes": {"header": 5}},
        {"round": 2, "client": "b", "direction": "down", "bytes": {"prompt": 7}},
    ]
    assert run.traffic() == lines
    with open(run.path / "traffic.jsonl", "a") as file:
        file.write('[1]\n"x"\n{"round"')
    assert run.traffic() == lines, "what is no object, or was cut short, is no line"
    (run.path / "flower").mkdir()
    (run.path / "flower" / "proxy.jsonl").write_text('{"pull": [1, 2, 3]}\n')
    assert run.proxy_counts() == [{"pull": [1, 2, 3]}]
    (run.path / "traffic.jsonl").unlink()
    (run.path / "traffic.jsonl").mkdir()
    with pytest.raises(
        StorageError,
        match=r"cannot write .*traffic\.jsonl: Is a directory; free some space, then resume",
    ):
        run.log_traffic(1, "a", "up", {})


def test_inputs_are_pinned_once_and_held_ever_after(tmp_path: Path) -> None:
    run = RunDirectory.create(configuration(tmp_path))
    run.hold_known({"test": "anything"})
    run.pin({"train": "1", "model": "2"})
    run.pin({"train": "1", "model": "2"})
    run.hold({"train": "1"})
    run.hold_known({"train": "1", "test": "anything"})
    with pytest.raises(
        RunError,
        match=(
            "was started with another train and another model: restore the original, or start a"
            " new run"
        ),
    ):
        run.pin({"train": "3", "model": "4"})
    with pytest.raises(RunError, match="another model:"):
        run.hold_known({"train": "1", "model": "x", "test": "y"})
    with pytest.raises(RunError, match="another test:"):
        run.hold({"test": "y"})


def test_partitions_packages_and_parties_have_their_places(tmp_path: Path) -> None:
    run = RunDirectory.create(configuration(tmp_path))
    assert run.partition() is None
    run.write_partition({"server": [1, 2], "clients": {"a": [0]}})
    assert run.partition() == {"server": [1, 2], "clients": {"a": [0]}}
    assert run.package == run.path / "auxiliary"
    assert run.state_store("client a/../b").folder == run.path / "state" / "client%20a%2F%2E%2E%2Fb"
    made = RunDirectory.create(
        configuration(tmp_path / "study", auxiliary={"folder": str(tmp_path / "packages" / "one")})
    )
    assert made.package == tmp_path / "packages" / "one"
    (tmp_path / "study" / "packages" / "one").mkdir(parents=True)
    assert made.package == tmp_path / "study" / "packages" / "one", "of a study that was moved"
    (tmp_path / "packages" / "one").mkdir(parents=True)
    assert made.package == tmp_path / "packages" / "one", "where it is named, if it is there"


def test_configurations_differ_in_keys_and_sections_but_not_in_their_place(tmp_path: Path) -> None:
    one = configuration(tmp_path)
    other = configuration(
        tmp_path / "elsewhere",
        seed=3,
        messenger={"rank": 9},
        federation={"folder": "."},
        auxiliary={"folder": "p"},
    )
    assert (
        differing_keys(one, one) == []
        and differing_keys(one, configuration(tmp_path / "elsewhere")) == []
    )
    assert sorted(differing_keys(one, other)) == [
        "auxiliary.folder",
        "federation",
        "messenger.rank",
        "seed",
    ]
    assert set(differing_keys(other, one)) == set(differing_keys(one, other))


def test_what_is_no_json_object_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(RunError, match=r"x\.json cannot be read \(No such file or directory\)"):
        read_json(path)
    for text, why in (
        ("{", "cannot be read"),
        ("[]", "is not what fedsp wrote: a JSON object is missing"),
        ('{"a": 1}', "is not what fedsp wrote: b is missing"),
    ):
        path.write_text(text)
        with pytest.raises(RunError, match=why):
            read_json(path, "a", "b")
    assert read_json(path, "a") == {"a": 1} and read_json(path) == {"a": 1}


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "fedsp"
    (package / "experiments").mkdir(parents=True)
    where = package / "__init__.py"
    monkeypatch.setattr(runs, "__file__", str(package / "experiments" / "run_directory.py"))
    where.write_text("x")
    assert source_commit() == "released"
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    commit = subprocess.run(
        ["git", "-C", str(tmp_path), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert source_commit() == commit
    (tmp_path / "beside.txt").write_text("x")
    assert source_commit() == commit, "what else is in the checkout is not what fedsp runs from"
    where.write_text("y")
    assert source_commit() == f"{commit}+"
    subprocess.run(["git", "-C", str(tmp_path), "rm", "-q", "-r", "--cached", "src"], check=True)
    assert source_commit() == "released", "installed into a checkout of something else"
    found = versions()
    libraries = {
        "fedsp",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "datasets",
        "flwr-datasets",
    }
    assert (
        found["torch"] == torch.__version__
        and set(found) == {"python", "platform", "commit"} | libraries
        and "not installed" not in found.values()
    )
    monkeypatch.setattr(
        runs, "version", lambda name: (_ for _ in ()).throw(PackageNotFoundError(name))
    )
    assert versions()["torch"] == "not installed"
