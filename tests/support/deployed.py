"""The processes of a deployment on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import psutil

DRIVER = Path(__file__).with_name("serve_driver.py")


class Deployment:
    """A federation on disk, and its processes. Every process that a test starts is ended, by pid,
    when the test is."""

    opened: ClassVar[list[Deployment]] = []
    """Those of the test that runs: if it fails their logs are printed."""

    def __init__(self, place: Path, port: int) -> None:
        self.opened.append(self)
        self.place, self.port, self.run = place, port, place / "server" / "run"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(
        self, folder: Path, log: str, *command: str, hostile: str = ""
    ) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "HOSTILE": hostile}
        with open(folder / log, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", *command],
                cwd=folder,
                stdout=file,
                stderr=file,
                env=environment,
            )
        self._started.append(process)
        return process

    def join(self, client: str, refused_for: float = 90.0) -> subprocess.Popen[bytes]:
        patience = f"from fedsp.deployment import join; join.REFUSED_FOR = {refused_for}"
        code = (
            f"import sys; {patience}; sys.argv = ['fedsp', 'join', 'party.toml']; from fedsp.cli"
            " import main; main()"
        )
        return self.start(self.place / client, "join.log", "-c", code)

    def serve(
        self, *arguments: str, kill: str = "nothing", record: str = "nothing", hostile: str = ""
    ) -> subprocess.Popen[bytes]:
        return self.start(
            self.place / "server",
            "serve.log",
            str(DRIVER),
            kill,
            record,
            "serve",
            *(arguments or ("run.toml",)),
            hostile=hostile,
        )

    def said(self, party: str) -> str:
        return (self.place / party / ("serve.log" if party == "server" else "join.log")).read_text()

    def logs(self, lines: int = 60) -> str:
        """The last lines of every log of its processes."""
        parts = []
        for path in sorted(self.place.rglob("*.log")):
            last = path.read_text(errors="replace").splitlines()[-lines:]
            parts += [f"--- {path.relative_to(self.place)}", *last]
        return "\n".join(parts)

    def stop(self) -> None:
        ours = [
            child
            for process in self._started
            if process.poll() is None
            for child in [
                *psutil.Process(process.pid).children(recursive=True),
                psutil.Process(process.pid),
            ]
        ]
        for process in self._started:
            if process.poll() is None:
                process.kill()
        for process in self._started:
            process.wait(20)
        _, left = psutil.wait_procs(ours, 20)
        assert not left, f"processes outlived their parents: {left}"


def until(what: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something that processes do; the wait ends as soon as it is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"nothing came of it in {seconds:g} s"
        time.sleep(0.1)


def exited(process: subprocess.Popen[bytes], seconds: float = 240.0) -> int:
    return process.wait(seconds)
