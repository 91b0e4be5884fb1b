"""Whole runs on the embedded model: resume, order, privacy of the wire, faults, and every sentence
about bad input."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp import api as commands
from fedsp.algorithm import FedSP
from fedsp.config_file import make_config
from fedsp.data.dataset import load_dataset
from fedsp.data.encoding import Encoded, decode_behind, encode_texts
from fedsp.data.files import read_passages
from fedsp.data.seeding import derive_seed
from fedsp.errors import (
    AuxiliaryError,
    ConfigurationError,
    DataError,
    FedspError,
    PromptError,
    RunError,
    StorageError,
    TooFewClients,
    TrainingDiverged,
)
from fedsp.experiments import build
from fedsp.experiments import run as experiment
from fedsp.experiments import server_setup as server
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.plan import how_it_reads, plan_run
from fedsp.experiments.run import run_experiment
from fedsp.experiments.run_directory import RunDirectory, differing_keys, list_runs
from fedsp.experiments.server_setup import Server, distillation_text, open_server
from fedsp.experiments.start import answers_of, open_run
from fedsp.federation.agreement import agreement_of
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.clients import Clients, client_messenger, make_method, make_party
from fedsp.federation.loop import RoundConfig, RunState, federate
from fedsp.federation.messages import (
    Failure,
    Request,
    RoundRecord,
    Transport,
    Update,
    sample_clients,
)
from fedsp.federation.methods.base import Side, Work
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.federation.transport.local import local
from fedsp.models import loading
from fedsp.models.auxiliary import load_auxiliary
from fedsp.models.payload import PROMPT, Payload, pack
from fedsp.models.prompted_lm import ModelShape
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt, read_prompt
from fedsp.privacy import Ledger
from fedsp.report.progress import progress
from fedsp.storage import read_tensors, tensors_digest, write_tensors
from fedsp.training import loop as fitting
from fedsp.training import stage
from fedsp.training.answers import proxy_tuned
from fedsp.training.distillation import packed
from support.killed import end_of
from support.small_runs import PAPER, ROWS, prompt_bits, questions, settings


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The journal without its seconds."""
    return [
        {key: value for key, value in record.items() if not key.startswith("seconds")}
        for record in RunDirectory.open(folder).records()
    ]


class Killed(Exception):
    """Stands for kill -9 in this process: nothing catches it."""


@pytest.mark.parametrize("preset", [{}, PAPER], ids=["messenger", "paper"])
def test_a_run_writes_what_it_promises_and_leaves_the_global_model_alone(
    tmp_path: Path, preset: dict[str, Any]
) -> None:
    before = tensors_digest(
        dict(loading.load_model(str(EMBEDDED / "model"), device="cpu").model.named_parameters())
    )
    figures = commands.run(settings(tmp_path, **preset))
    folder = Path(figures["folder"])
    records = RunDirectory.open(folder).records()
    assert [record["round"] for record in records] == [1, 2, 3]
    assert all(
        record["answered"] == ["client-0", "client-1", "client-2"] and not record["failed"]
        for record in records
    )
    spec = read_prompt(folder / "best.safetensors").spec
    link = len(pack({PROMPT: torch.zeros(spec.shape)}))
    assert all(record["bytes_up"] == record["bytes_down"] == 3 * link for record in records)
    assert {"accuracy", "accuracy_norm", "answer_perplexity"} <= set(figures["test"])
    assert {path.name for path in folder.iterdir()} >= {
        "config.toml",
        "run.json",
        "partition.json",
        "rounds.jsonl",
        "prompts",
        "best.safetensors",
        "checkpoint",
        "result.json",
        "auxiliary",
    }
    partition = json.loads((folder / "partition.json").read_text())
    held = [*partition["server"], *(row for rows in partition["clients"].values() for row in rows)]
    assert sorted(held) == list(range(60))
    assert (
        tensors_digest(
            dict(loading.load_model(str(EMBEDDED / "model"), device="cpu").model.named_parameters())
        )
        == before
    )


def test_the_global_weights_in_memory_are_bit_identical_after_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[Server, str]] = []
    original = server.open_server

    def spy(*arguments: Any) -> Server:
        found = original(*arguments)
        opened.append((found, tensors_digest(dict(found.model.model.named_parameters()))))
        return found

    monkeypatch.setattr(experiment, "open_server", spy)
    commands.run(settings(tmp_path, **PAPER))
    ((found, before),) = opened
    assert tensors_digest(dict(found.model.model.named_parameters())) == before


@pytest.mark.study
@pytest.mark.parametrize(
    "preset",
    [{}, PAPER, {"validation": {"by": "clients"}}, {"validation": {"by": "none"}}],
    ids=["messenger", "paper", "validated by clients", "last prompt"],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, preset: dict[str, Any]) -> None:
    whole = Path(commands.run(settings(tmp_path / "whole", **preset))["folder"])
    config = make_config(settings(tmp_path / "killed", **preset))
    killed = Path(config.output)

    def dies_at(request_count: int) -> Callable[[Clients], Transport]:
        def engine(clients: Clients) -> Transport:
            asked, transport = 0, local(clients)

            def counting(requests: list[Request]) -> Iterable[Update | Failure]:
                nonlocal asked
                for reply in transport(requests):
                    asked += 1
                    if asked == request_count:
                        raise Killed
                    yield reply

            return counting

        return engine

    directory = RunDirectory.create(config)
    for count in (
        2,
        3,
        5,
    ):  # in the first round; at its last reply; in the second round after a resume
        with pytest.raises(Killed):
            run_experiment(directory, dies_at(count), Callbacks())
    commands.resume(killed)
    assert prompt_bits(killed) == prompt_bits(whole)
    assert untimed(killed) == untimed(whole)


def test_times_are_those_of_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the distillation, too, that a start before made."""
    original = RunDirectory.save_round

    def stop(self: RunDirectory, state: Any, *rest: Any) -> None:
        original(self, state, *rest)
        if state.round == 2:
            raise Killed

    monkeypatch.setattr(RunDirectory, "save_round", stop)
    with pytest.raises(Killed):
        commands.run(settings(tmp_path))
    monkeypatch.undo()
    run = RunDirectory.open(tmp_path / "run")
    run.write_seconds({"all": 1000.0, "distillation": 600.0})
    figures = commands.resume(run.path)
    assert figures["seconds_distillation"] == 600.0 and 1000.0 < figures["seconds"] < 1600.0


def test_clients_choose_a_round_where_all_of_them_judge_each(tmp_path: Path) -> None:
    by_clients: dict[str, Any] = {"validation": {"by": "clients"}}
    with pytest.raises(ConfigurationError, match=r"but a round asks 2 of 3 \(round\.clients\)"):
        commands.run(settings(tmp_path, **by_clients, round={"clients": 2}))
    few = {"train": questions(tmp_path, "few", ROWS[:4])}
    with pytest.raises(ConfigurationError, match="no client has two examples, one of which"):
        commands.run(settings(tmp_path, **by_clients, data=few))
    assert not (tmp_path / "run" / "auxiliary").exists(), "before a package is made"


def test_more_clients_than_there_are_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    commands.run(
        settings(tmp_path, round={"rounds": 1, "clients": 9}),
        callbacks=Callbacks(info=said.append),
    )
    assert "round.clients = 9: all 3 clients are asked" in said


def test_what_clients_judged_last_is_counted(tmp_path: Path) -> None:
    sent = [
        commands.run(settings(tmp_path / by, validation={"by": by})) for by in ("clients", "none")
    ]
    assert sent[0]["bytes_down"] == pytest.approx(sent[1]["bytes_down"] * 4 / 3, rel=0.01)
    assert sent[0]["updates"] == sent[1]["updates"] == 9, "who judges trains nothing"
    found = progress(RunDirectory.open(tmp_path / "clients" / "run"))
    assert (found["round"], found["rounds"], found["seconds_left"]) == (3, 3, None)
    assert [round for round, _ in found["validation"]] == [0, 1, 2, 3]
    assert found["best"] == dict(found["validation"])[found["best_round"]]


def test_a_checkpoint_cut_short_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    whole = Path(commands.run(settings(tmp_path / "whole"))["folder"])
    config = make_config(settings(tmp_path / "cut"))
    cut = Path(config.output)
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    (cut / "config.toml").write_text(
        (cut / "config.toml").read_text().replace(str(tmp_path / "whole"), str(tmp_path / "cut"))
    )
    last = cut / "checkpoint" / "round-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    said: list[str] = []
    commands.resume(cut, callbacks=Callbacks(info=said.append))
    assert any(
        "round-00003.safetensors is damaged" in line and "the one before it is" in line
        for line in said
    )
    assert prompt_bits(cut) == prompt_bits(whole)


@pytest.mark.study
@pytest.mark.parametrize("preset", [{}, PAPER], ids=["messenger", "paper"])
def test_the_order_of_answers_does_not_matter(tmp_path: Path, preset: dict[str, Any]) -> None:
    forward = Path(commands.run(settings(tmp_path / "forward", **preset))["folder"])
    directory = RunDirectory.create(make_config(settings(tmp_path / "backward", **preset)))
    run_experiment(
        directory, lambda clients: lambda requests: local(clients)(requests[::-1]), Callbacks()
    )
    assert prompt_bits(directory.path) == prompt_bits(forward)


def test_only_one_named_tensor_crosses_the_border(tmp_path: Path) -> None:
    crossed: set[str] = set()

    def engine(clients: Clients) -> Transport:
        def transport(requests: list[Request]) -> Iterable[Update | Failure]:
            for reply in local(clients)(requests):
                assert isinstance(reply, Update)
                crossed.update(reply.payload)
                crossed.update(*(request.payload for request in requests))
                yield reply

        return transport

    run_experiment(
        RunDirectory.create(make_config(settings(tmp_path, **PAPER))), engine, Callbacks()
    )
    assert crossed == {PROMPT}


def test_a_client_lives_where_the_global_model_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(settings(tmp_path))
    commands.distill(config, tmp_path / "package")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a client tried to load the global model")

    for module in (loading, server):
        monkeypatch.setattr(module, "load_model", refuse)
    auxiliary = load_auxiliary(
        tmp_path / "package", device=torch.device("cpu"), positions="hugging_face"
    )
    agreement = agreement_of(config, 64)
    client = make_party(
        "a",
        agreement,
        auxiliary,
        client_messenger(agreement, auxiliary)(),
        [Encoded((5, 6, 7, 8), 2)] * 4,
        StateStore(tmp_path / "rest"),
        ledger=Ledger(tmp_path / "privacy.jsonl"),
        max_epsilon=1.0,
    )
    request = Request(
        run="run",
        round=1,
        client="a",
        seed=0,
        payload={PROMPT: torch.zeros(client.prompt.spec.shape)},
    )
    update = make_method(agreement, auxiliary).client_update(client, request)
    assert list(update.payload) == [PROMPT] and not torch.equal(
        update.payload[PROMPT], request.payload[PROMPT]
    )


class Echo:
    """A method that costs nothing: the loop by itself."""

    def __init__(self, payload: Payload) -> None:
        self.payload = payload

    def init(self, server: Party) -> Payload:
        return self.payload

    def client_update(self, client: Party, request: Request) -> Update:
        return Update(
            round=request.round,
            client=request.client,
            payload={PROMPT: request.payload[PROMPT] + 1e-3},
        )

    def server_update(
        self, server: Party, aggregated: Payload, round: int, seed: int
    ) -> tuple[Payload, float | None]:
        return aggregated, None

    def work(self, party: Party, side: Side) -> list[Work]:
        return []


def loop(
    transport: Transport,
    *,
    clients: int = 4,
    asked: int | None = None,
    rounds: int = 1,
    minimum: int = 1,
    shape: tuple[int, ...] = (2, 3, 4),
) -> tuple[RunState, list[RoundRecord]]:
    records: list[RoundRecord] = []
    settings = RoundConfig(
        run="run",
        seed=0,
        rounds=rounds,
        clients=asked,
        min_clients=minimum,
        weighting="examples",
        max_change=1.0,
        validate_by="none",
    )
    register = {f"c{index}": 1 + index % 3 for index in range(clients)}
    nobody: Any = None
    state = federate(
        Echo({PROMPT: torch.zeros(shape)}),
        nobody,
        register,
        transport,
        settings,
        state=None,
        validate=lambda payload: 0.0,
        save=lambda _, record: records.append(record),
    )
    return state, records


def test_admission_counts_each_refusal_with_its_reason() -> None:
    bad = torch.zeros(2, 3, 4)
    bad[0, 0, 0] = float("inf")
    replies: dict[str, Callable[[Request], Update | Failure]] = {
        "c0": lambda r: Update(round=r.round, client=r.client, payload={PROMPT: bad}),
        "c1": lambda r: Update(round=r.round, client=r.client, payload={PROMPT: torch.zeros(2, 3)}),
        "c2": lambda r: Update(
            round=r.round, client=r.client, payload={PROMPT: torch.zeros(2, 3, 4).double()}
        ),
        "c3": lambda r: Update(
            round=r.round, client=r.client, payload={PROMPT: torch.full((2, 3, 4), 1e3)}
        ),
        "c4": lambda r: Update(
            round=r.round, client=r.client, payload={**r.payload, "auxiliary": torch.zeros(1)}
        ),
        "c5": lambda r: Update(round=r.round + 1, client=r.client, payload=r.payload),
        "c6": lambda r: Failure(round=r.round, client=r.client, reason="out of memory"),
        "c7": lambda r: Update(round=r.round, client="stranger", payload=r.payload),
        "c8": lambda r: Update(
            round=r.round, client=r.client, payload={PROMPT: torch.full((2, 3, 4), 0.5)}
        ),
    }
    state, (record,) = loop(
        lambda requests: [replies[request.client](request) for request in requests], clients=9
    )
    assert record.answered == ["c8"]
    assert torch.equal(state.payload[PROMPT], torch.full((2, 3, 4), 0.5))
    expected = {
        "c0": "1 numbers that are not finite",
        "c1": "shape",
        "c2": "float64",
        "c3": "max_change",
        "c4": "names",
        "c5": "round 2",
        "c6": "out of memory",
        "c7": "did not answer",
        "stranger": "not asked",
    }
    assert set(record.failed) == set(expected)
    assert all(text in record.failed[client] for client, text in expected.items())


def test_a_second_reply_does_not_count_twice() -> None:
    state, _ = loop(
        lambda requests: [
            Update(round=r.round, client=r.client, payload={PROMPT: torch.full((2, 3, 4), value)})
            for r in requests
            for value in (0.25, 0.75)
        ]
    )
    assert torch.equal(state.payload[PROMPT], torch.full((2, 3, 4), 0.25))


def test_too_few_replies_stop_the_run_where_it_can_be_resumed() -> None:
    with pytest.raises(
        TooFewClients, match=r"round 1 has 0 accepted updates of 4 asked.*c0: away.*can be resumed"
    ):
        loop(
            lambda requests: [
                Failure(round=r.round, client=r.client, reason="away") for r in requests
            ],
            minimum=2,
        )


def test_a_thousand_clients_cost_no_memory_and_little_time() -> None:
    shape = (16, 8, 256)

    def transport(requests: list[Request]) -> Iterable[Update | Failure]:
        return (
            Update(round=r.round, client=r.client, payload={PROMPT: r.payload[PROMPT].clone()})
            for r in requests
        )

    peaks = []
    for clients in (10, 1000):
        tracemalloc.start()
        _, records = loop(transport, clients=clients, asked=10, rounds=5, shape=shape)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert all(len(record.answered) == 10 for record in records)
    assert peaks[1] < peaks[0] + 1_000_000


def test_only_clients_that_are_asked_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand clients with ten asked."""
    opened: list[str] = []

    def opening(client: str, *given: Any, **named: Any) -> Party:
        opened.append(client)
        return make_party(client, *given, **named)

    monkeypatch.setattr(build, "make_party", opening)
    rows = [row | {"id": str(index)} for index, row in enumerate(ROWS)] * 2
    values = settings(
        tmp_path,
        data={"train": questions(tmp_path, "many", rows)},
        partition={"clients": 1000, "server_share": 0.0},
        round={"rounds": 1, "clients": 10},
        client={"prompt_steps": 1, "batch_size": 1},
    )
    figures = commands.run(values)
    asked = RunDirectory.open(Path(figures["folder"])).records()[0]["asked"]
    assert len(asked) == 10 and opened[:10] == asked and len(set(opened[10:])) <= 1, (
        "and one more, for what a round costs"
    )


def test_seeds_and_samples_do_not_move() -> None:
    """Golden values: a resumed or repeated run of an older version must draw the same."""
    assert derive_seed(7, "x") == 3942840481044313421
    assert sample_clients([f"c{index}" for index in range(10)], 3, 0, 1) == ["c4", "c5", "c8"]


def test_a_fit_goes_on_from_an_earlier_one_and_leaves_that_as_it_was() -> None:
    def fit(
        weights: torch.Tensor, first: int, last: int, moments: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, fitting.TrainResult]:
        parameter = torch.nn.Parameter(weights.clone())
        batches = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))[first:last]
        loss = lambda batch: ((parameter - batch) ** 2).sum()
        fitted = fitting.fit(
            {"a": parameter},
            loss,
            batches,
            fitting.Optimisation(learning_rate=0.1, total_steps=4),
            first_step=first,
            moments=moments,
        )
        return parameter.detach(), fitted

    whole, _ = fit(torch.zeros(3), 0, 4)
    half, fitted = fit(torch.zeros(3), 0, 2)
    before = {name: tensor.clone() for name, tensor in fitted.moments.items()}
    for _ in range(2):
        assert torch.equal(fit(half, 2, 4, fitted.moments)[0], whole)
    assert sorted(before) == ["exp_avg.a", "exp_avg_sq.a", "step.a"] and all(
        torch.equal(fitted.moments[name], before[name]) for name in before
    )


def test_a_loss_that_is_not_a_number_stops_with_round_and_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = fitting.answer_loss, 0

    def broken(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments) * (float("nan") if calls > 8 else 1.0)

    monkeypatch.setattr(stage, "answer_loss", broken)
    with pytest.raises(
        TrainingDiverged,
        match=(
            r"round 2, client 'client-\d': the loss is nan at local step \d of 2.*the prompt of"
            r" round 1 is kept"
        ),
    ):
        commands.run(settings(tmp_path, validation={"by": "none"}))
    assert read_prompt(tmp_path / "run" / "best.safetensors")
    monkeypatch.setattr(stage, "answer_loss", original)
    assert commands.resume(tmp_path / "run")["best_round"] == 3


@pytest.mark.study
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    original, files = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal files
        files += 1
        if files > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device.*untouched"):
        commands.run(settings(tmp_path))
    monkeypatch.setattr(os, "fsync", original)
    commands.resume(tmp_path / "run")
    assert prompt_bits(tmp_path / "run") == prompt_bits(
        Path(commands.run(settings(tmp_path / "whole"))["folder"])
    )


BAD: list[tuple[str, dict[str, Any], type[FedspError], str]] = [
    (
        "unknown task",
        {"data": {"task": "arc_esay"}},
        DataError,
        "unknown task 'arc_esay'; did you mean 'arc_easy'?",
    ),
    (
        "file missing",
        {"data": {"train": "nowhere.jsonl"}},
        DataError,
        "there is no file nowhere.jsonl",
    ),
    (
        "more clients than examples",
        {"partition": {"clients": 99}},
        DataError,
        "partition.clients = 99, but only 48 training examples",
    ),
    (
        "missing column",
        {"partition": {"kind": "dirichlet", "column": "nothing"}},
        DataError,
        "has no column 'nothing'",
    ),
    (
        "server without examples",
        {"partition": {"server_share": 0.0}, "server": {"steps": 1}},
        DataError,
        "the server holds no example",
    ),
    (
        "text missing",
        {"distill": {"text": ["nowhere.txt"]}},
        DataError,
        "there is no text file nowhere.txt",
    ),
    (
        "plan",
        {"auxiliary": {"plan": "ends(4)"}},
        FedspError,
        "leaves no middle in a model of 8 layers",
    ),
    (
        "prompt too long",
        {"prompt": {"length": 250}},
        FedspError,
        "leaves 6 of the model's 256 positions",
    ),
]


@pytest.mark.parametrize(
    ("change", "kind", "sentence"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, change: dict[str, Any], kind: type[FedspError], sentence: str
) -> None:
    with pytest.raises(kind) as caught:
        commands.run(settings(tmp_path, **change))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        (
            {"validation": {"by": "clients"}, "round": {"rounds": 1, "clients": 0}},
            FedspError,
            "validation.by: no client is sampled",
        ),
        (
            {
                "distill": {"steps": 2, "text": ["server"], "sequence_length": 32},
                "partition": {"clients": 3, "server_share": 0.0},
            },
            DataError,
            "there is no text to distil on",
        ),
        (
            {
                "distill": {
                    "steps": 2,
                    "text": [str(EMBEDDED / "public.txt")],
                    "sequence_length": 300,
                }
            },
            DataError,
            "distill.sequence_length = 300 is more than the 252",
        ),
        (
            {"model": {"name": "embedded", "device": "gpu"}},
            FedspError,
            "model.device = 'gpu' cannot be used on this machine",
        ),
        (
            {"partition": {"clients": 3, "server_share": 1.0}},
            DataError,
            "only 0 training examples are left",
        ),
    ],
)
def test_configurations_that_fit_no_data(
    tmp_path: Path, changes: dict[str, Any], kind: type[FedspError], sentence: str
) -> None:
    with pytest.raises(kind) as caught:
        commands.run(settings(tmp_path, **changes))
    assert sentence in str(caught.value)
    assert not (tmp_path / "run").exists(), "a run that could not begin keeps no folder"


def test_a_loss_that_is_not_a_number_is_never_the_best() -> None:
    state = RunState(round=0, payload={}, best={}, best_round=0, best_loss=None)
    for loss in (float("nan"), float("-inf")):
        assert state.consider({}, 1, loss) is state
    assert state.consider({}, 2, 1.0).consider({}, 3, float("nan")).best_round == 2


@pytest.mark.parametrize(
    "what", ["data.train", "data.validation", "data.test", "distill.text", "global model"]
)
def test_a_run_begun_with_something_else_is_not_resumed(what: str, tmp_path: Path) -> None:
    """Everything that it reads is held against what it was begun with."""
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED / "model", model)
    commands.run(settings(tmp_path, model={"name": str(model), "device": "cpu"}))
    (tmp_path / "run" / "result.json").unlink()
    section, _, split = what.partition(".")
    if section == "data":
        questions(tmp_path, split, ROWS[1:61])
    elif section == "distill":
        (tmp_path / "public.txt").write_text("Another text.\n")
    else:
        weights, _ = read_tensors(model / "model.safetensors")
        name = next(name for name in weights if "ln_f" in name)
        write_tensors(
            model / "model.safetensors", weights | {name: 1.5 * weights[name]}, {"format": "pt"}
        )
    with pytest.raises(RunError, match=f"was started with another {what}: restore the original"):
        commands.resume(tmp_path / "run")
    if what == "global model":
        for use in (commands.evaluate, partial(commands.generate, text="a")):
            with pytest.raises(RunError, match="was started with another global model"):
                use(tmp_path / "run")


def test_a_run_of_a_version_that_pinned_less_is_resumed(tmp_path: Path) -> None:
    commands.run(settings(tmp_path))
    run = RunDirectory.open(tmp_path / "run")
    (run.path / "result.json").unlink()
    known = json.loads((run.path / "inputs.json").read_text())
    pinned = known.pop("global model")
    (run.path / "inputs.json").write_text(json.dumps(known))
    commands.resume(run.path)
    assert json.loads((run.path / "inputs.json").read_text())["global model"] == pinned


def test_a_peft_adapter_can_be_where_a_run_starts(tmp_path: Path) -> None:
    commands.run(settings(tmp_path / "first", prompt={"length": 4, "space": "key_value"}))
    commands.export(tmp_path / "first" / "run", tmp_path / "adapter")
    figures = commands.run(
        settings(
            tmp_path / "second",
            prompt={"length": 4, "space": "key_value", "init": str(tmp_path / "adapter")},
            round={"rounds": 1},
        )
    )
    first = read_prompt(tmp_path / "first" / "run" / "best.safetensors").values()
    second = read_prompt(Path(figures["folder"]) / "best.safetensors").values()
    assert float((first - second).detach().abs().max()) < 0.2


def test_clients_with_any_name_keep_their_state_inside_the_run(tmp_path: Path) -> None:
    directory = RunDirectory.create(make_config(settings(tmp_path)))
    names = ["../server", "..", ".", "a/b", "client %2E", "x" * 300, "x" * 301, "ä" * 90]
    folders = [directory.state_store(f"client {name}").folder for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert folder.parent == directory.path / "state" and folder.name not in {".", ".."}
        folder.mkdir(parents=True)


def test_an_empty_client_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsp.data import partition

    monkeypatch.setattr(partition, "_divide", lambda *_: {"hospital-a": [0], "hospital-b": []})
    with pytest.raises(
        DataError, match="client 'hospital-b' would hold no example: use fewer clients"
    ):
        commands.run(settings(tmp_path))


def test_too_long_examples_are_counted(tmp_path: Path) -> None:
    figures = commands.run(settings(tmp_path, data={**settings(tmp_path)["data"], "max_tokens": 8}))
    assert figures["shortened_client_examples"] > 0 and figures["test"]["shortened_examples"] > 0


@pytest.mark.study
@pytest.mark.parametrize("write", [7, 16, 19])
def test_kill_9_in_the_middle_of_a_write(tmp_path: Path, write: int) -> None:
    """A process of its own, killed while a file is half written: package, prompt or checkpoint."""
    whole = Path(commands.run(settings(tmp_path / "whole", **PAPER))["folder"])
    values = settings(tmp_path / "killed", **PAPER)
    original, writes = os.fsync, itertools.count(1)

    def fsync(fd: Any) -> None:
        if next(writes) == write:
            os.ftruncate(fd, 100)
            os.kill(os.getpid(), signal.SIGKILL)
        original(fd)

    def run() -> None:
        os.fsync = fsync
        commands.run(values)

    assert end_of(run) == -signal.SIGKILL
    commands.resume(values["output"])
    assert prompt_bits(Path(values["output"])) == prompt_bits(whole)


def test_a_prompt_of_another_shape_is_refused(tmp_path: Path) -> None:
    from fedsp.models.soft_prompt import SoftPrompt

    SoftPrompt(
        PromptSpec(
            space="residual",
            length=5,
            model=ModelShape(layers=8, heads=4, head_size=32, hidden=128),
        )
    ).save(tmp_path / "p.safetensors")
    with pytest.raises(
        FedspError,
        match=(
            r"holds a residual prompt of shape \(5, 8, 128\), the run needs residual of shape \(4,"
            r" 8, 128\)"
        ),
    ):
        commands.run(
            settings(tmp_path, prompt={"length": 4, "init": str(tmp_path / "p.safetensors")})
        )


def test_a_changed_package_is_refused(tmp_path: Path) -> None:
    config = make_config(settings(tmp_path))
    commands.distill(config, tmp_path / "package")
    values = settings(tmp_path, auxiliary={"folder": str(tmp_path / "package")})
    manifest = tmp_path / "package" / "auxiliary.json"
    original = manifest.read_text()
    manifest.write_text(original.replace(json.loads(original)["sha256"], "0" * 64))
    with pytest.raises(AuxiliaryError, match=r"SHA-256 digest .* expected 0000000000000000"):
        commands.run(values)
    manifest.write_text(original)
    tokenizer = tmp_path / "package" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(AuxiliaryError, match="tokenizer"):
        commands.run(values)


@pytest.mark.study
def test_a_package_says_how_much_worse_than_the_global_model_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against both models' own forward on the first text that the distillation leaves; who plans or
    starts a run on a package that reads much worse is warned, before anything is tuned."""
    public = str(EMBEDDED / "public.txt")
    distill = {"steps": 2, "batch_size": 2, "sequence_length": 32, "sequences": 4}
    config = make_config(settings(tmp_path, distill={**distill, "text": [public]}))
    package = tmp_path / "package"
    commands.distill(config, package)
    manifest = json.loads((package / "auxiliary.json").read_text())
    server = open_server(config, load_dataset(config))
    count = config.distill.sequences + 32
    unread = packed(
        server.tokenizer, read_passages([public]), length=32, count=count, seed=config.seed
    )[config.distill.sequences :]
    auxiliary = load_auxiliary(package, device=torch.device("cpu"), positions="hugging_face")
    ids = torch.tensor(unread)
    with torch.no_grad():
        own, expected = (
            float(model.model(input_ids=ids, labels=ids).loss)
            for model in (auxiliary, server.model)
        )
    assert manifest["excess_text_loss"] == pytest.approx(own - expected, abs=1e-4)
    values = settings(tmp_path, auxiliary={"folder": str(package)})
    assert plan_run(make_config(values))["excess_text_loss"] == manifest["excess_text_loss"]
    said: list[str] = []
    monkeypatch.setattr("fedsp.experiments.plan.MUCH_WORSE", manifest["excess_text_loss"] - 0.01)
    commands.run(values, callbacks=Callbacks(info=said.append))
    told = [text for text in said if "nats a token worse" in text]
    assert len(told) == 1 and told[0].startswith("warning: on public text")
    assert "distil longer" in told[0]
    monkeypatch.setattr("fedsp.experiments.plan.MUCH_WORSE", manifest["excess_text_loss"] + 0.01)
    assert how_it_reads(manifest["excess_text_loss"]).startswith("on public text")


@pytest.mark.parametrize(
    ("length", "sequences", "read", "unread"),
    [(16, 100, 100, 32), (16, 5000, None, 32), (64, 512, None, 0)],
)
def test_text_that_a_package_is_judged_by_is_not_distilled_on(
    length: int, sequences: int, read: int | None, unread: int, tmp_path: Path
) -> None:
    """What stands behind the text that is read, or its end; none where that would be more than a
    sixteenth of it."""
    public = EMBEDDED / "public.txt"
    section = {"text": [str(public)], "sequence_length": length, "sequences": sequences}
    config = make_config(settings(tmp_path, distill={"steps": 1, **section}))
    server = open_server(config, load_dataset(config))
    whole = packed(
        server.tokenizer, read_passages([public]), length=length, count=10**6, seed=config.seed
    )
    text = distillation_text(server)
    end = len(whole) - unread if read is None else read
    assert text.read == whole[:end]
    assert text.unread == [row for row in whole[end : end + unread] if len(row) == length]


def test_a_package_that_is_damaged_cannot_be_planned_for(tmp_path: Path) -> None:
    package = tmp_path / "package"
    values = make_config(settings(tmp_path, auxiliary={"folder": str(package)}))
    assert "excess_text_loss" not in plan_run(values)  # not there yet
    package.mkdir()
    (package / "auxiliary.json").write_text("{")
    with pytest.raises(AuxiliaryError, match="the auxiliary model in .* cannot be used"):
        plan_run(values)


def test_a_run_reads_columns_by_their_own_names(tmp_path: Path) -> None:
    """To the same bits, in files of every split."""
    commands.run(settings(tmp_path / "plain"))
    own = settings(tmp_path / "own")
    for split in ("train", "validation", "test"):
        file = Path(own["data"][split])
        file.write_text(file.read_text().replace('"question":', '"Frage":'))
    own["data"]["columns"] = {"question": "Frage"}
    commands.run(own)
    assert prompt_bits(tmp_path / "own" / "run") == prompt_bits(tmp_path / "plain" / "run")


@pytest.fixture(scope="module")
def untuned(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The answer loss of the untuned model on the test questions of small runs."""
    bare = commands.run(settings(tmp_path_factory.mktemp("bare"), method="zero_shot"))
    assert "zero_shot" not in bare
    return float(bare["test"]["answer_loss"])


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "messenger", "messenger": {"kind": "adapter"}, "prompt": {}},
        {"messenger": {"kind": "layers"}},
        {"method": "finetune", "partition": {"clients": 0}, "server": {"steps": 2}},
        {"method": "lora"},
    ],
    ids=["adapter", "layers", "finetune", "lora"],
)
def test_figures_without_what_was_tuned_stand_beside_those_of_a_run(
    changes: dict[str, Any], tmp_path: Path, untuned: float
) -> None:
    """The untuned model's own, whatever the run tunes."""
    values = settings(tmp_path, round={"rounds": 1}, **changes)
    if changes.get("prompt") == {}:
        del values["prompt"]
    figures = commands.run(values)
    expected = pytest.approx(untuned, rel=1e-6)
    assert figures["zero_shot"]["answer_loss"] == expected != figures["test"]["answer_loss"]


def test_they_are_the_same_after_a_kill(tmp_path: Path, untuned: float) -> None:
    figures = commands.run(settings(tmp_path))
    assert figures["zero_shot"]["answer_loss"] == pytest.approx(untuned, rel=1e-6)
    (tmp_path / "run" / "result.json").unlink()
    assert commands.resume(tmp_path / "run")["zero_shot"] == figures["zero_shot"]


def test_a_share_is_held_out_for_the_test_where_no_file_is_named(tmp_path: Path) -> None:
    """Nobody trains on it, it is the same when the run is resumed, and it is said."""
    values = settings(tmp_path)
    del values["data"]["test"]
    said: list[str] = []
    figures = commands.run(values, callbacks=Callbacks(info=said.append))
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    held = {row for name in ("server", "validation") for row in partition[name]}
    held |= {row for rows in partition["clients"].values() for row in rows}
    assert len(partition["test"]) == 6 and not held & set(partition["test"])
    assert len(held) == 54 and figures["test"]["examples"] == 6
    assert any("6 of the 60 examples in data.train are held out for the test" in a for a in said)
    (row,) = commands.evaluate(tmp_path / "run", zero_shot=False)
    assert row["answer_loss"] == pytest.approx(figures["test"]["answer_loss"], abs=1e-6)
    few = load_dataset(make_config(values | {"data": values["data"] | {"test_examples": 2}}))
    assert len(few.test) == 2 and {row.context for row in few.test} <= {
        few.train[index].context for index in partition["test"]
    }
    other = load_dataset(make_config(values | {"seed": 5})).partition
    assert other.test == partition["test"] and other.server != partition["server"]
    none = load_dataset(make_config(values | {"data": values["data"] | {"test_holdout": 0.0}}))
    assert not none.test and not none.partition.test


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    commands.run(settings(tmp_path))
    with pytest.raises(RunError, match="this very run, finished"):
        commands.run(settings(tmp_path))
    with pytest.raises(RunError, match=r"another configuration \(round.rounds differs\)"):
        commands.run(settings(tmp_path, round={"rounds": 4}))
    with pytest.raises(RunError, match="another configuration"):
        commands.resume(tmp_path / "run", make_config(settings(tmp_path, seed=5)))
    with pytest.raises(RunError, match="holds no run"):
        commands.resume(tmp_path / "elsewhere")


def test_a_finished_run_is_said_to_be_finished_and_nothing_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = commands.run(settings(tmp_path))
    bits = prompt_bits(tmp_path / "run")
    monkeypatch.setattr(experiment, "open_server", lambda *_: pytest.fail("the model was loaded"))
    said: list[str] = []
    again = commands.resume(tmp_path / "run", callbacks=Callbacks(info=said.append))
    assert (
        again["test"] == figures["test"]
        and again["folder"] == figures["folder"]
        and "is finished" in said[0]
    )
    assert prompt_bits(tmp_path / "run") == bits


@pytest.mark.study
def test_a_test_file_that_changed_since_is_not_evaluated_in_silence(tmp_path: Path) -> None:
    commands.run(settings(tmp_path))
    path = tmp_path / "test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(RunError, match=r"was started with another data.test: restore the original"):
        commands.evaluate(tmp_path / "run")
    assert commands.evaluate(tmp_path / "run", split="validation")[0]["examples"] == 12


def test_a_server_whose_own_steps_diverge_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        FedSP,
        "server_update",
        lambda _self, _server, aggregated, *_: ({PROMPT: aggregated[PROMPT] * float("nan")}, 1.0),
    )
    with pytest.raises(
        TrainingDiverged,
        match="round 1, server: the tuned values are not finite: lower server.learning_rate",
    ):
        commands.run(settings(tmp_path, server={"steps": 1}))
    with pytest.raises(FedspError, match="server.learning_rate: expected at most 100"):
        make_config(settings(tmp_path, server={"steps": 1, "learning_rate": 1e23}))


def test_more_answers_than_a_round_asks_for_are_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(
        FedspError,
        match="a round needs 5 updates but samples 3 clients; set it to 3 at most",
    ):
        make_config(settings(tmp_path, round={"min_clients": 5}))


def test_files_are_the_same_by_whatever_name_a_run_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs keep the whole names of their files; those of before may have relative ones, and be
    resumed from where they were begun, even if a file is gone that is read no more."""
    monkeypatch.chdir(tmp_path)
    values = settings(Path(), round={"rounds": 1})
    config = commands.as_config(values)
    assert config.data.train == str(tmp_path / "train.jsonl")
    commands.run(config)
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace(f"{tmp_path}/", ""))
    begun = RunDirectory.open(tmp_path / "run").config
    assert begun.data.train == "train.jsonl" and begun.distill.text == ["public.txt"]
    assert not differing_keys(config, begun)
    (tmp_path / "test.jsonl").unlink()
    assert not differing_keys(config, begun)
    assert commands.resume(tmp_path / "run", config)["best_round"] <= 1
    other = commands.as_config({**values, "data": {**values["data"], "test": "validation.jsonl"}})
    assert differing_keys(other, begun) == ["data.test"]


@pytest.mark.parametrize("line", [b"\xff\xfe", b"5", b"null", b'{"round": 1}'])
def test_an_odd_line_of_a_journal_hides_no_other_run(line: bytes, tmp_path: Path) -> None:
    commands.run(settings(tmp_path))
    shutil.copytree(tmp_path / "run", tmp_path / "spoiled")
    with open(tmp_path / "spoiled" / "rounds.jsonl", "ab") as file:
        file.write(line + b"\n")
    assert [row["state"] for row in list_runs(tmp_path)] == ["finished", "finished"]


def test_a_prompt_that_leaves_no_room_for_text_is_refused(tmp_path: Path) -> None:
    commands.run(settings(tmp_path))
    spec = read_prompt(tmp_path / "run" / "best.safetensors").spec
    SoftPrompt(replace(spec, length=255)).save(tmp_path / "long.safetensors")
    with pytest.raises(
        PromptError, match="a prompt of 255 tokens leaves 1 of the model's 256 positions for text"
    ):
        commands.evaluate(tmp_path / "run", prompt=tmp_path / "long.safetensors")


def test_a_prompt_of_a_file_is_not_read_by_the_package_of_a_run_of_adapters(tmp_path: Path) -> None:
    adapters = settings(tmp_path, messenger={"kind": "adapter"})
    del adapters["prompt"]
    folder = commands.run(adapters)["folder"]
    prompt = Path(commands.run(settings(tmp_path / "other"))["folder"]) / "best.safetensors"
    assert len(commands.evaluate(folder, prompt=prompt)) == 2
    with pytest.raises(RunError, match="tuned no prompt, so its auxiliary model reads none"):
        commands.evaluate(folder, prompt=prompt, auxiliary=True)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write .*file.*; choose another folder"):
        commands.run(settings(tmp_path, output=str(tmp_path / "file" / "run")))


def test_a_second_run_on_a_folder_leaves_it_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the first still loads its model, and has written no more than what it is."""
    place = "fedsp.experiments.run.load_dataset"
    refused: list[str] = []

    def another_comes(*arguments: Any) -> Any:
        monkeypatch.setattr(place, load_dataset)
        done = subprocess.run(
            [sys.executable, "-c", f"import fedsp; fedsp.run({settings(tmp_path)!r})"],
            capture_output=True,
            text=True,
        )
        refused.append(done.stderr)
        return load_dataset(*arguments)

    monkeypatch.setattr(place, another_comes)
    assert commands.run(settings(tmp_path))["best_round"] >= 0
    assert "is being run by another process" in refused[0]


@pytest.mark.parametrize("how", ["run", "resume"])
def test_a_run_is_one_process_s_at_a_time(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that go on with it would train twice, and a private run would spend twice."""
    keep = RunDirectory.save_round

    def another_comes(self: RunDirectory, *arguments: Any) -> None:
        keep(self, *arguments)
        with pytest.raises(
            RunError, match="is being run by another process: wait for it, or end it"
        ):
            commands.resume(self.path)
        if how == "resume":
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "save_round", another_comes)
    if how == "run":
        assert commands.run(settings(tmp_path))["best_round"] >= 0
    else:
        with pytest.raises(KeyboardInterrupt):
            commands.run(settings(tmp_path))
        monkeypatch.setattr(RunDirectory, "save_round", keep)
        assert commands.resume(tmp_path / "run")["best_round"] >= 0, "a lock ends with its process"


@pytest.mark.parametrize(
    "arguments",
    [["-c", "import fedsp; fedsp.__all__"], ["-m", "fedsp", "--help"]],
    ids=["import", "help"],
)
def test_start_up_imports_nothing_heavy(arguments: list[str]) -> None:
    """What makes a start slow is torch and transformers; neither may be loaded before a command
    needs it."""
    code = "import runpy, sys\n" + (
        "import fedsp\nfedsp.__all__\n"
        if arguments[0] == "-c"
        else (
            "sys.argv = ['fedsp', '--help']\ntry:\n    runpy.run_module('fedsp',"
            " run_name='__main__')\nexcept SystemExit:\n    pass\n"
        )
    )
    code += (
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'numpy'} &"
        " set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_test_question_that_cannot_be_scored_stops_a_run_before_its_first_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_tokenizer: Any, examples: Any, _most: int) -> Any:
        raise DataError(f"example {examples[0].id}: the tokenizer makes no token of an answer")

    monkeypatch.setattr(experiment, "encode_choices", refuses)
    with pytest.raises(
        DataError, match=f"example {ROWS[200]['id']}: " if "id" in ROWS[200] else "example 0: "
    ):
        commands.run(settings(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.study
@pytest.mark.parametrize("kind", ["prompt", "adapter", "layers", "prompt+adapter"])
def test_evaluation_tells_what_was_learned_from_what_was_transferred(
    tmp_path: Path, kind: str
) -> None:
    """A package that is the whole model, not distilled: tuned and untuned auxiliary model are the
    global one's, the mean of two equals is each, and proxy-tuning by weight 1 is plugging in."""
    values = settings(
        tmp_path,
        auxiliary={"plan": "tail(7, 1)"},
        distill={"steps": 0},
        messenger={"kind": kind, "rank": 2},
        client={"prompt_steps": 2, "batch_size": 4, "learning_rate": 1e-3},
    )
    folder = Path(commands.run(values)["folder"])
    zero, tuned, untuned, own, proxy, mean = commands.evaluate(folder, auxiliary=True)
    assert [row["prompt"].partition(",")[0] for row in (untuned, own, proxy)] == [
        "auxiliary model",
        "auxiliary model",
        "proxy-tuned",
    ]
    assert untuned["answer_loss"] == pytest.approx(zero["answer_loss"], abs=1e-4)
    assert own["answer_loss"] == pytest.approx(tuned["answer_loss"], abs=1e-4)
    assert mean["answer_loss"] == pytest.approx(tuned["answer_loss"], abs=1e-4)
    assert tuned["answer_loss"] != pytest.approx(zero["answer_loss"], abs=1e-3)
    assert commands.evaluate(folder)[1] == tuned, "what was loaded in between leaves no trace"
    result = json.loads((folder / "result.json").read_text())
    assert result["auxiliary_test"] == pytest.approx(
        {name: own[name] for name in result["auxiliary_test"]}, abs=1e-4
    )
    run = open_run(folder)
    learned, not_learned = run.auxiliary_sides
    rows: Any = ([(1, 2, 3)], [[(4, 5), (6, 7)]], [[0, 0]])
    by_proxy = proxy_tuned(run.side(zero_shot=True), learned, not_learned, 1.0)
    torch.testing.assert_close(
        by_proxy.scorer()(*rows), run.side().scorer()(*rows), rtol=1e-4, atol=1e-4
    )


@pytest.mark.study
def test_both_models_write_a_text_together(tmp_path: Path) -> None:
    """Token by token with their caches, as they would without: the likeliest next token by the
    probabilities of answers to questions."""
    values = settings(
        tmp_path,
        auxiliary={"plan": "emulator(1, 1)"},
        messenger={"kind": "prompt+adapter", "rank": 8, "train_first": True},
        prompt={"length": 4, "space": "residual"},
        client={"prompt_steps": 8, "batch_size": 8, "learning_rate": 1e-2},
    )
    folder = Path(commands.run(values)["folder"])
    run = open_run(folder)
    text = "The stone bridge"
    (asked,) = encode_texts(run.server.tokenizer, [text])
    written = {}
    for answers in ("global", "auxiliary", "proxy", "mean"):
        together = answers_of(run, answers, 1.5)
        ids = list(asked)
        for _ in range(5):
            scores = together.scorer()([tuple(ids[:-1])], [[(ids[-1],)]], [[0]])
            ids.append(int(scores.argmax()))
        written[answers] = commands.generate(folder, text, most=5, answers=answers, weight=1.5)
        assert written[answers] == decode_behind(run.server.tokenizer, asked, ids[len(asked) :])
    assert len(set(written.values())) > 1, "each answers in its own way"
    with pytest.raises(ConfigurationError, match="answers = 'prox': choose .*proxy"):
        commands.generate(folder, text, answers="prox")  # type: ignore[arg-type]
    for weight in (1e38, -1001, math.nan, math.inf):
        with pytest.raises(ConfigurationError, match="it must be from -1000 to 1000"):
            commands.generate(folder, text, answers="proxy", weight=weight)
    with pytest.raises(ConfigurationError, match="without what was tuned only the global model"):
        commands.generate(folder, text, answers="mean", zero_shot=True)
    with pytest.raises(DataError, match="the model has 252 positions after the prompt"):
        commands.generate(folder, text, most=250, answers="mean")


def test_only_a_run_of_fedsp_has_an_auxiliary_model_to_answer_with(tmp_path: Path) -> None:
    folder = Path(commands.run(settings(tmp_path, method="fedprompt"))["folder"])
    with pytest.raises(RunError, match="has no auxiliary model to answer with"):
        commands.evaluate(folder, auxiliary=True)


def test_one_client_alone_is_asked_and_nobody_else(tmp_path: Path) -> None:
    whole = settings(tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"round\.only: there is no client 'client-9'; did"
    ):
        commands.run(settings(tmp_path / "none", round={"rounds": 1, "only": "client-9"}))
    with pytest.raises(ConfigurationError, match=r"round\.only: it names one of several"):
        commands.run(settings(tmp_path / "all", partition={"clients": 0}, round={"only": "x"}))
    folder = Path(commands.run({**whole, "round": {"rounds": 2, "only": "client-1"}})["folder"])
    run = RunDirectory.open(folder)
    assert [record["asked"] for record in run.records()] == [["client-1"]] * 2
    partition = run.partition()
    assert partition and len(partition["clients"]) == 3, "the others hold what they held"


def test_a_run_stops_when_validation_has_not_fallen_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in validations, and from the best of them also after a kill."""
    losses = iter([4.0, 3.0, 3.5, 2.5, 2.6, 2.7, 1.0])
    monkeypatch.setattr("fedsp.experiments.run.validation_loss", lambda *_: next(losses))
    values = settings(
        tmp_path,
        data={**settings(tmp_path)["data"], "test": ""},
        round={"rounds": 40},
        client={"prompt_steps": 1, "batch_size": 2},
        validation={"every": 3, "patience": 2},
    )
    keep = RunDirectory.save_round

    def kill(self: RunDirectory, state: Any, *arguments: Any) -> None:
        keep(self, state, *arguments)
        if state.round == 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "save_round", kill)
    with pytest.raises(KeyboardInterrupt):
        commands.run(values)
    monkeypatch.setattr(RunDirectory, "save_round", keep)
    result = commands.resume(values["output"])
    rounds = RunDirectory.open(Path(values["output"])).records()
    assert len(rounds) == 15 and result["best_round"] == 9 and result["validation_loss"] == 2.5
    with pytest.raises(ConfigurationError, match=r"validation\.patience: it counts the server's"):
        make_config({**values, "validation": {"by": "clients", "patience": 2}})
