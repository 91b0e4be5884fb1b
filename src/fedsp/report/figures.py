"""The report's figures, as SVG in the page's text colour: readable in dark mode, in print and with
colour blindness."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from fedsp.experiments.run_directory import validations
from fedsp.report.collect import Section
from fedsp.report.finished_run import Run

INK = "#123456"
"""Stands for the page's own colour of text, which replaces it in the SVG."""

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C8C8C"]
"""Okabe and Ito's palette, for those who do not see red and green; each colour also has a marker
and a line of its own."""

MARKERS, DASHES = "osD^vPX*<>hp", ["-", "--", "-.", ":"]


def learning_curves(section: Section) -> str | None:
    """Validation loss by round, mean over seeds, one panel for each task."""
    if not any(len(_curve(run)) > 1 for line in section.lines for run in line.all):
        return None
    figure, panels = _panels(section.tasks, "round")
    for task, axes in zip(section.tasks, panels, strict=True):
        for style, line in zip(_styles(), section.lines, strict=False):
            curves = [_curve(run) for run in line.runs.get(task, [])]
            rounds = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
            if len(rounds) > 1:
                axes.plot(
                    rounds,
                    [statistics.fmean(curve[round] for curve in curves) for round in rounds],
                    label=_plain(line.label),
                    **style,
                )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("validation loss, nats")
    return _svg(figure, panels)


def _curve(run: Run) -> dict[int, float]:
    return validations(run.records)


def against(
    section: Section,
    figure: Callable[[Run], float],
    label: str,
    score: Callable[[Run], float],
    name: str,
) -> str | None:
    """A score against what a run costs (a logarithmic scale), one panel for each task; runs that
    cost nothing are a line."""
    if not any(figure(run) > 0 for line in section.lines for run in line.all):
        return None
    drawing, panels = _panels(section.tasks, label)
    for task, axes in zip(section.tasks, panels, strict=True):
        for style, line in zip(_styles(), section.lines, strict=False):
            runs = line.runs.get(task, [])
            if not runs:
                continue
            scores = [score(run) for run in runs]
            cost = statistics.fmean(figure(run) for run in runs)
            if cost > 0:
                error = statistics.stdev(scores) if len(scores) > 1 else 0.0
                axes.errorbar(
                    cost,
                    statistics.fmean(scores),
                    yerr=error,
                    color=style["color"],
                    marker=style["marker"],
                    label=_plain(line.label),
                    linestyle="none",
                )
            else:
                axes.axhline(
                    statistics.fmean(scores),
                    color=style["color"],
                    linestyle=style["linestyle"],
                    linewidth=1,
                    label=_plain(f"{line.label} (none)"),
                )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel(name)
    return _svg(drawing, panels)


def bars(section: Section) -> str:
    """Answer loss of every line, mean over tasks, with the spread over seeds; the line at the
    reference."""
    lines = [line for line in section.lines if set(line.runs) >= set(section.tasks)] or [
        line for line in section.lines if line.runs
    ]
    figure = Figure(figsize=(7.2, 0.6 + 0.3 * len(lines)))
    axes = figure.subplots()
    for place, line in enumerate(lines):
        by_seed = line.by_seed(lambda run: run.loss)
        error = statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0
        own = line.method == section.reference
        axes.barh(
            place,
            statistics.fmean(by_seed),
            xerr=error,
            color=COLOURS[0] if own else COLOURS[5],
            hatch="" if own else "//",
            edgecolor=INK,
            linewidth=0.5,
            height=0.7,
            ecolor=INK,
        )
        if own:
            axes.axvline(statistics.fmean(by_seed), color=INK, linestyle=":", linewidth=1)
    values = [value for line in lines for value in line.by_seed(lambda run: run.loss)]
    margin = 0.15 * (max(values) - min(values) or 1.0)
    axes.set_xlim(min(values) - margin, max(values) + margin)
    axes.set_yticks(range(len(lines)), [_plain(line.label) for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("answer loss, nats (shorter is better; the axis does not start at 0)")
    return _svg(figure, [axes], legend=False)


def clients(section: Section) -> str | None:
    """Accuracy of every client of every run, a row for each line; a bar marks the mean."""
    lines = [line for line in section.lines if any(run.of_clients("accuracy") for run in line.all)]
    if not lines:
        return None
    figure = Figure(figsize=(7.2, 0.6 + 0.3 * len(lines)))
    axes = figure.subplots()
    styles = dict(zip((line.label for line in section.lines), _styles(), strict=False))
    for place, line in enumerate(lines):
        style = styles[line.label]
        values = [value for run in line.all for value in run.of_clients("accuracy", 100)]
        axes.plot(
            values,
            [place] * len(values),
            marker=style["marker"],
            color=style["color"],
            linestyle="none",
            alpha=0.6,
            markersize=4,
        )
        axes.plot(
            [statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color=INK, linewidth=1.5
        )
    axes.set_yticks(range(len(lines)), [_plain(line.label) for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on questions like the client's own, %")
    return _svg(figure, [axes], legend=False)


def depths(section: Section) -> str | None:
    """Hidden-state scale and gradient norm by depth of the auxiliary model, the mean over runs;
    dashed: weights as handed out, solid: after the last round."""
    if not any(run.depths for line in section.lines for run in line.all):
        return None
    figure, panels = _panels(["scale of hidden states", "norm of gradients"], "depth")
    for axes, name in zip(panels, ("hidden_scale", "gradient_norm"), strict=True):
        for style, line in zip(_styles(), section.lines, strict=False):
            for weights, dashes in (("client", "-"), ("package", "--")):
                curves = [
                    [row[name] for row in run.depths if row["weights"] == weights]
                    for run in line.all
                    if run.depths
                ]
                if curves:
                    means = [statistics.fmean(column) for column in zip(*curves, strict=True)]
                    axes.plot(
                        means,
                        label=_plain(f"{line.label}, {weights}"),
                        **{**style, "linestyle": dashes},
                    )
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure, panels)


def _styles() -> list[dict[str, Any]]:
    return [
        {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": DASHES[(place // len(COLOURS)) % 4],
            "markersize": 4,
            "linewidth": 1.3,
        }
        for place in range(100)
    ]


def _plain(text: str) -> str:
    """A label as it stands; matplotlib takes a dollar for the start of mathematics."""
    return text.replace("$", r"\$")


def _panels(titles: Sequence[str], label: str) -> tuple[Figure, list[Axes]]:
    """A panel for each title, at most three side by side, with one label below them all."""
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(max(5.0, 3.0 * columns), 2.9 * rows + 0.3), layout="constrained")
    axes = [panel for row in figure.subplots(rows, columns, squeeze=False) for panel in row]
    for empty in axes[len(titles) :]:
        empty.remove()
    for panel, title in zip(axes, titles, strict=False):
        panel.set_title(title, fontsize=10)
    figure.supxlabel(label, color=INK, fontsize=9)
    return figure, axes[: len(titles)]


def _svg(figure: Figure, panels: Sequence[Axes], *, legend: bool = True) -> str:
    """The figure as an SVG element: its ink is `currentColor`, its text stays text, and it is as
    wide as the page lets it."""
    for axes in panels:
        axes.tick_params(colors=INK, labelsize=8)
        axes.yaxis.label.set_fontsize(9)
        axes.xaxis.label.set_fontsize(9)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.title.set_color(INK)
        axes.patch.set_alpha(0.0)
        axes.grid(True, color=INK, alpha=0.12, linewidth=0.6)
        axes.set_axisbelow(True)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(INK)
    if legend:
        shown: dict[str, Any] = {}
        for axes in panels:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                shown.setdefault(label, handle)
        figure.legend(
            list(shown.values()),
            list(shown),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.02),
            ncols=3,
            fontsize=8,
            frameon=False,
            labelcolor=INK,
        )
    figure.patch.set_alpha(0.0)
    buffer = io.StringIO()
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "fedsp",
            "font.family": "sans-serif",
            "hatch.linewidth": 0.4,
        }
    ):
        figure.savefig(
            buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px; font-family: inherit", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', svg, count=1)
