"""The finished runs of studies, or of any folders, gathered into tables of which every number knows its runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedsp.comparison import Difference, Scores, holm, paired_difference
from fedsp.config import RunConfig
from fedsp.depths import DEPTHS
from fedsp.errors import RunError
from fedsp.runs import RunDirectory, find_runs
from fedsp.sides import METHODS
from fedsp.study import FAILURE, INDEX, read_index


@dataclass(frozen=True)
class Run:
    """A finished run and where it stands in its study."""

    key: str
    method: str
    task: str
    model: str
    partition: str
    choice: str
    seed: int
    folder: Path
    config: RunConfig
    figures: dict[str, Any]
    records: list[dict[str, Any]]
    about: dict[str, Any]
    depths: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cell(self) -> tuple[str, ...]:
        """Where it stands in its study, but for the seed."""
        return (self.method, self.task, self.model, self.partition, self.choice)

    @property
    def clients_hold(self) -> str:
        asks = self.config.partition.clients and self.config.round.clients != 0
        return METHODS[self.config.method].clients_hold if asks else "nothing"

    @property
    def text_is(self) -> str:
        """What becomes of the text: the privacy of data that the method gives by construction."""
        if self.config.method == "zero_shot" or self.config.round.clients == 0:
            return "clients' text unused"
        if self.config.partition.clients == 0:
            return "gathered at the server"
        return "gathered at one owner" if self.config.partition.clients == 1 else "stays with its owners"

    @property
    def bytes(self) -> int:
        """Bytes of all messages, both ways, as serialised, and of the package for each client."""
        return int(self.figures["bytes_up"] + self.figures["bytes_down"] + self.figures["package_bytes"] * self.config.partition.clients)

    @property
    def client_operations(self) -> float:
        """Floating-point operations of all clients in all rounds: those measured in one round of the first client, times the updates."""
        return float(self.figures["cost"].get("client", {}).get("operations", 0.0) * self.figures["updates"])

    @property
    def client_steps(self) -> int:
        """Steps of all clients in all rounds."""
        return int(self.figures["updates"] * (self.config.client.align_steps + self.config.client.speak_steps))

    @property
    def cosines(self) -> list[float]:
        """The mean cosine between two clients' changes, round by round."""
        return [record["update_cosine"] for record in self.records if record.get("update_cosine") is not None]

    def of_clients(self, figure: str, scale: float = 1.0) -> list[float]:
        """A figure of each client."""
        return [scale * client[figure] for client in self.figures["clients"].values()]

    @cached_property
    def _scores(self) -> dict[str, tuple[float, int, float]]:
        rows = RunDirectory(self.folder, self.config).scores()
        scores = {}
        for row in rows:
            choice = max(range(len(row["log_likelihoods"])), key=lambda index: row["log_likelihoods"][index])
            scores[row["id"]] = (-row["log_likelihoods"][row["gold"][0]], row["tokens"][row["gold"][0]], float(choice in row["gold"]))
        return scores

    def losses(self, questions: Sequence[str]) -> list[float]:
        """A number per question whose mean is the answer loss, nats per token."""
        tokens = sum(self._scores[question][1] for question in questions) / len(questions)
        return [self._scores[question][0] / tokens for question in questions]

    def right(self, questions: Sequence[str]) -> list[float]:
        """1 for each question whose most likely choice is right, else 0."""
        return [self._scores[question][2] for question in questions]

    @property
    def questions(self) -> list[str]:
        return sorted(self._scores)


@dataclass(frozen=True)
class Entry:
    """A cell of a table: its text, the number behind it, and the keys of the runs that it is made of."""

    text: str
    value: float | None = None
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of entries below column names; `note` says how to read it."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Entry]]
    note: str = ""


@dataclass
class Line:
    """The runs of one method under one model and partition, by task, all at the choice that validation prefers."""

    method: str
    model: str
    partition: str
    runs: dict[str, list[Run]] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    label: str = ""

    @property
    def all(self) -> list[Run]:
        return [run for runs in self.runs.values() for run in runs]


@dataclass
class Section:
    """A grid of a study, ready to be shown."""

    title: str
    text: str
    tasks: list[str]
    lines: list[Line]
    reference: str | None
    missing: list[str]


@dataclass
class Results:
    """Everything that a report shows."""

    name: str
    sections: list[Section]
    runs: dict[str, Run]
    failures: list[tuple[str, str, bool]]


def read_results(folders: Iterable[Path]) -> Results:
    """Gather finished runs. A folder is a study's, or one with runs somewhere below it, which make one section.

    Raises:
        RunError: a folder holds no finished run.
    """
    results = Results("", [], {}, [])
    for folder in folders:
        if (folder / INDEX).exists():
            _read_study(folder, results)
        else:
            _read_runs(folder, results)
    if not results.runs:
        raise RunError(f"there is no finished run in {', '.join(map(str, folders))}: run one, or wait for the study")
    return results


def _open(folder: Path, key: str, **where: Any) -> Run | None:
    directory = RunDirectory.open(folder)
    if not directory.finished or "test" not in directory.result():
        return None
    about = {"seed": directory.config.seed} | where
    depths = RunDirectory.read_json(folder / DEPTHS)["rows"] if (folder / DEPTHS).exists() else []
    return Run(
        key=key,
        depths=depths,
        folder=folder,
        config=directory.config,
        figures=directory.result(),
        records=directory.records(),
        about=directory.about(),
        **about,
    )


def _read_study(folder: Path, results: Results) -> None:
    index = read_index(folder)
    results.name = ", ".join(filter(None, [results.name, index["name"]]))
    found: dict[str, Run] = {}
    axes = ("method", "task", "model", "partition", "choice", "seed")
    for cell in index["cells"]:
        path = folder / cell["folder"]
        run = _open(path, f"run-{len(results.runs) + 1}", **{axis: cell[axis] for axis in axes}) if (path / "config.toml").exists() else None
        if run:
            results.runs[run.key] = found[cell["folder"]] = run
        elif (path / FAILURE).exists():
            failure = RunDirectory.read_json(path / FAILURE)
            results.failures.append((path.name, failure["reason"], failure["diverged"]))
    for number, grid in enumerate(index["grids"]):
        cells = [cell for cell in index["cells"] if number in cell["grids"]]
        present = [found[cell["folder"]] for cell in cells if cell["folder"] in found]
        missing = [cell["folder"] for cell in cells if cell["folder"] not in found]
        reference = index["reference"] if index["reference"] in grid["methods"] else grid["methods"][0]
        order = {method: place for place, method in enumerate(grid["methods"])}
        lines = _lines(sorted(present, key=lambda run: order[run.method]))
        if lines:
            tasks = list(dict.fromkeys(cell["task"] for cell in cells if any(cell["task"] in line.runs for line in lines)))
            results.sections.append(Section(grid["title"], grid["text"], tasks, lines, reference, missing))


def _read_runs(folder: Path, results: Results) -> None:
    results.name = ", ".join(filter(None, [results.name, folder.name]))
    runs = []
    for path in find_runs(folder) or []:
        config = RunDirectory.open(path).config
        title = f"{METHODS[config.method].title}, {config.preset}" if config.method == "fedsp" else METHODS[config.method].title
        where = {"method": f"{title} ({path.name})" if path != folder else title, "task": config.data.task, "model": Path(config.model.name).name}
        run = _open(path, f"run-{len(results.runs) + 1}", partition=config.partition.kind, choice="", **where)
        if run:
            results.runs[run.key] = run
            runs.append(run)
    if runs:
        lines = _lines(runs)
        results.sections.append(Section(f"Runs in {folder.name}", "", list(dict.fromkeys(run.task for run in runs)), lines, lines[0].method, []))


def _lines(runs: Sequence[Run]) -> list[Line]:
    """Runs by method, model and partition, in their order; of several choices the one with the lowest mean validation loss stays, task by task."""
    lines: dict[tuple[str, str, str], Line] = {}
    groups: dict[tuple[str, str, str, str], dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault((run.method, run.model, run.partition, run.task), {}).setdefault(run.choice, []).append(run)
    for (method, model, partition, task), choices in groups.items():
        line = lines.setdefault((method, model, partition), Line(method, model, partition))
        best = min(choices, key=lambda choice: _validation(choices[choice]))
        line.runs[task], line.choices[task] = sorted(choices[best], key=lambda run: run.seed), best
    several = {axis: len({getattr(line, axis) for line in lines.values()}) > 1 for axis in ("model", "partition")}
    for line in lines.values():
        line.label = ", ".join([line.method, *(getattr(line, axis) for axis, many in several.items() if many)])
    return list(lines.values())


def _validation(runs: Sequence[Run]) -> float:
    losses = [run.figures["validation_loss"] for run in runs if run.figures["validation_loss"] is not None]
    return statistics.fmean(losses) if losses else float("inf")


def spread(numbers: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, as text."""
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def _entry(runs: Sequence[Run], figure: Callable[[Run], float], digits: int, scale: float = 1.0) -> Entry:
    if not runs:
        return Entry("-")
    numbers = [scale * figure(run) for run in runs]
    return Entry(spread(numbers, digits), statistics.fmean(numbers), tuple(run.key for run in runs))


PRIVACY = ["given of the model", "clients hold", "the text"]
"""Columns of every table: the share of the global model's parameters that clients hold bit for bit, what that is, and what becomes of the text."""


def _privacy(line: Line) -> list[Entry]:
    first = line.all[0]
    share = first.figures["disclosed_share"]
    return [Entry(f"{100 * share:.0f} %", share, tuple(run.key for run in line.all)), Entry(first.clients_hold), Entry(first.text_is)]


def score_table(section: Section, figure: str) -> Table:
    """Accuracy (%) or answer loss (nats) by line and task, and what privacy each method gives."""
    accuracy = figure == "accuracy"
    rows = []
    for line in section.lines:
        cells = [
            _entry(line.runs.get(task, []), lambda run: float(run.figures["test"][figure]), 1 if accuracy else 3, 100 if accuracy else 1)
            for task in section.tasks
        ]
        known = [cell.value for cell in cells if cell.value is not None]
        mean = Entry(f"{statistics.fmean(known):.{1 if accuracy else 3}f}" if len(known) == len(cells) else "-", None, tuple(run.key for run in line.all))
        chosen = sorted({choice for choice in line.choices.values() if choice})
        rows.append(
            [
                Entry(line.label + (f" ({'; '.join(chosen)})" if chosen else "")),
                *cells,
                *([mean] if len(section.tasks) > 1 else []),
                *_privacy(line),
            ]
        )
    columns = ["method", *section.tasks, *(["mean"] if len(section.tasks) > 1 else []), *PRIVACY]
    title = "Accuracy, %" if accuracy else "Answer loss, nats per token"
    seeds = sorted({len(runs) for line in section.lines for runs in line.runs.values()})
    note = f"Mean ± standard deviation over seeds ({', '.join(map(str, seeds))} each) on the test questions, through the global model; {'higher' if accuracy else 'lower'} is better."
    return Table(figure, title, columns, rows, note)


def paired_scores(one: Sequence[Run], other: Sequence[Run], figure: str) -> tuple[Scores, Scores] | None:
    """The scores of two methods on the seeds and questions that both have, (S, Q) each; None where they share none."""
    mine, theirs = ({run.seed: run for run in runs} for runs in (one, other))
    seeds = sorted(set(mine) & set(theirs))
    if not seeds:
        return None
    questions = sorted(set.intersection(*(set(runs[seed].questions) for runs in (mine, theirs) for seed in seeds)))
    if not questions:
        return None
    scores = [np.array([runs[seed].losses(questions) if figure == "answer_loss" else runs[seed].right(questions) for seed in seeds]) for runs in (mine, theirs)]
    return scores[0], scores[1]


def comparison_table(section: Section) -> Table | None:
    """Each line against the reference (of its own model and partition): difference in accuracy and answer loss over all tasks, intervals, Holm's p."""
    references = {(line.model, line.partition): line for line in section.lines if line.method == section.reference}
    compared: list[tuple[Line, Line, dict[str, Difference]]] = []
    for line in section.lines:
        reference = references.get((line.model, line.partition))
        if reference is None or reference is line:
            continue
        differences = {}
        for figure in ("answer_loss", "accuracy"):
            pairs = [paired_scores(line.runs.get(task, []), reference.runs.get(task, []), figure) for task in section.tasks]
            known = [pair for pair in pairs if pair is not None]
            if known:
                differences[figure] = paired_difference(known)
        if differences:
            compared.append((line, reference, differences))
    if not compared:
        return None
    adjusted = {figure: holm([differences[figure].p for _, _, differences in compared]) for figure in ("answer_loss", "accuracy")}
    rows = []
    for place, (line, reference, differences) in enumerate(compared):
        keys = tuple(run.key for run in [*line.all, *reference.all])
        loss, accuracy = differences["answer_loss"], differences["accuracy"]
        rows.append(
            [
                Entry(line.label),
                Entry(f"{loss.mean:+.3f} [{loss.low:+.3f}, {loss.high:+.3f}]", loss.mean, keys),
                Entry(_p(adjusted["answer_loss"][place]), adjusted["answer_loss"][place], keys),
                Entry(f"{100 * accuracy.mean:+.1f} [{100 * accuracy.low:+.1f}, {100 * accuracy.high:+.1f}]", 100 * accuracy.mean, keys),
                Entry(_p(adjusted["accuracy"][place]), adjusted["accuracy"][place], keys),
                *_privacy(line),
            ]
        )
    note = "Paired on questions and seeds, mean over tasks; 95 % intervals of a bootstrap over both; p-values corrected for all comparisons of this table (Holm). A negative difference in loss is better."
    return Table("comparison", f"Difference from {section.reference}", ["method", "answer loss, nats", "p (Holm)", "accuracy, points", "p (Holm) ", *PRIVACY], rows, note)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def cost_table(section: Section) -> Table:
    """What a run costs each party, measured: numbers held, trained and sent; bytes; operations; memory; seconds."""
    rows = []
    for line in section.lines:
        runs = line.all
        keys = tuple(run.key for run in runs)
        client = [run.figures["cost"].get("client", {}) for run in runs]
        server = [run.figures["cost"]["server"] for run in runs]

        def mean(figures: list[dict[str, float]], name: str) -> float | None:
            known = [row[name] for row in figures if name in row]
            return statistics.fmean(known) if known else None

        held = mean(client, "parameters_held")
        numbers = [
            held,
            statistics.fmean(row["parameters_held"] for row in server) / held if held else None,
            mean(client, "parameters_trained"),
            mean(client, "parameters_sent"),
            statistics.fmean(run.bytes for run in runs) or None,
            mean(client, "operations"),
            mean(server, "operations") or None,
            mean(client, "memory_bytes"),
            mean(client, "tokens_per_second"),
            statistics.fmean(run.figures["seconds_rounds"] for run in runs) or None,
        ]
        texts = ["-" if number is None else _si(number) for number in numbers]
        rows.append([Entry(line.label), *(Entry(text, number, keys) for text, number in zip(texts, numbers, strict=True)), *_privacy(line)])
    columns = [
        "method",
        "client: parameters held",
        "server's / client's",
        "trained",
        "sent",
        "bytes, all messages and packages",
        "client: operations a round",
        "server: operations a round",
        "client: memory, bytes",
        "client: tokens a second",
        "seconds, all rounds",
        *PRIVACY,
    ]
    note = "Parameters held: the model and what is tuned, those that depths or ends share counted once; their ratio is the paper's all / auxiliary. Measured on the first client's first round; operations by torch's counter, forward and backward; memory is weights, gradients, AdamW's moments and the activations kept. Means over tasks and seeds."
    return Table("cost", "Cost", columns, rows, note)


def _si(number: float) -> str:
    """Three digits and a prefix: 8.68 M."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g}"


def heterogeneity_table(section: Section) -> Table | None:
    """Accuracy by client, its spread, and how far clients pull apart, where the questions were divided by kind."""
    lines = [line for line in section.lines if any("clients" in run.figures for run in line.all)]
    if not lines:
        return None
    rows = []
    for line in lines:
        runs = [run for run in line.all if run.figures.get("clients")]
        rows.append(
            [
                Entry(line.label),
                _entry(runs, lambda run: statistics.fmean(run.of_clients("accuracy", 100)), 1),
                _entry(runs, lambda run: min(run.of_clients("accuracy", 100)), 1),
                _entry(runs, lambda run: statistics.pstdev(run.of_clients("accuracy", 100)), 1),
                _entry([run for run in runs if run.cosines], lambda run: statistics.fmean(run.cosines), 2),
                _entry(runs, lambda run: max(run.of_clients("examples")) / max(1, min(run.of_clients("examples"))), 1),
                *_privacy(line),
            ]
        )
    columns = ["method", "clients' mean accuracy, %", "worst client, %", "spread over clients, points", "cosine of updates", "largest / smallest client", *PRIVACY]
    note = "A client's accuracy is that on the test questions, each topic weighted by its share of the client's own questions. Cosine: mean over pairs of clients and rounds; 1 is one direction, 0 is none in common."
    return Table("clients", "Clients", columns, rows, note)


def stability_table(section: Section, failures: Sequence[tuple[str, str, bool]]) -> Table:
    """Loss spikes, and the spread over seeds."""
    rows = []
    for line in section.lines:
        runs = line.all
        losses = [run.figures["test"]["answer_loss"] for run in runs]
        rows.append(
            [
                Entry(line.label),
                Entry(str(len(runs)), float(len(runs)), tuple(run.key for run in runs)),
                _entry(
                    [run for run in runs if run.client_steps], lambda run: 100 * sum(record.get("spikes", 0) for record in run.records) / run.client_steps, 2
                ),
                _entry(runs, lambda run: float(run.figures["test"]["answer_loss"]), 3),
                Entry(f"{max(losses) - min(losses):.3f}", max(losses) - min(losses), tuple(run.key for run in runs)),
                *_privacy(line),
            ]
        )
    diverged = sum(diverged for _, _, diverged in failures)
    columns = ["method", "finished runs", "steps with a loss spike, %", "answer loss, nats", "range over runs, nats", *PRIVACY]
    return Table(
        "stability",
        "Stability",
        columns,
        rows,
        f"A spike is a step whose loss is more than half above the median of its stage. Runs of the whole study that diverged: {diverged}.",
    )
