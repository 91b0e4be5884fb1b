"""Tables about a section of a study, of which every number knows its runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedsp.report.collect import Line, Section
from fedsp.report.finished_run import Run
from fedsp.report.significance import Difference, Scores, holm, paired_difference


@dataclass(frozen=True)
class Entry:
    """A cell of a table: its text, the number behind it, and the keys of the runs that it is made
    of."""

    text: str
    value: float | None = None
    runs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of entries below column names; `note` says how to read it, `lines` which line of its
    section each row is about."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[Entry]]
    note: str = ""
    lines: tuple[str, ...] = ()


def spread(numbers: Sequence[float], digits: int) -> str:
    """Mean and standard deviation, as text."""
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else mean


def _entry(
    runs: Sequence[Run], figure: Callable[[Run], float], digits: int, scale: float = 1.0
) -> Entry:
    if not runs:
        return Entry("-")
    numbers = [scale * figure(run) for run in runs]
    return Entry(spread(numbers, digits), statistics.fmean(numbers), tuple(run.key for run in runs))


PRIVACY = ["given of the model", "clients hold", "the text"]
"""Columns of every table: the share of the global model's parameters that clients hold bit for bit
(and nearly, where `fedsp audit --only disclosure` has measured that), what they hold, and what
becomes of the text."""


def _privacy(line: Line) -> list[Entry]:
    if not line.all:
        return [Entry("-"), Entry("-"), Entry("-")]
    first = line.all[0]
    share, near = first.figures["disclosed_share"], first.disclosure.get("nearly_disclosed_share")
    text = f"{100 * share:.0f} %" + (
        "" if near is None or near - share < 0.005 else f" (nearly {100 * near:.0f} %)"
    )
    return [
        Entry(text, share, tuple(run.key for run in line.all)),
        Entry(first.clients_hold),
        Entry(first.text_is),
    ]


def score_table(section: Section, figure: str) -> Table:
    """Accuracy (%) or answer loss (nats) by line and task, and what privacy each method gives."""
    accuracy = figure == "accuracy"
    digits, scale = (1, 100.0) if accuracy else (3, 1.0)
    several = len(section.tasks) > 1
    rows = []
    for line in section.lines:
        cells = [
            _entry(line.runs.get(task, []), _score if accuracy else _loss, digits, scale)
            for task in section.tasks
        ]
        whole = (
            line
            if set(line.runs) >= set(section.tasks)
            else Line(method="", model="", partition="")
        )
        mean = _line_entry(whole, _score if accuracy else _loss, digits, scale)
        chosen = sorted({choice for choice in line.choices.values() if choice})
        rows.append(
            [
                Entry(line.label + (f" ({'; '.join(chosen)})" if chosen else "")),
                *cells,
                *([mean] if several else []),
                *_privacy(line),
            ]
        )
    columns = ["method", *section.tasks, *(["mean"] if several else []), *PRIVACY]
    title = "Accuracy, %" if accuracy else "Answer loss, nats per token"
    seeds = sorted({len(runs) for line in section.lines for runs in line.runs.values()})
    note = (
        f"Mean ± standard deviation over seeds ({', '.join(map(str, seeds))} each) on the test"
        f" questions, through the global model; {'higher' if accuracy else 'lower'} is better."
    )
    if accuracy and any(
        "exact_match" in run.figures["test"] for line in section.lines for run in line.all
    ):
        note += " Where a task has no choices it is the exact match."
    return Table(
        name=figure,
        title=title,
        columns=columns,
        rows=rows,
        note=note,
        lines=_labels(section.lines),
    )


def _score(run: Run) -> float:
    return run.score


def _loss(run: Run) -> float:
    return run.loss


def _labels(lines: Iterable[Line]) -> tuple[str, ...]:
    return tuple(line.label for line in lines)


def _line_entry(
    line: Line, figure: Callable[[Run], float | None], digits: int, scale: float = 1.0
) -> Entry:
    """A figure of a line: mean and spread over seeds of its mean over tasks."""
    numbers = [scale * number for number in line.by_seed(figure)]
    return (
        Entry(
            spread(numbers, digits), statistics.fmean(numbers), tuple(run.key for run in line.all)
        )
        if numbers
        else Entry("-")
    )


def paired_scores(
    one: Sequence[Run], other: Sequence[Run], figure: str
) -> tuple[Scores, Scores] | None:
    """The scores of two methods on the seeds and questions that both have, (S, Q) each; None where
    they share none."""
    mine, theirs = ({run.seed: run for run in runs} for runs in (one, other))
    seeds = sorted(set(mine) & set(theirs))
    if not seeds:
        return None
    questions = sorted(
        set.intersection(*(set(runs[seed].questions) for runs in (mine, theirs) for seed in seeds))
    )
    if not questions:
        return None
    scores = [
        np.array(
            [
                (
                    runs[seed].losses(questions)
                    if figure == "answer_loss"
                    else runs[seed].right(questions)
                )
                for seed in seeds
            ]
        )
        for runs in (mine, theirs)
    ]
    return scores[0], scores[1]


def comparison_table(section: Section) -> Table | None:
    """Each line against the reference (of its own model and partition): difference in accuracy and
    answer loss over all tasks, intervals, Holm's p."""
    references = {
        (line.model, line.partition): line
        for line in section.lines
        if line.method == section.reference
    }
    compared: list[tuple[Line, Line, dict[str, Difference]]] = []
    for line in section.lines:
        reference = references.get((line.model, line.partition))
        if reference is None or reference is line:
            continue
        differences = {}
        for figure in ("answer_loss", "accuracy"):
            pairs = [
                paired_scores(line.runs.get(task, []), reference.runs.get(task, []), figure)
                for task in section.tasks
            ]
            known = [pair for pair in pairs if pair is not None]
            if known:
                differences[figure] = paired_difference(known)
        if differences:
            compared.append((line, reference, differences))
    if not compared:
        return None
    adjusted = iter(
        holm(
            [
                differences[figure].p
                for _, _, differences in compared
                for figure in ("answer_loss", "accuracy")
            ]
        )
    )
    rows = []
    for line, reference, differences in compared:
        keys = tuple(run.key for run in [*line.all, *reference.all])
        cells = []
        for figure, digits, scale in (("answer_loss", 3, 1), ("accuracy", 1, 100)):
            found, p = differences[figure], next(adjusted)
            mean, low, high = (
                f"{scale * value:+.{digits}f}" for value in (found.mean, found.low, found.high)
            )
            cells += [
                Entry(f"{mean} [{low}, {high}]", scale * found.mean, keys),
                Entry(_p(p), p, keys),
            ]
        rows.append([Entry(line.label), *cells, *_privacy(line)])
    note = (
        "Paired on questions and seeds, mean over tasks; 95 % intervals of a bootstrap over both;"
        " p-values corrected for all comparisons of this table, both figures together (Holm). A"
        " negative difference in loss is better."
    )
    columns = ["method", "answer loss, nats", "p (Holm)", "accuracy, points", "p (Holm) ", *PRIVACY]
    return Table(
        name="comparison",
        title=f"Difference from {section.reference}",
        columns=columns,
        rows=rows,
        note=note,
        lines=_labels(line for line, _, _ in compared),
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def cost_table(section: Section) -> Table:
    """What a run costs each party, measured: numbers held, trained and sent; bytes; operations;
    memory; seconds."""
    rows = []
    for line in section.lines:
        runs = line.all

        def of(side: str, name: str, runs: list[Run] = runs) -> float | None:
            known = [
                run.figures["cost"][side][name]
                for run in runs
                if run.figures["cost"].get(side, {}).get(name)
            ]
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
            (
                statistics.fmean(run.figures["seconds_rounds"] for run in runs) or None
                if runs
                else None
            ),
            statistics.fmean(run.distillation_seconds for run in runs) or None if runs else None,
        ]
        keys = tuple(run.key for run in runs)
        rows.append(
            [
                Entry(line.label),
                *(
                    Entry("-" if number is None else _si(number), number, keys)
                    for number in numbers
                ),
                *_privacy(line),
            ]
        )
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
    note = (
        "Measured on the first batches of the server and of the first client; operations by torch's"
        " counter, forward and backward, attention included; memory is weights, gradients, AdamW's"
        " moments and the activations kept. Parameters that depths or ends share count once; global"
        " / client's model is the paper's all / auxiliary. Means over tasks and seeds."
    )
    return Table(
        name="cost",
        title="Cost",
        columns=columns,
        rows=rows,
        note=note,
        lines=_labels(section.lines),
    )


def _si(number: float) -> str:
    """Three digits and a prefix: 8.68 M."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g}"


def heterogeneity_table(section: Section) -> Table | None:
    """Accuracy by client, its spread, and how far clients pull apart, where the questions were
    divided by kind."""
    lines = [line for line in section.lines if any(run.figures.get("clients") for run in line.all)]
    if not lines:
        return None
    figures: list[tuple[str, Callable[[list[float]], float], str, int]] = [
        ("clients' mean accuracy, %", statistics.fmean, "accuracy", 1),
        ("worst client, %", min, "accuracy", 1),
        ("spread over clients, points", statistics.pstdev, "accuracy", 1),
        (
            "largest / smallest client",
            lambda sizes: max(sizes) / max(1.0, min(sizes)),
            "examples",
            1,
        ),
    ]

    def over_clients(run: Run, name: str, fold: Callable[[list[float]], float]) -> float | None:
        return (
            fold(run.of_clients(name, 100 if name == "accuracy" else 1))
            if run.figures.get("clients")
            else None
        )

    rows = []
    for line in lines:
        cells = [
            _line_entry(
                line,
                partial(over_clients, name=name, fold=fold),
                digits,
            )
            for _, fold, name, digits in figures
        ]
        cosine = _line_entry(
            line, lambda run: statistics.fmean(run.cosines) if run.cosines else None, 2
        )
        rows.append([Entry(line.label), *cells, cosine, *_privacy(line)])
    note = (
        "A client's accuracy is that on the test questions, each topic weighted by its share of the"
        " client's own questions. Cosine: mean over pairs of clients and rounds; 1 is one"
        " direction, 0 is none in common. Mean ± standard deviation over seeds, of means over"
        " tasks."
    )
    return Table(
        name="clients",
        title="Clients",
        columns=["method", *(name for name, _, _, _ in figures), "cosine of updates", *PRIVACY],
        rows=rows,
        note=note,
        lines=_labels(lines),
    )


def stability_table(section: Section) -> Table:
    """Divergence, loss spikes, the spread over seeds, and, where it was measured, how signals grow
    or fade along the auxiliary model."""
    rows = []
    measured = any(run.depths for line in section.lines for run in line.all)
    for line in section.lines:
        keys = tuple(run.key for run in line.all)
        losses = line.by_seed(_loss)
        spread_of = max(losses) - min(losses) if losses else None
        spikes = _line_entry(
            line,
            lambda run: (
                100 * sum(record.get("spikes", 0) for record in run.records) / run.client_steps
                if run.client_steps
                else None
            ),
            2,
        )
        rows.append(
            [
                Entry(line.label),
                Entry(
                    f"{line.diverged} of {line.begun or len(line.all)}", float(line.diverged), keys
                ),
                spikes,
                _line_entry(line, _loss, 3),
                Entry("-" if spread_of is None else f"{spread_of:.3f}", spread_of, keys),
                *(
                    [
                        _line_entry(line, lambda run: _growth(run, "hidden_scale"), 2),
                        _line_entry(line, lambda run: _growth(run, "gradient_norm"), 2),
                    ]
                    if measured
                    else []
                ),
                *_privacy(line),
            ]
        )
    growth = (
        ["hidden states, last / first block", "gradients, last / first block"] if measured else []
    )
    columns = [
        "method",
        "diverged",
        "steps with a loss spike, %",
        "answer loss, nats",
        "range over seeds, nats",
        *growth,
        *PRIVACY,
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
    return Table(
        name="stability",
        title="Stability",
        columns=columns,
        rows=rows,
        note=note,
        lines=_labels(section.lines),
    )


def _growth(run: Run, name: str) -> float | None:
    """The figure at the input of the last block over that of the second, whose input is the first
    that a block has made."""
    values = [row[name] for row in run.depths if row["weights"] == "client"]
    return values[-2] / values[1] if len(values) > 3 else None
