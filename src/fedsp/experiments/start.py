"""Start, resume or open a run, and make the package: the folder with the auxiliary model that
clients get."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import torch

from fedsp.config import RunConfig
from fedsp.data.chat import end_of_turn
from fedsp.data.dataset import load_dataset
from fedsp.data.encoding import decode_behind, encode_contexts
from fedsp.data.tasks import Example
from fedsp.errors import ConfigurationError, DataError, RunError, did_you_mean
from fedsp.experiments.build import method_setup
from fedsp.experiments.plan import LEAST_ROOM
from fedsp.experiments.run import run_experiment
from fedsp.experiments.run_directory import LOCK, RunDirectory
from fedsp.experiments.server_setup import (
    Server,
    blank_prompt,
    make_auxiliary,
    open_server,
    score_test,
    token_limit,
    with_layers_chosen,
)
from fedsp.experiments.tracking.tracked import tracked
from fedsp.federation.agreement import agreement_of
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.clients import client_messenger
from fedsp.federation.methods.registry import find_method
from fedsp.federation.transport.local import local
from fedsp.federation.transport.workers import workers
from fedsp.models.adapter import Adapter
from fedsp.models.auxiliary import AuxiliaryModel, disclosed_share, load_auxiliary
from fedsp.models.loading import choose_device, reduce_precision
from fedsp.models.messengers.prompt_and_adapter import PromptAndAdapter
from fedsp.models.payload import Payload
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import SoftPrompt, read_prompt
from fedsp.models.trainable import Messenger
from fedsp.storage import MANIFEST, locked, move_into_place, read_tensors, unfinished_beside
from fedsp.training.answers import Answering, Answers, Side, mean_of, proxy_tuned
from fedsp.training.evaluation import Parts, in_parts
from fedsp.training.generation import write

Figures = dict[str, Any]
Engine = Callable[[RunDirectory, Callbacks], Figures]
"""How a run reaches its clients: it does, or goes on with, the run in a folder."""


def in_this_process(directory: RunDirectory, callbacks: Callbacks) -> Figures:
    """The engine whose clients are in this process."""
    return run_experiment(directory, local, callbacks)


def in_workers(count: int) -> Engine:
    """The engine whose clients train in so many processes, one thread each: the same bits as in one
    process that has one thread.

    Raises (when it is run):
        ConfigurationError: the model is not on the CPU, or the auxiliary model changes between
            rounds, which forked processes would not see.
        RunError: the run was begun with several threads, which decide its last bits.
    """

    def engine(directory: RunDirectory, callbacks: Callbacks) -> Figures:
        config = directory.config
        if choose_device(config.model.device).type != "cpu":
            raise ConfigurationError(
                'workers: they share a CPU\'s memory; set model.device to "cpu", or leave workers'
                " out"
            )
        if directory.threads != 1:
            raise RunError(
                f"{directory.path} was begun with {directory.threads} threads, which decide its"
                " last bits: resume it without workers"
            )
        with ExitStack() as stack:
            return run_experiment(
                directory,
                lambda clients: stack.enter_context(workers(clients, count)),
                callbacks,
            )

    return engine


def require_local(config: RunConfig) -> None:
    """See that a configuration's clients are not elsewhere.

    Raises:
        ConfigurationError: they are.
    """
    if config.federation:
        raise ConfigurationError(
            "the configuration has a [federation] section, so its clients are on machines of their"
            " own: run it with `fedsp serve`"
        )


def start_run(
    config: RunConfig, callbacks: Callbacks | None = None, engine: Engine = in_this_process
) -> Figures:
    """Run the configuration's federation; returns the figures of `result.json` and the folder."""
    if engine is in_this_process:
        require_local(config)
    config = with_layers_chosen(config, callbacks)
    RunDirectory.require_free(config)  # before a lock lies in it
    with _alone(Path(config.output)):
        return _go_on(RunDirectory.create(config), callbacks, engine)


def resume_run(
    directory: RunDirectory, callbacks: Callbacks | None = None, engine: Engine = in_this_process
) -> Figures:
    """Go on with a run, or tell of a finished one what was still to be told; returns its figures
    and the folder. The run is locked: two processes on it would train twice and spend the privacy
    budget twice.

    Raises:
        RunError: another process has it.
    """
    with _alone(directory.path):
        return _go_on(directory, callbacks, engine)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only process that runs what is in a folder."""
    with locked(folder / LOCK, wait=False) as held:
        if not held:
            raise RunError(
                f"{folder} is being run by another process: wait for it, or end it; nothing was"
                " changed"
            )
        yield


def _go_on(directory: RunDirectory, callbacks: Callbacks | None, engine: Engine) -> Figures:
    torch.set_num_threads(directory.threads)  # as it was begun with: they decide the last bits
    callbacks = callbacks or Callbacks()
    if directory.finished:
        callbacks.info(f"the run in {directory.path} is finished")
    return {
        "folder": str(directory.path),
        **tracked(directory, callbacks, lambda callbacks: engine(directory, callbacks)),
    }


def make_package(
    config: RunConfig,
    folder: str | Path,
    callbacks: Callbacks | None = None,
    seal: Callable[[Path, AuxiliaryModel, Server], str] = lambda folder, auxiliary, server: (
        auxiliary.digest()
    ),
) -> Figures:
    """Make the auxiliary model of a configuration and write it as the package, the folder that
    clients get. `seal` may add files to it first, and returns the digest.

    Raises:
        RunError: the folder is in use.
    """
    folder = Path(folder).resolve()
    require_new(folder)
    whole: Figures = {"device": "auto"} if config.model.device == "split" else {}
    if config.model.precision in ("8bit", "4bit"):  # a package needs all digits
        whole["precision"] = "auto"
    sections = {
        "auxiliary": config.auxiliary.model_copy(update={"folder": None}),
        "model": config.model.model_copy(update=whole),
    }
    config = with_layers_chosen(config.model_copy(update=sections), callbacks)
    server = open_server(config, load_dataset(config))
    started = time.perf_counter()
    unfinished = unfinished_beside(folder)
    try:
        auxiliary = make_auxiliary(server, unfinished, callbacks or Callbacks())
        digest = seal(unfinished, auxiliary, server)
        move_into_place(unfinished, folder, last=MANIFEST)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {
        "folder": str(folder),
        "sha256": digest,
        "disclosed_share": (
            disclosed_share(auxiliary, server.model)
            if auxiliary.discloses is None
            else auxiliary.discloses
        ),
        "seconds": time.perf_counter() - started,
    }


def require_new(folder: Path) -> None:
    """See that nothing would be written over.

    Raises:
        RunError: the folder is in use.
    """
    if folder.exists() and (
        not folder.is_dir() or any(entry.name != ".part" for entry in folder.iterdir())
    ):
        raise RunError(f"{folder} is in use: give a new folder")


@dataclass(kw_only=True)
class OpenRun:
    """The server's side of a run: the global model, as the run's method reads it, and the best that
    was tuned."""

    directory: RunDirectory
    server: Server
    model: PromptedLM
    messenger: Messenger
    best: Payload
    start: Payload

    def prefix(self, *, zero_shot: bool = False) -> torch.Tensor | None:
        """Load the best prompt or weights, or with `zero_shot` the initial ones, which change
        nothing without a prefix; returns the prefix keys and values, None if there are none."""
        if not (zero_shot and isinstance(self.messenger, SoftPrompt)):
            self.messenger.load(self.start if zero_shot else self.best)
        if zero_shot:
            return None
        with torch.no_grad():
            return self.messenger.prefix(self.model)

    def side(self, *, zero_shot: bool = False) -> Side:
        """The global model as it answers with what was tuned, or without it."""
        return Side(self.model, partial(self.prefix, zero_shot=zero_shot))

    @cached_property
    def auxiliary_sides(self) -> tuple[Side, Side]:
        """The run's auxiliary model, loaded once, as it answers with the best that was tuned, and
        without it.

        Raises:
            RunError: its clients have no auxiliary model.
        """
        config = self.directory.config
        if not (find_method(config.method).deployable and config.asks_clients):
            raise RunError(
                f"{self.directory.path} has no auxiliary model to answer with: take a run of FedSP"
                " with clients"
            )
        auxiliary = load_auxiliary(
            self.directory.package, device=self.model.device, positions=config.model.positions
        )
        reduce_precision(auxiliary, config.auxiliary.precision, "auxiliary.precision")
        messenger = client_messenger(agreement_of(config, self.server.max_tokens), auxiliary)()

        def load(tuned: bool) -> torch.Tensor | None:
            messenger.load(self.best if tuned else self.start)
            with torch.no_grad():
                return messenger.prefix(auxiliary) if tuned else None

        return Side(auxiliary, partial(load, True)), Side(auxiliary, partial(load, False))

    def score(
        self, answers: Answers, examples: list[Example], max_tokens: int | None = None
    ) -> Figures:
        """The figures of questions by these answers; `max_tokens`: of an example, None: the
        run's."""
        return self.score_in_parts(answers, examples, max_tokens)[0]

    def score_in_parts(
        self, answers: Answers, examples: list[Example], max_tokens: int | None = None
    ) -> tuple[Figures, Parts]:
        """The same, and figures of parts of the questions, by task and by label."""
        server = self.server
        room = server.max_tokens if max_tokens is None else max_tokens
        figures, scored = score_test(
            self.model, None, examples, server.tokenizer, room, answers.scorer()
        )
        return figures, in_parts(scored, examples)

    def write(self, answers: Answers, examples: list[Example], most: int) -> list[str]:
        """What is written behind questions, at most so many tokens, the likeliest each time.

        Raises:
            DataError: so many leave the model no room to read a question.
        """
        tokenizer = self.server.tokenizer
        room = min(answers.room() - most, self.server.max_tokens)
        if room < LEAST_ROOM:
            raise DataError(
                f"answers of up to {most} tokens leave {max(0, room)} of the model's"
                f" {answers.room()} positions for the question: let it write fewer"
            )
        asked = [tuple(ids[-room:]) for ids in encode_contexts(tokenizer, examples)]
        written = write(answers, asked, most, end_of_turn(tokenizer))
        return [
            decode_behind(tokenizer, row.ids[: row.start], row.ids[row.start :]).strip()
            for row in written
        ]


def answers_of(
    run: OpenRun, answering: Answering, weight: float, *, zero_shot: bool = False
) -> Answers:
    """Who answers for a run, alone or together, or with `zero_shot` the global model without what
    was tuned; `weight` is that of proxy-tuned answers.

    Raises:
        ConfigurationError: nobody is called that, the weight is too large, or others than the
            global model are to answer without what was tuned.
        RunError: its clients have no auxiliary model, and that is to answer.
    """
    if answering not in get_args(Answering):
        raise ConfigurationError(
            f"answers = {answering!r}: choose {', '.join(get_args(Answering))}"
            + did_you_mean(answering, get_args(Answering))
        )
    if not abs(weight) <= 1000:
        raise ConfigurationError(f"weight = {weight}: it must be from -1000 to 1000, such as 1")
    if zero_shot and answering != "global":
        raise ConfigurationError(
            f"answers = {answering!r}: without what was tuned only the global model answers; leave"
            " one of the two out"
        )
    if answering == "global":
        return run.side(zero_shot=zero_shot)
    tuned, untuned = run.auxiliary_sides
    if answering == "auxiliary":
        return tuned
    if answering == "mean":
        return mean_of(run.side(), tuned)
    return proxy_tuned(run.side(zero_shot=True), tuned, untuned, weight)


def open_run(folder: str | Path) -> OpenRun:
    """The server's side of a run, with the best of its rounds so far.

    Raises:
        RunError: there is no run, or no round of it is finished.
    """
    (run,) = open_runs([folder])
    return run


def open_runs(folders: Sequence[str | Path]) -> list[OpenRun]:
    """The server's sides of several runs, with one global model between them: of those that tune
    prompts and adapters, each must load its own numbers before it reads.

    Raises:
        RunError: as `open_run`, or their models differ, or one of several tunes whole weights.
    """
    runs: list[OpenRun] = []
    for folder in folders:
        run = _opened(Path(folder), runs[0].server if runs else None)
        shares = isinstance(run.messenger, SoftPrompt | Adapter | PromptAndAdapter)
        if len(folders) > 1 and not shares:
            raise RunError(
                f"{folder} tuned weights of the model itself, which other runs cannot share: open"
                " it alone"
            )
        runs.append(run)
    return runs


def _opened(folder: Path, shared: Server | None) -> OpenRun:
    directory = RunDirectory.open(folder)
    config = directory.config
    if not directory.best.exists():
        raise RunError(f"{folder} has no prompt yet: its first round is not finished")
    if shared and shared.config.model != config.model:
        raise RunError(
            f"{folder} tuned {config.model.name}, and not as another run tuned"
            f" {shared.config.model.name}: runs share a model if their sections [model] are equal"
        )
    # what was tuned answers without the text that it was tuned on
    read = partial(load_dataset, config, directory.partition())
    server = (
        replace(shared, config=config, read=read, max_tokens=token_limit(config, shared.model))
        if shared
        else open_server(config, read)
    )
    directory.hold_known({"global model": (shared or server).digest})
    setup = replace(method_setup(server), initial_prompt=partial(blank_prompt, server))
    model, messenger = find_method(config.method).server_side(setup)
    start = messenger.payload()
    if isinstance(messenger, SoftPrompt):
        messenger = read_prompt(directory.best).to(server.model.device)
        best = messenger.payload()
    else:
        best = read_tensors(directory.best)[0]
    return OpenRun(
        directory=directory,
        server=server,
        model=model,
        messenger=messenger,
        best=best,
        start=start,
    )
