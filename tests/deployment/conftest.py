"""A failing test of a deployment prints the logs of its processes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from support.deployed import Deployment


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for deployment in Deployment.opened:
            report.sections.append((f"logs below {deployment.place}", deployment.logs()))
    if report.when == "teardown":
        Deployment.opened.clear()
    return report
