"""What ends with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

WATCHDOG = [sys.executable, "-P", "-m", "fedsp.deployment.watchdog"]


def watched() -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """A watchdog, and the command that it runs, which says when it has begun."""
    code = "import time; print('begun', flush=True); time.sleep(600)"
    watchdog = subprocess.Popen(
        [*WATCHDOG, sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert watchdog.stdout and watchdog.stdout.readline() == b"begun\n"
    (child,) = psutil.Process(watchdog.pid).children()
    return watchdog, child


def ended(child: psutil.Process) -> bool:
    return not psutil.wait_procs([child], 20)[1]


def test_a_command_ends_when_standard_input_closes() -> None:
    watchdog, child = watched()
    assert watchdog.stdin
    watchdog.stdin.close()
    assert ended(child) and watchdog.wait(20) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_command_ends_though_the_watchdog_itself_is_killed() -> None:
    watchdog, child = watched()
    os.kill(watchdog.pid, signal.SIGKILL)
    watchdog.wait(20)
    assert ended(child)
