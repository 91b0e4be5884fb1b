"""Answer perplexity against the bytes of a round, by coding. The table and the curve of docs/results/performance.md.

    fedsp study configs/studies/compression.toml --root REFERENCE        # REFERENCE holds models/ and data/
    python benchmarks/bytes.py studies/compression [--figure bytes.svg]

Bytes are of payloads, per client and round, up and down together, from the second round on: in the first every client gets the whole prompt. Perplexity is
that of the best prompt on the test questions; its change is against float32 with the same seed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

from fedsp.finished_run import Run
from fedsp.results import read_results

matplotlib.use("Agg")
from matplotlib import pyplot


def kilobytes(run: Run, direction: str) -> float:
    """A payload's bytes in one direction, per client, from the second round on; thousands."""
    return statistics.fmean(record[f"bytes_{direction}"] / len(record["answered"]) for record in run.records[1:]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    runs: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in read_results([given.study]).runs.values():
        runs[run.method][run.seed] = run
    perplexity = {name: {seed: run.figures["test"]["answer_perplexity"] for seed, run in seeds.items()} for name, seeds in runs.items()}
    asked = {name: seeds for name, seeds in runs.items() if name != "zero-shot"}
    up, down = ({name: statistics.fmean(kilobytes(run, way) for run in seeds.values()) for name, seeds in asked.items()} for way in ("up", "down"))
    half = up["float16"] + down["float16"]
    print(f"Zero-shot: {statistics.fmean(perplexity['zero-shot'].values()):.1f}\n")
    print("| coding, both ways | up, kB | down, kB | fewer than float16 | answer perplexity | against float32, same seed |\n|---|---|---|---|---|---|")
    for name in asked:
        against = [100 * (value / perplexity["float32"][seed] - 1) for seed, value in perplexity[name].items()]
        apart = f"{statistics.fmean(against):+.2f} % ({min(against):+.2f} to {max(against):+.2f})"
        print(f"| {name} | {up[name]:.2f} | {down[name]:.2f} | {half / (up[name] + down[name]):.1f} | {spread(list(perplexity[name].values()))} | {apart} |")
    if given.figure:
        draw(given.figure, {name: up[name] + down[name] for name in asked}, {name: list(perplexity[name].values()) for name in asked})


def spread(numbers: list[float]) -> str:
    return f"{statistics.fmean(numbers):.1f} ± {statistics.stdev(numbers) if len(numbers) > 1 else math.nan:.1f}"


def draw(path: Path, size: dict[str, float], perplexity: dict[str, list[float]]) -> None:
    """Mean perplexity with its standard deviation over seeds, against kilobytes on a logarithmic axis."""
    matplotlib.rcParams["svg.hashsalt"] = "fedsp"
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in size:
        mean = statistics.fmean(perplexity[name])
        axes.errorbar(size[name], mean, statistics.stdev(perplexity[name]), fmt="o", capsize=3, color="tab:blue")
        axes.annotate(name, (size[name], mean), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="kB per client and round, up and down", ylabel="answer perplexity, test questions")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
