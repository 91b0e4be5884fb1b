"""A study: a grid of methods x tasks x models x partitions x seeds from one TOML file, each cell a
run with a folder of its own.

    name = "tiny"                       # folder of the study below `output`
    output = "studies"
    seeds = [0, 1, 2]
    reference = "FedSP"                 # what the others are compared with

    [base]                              # any section of run.toml, for all cells
    round = { rounds = 5 }
    [models.small]
    model = { name = "path/or/hub-name" }
    [tasks.mine]
    data = { train = "train.jsonl", test = "test.jsonl" }
    [partitions.even]
    partition = { clients = 5 }
    [methods.FedSP]
    server = { steps = 5 }
    [methods.FedPrompt]
    method = "fedprompt"
    choose = { "client.learning_rate" = [1e-2, 3e-2] }   # all run; validation decides, never test

    [[grids]]
    title = "Methods"
    methods = ["FedSP", "FedPrompt"]

A grid takes every model, task and seed, and the first partition, unless it names them. A cell that
two grids share is run once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from fedsp.config import NAME, Count, RunConfig, Section
from fedsp.config_file import (
    apply_override,
    make_config,
    makes_package,
    read_toml,
    resolve_paths,
    trains_weights,
    validated,
)
from fedsp.data.files import text_digest
from fedsp.errors import (
    ConfigurationError,
    FedspError,
    RunError,
    StorageError,
    TrainingDiverged,
    did_you_mean,
    first_line,
)
from fedsp.experiments.run_directory import CONFIG, RESULT, RunDirectory, read_json
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.methods.registry import find_method
from fedsp.storage import locked, parse_json, write_json

INDEX, FAILURE = "study.json", "failure.json"
AXES = ("method", "task", "model", "partition", "choice", "seed")
Overlay = dict[str, Any]
"""Sections and keys of run.toml, laid over those of `base`."""


class Grid(Section):
    """A table of the report, and the cells that it needs."""

    title: str = Field(description="heading in the report")
    methods: list[str] = Field(min_length=1, description="names of [methods]")
    tasks: list[str] = Field([], description="names of [tasks]; none: all")
    models: list[str] = Field([], description="names of [models]; none: all")
    partitions: list[str] = Field([], description="names of [partitions]; none: the first")
    seeds: list[Count] = Field([], description="seeds; none: those of the study")
    text: str = Field("", description="a paragraph below the heading")
    reference: str | None = Field(
        None, description="the method that the others are compared with; none: that of the study"
    )


class Study(Section):
    """A study file."""

    name: str = Field(pattern=NAME, description="folder of the study below output")
    output: str = Field("studies", description="folder of studies")
    seeds: list[Count] = Field(
        [0, 1, 2], min_length=1, description="every cell is run once with each"
    )
    reference: str | None = Field(
        None,
        description="the method that the others are compared with; none: the first of each grid",
    )
    base: Overlay = Field(default_factory=dict, description="sections of run.toml for all cells")
    models: dict[str, Overlay] = Field(min_length=1, description="models by name")
    tasks: dict[str, Overlay] = Field(min_length=1, description="tasks by name")
    partitions: dict[str, Overlay] = Field(
        {"even": {}}, min_length=1, description="partitions by name"
    )
    methods: dict[str, Overlay] = Field(
        min_length=1, description="methods by name; `choose` gives alternatives"
    )
    grids: list[Grid] = Field(min_length=1, description="tables")

    @field_validator("methods")
    @classmethod
    def _choices(cls, methods: dict[str, Overlay]) -> dict[str, Overlay]:
        for name, overlay in methods.items():
            choose = overlay.get("choose", {})
            if not isinstance(choose, dict) or not all(
                isinstance(values, list) and values for values in choose.values()
            ):
                raise ValueError(
                    f"methods.{name}.choose gives lists of values by key, such as {{"
                    ' "client.learning_rate" = [1e-2, 3e-2] }'
                )
        return methods


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study: a method, task, model, partition and seed. `choice` names its values of
    the keys that the method's `choose` varies; `grids` are the indices of the study's tables
    ([[grids]]) that show it."""

    method: str
    task: str
    model: str
    partition: str
    choice: str
    seed: int
    grids: tuple[int, ...]
    config: RunConfig

    @property
    def name(self) -> str:
        parts = (self.model, self.task, self.partition, self.method, self.choice)
        return ", ".join([*filter(None, parts), f"seed {self.seed}"])

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


def read_study(path: Path, *, root: Path | None = None) -> tuple[Study, list[Cell]]:
    """A study file and its cells, all of them checked. File names are taken from `root` (none: the
    study file's folder).

    Raises:
        ConfigurationError: the file, a name in a grid, or a cell's configuration is at fault.
    """
    study = validated(Study, read_toml(path, "see `fedsp study --help`"), str(path))
    for grid in study.grids:
        for axis in ("methods", "tasks", "models", "partitions"):
            names = getattr(study, axis)
            for name in getattr(grid, axis):
                if name not in names:
                    raise ConfigurationError(
                        f"{path}: the grid {grid.title!r} names {name!r}, which is not in"
                        f" [{axis}]{did_you_mean(name, names)}"
                    )
    for reference in [study.reference, *(grid.reference for grid in study.grids)]:
        if reference and reference not in study.methods:
            raise ConfigurationError(
                f"{path}: reference = {reference!r} is not in"
                f" [methods]{did_you_mean(reference, study.methods)}"
            )
    return study, list(_cells(study, (root or path.parent).resolve(), str(path)))


def _cells(study: Study, root: Path, source: str) -> Iterator[Cell]:
    """Every cell once, seed by seed, so that a study that is stopped early has whole seeds."""
    wanted: dict[tuple[int, str, str, str, str], list[int]] = {}
    seeds = sorted({seed for grid in study.grids for seed in grid.seeds or study.seeds})
    for seed in seeds:
        for number, grid in enumerate(study.grids):
            if seed in (grid.seeds or study.seeds):
                axes = (
                    grid.models or study.models,
                    grid.tasks or study.tasks,
                    grid.partitions or list(study.partitions)[:1],
                    grid.methods,
                )
                for model, task, partition, method in itertools.product(*axes):
                    wanted.setdefault((seed, model, task, partition, method), []).append(number)
    for (seed, model, task, partition, method), numbers in wanted.items():
        overlay = dict(study.methods[method])
        choose = overlay.pop("choose", {})
        for values in itertools.product(*choose.values()):
            merged = merge(
                study.base,
                study.models[model],
                study.tasks[task],
                study.partitions[partition],
                overlay,
                {"seed": seed},
            )
            chosen = dict(zip(choose, values, strict=True))
            choice = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in chosen.items())
            for key, value in chosen.items():
                apply_override(merged, f"{key}={json.dumps(value)}")
            resolve_paths(merged, root)
            name = ", ".join(part for part in (model, task, partition, method, choice) if part)
            config = make_config(merged, f"{source}, the cell {name!r},")
            # where figures go changes none of them
            digest = _digest(config.model_dump(exclude={"output", "tracking"}))
            folder = Path(study.output) / study.name / f"{_slug(name)}-seed-{seed}-{digest}"
            yield Cell(
                method=method,
                task=task,
                model=model,
                partition=partition,
                choice=choice,
                seed=seed,
                grids=tuple(numbers),
                config=config.model_copy(update={"output": str(folder)}),
            )


def merge(*parts: Mapping[str, Any]) -> Overlay:
    """Nested values, later ones over earlier ones."""
    result: Overlay = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, Mapping):
                below = result.get(key)
                value = merge(below if isinstance(below, Mapping) else {}, value)
            result[key] = value
    return result


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def run_study(
    path: str | Path,
    *,
    root: str | Path | None = None,
    threads: int | None = None,
    workers: int | None = None,
    callbacks: Callbacks | None = None,
) -> dict[str, Any]:
    """Run what is not finished of a study; several processes may do so at once, and each cell is
    run by one of them. `threads` are torch's. `workers`: processes on this machine that share the
    cells, one thread each; None: one after another in this one.

    Returns the folder, and how many cells are finished, failed, and left to other processes. A cell
    that turns out not to be possible while it runs is written down with the reason, and the rest
    goes on.

    Raises:
        ConfigurationError: the study file or what its cells would read is at fault, or both threads
            and workers are given; then nothing has been run.
        RunError: a worker was ended from outside.
    """
    if workers is not None and threads:
        raise ConfigurationError("threads: each of the workers has one; leave threads out")
    if workers is not None and workers < 1:
        raise ConfigurationError(f"workers = {workers}: expected at least 1")
    callbacks = callbacks or Callbacks()
    study, cells = read_study(Path(path), root=Path(root) if root else None)
    _check(cells, str(path))
    import torch

    if threads:
        torch.set_num_threads(threads)
    folder = Path(study.output) / study.name
    write_json(folder / INDEX, _index(study, cells))
    counts = {"finished": 0, "failed": 0, "elsewhere": 0}
    done = _in_turn(cells, folder, callbacks) if not workers else _shared(cells, folder, workers)
    for number, (index, state, why, seconds, said) in enumerate(done, start=1):
        counts[state] += 1
        for text in said:
            callbacks.info(text)
        callbacks.part_done(number, len(cells), f"{cells[index].name}: {state}{why}", seconds)
    return {"folder": str(folder), "cells": len(cells), **counts}


Done = tuple[int, str, str, float, list[str]]
"""Of a cell: its index, its state, a note for the log, seconds, and what its run said."""


def _check(cells: list[Cell], source: str) -> None:
    """See, before any cell is run, that those to do find the files that they read, that the layer
    plan and the prompt fit the model, and that what is finished was run on the same examples.

    Raises:
        ConfigurationError: some cannot be run; each different reason once, with the first cell that
            it holds for.
    """
    from fedsp.experiments.plan import check_examples, check_text, make_plan

    known: dict[str, str] = {}

    def fault(config: RunConfig, sections: set[str], check: Callable[[RunConfig], object]) -> str:
        """What a check that depends on these sections alone finds, or nothing."""
        key = _digest(config.model_dump(include=sections))
        if key not in known:
            known[key] = ""
            try:
                check(config)
            except FedspError as error:
                known[key] = str(error)
        return known[key]

    reasons: dict[str, list[str]] = {}
    finished: list[Cell] = []
    to_do: list[Cell] = []
    for cell in cells:
        (finished if (cell.folder / RESULT).exists() else to_do).append(cell)
    if to_do:
        _require_the_same_files(finished, source)
    for cell in to_do:
        config = cell.config
        entry = find_method(config.method)
        divided = {"seed", "data", "model", "partition", "validation", "server", "round", "method"}
        found = fault(config, divided, check_examples)
        if entry.package or not entry.trains_weights:
            found = found or fault(config, {"distill", "auxiliary", "prompt"}, check_text)
        if entry.deployable and not config.auxiliary.to_be_chosen:
            parts = {"model", "auxiliary", "messenger", "prompt", "distill"}
            found = found or fault(config, parts, lambda config: make_plan(config, 1))
        if found:
            reasons.setdefault(found, []).append(cell.name)
    if reasons:
        count = sum(map(len, reasons.values()))
        raise ConfigurationError(
            f"{source}: {count} of {len(cells)} cells cannot be run:"
            + "".join(f"\n  {names[0]}: {reason}" for reason, names in reasons.items())
        )


def _require_the_same_files(finished: list[Cell], source: str) -> None:
    """See that the files of examples hold what finished cells were run on, where they can be read.

    Raises:
        ConfigurationError: one holds something else.
    """
    from fedsp.data.dataset import examples_digest
    from fedsp.experiments.plan import check_examples

    known: dict[str, dict[str, str]] = {}
    for cell in finished:
        data = cell.config.data
        key = _digest(data.model_dump())
        if key not in known:
            known[key] = {}
            with suppress(FedspError):
                if dataset := check_examples(cell.config):
                    known[key] = {
                        "data.train": dataset.train_digest,
                        **({"data.test": examples_digest(dataset.test)} if data.test else {}),
                    }
        before = RunDirectory.open(cell.folder, to_show=True).inputs()
        for name, digest in known[key].items():
            if before.get(name, digest) != digest:
                raise ConfigurationError(
                    f"{source}: {cell.name} was run on another {name} than there is now: restore"
                    " the file, or give the study another name"
                )


def _in_turn(cells: list[Cell], folder: Path, callbacks: Callbacks) -> Iterator[Done]:
    for index, cell in enumerate(cells):
        yield _done(index, cell, folder, callbacks)


def _shared(cells: list[Cell], folder: Path, count: int) -> Iterator[Done]:
    """In so many processes at most, in the order in which they end."""
    import fedsp.experiments.start  # noqa: F401  (read once, for all that are forked)
    from fedsp.federation.transport.workers import forked, result_of

    with forked(min(count, len(cells))) as pool:
        futures = [pool.submit(_done, index, cell, folder) for index, cell in enumerate(cells)]
        for future in as_completed(futures):
            yield result_of(future)


def _done(index: int, cell: Cell, folder: Path, callbacks: Callbacks | None = None) -> Done:
    """Run a cell; without callbacks it is a worker that does, whose run has one thread."""
    said: list[str] = []
    started = time.perf_counter()
    state, why = _run_cell(
        cell,
        folder,
        callbacks or Callbacks(info=said.append),
        threads=None if callbacks else 1,
    )
    return index, state, why, time.perf_counter() - started, said


def _run_cell(
    cell: Cell, study: Path, callbacks: Callbacks, threads: int | None = None
) -> tuple[str, str]:
    """Run or resume a cell. Returns its state ("finished", "failed", or "elsewhere" if another
    process runs it) and a note for the log.

    A cell whose training diverged is not tried again; one that failed for another reason is, when
    the study is started again, as is one that was begun with other than so many `threads`, which
    decide its last bits.
    """
    with locked(study / ".locks" / cell.folder.name, wait=False) as mine:
        if not mine:
            return "elsewhere", ""
        if (cell.folder / RESULT).exists():
            return "finished", " before"
        failure = cell.folder / FAILURE
        if failure.exists() and read_json(failure, "diverged")["diverged"]:
            return "failed", " before"
        import torch

        from fedsp.experiments.start import resume_run, start_run

        before = torch.get_num_threads()
        try:
            if (cell.folder / CONFIG).exists():
                begun = RunDirectory.open(cell.folder)
                if threads and begun.threads != threads:
                    return "failed", f", begun with {begun.threads} threads: leave workers out"
                resume_run(begun, callbacks)
            else:
                start_run(_with_package(cell.config, study, callbacks), callbacks)
        except StorageError:
            raise  # the disk is full, and would be for every other cell
        except Exception as error:  # whatever it is, the other cells may be done
            reason = (
                str(error)
                if isinstance(error, FedspError)
                else f"{type(error).__name__}: {first_line(error)}"
            )
            write_json(failure, {"diverged": isinstance(error, TrainingDiverged), "reason": reason})
            return "failed", f", {reason}"
        finally:
            torch.set_num_threads(before)  # a resumed run takes those that it was begun with
        failure.unlink(missing_ok=True)
    return "finished", ""


def _with_package(config: RunConfig, study: Path, callbacks: Callbacks) -> RunConfig:
    """The configuration with the folder of its auxiliary model, which cells that ask for the same
    one share. It is made if it is not there."""
    if not makes_package(config):
        return config
    about: dict[str, Any] = {
        "model": config.model.model_dump(),
        "auxiliary": config.auxiliary.model_dump(),
        "distill": config.distill.model_dump(),
        "length": config.prompt.length,
        "seed": config.seed,
        "data": (
            [config.data.model_dump(), config.partition.model_dump(), config.server_share]
            if config.distill.text == ["server"]
            else None
        ),
    }
    if config.distill.text == ["server"]:
        about["validation"] = config.validation.by
    if config.distill.reads_files:
        about["text"] = text_digest(config.distill.text)
    if config.model.device != "cpu" and trains_weights(config):
        about["precision"] = "full"  # of the model that it is distilled from
    package = (study / "packages" / _digest(about)).resolve()
    with locked(study / ".locks" / f"package-{package.name}", wait=True):
        made = package.with_suffix(".json")
        if not made.exists():
            for left in package.glob("*"):  # by a process that was killed
                left.unlink()
            from fedsp.experiments.start import make_package

            write_json(made, {**make_package(config, package, callbacks), "of": about})
    return config.model_copy(
        update={"auxiliary": config.auxiliary.model_copy(update={"folder": str(package)})}
    )


def _index(study: Study, cells: list[Cell]) -> dict[str, Any]:
    """What the report reads: the grids, and where each cell's run is."""
    rows = [
        {axis: getattr(cell, axis) for axis in AXES}
        | {"grids": list(cell.grids), "folder": cell.folder.name}
        for cell in cells
    ]
    return {
        "name": study.name,
        "reference": study.reference,
        "grids": [grid.model_dump() for grid in study.grids],
        "cells": rows,
    }


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a study's folder.

    Raises:
        RunError: the folder holds no study.
    """
    try:
        index: dict[str, Any] = parse_json((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder} holds no study: its {INDEX} cannot be read ({error}); `fedsp study`"
            " writes one"
        ) from error
    return index
