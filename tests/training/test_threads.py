"""Threads by measuring: one where several wait for each other, and what the environment says."""

from __future__ import annotations

import pytest
import torch

from fedsp.training.threads import CHOSEN_BY_HAND, measured_threads


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    for name in CHOSEN_BY_HAND:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("of_two", "threads"), [(0.4, 2), (0.9, 2), (0.95, 1), (3.0, 1)])
def test_several_threads_only_where_they_are_faster(of_two: float, threads: int) -> None:
    found, faster = measured_threads(lambda count: 1.0 if count == 1 else of_two)
    assert found == threads and faster == pytest.approx(1 / of_two)


def test_one_call_that_was_held_up_decides_nothing() -> None:
    calls = iter([9.0, *[0.6] * 20])
    assert measured_threads(lambda count: 1.0 if count == 1 else next(calls))[0] == 2


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert measured_threads(lambda count: float(count)) == (2, 1.0)
