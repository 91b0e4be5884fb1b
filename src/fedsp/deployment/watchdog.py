"""A watchdog for a child process: `python -m fedsp.deployment.watchdog COMMAND...` runs a command,
and ends it and all it started when standard input closes.

Standard input is a pipe from the process that started it, so it closes however that process ends,
kill -9 included.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

GRACE = 8.0


def main(command: list[str]) -> int:
    """Run `command` until it ends or standard input closes; returns its exit code."""
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_parent
    )

    def watch() -> None:
        while os.read(0, 1 << 16):
            pass
        _signal(child.pid, signal.SIGTERM)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            _signal(child.pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _signal(child.pid, signal.SIGTERM))
    code = child.wait()
    _signal(child.pid, signal.SIGKILL)  # what the command started and left behind
    return code


def _end_with_parent() -> None:
    """Linux ends the command where the watchdog itself is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # at once: a thread may still be reading standard input
