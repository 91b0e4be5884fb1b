"""Answer perplexity against the bytes of a round, by codec. The tables and the curve of
docs/results/performance.md.

    fedsp study configs/studies/compression.toml --root REFERENCE        # REFERENCE holds models/
                                  and data/
    python benchmarks/bytes.py studies/compression [--figure bytes.svg]
    fedsp study configs/studies/adapter-bytes.toml --root REFERENCE
    python benchmarks/bytes.py studies/adapter-bytes --against float16

With `--against`, every method of a study against one of them, by the bytes of all rounds, the first
whole broadcast included. Without, bytes are of payloads, per client and round, up and down
together, from the second round on: in the first every client gets the whole prompt. Perplexity is
that of the best prompt on the test questions; its change is against float32 with the same seed and
as many rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib
from spread import mean, mean_and_deviation

from fedsp.report.collect import read_results
from fedsp.report.finished_run import Run

matplotlib.use("Agg")
from matplotlib import pyplot

Codings = dict[str, dict[int, Run]]
"""Runs by codec and seed."""


def kilobytes(runs: dict[int, Run], direction: str) -> float:
    """A payload's bytes in one direction, thousands, the mean over clients, rounds from the second
    on, and seeds."""
    return (
        statistics.fmean(
            record[f"bytes_{direction}"] / len(record["answered"])
            for run in runs.values()
            for record in run.records[1:]
        )
        / 1000
    )


def both(runs: dict[int, Run]) -> float:
    return kilobytes(runs, "up") + kilobytes(runs, "down")


def perplexity(run: Run) -> float:
    return float(run.figures["test"]["answer_perplexity"])


def whole_runs(study: Path, against: str) -> None:
    by_method: Codings = defaultdict(dict)
    for run in read_results([study]).runs.values():
        if run.config.method == "fedsp":
            by_method[run.method][run.seed] = run

    def sent(run: Run) -> float:
        return float(run.figures["bytes_up"] + run.figures["bytes_down"]) / 1e6

    most = statistics.fmean(map(sent, by_method[against].values()))
    print(
        "| method | MB in all | fewer | exact match | answer perplexity | against"
        f" {against}, same seed |\n|---|---|---|---|---|---|"
    )
    for name, runs in by_method.items():
        bytes_sent = statistics.fmean(map(sent, runs.values()))
        changes = [
            100 * (perplexity(run) / perplexity(by_method[against][seed]) - 1)
            for seed, run in runs.items()
        ]
        right = [100 * float(run.figures["test"]["exact_match"]) for run in runs.values()]
        row = [
            name,
            f"{bytes_sent:.1f}",
            f"{most / bytes_sent:.1f}",
            f"{mean(right, '.1f')} %",
            mean([perplexity(run) for run in runs.values()], ".2f"),
            f"{statistics.fmean(changes):+.1f} % ({min(changes):+.1f} to {max(changes):+.1f})",
        ]
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--against", help="a method of the study")
    given = parser.parse_args()
    if given.against:
        whole_runs(given.study, given.against)
        return
    by_rounds: dict[int, Codings] = defaultdict(lambda: defaultdict(dict))
    for run in read_results([given.study]).runs.values():
        if run.config.method == "fedsp":
            by_rounds[run.config.round.rounds][run.config.compression.up][run.seed] = run
    half = both(next(codecs["float16"] for codecs in by_rounds.values() if "float16" in codecs))
    for rounds, codecs in sorted(by_rounds.items()):
        print(
            f"\n{rounds} rounds\n\n| codec, both ways | up, kB | down, kB | fewer than float16 |"
            " answer perplexity | against float32, same seed |\n|---|---|---|---|---|---|"
        )
        for name, runs in codecs.items():
            against = [
                100 * (perplexity(run) / perplexity(codecs["float32"][seed]) - 1)
                for seed, run in runs.items()
            ]
            apart = (
                f"{statistics.fmean(against):+.1f} % ({min(against):+.1f} to {max(against):+.1f})"
            )
            tested = mean([perplexity(run) for run in runs.values()], ".1f")
            row = [
                name,
                *(f"{kilobytes(runs, way):.1f}" for way in ("up", "down")),
                f"{half / both(runs):.1f}",
                tested,
                apart,
            ]
            print(f"| {' | '.join(row)} |")
    if given.figure:
        draw(given.figure, by_rounds)


def draw(path: Path, by_rounds: dict[int, Codings]) -> None:
    """Mean perplexity with its standard deviation over seeds, against kilobytes on a logarithmic
    axis."""
    matplotlib.rcParams.update({"svg.hashsalt": "fedsp", "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (rounds, codecs) in enumerate(sorted(by_rounds.items())):
        for name, runs in codecs.items():
            middle, deviation = mean_and_deviation([perplexity(run) for run in runs.values()])
            label = f"{rounds} rounds" if name == "float32" else None
            axes.errorbar(
                both(runs),
                middle,
                deviation,
                fmt="os"[number],
                capsize=3,
                color=f"C{number}",
                label=label,
            )
            axes.annotate(
                name, (both(runs), middle), xytext=(6, 6), textcoords="offset points", fontsize=8
            )
    axes.margins(x=0.1)
    axes.set(
        xscale="log",
        xlabel="kB for each client and round, up and down",
        ylabel="answer perplexity, test questions",
    )
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
