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
from fedsp.disclosure import DISCLOSURE
from fedsp.errors import RunError
from fedsp.runs import RunDirectory, find_runs
from fedsp.sides import METHODS
from fedsp.study import FAILURE, INDEX, read_index


@dataclass(frozen=True)
class Run:
    """A finished run and where it stands in its study."""

    key: str
    study: str
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
    disclosure: dict[str, float] = field(default_factory=dict)

    @property
    def cell(self) -> tuple[str, ...]:
        """Where it stands in its study, but for the seed."""
        return (self.study, self.method, self.task, self.model, self.partition, self.choice)

    @property
    def name(self) -> str:
        """The same and the seed, for people."""
        return ", ".join(part for part in (self.method, self.choice, self.task, self.partition, f"seed {self.seed}") if part)

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
    def model_parameters(self) -> float:
        """Parameters of the model at a client, those that depths or ends share once; 0 where there is no client."""
        return self._model("client")

    @property
    def global_parameters(self) -> float:
        """The same of the global model."""
        return self._model("server")

    def _model(self, side: str) -> float:
        """Without what was put in front of the model or into it, which earlier results count with it."""
        cost = self.figures["cost"].get(side, {})
        added = 0 if self.config.method in ("finetune", "offsite_tuning", "zero_shot") else cost.get("parameters_sent", 0)
        return float(cost.get("model_parameters", cost.get("parameters_held", 0) - added))

    @property
    def package(self) -> float:
        """Bytes of what a client is handed before the first round, float32; with finetune the first broadcast is the model."""
        whole = self.config.method in ("fedprompt", "lora")
        return 4 * self.model_parameters if whole else float(self.figures["package_bytes"])

    @property
    def bytes(self) -> float:
        """Bytes of all messages, both ways, as serialised, and of the package for each client that was asked."""
        clients = len({client for record in self.records for client in record["asked"]})
        return float(self.figures["bytes_up"] + self.figures["bytes_down"] + self.package * clients)

    @property
    def distillation_seconds(self) -> float:
        """Seconds in which the package was made, once for all cells of a study that share it."""
        if not self.config.auxiliary.folder:
            return float(self.figures["seconds_distillation"])
        made = Path(self.config.auxiliary.folder).with_suffix(".json")
        here = self.folder.parent / "packages" / made.name  # where the study has been moved
        path = next((path for path in (here, made) if path.exists()), None)
        return float(RunDirectory.read_json(path)["seconds"]) if path else 0.0

    @property
    def score(self) -> float:
        """The share of test questions that are right: accuracy, or exact match where the task has that."""
        test = self.figures["test"]
        return float(test["accuracy"] if "accuracy" in test else test["exact_match"])

    @property
    def loss(self) -> float:
        """Answer loss on the test questions, nats per token."""
        return float(self.figures["test"]["answer_loss"])

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
            right = row["right"] if "right" in row else choice in row["gold"]
            scores[row.get("question", row["id"])] = (-row["log_likelihoods"][row["gold"][0]], row["tokens"][row["gold"][0]], float(right))
        return scores

    def losses(self, questions: Sequence[str]) -> list[float]:
        """A number per question whose mean is the answer loss, nats per token."""
        tokens = sum(self._scores[question][1] for question in questions) / len(questions)
        return [self._scores[question][0] / tokens for question in questions]

    def right(self, questions: Sequence[str]) -> list[float]:
        """1 for each question that counts as right, else 0."""
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
    """Rows of entries below column names; `note` says how to read it, `lines` which line of its section each row is about."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Entry]]
    note: str = ""
    lines: tuple[str, ...] = ()


@dataclass
class Line:
    """The runs of one method under one model and partition, by task, all at the choice that validation prefers."""

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

    def by_seed(self, figure: Callable[[Run], float | None]) -> list[float]:
        """For each seed that all its tasks have, the mean of a figure over tasks; where they share none, over all its runs at once."""
        tasks = [{run.seed: value for run in runs if (value := figure(run)) is not None} for runs in self.runs.values()]
        tasks = [task for task in tasks if task]
        if not tasks:
            return []
        seeds = sorted(set.intersection(*(set(task) for task in tasks)))
        values = [statistics.fmean(task[seed] for task in tasks) for seed in seeds]
        return values or [statistics.fmean(value for task in tasks for value in task.values())]


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
        RunError: no folder holds a finished run with test questions.
    """
    results = Results("", [], {}, [])
    for folder in folders:
        if (folder / INDEX).exists():
            _read_study(folder, results)
        else:
            _read_runs(folder, results)
    if not results.runs:
        raise RunError(f"there is no finished run with test questions in {', '.join(map(str, folders))}: run one, or wait for the study")
    return results


def _open(folder: Path, key: str, **where: Any) -> Run | None:
    """The run in a folder; None if it is not finished, or had no test questions."""
    directory = RunDirectory.open(folder)
    if not directory.finished or "test" not in directory.result():
        return None
    about = {"seed": directory.config.seed} | where
    depths = RunDirectory.read_json(folder / DEPTHS)["rows"] if (folder / DEPTHS).exists() else []
    disclosure = RunDirectory.read_json(folder / DISCLOSURE) if (folder / DISCLOSURE).exists() else {}
    return Run(
        key=key,
        disclosure=disclosure,
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
    diverged: set[str] = set()
    axes = ("method", "task", "model", "partition", "choice", "seed")
    for cell in index["cells"]:
        path = folder / cell["folder"]
        where = {axis: cell[axis] for axis in axes}
        run = _open(path, f"run-{len(results.runs) + 1}", study=str(folder), **where) if (path / "config.toml").exists() else None
        if run:
            results.runs[run.key] = found[cell["folder"]] = run
        elif (path / FAILURE).exists():
            failure = RunDirectory.read_json(path / FAILURE)
            results.failures.append((path.name, failure["reason"], failure["diverged"]))
            diverged.update([cell["folder"]] if failure["diverged"] else [])
    for number, grid in enumerate(index["grids"]):
        cells = [cell for cell in index["cells"] if number in cell["grids"]]
        present = [found[cell["folder"]] for cell in cells if cell["folder"] in found]
        missing = [cell["folder"] for cell in cells if cell["folder"] not in found]
        wanted = grid.get("reference") or index["reference"]
        reference = wanted if wanted in grid["methods"] else grid["methods"][0]
        order = {method: place for place, method in enumerate(grid["methods"])}
        lines = _lines(sorted(present, key=lambda run: order[run.method]))
        _count_diverged(lines, [cell for cell in cells if cell["folder"] in diverged], order)
        if lines:
            tasks = list(dict.fromkeys(cell["task"] for cell in cells if any(cell["task"] in line.runs for line in lines)))
            results.sections.append(Section(grid["title"], grid["text"], tasks, lines, reference, missing))


def _read_runs(folder: Path, results: Results) -> None:
    results.name = ", ".join(filter(None, [results.name, folder.name]))
    runs = []
    for path in find_runs(folder) or []:
        config = RunDirectory.open(path).config
        title = f"{METHODS[config.method].title}, {config.preset}" if config.method == "fedsp" else METHODS[config.method].title
        label = f"{title} ({path.relative_to(folder)})" if path != folder else title
        where = {"method": label, "task": config.data.task, "model": Path(config.model.name).name, "partition": config.partition.kind}
        run = _open(path, f"run-{len(results.runs) + 1}", study=str(folder), choice="", **where)
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
        shared = set.intersection(*({run.seed for run in alternatives} for alternatives in choices.values()))
        best = min(choices, key=lambda choice: _validation([run for run in choices[choice] if run.seed in shared or not shared]))
        line.runs[task], line.choices[task] = sorted(choices[best], key=lambda run: run.seed), best
    several = {axis: len({getattr(line, axis) for line in lines.values()}) > 1 for axis in ("model", "partition")}
    for line in lines.values():
        line.label = ", ".join([line.method, *(getattr(line, axis) for axis, many in several.items() if many)])
    return list(lines.values())


def _count_diverged(lines: list[Line], cells: Sequence[dict[str, Any]], order: dict[str, int]) -> None:
    """Put diverged cells beside the runs that finished; a method of which none finished gets a line of its own."""
    for line in lines:
        line.begun = len(line.all)
    for cell in cells:
        axes = (cell["method"], cell["model"], cell["partition"])
        found = next((line for line in lines if (line.method, line.model, line.partition) == axes), None)
        line = found or Line(*axes, label=cell["method"])
        if found is None:
            lines.append(line)
        line.begun, line.diverged = line.begun + 1, line.diverged + 1
    lines.sort(key=lambda line: order[line.method])


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
"""Columns of every table: the share of the global model's parameters that clients hold bit for bit (and nearly, where `fedsp audit disclosure` has measured
that), what they hold, and what becomes of the text."""


def _privacy(line: Line) -> list[Entry]:
    if not line.all:
        return [Entry("-"), Entry("-"), Entry("-")]
    first = line.all[0]
    share, near = first.figures["disclosed_share"], first.disclosure.get("nearly_disclosed_share")
    text = f"{100 * share:.0f} %" + ("" if near is None or near - share < 0.005 else f" (nearly {100 * near:.0f} %)")
    return [Entry(text, share, tuple(run.key for run in line.all)), Entry(first.clients_hold), Entry(first.text_is)]


def score_table(section: Section, figure: str) -> Table:
    """Accuracy (%) or answer loss (nats) by line and task, and what privacy each method gives."""
    accuracy = figure == "accuracy"
    digits, scale = (1, 100.0) if accuracy else (3, 1.0)
    several = len(section.tasks) > 1
    rows = []
    for line in section.lines:
        cells = [_entry(line.runs.get(task, []), _score if accuracy else _loss, digits, scale) for task in section.tasks]
        whole = line if set(line.runs) >= set(section.tasks) else Line("", "", "")
        mean = _line_entry(whole, _score if accuracy else _loss, digits, scale)
        chosen = sorted({choice for choice in line.choices.values() if choice})
        rows.append([Entry(line.label + (f" ({'; '.join(chosen)})" if chosen else "")), *cells, *([mean] if several else []), *_privacy(line)])
    columns = ["method", *section.tasks, *(["mean"] if several else []), *PRIVACY]
    title = "Accuracy, %" if accuracy else "Answer loss, nats per token"
    seeds = sorted({len(runs) for line in section.lines for runs in line.runs.values()})
    note = f"Mean ± standard deviation over seeds ({', '.join(map(str, seeds))} each) on the test questions, through the global model; {'higher' if accuracy else 'lower'} is better."
    if accuracy and any("exact_match" in run.figures["test"] for line in section.lines for run in line.all):
        note += " Where a task has no choices it is the exact match."
    return Table(figure, title, columns, rows, note, _labels(section.lines))


def _score(run: Run) -> float:
    return run.score


def _loss(run: Run) -> float:
    return run.loss


def _labels(lines: Iterable[Line]) -> tuple[str, ...]:
    return tuple(line.label for line in lines)


def _line_entry(line: Line, figure: Callable[[Run], float | None], digits: int, scale: float = 1.0) -> Entry:
    """A figure of a line: mean and spread over seeds of its mean over tasks."""
    numbers = [scale * number for number in line.by_seed(figure)]
    return Entry(spread(numbers, digits), statistics.fmean(numbers), tuple(run.key for run in line.all)) if numbers else Entry("-")


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
    adjusted = iter(holm([differences[figure].p for _, _, differences in compared for figure in ("answer_loss", "accuracy")]))
    rows = []
    for line, reference, differences in compared:
        keys = tuple(run.key for run in [*line.all, *reference.all])
        cells = []
        for figure, digits, scale in (("answer_loss", 3, 1), ("accuracy", 1, 100)):
            found, p = differences[figure], next(adjusted)
            mean, low, high = (f"{scale * value:+.{digits}f}" for value in (found.mean, found.low, found.high))
            cells += [Entry(f"{mean} [{low}, {high}]", scale * found.mean, keys), Entry(_p(p), p, keys)]
        rows.append([Entry(line.label), *cells, *_privacy(line)])
    note = "Paired on questions and seeds, mean over tasks; 95 % intervals of a bootstrap over both; p-values corrected for all comparisons of this table, both figures together (Holm). A negative difference in loss is better."
    columns = ["method", "answer loss, nats", "p (Holm)", "accuracy, points", "p (Holm) ", *PRIVACY]
    return Table("comparison", f"Difference from {section.reference}", columns, rows, note, _labels(line for line, _, _ in compared))


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def cost_table(section: Section) -> Table:
    """What a run costs each party, measured: numbers held, trained and sent; bytes; operations; memory; seconds."""
    rows = []
    for line in section.lines:
        runs = line.all

        def of(side: str, name: str, runs: list[Run] = runs) -> float | None:
            known = [run.figures["cost"][side][name] for run in runs if run.figures["cost"].get(side, {}).get(name)]
            return statistics.fmean(known) if known else None

        model = statistics.fmean(run.model_parameters for run in runs) if runs else 0.0
        whole = statistics.fmean(run.global_parameters for run in runs) if runs else 0.0
        numbers = [
            model or None,
            whole / model if model else None,
            of("client", "parameters_trained"),
            of("client", "parameters_sent"),
            of("client", "operations"),
            of("client", "memory_bytes"),
            of("client", "tokens_per_second"),
            of("server", "parameters_trained"),
            of("server", "operations"),
            of("server", "memory_bytes"),
            statistics.fmean(run.bytes for run in runs) or None if runs else None,
            statistics.fmean(run.figures["seconds_rounds"] for run in runs) or None if runs else None,
            statistics.fmean(run.distillation_seconds for run in runs) or None if runs else None,
        ]
        keys = tuple(run.key for run in runs)
        rows.append([Entry(line.label), *(Entry("-" if number is None else _si(number), number, keys) for number in numbers), *_privacy(line)])
    columns = [
        "method",
        "client: parameters of its model",
        "global / client's model",
        "client: trained",
        "sent",
        "client: operations a round",
        "client: memory, bytes",
        "client: tokens a second",
        "server: trained",
        "server: operations a round",
        "server: memory, bytes",
        "bytes, all messages and packages",
        "seconds, all rounds",
        "seconds, distillation, once",
        *PRIVACY,
    ]
    note = "Measured on the first batches of the server and of the first client; operations by torch's counter, forward and backward, attention included; memory is weights, gradients, AdamW's moments and the activations kept. Parameters that depths or ends share count once; global / client's model is the paper's all / auxiliary. Means over tasks and seeds."
    return Table("cost", "Cost", columns, rows, note, _labels(section.lines))


def _si(number: float) -> str:
    """Three digits and a prefix: 8.68 M."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g}"


def heterogeneity_table(section: Section) -> Table | None:
    """Accuracy by client, its spread, and how far clients pull apart, where the questions were divided by kind."""
    lines = [line for line in section.lines if any(run.figures.get("clients") for run in line.all)]
    if not lines:
        return None
    figures: list[tuple[str, Callable[[list[float]], float], str, int]] = [
        ("clients' mean accuracy, %", statistics.fmean, "accuracy", 1),
        ("worst client, %", min, "accuracy", 1),
        ("spread over clients, points", statistics.pstdev, "accuracy", 1),
        ("largest / smallest client", lambda sizes: max(sizes) / max(1.0, min(sizes)), "examples", 1),
    ]

    def over_clients(run: Run, name: str, fold: Callable[[list[float]], float]) -> float | None:
        return fold(run.of_clients(name, 100 if name == "accuracy" else 1)) if run.figures.get("clients") else None

    rows = []
    for line in lines:
        cells = [_line_entry(line, lambda run, name=name, fold=fold: over_clients(run, name, fold), digits) for _, fold, name, digits in figures]  # type: ignore[misc]
        cosine = _line_entry(line, lambda run: statistics.fmean(run.cosines) if run.cosines else None, 2)
        rows.append([Entry(line.label), *cells, cosine, *_privacy(line)])
    note = "A client's accuracy is that on the test questions, each topic weighted by its share of the client's own questions. Cosine: mean over pairs of clients and rounds; 1 is one direction, 0 is none in common. Mean ± standard deviation over seeds, of means over tasks."
    return Table("clients", "Clients", ["method", *(name for name, _, _, _ in figures), "cosine of updates", *PRIVACY], rows, note, _labels(lines))


def stability_table(section: Section) -> Table:
    """Divergence, loss spikes, the spread over seeds, and, where it was measured, how signals grow or fade along the auxiliary model."""
    rows = []
    measured = any(run.depths for line in section.lines for run in line.all)
    for line in section.lines:
        keys = tuple(run.key for run in line.all)
        losses = line.by_seed(_loss)
        spread_of = max(losses) - min(losses) if losses else None
        spikes = _line_entry(line, lambda run: 100 * sum(record.get("spikes", 0) for record in run.records) / run.client_steps if run.client_steps else None, 2)
        rows.append(
            [
                Entry(line.label),
                Entry(f"{line.diverged} of {line.begun or len(line.all)}", float(line.diverged), keys),
                spikes,
                _line_entry(line, _loss, 3),
                Entry("-" if spread_of is None else f"{spread_of:.3f}", spread_of, keys),
                *(
                    [_line_entry(line, lambda run: _growth(run, "hidden_scale"), 2), _line_entry(line, lambda run: _growth(run, "gradient_norm"), 2)]
                    if measured
                    else []
                ),
                *_privacy(line),
            ]
        )
    growth = ["hidden states, last / first block", "gradients, last / first block"] if measured else []
    columns = ["method", "diverged", "steps with a loss spike, %", "answer loss, nats", "range over seeds, nats", *growth, *PRIVACY]
    note = "A spike is a client's step whose loss is more than half above the median of its stage. Losses are means over tasks, their spread is over seeds."
    if measured:
        note += " Last / first block: the scale of the last block's input to that of the second's, and the same of the loss's gradient, at the first client after the last round (`fedsp audit depths`)."
    return Table("stability", "Stability", columns, rows, note, _labels(section.lines))


def _growth(run: Run, name: str) -> float | None:
    """The figure at the input of the last block over that of the second, whose input is the first that a block has made."""
    values = [row[name] for row in run.depths if row["weights"] == "client"]
    return values[-2] / values[1] if len(values) > 3 else None
