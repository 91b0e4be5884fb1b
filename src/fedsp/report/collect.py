"""The finished runs of studies, or of any folders, gathered by method, task and seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsp.errors import FedspError, RunError
from fedsp.experiments.run_directory import RunDirectory, find_runs, read_json
from fedsp.experiments.study import AXES, FAILURE, INDEX, read_index
from fedsp.federation.methods.registry import find_method
from fedsp.report.finished_run import Run, open_finished


@dataclass(kw_only=True)
class Line:
    """The runs of one method under one model and partition, by task, all at the choice that
    validation prefers."""

    method: str
    model: str
    partition: str
    runs: dict[str, list[Run]] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    label: str = ""
    begun: int = 0
    diverged: int = 0

    @property
    def all(self) -> list[Run]:
        return [run for runs in self.runs.values() for run in runs]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(run.key for run in self.all)

    def by_seed(self, figure: Callable[[Run], float | None]) -> list[float]:
        """For each seed that all its tasks have, the mean of a figure over tasks; where they share
        none, over all its runs at once."""
        tasks = [
            {run.seed: value for run in runs if (value := figure(run)) is not None}
            for runs in self.runs.values()
        ]
        tasks = [task for task in tasks if task]
        if not tasks:
            return []
        seeds = sorted(set.intersection(*(set(task) for task in tasks)))
        values = [statistics.fmean(task[seed] for task in tasks) for seed in seeds]
        return values or [statistics.fmean(value for task in tasks for value in task.values())]


@dataclass(kw_only=True)
class Section:
    """A grid of a study, ready to be shown; `runs` are all that are finished, those of choices that
    validation does not prefer too."""

    title: str
    text: str
    tasks: list[str]
    lines: list[Line]
    runs: list[Run]
    reference: str | None
    missing: list[str]


@dataclass(kw_only=True)
class Results:
    """Everything that a report shows."""

    name: str
    sections: list[Section]
    runs: dict[str, Run]
    failures: list[tuple[str, str, bool]]


def read_results(folders: Iterable[Path]) -> Results:
    """Gather finished runs. A folder is a study's, or one with runs somewhere below it, which make
    one section.

    Raises:
        RunError: no folder holds a finished run with test questions.
    """
    results = Results(name="", sections=[], runs={}, failures=[])
    for folder in folders:
        if (folder / INDEX).exists():
            _read_study(folder, results)
        else:
            _read_runs(folder, results)
    if not results.runs and results.failures:
        name, reason, _ = results.failures[0]
        raise RunError(
            f"no run in {', '.join(map(str, folders))} can be reported; of {name}: {reason}"
        )
    if not results.runs:
        raise RunError(
            f"there is no finished run with test questions in {', '.join(map(str, folders))}: run"
            " one, or wait for the study"
        )
    return results


def _read_study(folder: Path, results: Results) -> None:
    index = read_index(folder)
    results.name = ", ".join(filter(None, [results.name, index["name"]]))
    found: dict[str, Run] = {}
    diverged: set[str] = set()
    for cell in index["cells"]:
        path = folder / cell["folder"]
        where = {axis: cell[axis] for axis in AXES}
        try:
            run = open_finished(path, f"run-{len(results.runs) + 1}", study=str(folder), **where)
        except FedspError as error:  # such as one of a method that another process had
            results.failures.append((path.name, str(error), False))
            continue
        if run:
            results.runs[run.key] = found[cell["folder"]] = run
        elif (path / FAILURE).exists():
            failure = read_json(path / FAILURE)
            results.failures.append((path.name, failure["reason"], failure["diverged"]))
            diverged.update([cell["folder"]] if failure["diverged"] else [])
    for number, grid in enumerate(index["grids"]):
        cells = [cell for cell in index["cells"] if number in cell["grids"]]
        present = [found[cell["folder"]] for cell in cells if cell["folder"] in found]
        missing = [cell["folder"] for cell in cells if cell["folder"] not in found]
        wanted = grid.get("reference") or index["reference"]
        reference = wanted if wanted in grid["methods"] else grid["methods"][0]
        order = {method: place for place, method in enumerate(grid["methods"])}
        lines = _lines(
            sorted(present, key=lambda run: order[run.method]),
            [cell for cell in cells if cell["folder"] in diverged],
        )
        lines.sort(key=lambda line: order[line.method])
        if lines:
            known = {task for line in lines for task in line.runs}
            tasks = list(dict.fromkeys(cell["task"] for cell in cells if cell["task"] in known))
            results.sections.append(
                Section(
                    title=grid["title"],
                    text=grid["text"],
                    tasks=tasks,
                    lines=lines,
                    runs=present,
                    reference=reference,
                    missing=missing,
                )
            )


def _read_runs(folder: Path, results: Results) -> None:
    results.name = ", ".join(filter(None, [results.name, folder.name]))
    runs = []
    for path in find_runs(folder):
        try:
            config = RunDirectory.open(path, to_show=True).config
            entry = find_method(config.method)
            title = f"{entry.title}, {config.preset}" if entry.deployable else entry.title
            where = {
                "method": f"{title} ({path.relative_to(folder)})" if path != folder else title,
                "task": config.data.task,
                "model": Path(config.model.name).name,
                "partition": config.partition.kind,
            }
            key = f"run-{len(results.runs) + 1}"
            run = open_finished(path, key, study=str(folder), choice="", **where)
        except FedspError as error:  # such as one of a method that another process had
            results.failures.append((path.name, str(error), False))
            continue
        if run:
            results.runs[run.key] = run
            runs.append(run)
    if runs:
        lines = _lines(runs)
        results.sections.append(
            Section(
                title=f"Runs in {folder.name}",
                text="",
                tasks=list(dict.fromkeys(run.task for run in runs)),
                lines=lines,
                runs=runs,
                reference=lines[0].method,
                missing=[],
            )
        )


def _lines(runs: Sequence[Run], diverged: Iterable[Mapping[str, Any]] = ()) -> list[Line]:
    """Runs by method, model and partition, in their order; of several choices the one with the
    lowest mean validation loss stays, task by task. Diverged cells count beside the runs that
    finished; a method of which none finished gets a line of its own."""
    lines: dict[tuple[str, str, str], Line] = {}
    groups: dict[tuple[str, str, str, str], dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault((run.method, run.model, run.partition, run.task), {}).setdefault(
            run.choice, []
        ).append(run)
    for (method, model, partition, task), choices in groups.items():
        line = lines.setdefault(
            (method, model, partition), Line(method=method, model=model, partition=partition)
        )
        shared = set.intersection(
            *({run.seed for run in alternatives} for alternatives in choices.values())
        )
        best = min(
            choices,
            key=lambda choice: _validation(
                [run for run in choices[choice] if run.seed in shared or not shared]
            ),
        )
        line.runs[task], line.choices[task] = sorted(choices[best], key=lambda run: run.seed), best
        _require_one_setting(line.runs[task])
    several = {
        axis: len({getattr(line, axis) for line in lines.values()}) > 1
        for axis in ("model", "partition")
    }
    for line in lines.values():
        line.begun = len(line.all)
        line.label = ", ".join(
            [line.method, *(getattr(line, axis) for axis, many in several.items() if many)]
        )
    for cell in diverged:
        axes = (cell["method"], cell["model"], cell["partition"])
        own = Line(method=axes[0], model=axes[1], partition=axes[2], label=axes[0])
        line = lines.setdefault(axes, own)
        line.begun, line.diverged = line.begun + 1, line.diverged + 1
    return list(lines.values())


def _require_one_setting(runs: Sequence[Run]) -> None:
    """Refuse to average runs that differ in more than their seed (RunError)."""
    for name in ("data.train", "data.test", "global model"):
        known = {
            run.inputs[name]: run
            for run in runs
            if name in run.inputs and (name != "data.test" or run.config.data.test)
        }
        if len(known) > 1:
            one, other = list(known.values())[:2]
            raise RunError(
                f"{one.folder} and {other.folder} were run with another {name} each, so that they"
                " have no common mean: run one again, or report them apart"
            )


def _validation(runs: Sequence[Run]) -> float:
    losses = [
        run.figures["validation_loss"] for run in runs if run.figures["validation_loss"] is not None
    ]
    return statistics.fmean(losses) if losses else float("inf")
