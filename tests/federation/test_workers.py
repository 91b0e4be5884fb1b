"""Clients in several processes: the same bits, the same refusals, and nothing is left behind when
one of them, or the process that forked them, is killed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp import api as commands
from fedsp.errors import ConfigurationError, RunError, TrainingDiverged
from fedsp.federation.transport import local
from fedsp.federation.transport import workers as transport
from fedsp.models.loading import choose_device
from fedsp.training import loop as fitting
from fedsp.training import stage
from support.small_runs import PAPER, prompt_bits, settings

pytestmark = pytest.mark.skipif(
    choose_device("auto").type != "cpu",
    reason="where there is a GPU, a process that has trained cannot fork and train",
)


def figures_of(folder: Path) -> list[dict[str, Any]]:
    """What a run's rounds say, less their times."""
    lines = (folder / "run" / "rounds.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows
    ]


@pytest.mark.study
def test_any_number_of_workers_gives_the_bits_of_one_process(tmp_path: Path) -> None:
    """The authors' method, whose clients keep auxiliary weights and a projection of their own."""
    commands.run(settings(tmp_path / "here", **PAPER))
    for count in (1, 2, 5):  # three clients
        folder = tmp_path / str(count)
        commands.run(settings(folder, **PAPER), workers=count)
        assert prompt_bits(folder / "run") == prompt_bits(tmp_path / "here" / "run")
        assert figures_of(folder) == figures_of(tmp_path / "here")


def test_a_loss_that_is_no_number_is_told_with_its_round_and_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fitting.answer_loss
    monkeypatch.setattr(stage, "answer_loss", lambda *given: original(*given) * float("nan"))
    with pytest.raises(TrainingDiverged, match="round 1, client 'client-0': the loss is nan"):
        commands.run(settings(tmp_path, validation={"by": "none"}), workers=2)


@pytest.mark.study
def test_a_worker_that_is_killed_costs_no_finished_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.run(settings(tmp_path / "whole"))
    original, here = local.answer_here, os.getpid()

    def killed(clients: Any, request: Any) -> Any:
        if request.round == 2 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(clients, request)

    monkeypatch.setattr(transport, "answer_here", killed)
    with pytest.raises(RunError, match="ended from outside.*resume with fewer workers"):
        commands.run(settings(tmp_path / "killed"), workers=2)
    monkeypatch.setattr(transport, "answer_here", original)
    commands.resume(tmp_path / "killed" / "run")
    assert prompt_bits(tmp_path / "killed" / "run") == prompt_bits(tmp_path / "whole" / "run")


def test_workers_end_when_the_process_that_forked_them_is_killed() -> None:
    """Each holds the writing end of a pipe, which ends only when all of them have."""
    alive, held = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.setsid()
        os.close(alive)
        with transport.forked(2) as pool:
            for _ in range(2):
                pool.submit(_says_so_and_waits, held)
            signal.pause()
    os.close(held)
    try:
        assert os.read(alive, 1) == b"." and os.read(alive, 1) == b"."
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        assert select.select([alive], [], [], 60)[0] and os.read(alive, 1) == b""
    finally:
        os.close(alive)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent, signal.SIGKILL)


def _says_so_and_waits(pipe: int) -> None:
    os.write(pipe, b".")
    signal.pause()


def test_a_run_without_clients_needs_no_worker(tmp_path: Path) -> None:
    central = {"clients": 0, "server_share": 1.0}
    values = settings(tmp_path, method="zero_shot", partition=central)
    assert "test" in commands.run(values, workers=2)
    assert list(transport.in_parallel(2, len, [])) == []
    assert list(transport.in_parallel(2, len, ["a", "bc", ""])) == [1, 2, 0]


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({}, {"engine": "flower"}, "workers: engine flower has processes of its own"),
        ({}, {"workers": 0}, "workers = 0: expected at least 1"),
    ],
)
def test_what_workers_cannot_do_is_refused_by_name(
    changes: dict[str, Any], options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        commands.run(settings(tmp_path, **changes), **{"workers": 2, **options})


@pytest.mark.study
def test_a_run_that_was_begun_with_several_threads_is_not_resumed_with_one(tmp_path: Path) -> None:
    commands.run(settings(tmp_path))
    folder = tmp_path / "run"
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"threads": 2}))
    (folder / "result.json").unlink()
    try:
        with pytest.raises(RunError, match="was begun with 2 threads.*resume it without workers"):
            commands.resume(folder, workers=2)
    finally:
        torch.set_num_threads(1)
    assert (folder / "best.safetensors").exists()
