"""How much of the gain of LoRA in the whole model a messenger brings to the global one, against
what of that model clients hold. The tables and the picture of docs/results/messengers.md.

    fedsp study configs/studies/messengers.toml --root REFERENCE    # REFERENCE holds models/, data/
    python benchmarks/gain.py studies/messengers [--adapt QUESTIONS] [--figure gain.svg]

The gain is the fall in answer loss from zero-shot, as a share of that of LoRA in all linear modules
of the whole model at the clients, seed by seed. `--adapt` runs `fedsp adapt` on the runs of
`ADAPTED`, with questions in the form of the task, and leaves its figures in their folders, where
they are found again; loss and score after an adaptation that was not kept are those before. A grid
without zero-shot or that LoRA is told without gains. The picture is of the first grid.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from spread import mean

from fedsp import api as commands
from fedsp.report.collect import read_results
from fedsp.report.finished_run import Run
from fedsp.storage import write_json

matplotlib.use("Agg")
from matplotlib import pyplot

CEILING, NOTHING = "LoRA in the whole model, all modules", "zero-shot"
ALL = "adapter in all layers"
ADAPTED = (
    "adapter, rank 64",
    ALL,
    f"{ALL}, embeddings of rank 128",
    f"{ALL}, four of them, none verbatim, embeddings of rank 128",
)
KINDS = {
    "soft prompt": "soft prompt",
    "adapters": "adapter,",
    "adapters in all layers": ALL,
    "whole layers": "all weights",
}
"""Each curve of the picture, and how the names of its messengers begin."""
FIGURES = "adaptation.json"

Runs = dict[str, dict[int, Run]]
"""Runs by method and seed."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A messenger, by seed: the share of correct answers, the answer loss and the gain, and the
    answer loss of the auxiliary model, if there is one."""

    name: str
    disclosed: float
    scores: list[float]
    losses: list[float]
    gains: list[float]
    auxiliary: list[float]

    @property
    def adapted(self) -> bool:
        return self.name.endswith("adapted")


def adapt(runs: Runs, questions: Path) -> None:
    """Adapt what is not adapted yet."""
    torch.set_num_threads(1)
    for run in (run for method in ADAPTED for run in runs.get(method, {}).values()):
        if not (run.folder / FIGURES).exists():
            figures = commands.adapt(run.folder, questions, run.folder / "adapted")
            write_json(run.folder / FIGURES, figures)
            before, after = figures["before"], figures["after"]
            print(f"{run.name}: taught by {figures['teacher']}, {before:.3f} -> {after:.3f}")


def measured(runs: Runs) -> Iterator[Measured]:
    for name, seeds in runs.items():
        disclosed = statistics.fmean(run.figures["disclosed_share"] for run in seeds.values())
        tests = {seed: run.figures["test"] for seed, run in seeds.items()}
        found = [run.figures.get("auxiliary_test") for run in seeds.values()]
        own = [figures["answer_loss"] for figures in found if figures]
        yield _row(name, disclosed, tests, own, runs)
        files = {seed: run.folder / FIGURES for seed, run in seeds.items()}
        if all(file.exists() for file in files.values()):
            figures = {seed: json.loads(file.read_text()) for seed, file in files.items()}
            adapted = {
                seed: one["test_after" if one["kept"] else "test_before"]
                for seed, one in figures.items()
            }
            yield _row(f"{name}, then adapted", disclosed, adapted, own, runs)


def _row(
    name: str,
    disclosed: float,
    tests: dict[int, dict[str, float]],
    auxiliary: list[float],
    runs: Runs,
) -> Measured:
    def gain(seed: int, loss: float) -> float:
        nothing = runs[NOTHING][seed].loss
        return (nothing - loss) / (nothing - runs[CEILING][seed].loss)

    ends = {NOTHING, CEILING} <= runs.keys()
    return Measured(
        name=name,
        disclosed=disclosed,
        scores=[100 * test[_score(test)] for test in tests.values()],
        losses=[test["answer_loss"] for test in tests.values()],
        gains=[100 * gain(seed, test["answer_loss"]) for seed, test in tests.items() if ends],
        auxiliary=auxiliary,
    )


def _score(test: dict[str, float]) -> str:
    return "exact_match" if "exact_match" in test else "accuracy"


def draw(rows: list[Measured], path: Path) -> None:
    """Gain against disclosure; a curve through the best of each kind of messenger."""
    matplotlib.rcParams.update({"svg.hashsalt": "fedsp", "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    kinds = {
        f"{label}{', then adapted' if adapted else ''}": [
            row for row in rows if row.name.startswith(start) and row.adapted == adapted
        ]
        for label, start in KINDS.items()
        for adapted in (False, True)
    }
    kinds = {label: some for label, some in kinds.items() if some}
    for number, (label, some) in enumerate(kinds.items()):
        best: dict[float, float] = {}
        for row in some:
            share, gain = 100 * row.disclosed, statistics.fmean(row.gains)
            best[share] = max(best.get(share, 0.0), gain)
            axes.plot(share, gain, "o", color=f"C{number}")
            axes.annotate(
                row.name.removeprefix("adapter, ")
                .removeprefix(f"{ALL}, ")
                .removesuffix(", then adapted"),
                (share, gain),
                xytext=(6, 3 if row.adapted else -4),
                textcoords="offset points",
                fontsize=7,
            )
        axes.plot(*zip(*sorted(best.items()), strict=True), color=f"C{number}", label=label)
    axes.axvline(35, linestyle=":", color="grey")
    axes.axhline(90, linestyle=":", color="grey")
    axes.set(
        xlabel="of the global model disclosed bit for bit, %",
        ylabel="gain, % of LoRA in the whole model",
        xlim=(-2, 65),
        ylim=(0, 105),
    )
    axes.legend(loc="lower left")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--adapt", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    for number, section in enumerate(read_results([given.study]).sections):
        runs: Runs = {}
        for run in (run for line in section.lines for run in line.all):
            if not run.config.round.only:
                runs.setdefault(run.method, {})[run.seed] = run
        if {NOTHING, CEILING} <= runs.keys():
            known = runs[CEILING].keys() & runs[NOTHING].keys()
            runs = {
                name: {seed: some[seed] for seed in known & some.keys()}
                for name, some in runs.items()
            }
        if given.adapt and number == 0:
            adapt(runs, given.adapt)
        rows = list(measured(runs))
        print(f"\n{section.title}\n")
        print("| what travels | disclosed bit for bit | score | answer loss | gain | learned |")
        print("|---|---|---|---|---|---|")
        for row in rows:
            figures = f"{mean(row.scores, '.1f')} % | {mean(row.losses, '.3f')}"
            learned = mean(row.auxiliary, ".3f") if row.auxiliary else "-"
            gain = f"{mean(row.gains, '.0f')} %" if row.gains else "-"
            print(f"| {row.name} | {row.disclosed:.1%} | {figures} | {gain} | {learned} |")
        if given.figure and number == 0:
            draw([row for row in rows if not row.name.startswith("LoRA")], given.figure)


if __name__ == "__main__":
    main()
