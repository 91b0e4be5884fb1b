"""Tables about a section of a study, of which every number knows its runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import numpy as np

from fedsp.report.collect import Line, Section
from fedsp.report.finished_run import Run
from fedsp.report.significance import Difference, Scores, holm, paired_difference

Figure = Callable[[Run], float | None]


@dataclass(frozen=True)
class Entry:
    """A cell of a table: its text, the number behind it, and the keys of the runs that it is made
    of."""

    text: str
    value: float | None = None
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of entries below column names, each about one of `lines`; `note` says how to read it."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Entry]]
    note: str
    lines: list[Line]


def section_tables(section: Section) -> list[Table]:
    """All tables of a section, in the order in which they are read."""
    tables = [
        benefit_table(section),
        score_table(section, "accuracy"),
        score_table(section, "answer_loss"),
        comparison_table(section),
        cost_table(section),
        heterogeneity_table(section),
        stability_table(section),
    ]
    return [table for table in tables if table]


def _table(
    name: str, title: str, columns: Sequence[str], rows: list[tuple[Line, list[Entry]]], note: str
) -> Table:
    """A table with a row for each line, and what privacy it has."""
    cells = [[*entries, *_privacy(line)] for line, entries in rows]
    columns = ["method", *columns, *PRIVACY]
    return Table(name, title, columns, cells, note, [line for line, _ in rows])


PRIVACY = ["given of the model", "clients hold", "the text"]
"""Columns of every table: the share of the global model's parameters that clients hold bit for bit
(and nearly, where `fedsp audit --only disclosure` has measured that), what they hold, and what
becomes of the text."""


def _privacy(line: Line) -> list[Entry]:
    if not line.all:
        return [Entry("-")] * 3
    first = line.all[0]
    share, near = first.figures["disclosed_share"], first.disclosure.get("nearly_disclosed_share")
    text = f"{100 * share:.0f} %" + (
        "" if near is None or near - share < 0.005 else f" (nearly {100 * near:.0f} %)"
    )
    return [Entry(text, share, line.keys), Entry(first.clients_hold), Entry(first.text_is)]


def _entry(line: Line, figure: Figure, digits: int, scale: float = 1.0) -> Entry:
    """A figure of a line: mean and standard deviation over seeds of its mean over tasks."""
    numbers = [scale * number for number in line.by_seed(figure)]
    if not numbers:
        return Entry("-")
    mean = statistics.fmean(numbers)
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return Entry(f"{mean:.{digits}f}{spread}", mean, line.keys)


def score_table(section: Section, figure: str) -> Table:
    """Accuracy (%) or answer loss (nats) by line and task, and what privacy each method gives."""
    accuracy = figure == "accuracy"
    score, digits, scale = ("score", 1, 100.0) if accuracy else ("loss", 3, 1.0)
    several = len(section.tasks) > 1
    rows = []
    for line in section.lines:
        cells = [{task: line.runs.get(task, [])} for task in section.tasks]
        if several:
            cells.append(line.runs if set(line.runs) >= set(section.tasks) else {})
        entries = [
            _entry(replace(line, runs=runs), attrgetter(score), digits, scale) for runs in cells
        ]
        chosen = sorted({choice for choice in line.choices.values() if choice})
        label = line.label + (f" ({'; '.join(chosen)})" if chosen else "")
        rows.append((line, [Entry(label), *entries]))
    seeds = sorted({len(runs) for line in section.lines for runs in line.runs.values()})
    note = (
        f"Mean ± standard deviation over seeds ({', '.join(map(str, seeds))} each) on the test"
        f" questions, through the global model; {'higher' if accuracy else 'lower'} is better."
    )
    if accuracy and any(
        "exact_match" in run.figures["test"] for line in section.lines for run in line.all
    ):
        note += " Where a task has no choices it is the exact match."
    title = "Accuracy, %" if accuracy else "Answer loss, nats per token"
    return _table(figure, title, [*section.tasks, *(["mean"] if several else [])], rows, note)


def benefit_table(section: Section) -> Table | None:
    """What federating is worth: each federated line against the better of the best client alone
    and the best server alone; None where nobody was alone."""
    rows = []
    for line in section.lines:
        if any(run.role != "federated" for run in line.all) or not line.all:
            continue
        figures = [_benefit(section, line, task) for task in line.runs]
        if known := [figure for figure in figures if figure]:
            rows.append((line, _benefit_entries(line, known)))
    if not rows:
        return None
    note = (
        "Benefit: accuracy less that of the best client alone or the server alone, whichever is"
        " better; 95 % interval of a bootstrap over questions and seeds. The best client, and of"
        " several methods the server's best, is the one with the highest score on the test"
        " questions, which favours it. Means over tasks and seeds."
    )
    columns = [
        "federation benefit, points",
        "accuracy, %",
        "best client alone, %",
        "clients alone, mean, %",
        "worst client alone, %",
        "server alone, %",
    ]
    return _table("benefit", "Federation benefit", columns, rows, note)


@dataclass(frozen=True, kw_only=True)
class _Benefit:
    """One task's runs of a federated line, of each client alone, best first, of the server alone
    (by its best method, at the choice of validation), all of the seeds that the line has; and the
    scores of the line and of the better of the two."""

    line: list[Run]
    clients: list[list[Run]]
    server: list[Run]
    scores: tuple[Scores, Scores]


def _benefit(section: Section, line: Line, task: str) -> _Benefit | None:
    seeds = {run.seed for run in line.runs[task]}
    shared = [
        run
        for run in section.runs
        if (run.task, run.model, run.partition) == (task, line.model, line.partition)
        and run.seed in seeds
    ]
    chosen = {run.key for other in section.lines for run in other.runs.get(task, [])}
    clients, servers = (
        _best_first(run for run in shared if run.role == role and (run.key in chosen or every))
        for role, every in (("client alone", True), ("server alone", False))
    )
    rivals = sorted([*clients[:1], *servers[:1]], key=_score, reverse=True)
    scores = paired_scores(line.runs[task], rivals[0], Run.right) if rivals else None
    if scores is None:
        return None
    server = servers[0] if servers else []
    return _Benefit(line=line.runs[task], clients=clients, server=server, scores=scores)


def _best_first(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs by cell, the best first by the seeds that all cells have, or, where they share none, by
    all of each."""
    cells: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        cells.setdefault(run.cell, []).append(run)
    seeds = [{run.seed for run in some} for some in cells.values()]
    shared = set.intersection(*seeds) if seeds else set()

    def score(some: list[Run]) -> float:
        return _score([run for run in some if run.seed in shared] or some)

    return sorted(cells.values(), key=score, reverse=True)


def _score(runs: Sequence[Run]) -> float:
    return statistics.fmean(run.score for run in runs)


def _benefit_entries(line: Line, tasks: Sequence[_Benefit]) -> list[Entry]:
    found = paired_difference([task.scores for task in tasks])
    mean, low, high = (f"{100 * value:+.1f}" for value in (found.mean, found.low, found.high))
    keys = {run.key for task in tasks for runs in task.clients for run in runs}
    keys |= {run.key for task in tasks for run in task.server}
    own = Entry(f"{mean} [{low}, {high}]", 100 * found.mean, (*line.keys, *sorted(keys)))

    def over_tasks(groups: Sequence[list[list[Run]]]) -> Entry:
        if not all(groups):
            return Entry("-")
        mean = statistics.fmean(statistics.fmean(map(_score, runs)) for runs in groups)
        keys = tuple(run.key for group in groups for runs in group for run in runs)
        return Entry(f"{100 * mean:.1f}", 100 * mean, keys)

    return [
        Entry(line.label),
        own,
        over_tasks([[task.line] for task in tasks]),
        over_tasks([task.clients[:1] for task in tasks]),
        over_tasks([task.clients for task in tasks]),
        over_tasks([task.clients[-1:] for task in tasks]),
        over_tasks([[task.server] if task.server else [] for task in tasks]),
    ]


def paired_scores(
    one: Sequence[Run], other: Sequence[Run], score: Callable[[Run, Sequence[str]], list[float]]
) -> tuple[Scores, Scores] | None:
    """The scores of two methods on the seeds and questions that both have, (S, Q) each; None where
    they share none."""
    sides = [{run.seed: run for run in runs} for runs in (one, other)]
    seeds = sorted(set.intersection(*map(set, sides)))
    asked = [set(runs[seed].questions) for runs in sides for seed in seeds]
    questions = sorted(set.intersection(*asked)) if asked else []
    if not questions:
        return None
    mine, theirs = (np.array([score(runs[seed], questions) for seed in seeds]) for runs in sides)
    return mine, theirs


def comparison_table(section: Section) -> Table | None:
    """Each line against the reference (of its own model and partition): difference in accuracy and
    answer loss over all tasks, intervals, Holm's p."""
    references = {
        (line.model, line.partition): line
        for line in section.lines
        if line.method == section.reference
    }
    figures = ((Run.losses, 3, 1), (Run.right, 1, 100))
    compared: list[tuple[Line, Line, list[Difference]]] = []
    for line in section.lines:
        reference = references.get((line.model, line.partition))
        if reference is None or reference is line:
            continue
        differences = []
        for score, _, _ in figures:
            pairs = [
                paired_scores(line.runs.get(task, []), reference.runs.get(task, []), score)
                for task in section.tasks
            ]
            if known := [pair for pair in pairs if pair]:
                differences.append(paired_difference(known))
        if differences:
            compared.append((line, reference, differences))
    if not compared:
        return None
    adjusted = iter(holm([found.p for _, _, differences in compared for found in differences]))
    rows = []
    for line, reference, differences in compared:
        keys = (*line.keys, *reference.keys)
        entries = [Entry(line.label)]
        for found, (_, digits, scale) in zip(differences, figures, strict=True):
            mean, low, high = (
                f"{scale * value:+.{digits}f}" for value in (found.mean, found.low, found.high)
            )
            p = next(adjusted)
            entries += [
                Entry(f"{mean} [{low}, {high}]", scale * found.mean, keys),
                Entry("< 0.001" if p < 0.001 else f"{p:.3f}", p, keys),
            ]
        rows.append((line, entries))
    note = (
        "Paired on questions and seeds, mean over tasks; 95 % intervals of a bootstrap over both;"
        " p-values corrected for all comparisons of this table, both figures together (Holm). A"
        " negative difference in loss is better."
    )
    columns = ["answer loss, nats", "p (Holm)", "accuracy, points", "p (Holm) "]
    return _table("comparison", f"Difference from {section.reference}", columns, rows, note)


def cost_table(section: Section) -> Table:
    """What a run costs each party, measured: numbers held, trained and sent; bytes; operations;
    memory; seconds."""

    def of(side: str, name: str) -> Figure:
        return lambda run: run.cost(side, name) or None

    columns: dict[str, Figure] = {
        "client: parameters of its model": of("client", "model_parameters"),
        "global / client's model": of("server", "model_parameters"),
        "client: trained": of("client", "parameters_trained"),
        "sent": of("client", "parameters_sent"),
        "client: operations a round": of("client", "operations"),
        "client: memory, bytes": of("client", "memory_bytes"),
        "client: tokens a second": of("client", "tokens_per_second"),
        "server: trained": of("server", "parameters_trained"),
        "server: operations a round": of("server", "operations"),
        "server: memory, bytes": of("server", "memory_bytes"),
        "bytes, all messages and packages": attrgetter("bytes"),
        "seconds, all rounds": lambda run: run.figures["seconds_rounds"],
        "seconds, distillation, once": attrgetter("distillation_seconds"),
    }
    rows = []
    for line in section.lines:
        known = [
            [value for run in line.all if (value := figure(run)) is not None]
            for figure in columns.values()
        ]
        numbers = [statistics.fmean(values) or None if values else None for values in known]
        # the second column is the global model as a multiple of the first
        numbers[1] = (numbers[1] or 0.0) / numbers[0] if numbers[0] else None
        entries = [
            Entry("-" if number is None else _si(number), number, line.keys) for number in numbers
        ]
        rows.append((line, [Entry(line.label), *entries]))
    note = (
        "Measured on the first batches of the server and of the first client; operations by torch's"
        " counter, forward and backward, attention included; memory is weights, gradients, AdamW's"
        " moments and the activations kept. Parameters that depths or ends share count once; global"
        " / client's model is the paper's all / auxiliary. Means over tasks and seeds."
    )
    return _table("cost", "Cost", list(columns), rows, note)


def _si(number: float) -> str:
    """Three digits and a prefix: 8.68 M."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g}"


def heterogeneity_table(section: Section) -> Table | None:
    """Accuracy by client, its spread, and how far clients pull apart, where the questions were
    divided by kind."""
    lines = [line for line in section.lines if any(run.of_clients("accuracy") for run in line.all)]
    if not lines:
        return None

    def over_clients(name: str, fold: Callable[[list[float]], float], scale: float) -> Figure:
        return lambda run: fold(found) if (found := run.of_clients(name, scale)) else None

    columns: dict[str, Figure] = {
        "clients' mean accuracy, %": over_clients("accuracy", statistics.fmean, 100),
        "worst client, %": over_clients("accuracy", min, 100),
        "spread over clients, points": over_clients("accuracy", statistics.pstdev, 100),
        "largest / smallest client": over_clients(
            "examples", lambda sizes: max(sizes) / max(1.0, min(sizes)), 1
        ),
    }
    rows = []
    for line in lines:
        entries = [_entry(line, figure, 1) for figure in columns.values()]
        cosine = _entry(line, lambda run: statistics.fmean(run.cosines) if run.cosines else None, 2)
        rows.append((line, [Entry(line.label), *entries, cosine]))
    note = (
        "A client's accuracy is that on the test questions, each topic weighted by its share of the"
        " client's own questions. Cosine: mean over pairs of clients and rounds; 1 is one"
        " direction, 0 is none in common. Mean ± standard deviation over seeds, of means over"
        " tasks."
    )
    return _table("clients", "Clients", [*columns, "cosine of updates"], rows, note)


def stability_table(section: Section) -> Table:
    """Divergence, loss spikes, the spread over seeds, and, where it was measured, how signals grow
    or fade along the auxiliary model."""
    measured = any(run.depths for line in section.lines for run in line.all)
    growth = {
        "hidden states, last / first block": "hidden_scale",
        "gradients, last / first block": "gradient_norm",
    }
    if not measured:
        growth = {}
    rows = []
    for line in section.lines:
        losses = line.by_seed(attrgetter("loss"))
        apart = max(losses) - min(losses) if losses else None
        entries = [
            Entry(line.label),
            Entry(f"{line.diverged} of {line.begun}", float(line.diverged), line.keys),
            _entry(line, _spikes, 2),
            _entry(line, attrgetter("loss"), 3),
            Entry("-" if apart is None else f"{apart:.3f}", apart, line.keys),
            *(_entry(line, partial(_growth, name=name), 2) for name in growth.values()),
        ]
        rows.append((line, entries))
    columns = [
        "diverged",
        "steps with a loss spike, %",
        "answer loss, nats",
        "range over seeds, nats",
        *growth,
    ]
    note = (
        "A spike is a client's step whose loss is more than half above the median of its stage."
        " Losses are means over tasks, their spread is over seeds."
    )
    if measured:
        note += (
            " Last / first block: the scale of the last block's input to that of the second's, and"
            " the same of the loss's gradient, at the first client after the last round (`fedsp"
            " audit --only depths`)."
        )
    return _table("stability", "Stability", columns, rows, note)


def _spikes(run: Run) -> float | None:
    """The share of the clients' steps with a loss spike, %; unknown where losses are private."""
    if run.config.privacy.unit == "example":
        return None
    spikes = sum(record.get("spikes", 0) for record in run.records)
    return 100 * spikes / run.client_steps if run.client_steps else None


def _growth(run: Run, name: str) -> float | None:
    """The figure at the input of the last block over that of the second, whose input is the first
    that a block has made."""
    values = [row[name] for row in run.depths if row["weights"] == "client"]
    return values[-2] / values[1] if len(values) > 3 else None
