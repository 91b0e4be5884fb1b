"""`fedsp serve-model`: the runs that are served, and the HTTP server."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvicorn
from torch import Tensor

from fedsp.data.encoding import Tokenizer
from fedsp.deployment.model_server.engine import Engine
from fedsp.deployment.model_server.openai_api import Served, make_app
from fedsp.errors import ConfigurationError, DataError, RunError
from fedsp.experiments.start import OpenRun, answers_of, open_runs
from fedsp.models.soft_prompt import SoftPrompt
from fedsp.training.answers import Answering, Answers, Together

BASE = "base"
"""The name of the global model without what was tuned."""


GRACE = 5
"""Seconds for answers that are being written when the server is ended."""


def served_by_name(
    folders: Sequence[Path], answering: Answering, weight: float
) -> tuple[dict[str, Answers], Tokenizer]:
    """Who answers for each run, by the name of its folder, and the base model; and the tokenizer.

    Raises:
        RunError: two runs have one name, or they cannot be served together.
        ConfigurationError, RunError: as `answers_of`.
    """
    names = [Path(folder).resolve().name for folder in folders]
    for number, name in enumerate(names):
        if name == BASE or name in names[:number]:
            raise RunError(
                f"{folders[number]}: a model named {name!r} is served already; rename the folder"
            )
    runs = open_runs(folders)
    found = {
        name: _alone(run, runs, answers_of(run, answering, weight))
        for name, run in zip(names, runs, strict=True)
    }
    base = _alone(runs[0], runs, runs[0].side(zero_shot=True))
    return {**found, BASE: base}, runs[0].server.tokenizer


def _alone(run: OpenRun, runs: Sequence[OpenRun], answers: Answers) -> Answers:
    """The answers of a run whose global model others share: what theirs left in it is taken out
    first, and a prompt's keys and values are made once."""
    if len(answers.sides) == 1 and isinstance(run.messenger, SoftPrompt):
        (side,) = answers.sides
        prefix = side.load()
        answers = replace(side, load=lambda: prefix)
    others = [one for one in runs if one is not run and not isinstance(one.messenger, SoftPrompt)]

    def load(own: Callable[[], Tensor | None]) -> Tensor | None:
        for one in others:
            one.messenger.load(one.start)
        return own()

    sides = [
        replace(side, load=partial(load, side.load)) if side.model is run.model else side
        for side in answers.sides
    ]
    return sides[0] if len(sides) == 1 else Together(sides, answers.combine)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: at any free port.

    Raises:
        ConfigurationError: that cannot be.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()
    except (OSError, OverflowError) as error:
        found.close()
        raise ConfigurationError(
            f"the server cannot listen at {host}:{port} ({error}): give another --host or --port"
        ) from error
    return found


def read_key(path: Path | None, host: str) -> str | None:
    """The key that requests must bear, from a file.

    Raises:
        DataError: the file cannot be read, or holds no key.
        ConfigurationError: other machines could reach the server, and there is no key.
    """
    if path is None:
        if host not in ("127.0.0.1", "::1", "localhost"):
            raise ConfigurationError(
                f"--host {host}: other machines could use the model; give --key-file, a file with a"
                " key of your own that requests must bear"
            )
        return None
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise DataError(f"--key-file {path} cannot be read ({error})") from error
    if len(key) < 16 or not key.isprintable() or " " in key:
        raise DataError(
            f"--key-file {path}: expected one line of at least 16 letters, digits and signs; write"
            " one with `openssl rand -hex 32`"
        )
    return key


def serve_models(
    folders: Sequence[Path],
    *,
    host: str,
    port: int,
    key_file: Path | None,
    most: int,
    answering: Answering,
    weight: float,
    info: Callable[[str], None],
) -> None:
    """Serve runs of one base model until the process is ended.

    Raises:
        FedspError: as one sentence, whatever keeps it from starting.
    """
    key = read_key(key_file, host)
    with listen(host, port) as found:
        answers, tokenizer = served_by_name(folders, answering, weight)
        engine = Engine(answers)
        app = make_app(
            Served(
                engine=engine,
                tokenizer=tokenizer,
                rooms={name: one.room() for name, one in answers.items()},
                most=most,
                key=key,
            )
        )
        at = found.getsockname()[1]
        slow = [name for name, at_once in engine.at_once.items() if at_once == 1]
        if slow:
            info(f"one text at a time is written by {', '.join(slow)}, as their models need it")
        info(f"http://{f'[{host}]' if ':' in host else host}:{at}/v1 serves {', '.join(answers)}")
        engine.start()
        try:
            uvicorn.Server(
                uvicorn.Config(
                    app,
                    log_level="warning",
                    access_log=False,
                    lifespan="off",
                    timeout_graceful_shutdown=GRACE,
                )
            ).run(sockets=[found])
        finally:
            engine.stop()
