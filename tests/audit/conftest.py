"""The noise of the audits' tests: the same each time."""

from __future__ import annotations

import random

import pytest

from fedsp import privacy


@pytest.fixture(autouse=True)
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real noise would fail a test now and then with nothing broken: a lower bound of 95 %
    confidence is wrong in one of twenty, and an attack may guess right by chance."""
    draws = random.Random(11)
    monkeypatch.setattr("os.urandom", draws.randbytes)
    monkeypatch.setattr(privacy, "_system", draws)
