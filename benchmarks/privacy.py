"""The tables of docs/results/privacy.md, mean and spread over seeds, from the runs of a study and
what `fedsp audit` left in them.

fedsp study configs/studies/privacy.toml --root FOLDER       (profiles.toml and disclosure.toml too)
fedsp audit studies/privacy/*-P-20-*/ --only membership,inversion   (and --only model for the runs
                              of studies/disclosure with
                              clients)
python benchmarks/privacy.py studies/privacy studies/profiles studies/disclosure
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Runs = dict[str, list[Path]]


def runs_of(study: Path) -> Runs:
    """The finished runs of each method, by the name that the study gave their folders."""
    found: Runs = {}
    for path in sorted(study.glob("*-seed-*/result.json")):
        name = path.parent.name.split("-seed-")[0].split("-even-")[-1]
        found.setdefault(
            re.sub(r"epsilon-(\d+)", r"epsilon = \1", name)
            .replace("P-", "P = ")
            .replace("-epsilon", ", epsilon")
            .replace("-no-noise", ", no noise"),
            [],
        ).append(path.parent)
    return found


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(header)
    return "\n".join(
        [
            "| " + " | ".join(head) + " |",
            "|---" * len(head) + "|",
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
    )


def spread(values: Iterable[float | list[float]], form: str = "{:.3f}") -> str:
    """Mean ± standard deviation; of a figure with its interval, the figure."""
    known = [
        value[0] if isinstance(value, list) else value for value in values if value is not None
    ]
    if not known:
        return "-"
    return form.format(statistics.fmean(known)) + (
        f" ± {form.replace('+', '').format(statistics.stdev(known))}" if len(known) > 1 else ""
    )


def read(folders: list[Path], name: str) -> list[dict[str, Any]]:
    return [
        json.loads((folder / name).read_text()) for folder in folders if (folder / name).exists()
    ]


def utility(runs: Runs) -> Iterator[str]:
    def row(method: str, folders: list[Path]) -> list[str]:
        tests = [result["test"] for result in read(folders, "result.json")]
        return [
            method,
            str(len(tests)),
            spread(test["answer_loss"] for test in tests),
            spread((test["accuracy"] for test in tests), "{:.1%}"),
        ]

    yield table(
        ["method", "seeds", "answer loss, nats", "accuracy"],
        [row(*item) for item in sorted(runs.items())],
    )


def by_row(
    runs: Runs,
    name: str,
    key: Callable[[dict[str, Any]], tuple[str, ...]],
    header: list[str],
    cells: Callable[[list[dict[str, Any]]], list[str]],
    wanted: Callable[[dict[str, Any]], bool] = lambda found: True,
) -> Iterator[str]:
    """A table for each method that was audited: the rows of a file that are wanted, seeds
    together."""
    for method, folders in sorted(runs.items()):
        figures = read(folders, name)
        if figures:
            rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
            for one in figures:
                for found in filter(wanted, one["rows"]):
                    rows.setdefault(key(found), []).append(found)
            if not rows:
                continue
            yield f"**{method}**, {len(figures)} seeds\n\n" + table(
                header, [[*names, *cells(found)] for names, found in rows.items()]
            )


def membership(runs: Runs) -> Iterator[str]:
    """Means over seeds; the interval of a single run is in its `membership.json`."""

    def cells(found: list[dict[str, Any]]) -> list[str]:
        ceilings = [one["auc_ceiling"] for one in found if one["auc_ceiling"] < 1]
        hits = [one["hits_at_1"][0] for one in found if one["hits_at_1"]]
        return [
            spread(one["auc"][0] for one in found),
            spread(hits, "{:.1%}"),
            f"{max(ceilings):.3f}" if ceilings else "-",
        ]

    yield from by_row(
        runs,
        "membership.json",
        lambda found: (found["observer"], found["attack"]),
        ["who", "attack", "AUC", "members found at 1 % false alarms", "AUC at most"],
        cells,
    )


def strongest(runs: Runs) -> Iterator[str]:
    """For each method and observer: the attack with the highest mean AUC, which flatters the
    attacker."""
    rows = []
    for method, folders in sorted(runs.items()):
        figures = read(folders, "membership.json")
        found: dict[str, dict[str, list[float]]] = {}
        for one in figures:
            for row in one["rows"]:
                found.setdefault(row["observer"], {}).setdefault(row["attack"], []).append(
                    row["auc"][0]
                )
        if figures:
            best = {
                observer: max(attacks.items(), key=lambda item: statistics.fmean(item[1]))
                for observer, attacks in found.items()
            }
            observers = ("server", "server, sums", "client", "outsider")
            controls = [
                control["auc"][0] for one in figures for control in one["controls"].values()
            ]
            rows.append(
                [
                    method,
                    *(f"{spread(best[name][1])} ({best[name][0]})" for name in observers),
                    f"{min(controls):.3f} to {max(controls):.3f}",
                ]
            )
    if rows:
        yield table(["run", "server", "server, sums only", "client", "outsider", "controls"], rows)


def inversion(runs: Runs) -> Iterator[str]:
    """Single texts, by run; then what a server sees, a row for each run."""

    def cells(found: list[dict[str, Any]]) -> list[str]:
        return [
            spread((one[name] for one in found), form)
            for name, form in (
                ("tokens", "{:.0%}"),
                ("texts", "{:.0%}"),
                ("rouge", "{:.2f}"),
                ("guess", "{:.0%}"),
            )
        ]

    yield from by_row(
        runs,
        "inversion.json",
        lambda found: (found["level"], found["attack"]),
        ["what is seen", "attack", "tokens", "whole texts", "ROUGE-L", "by guessing"],
        cells,
        lambda found: not _of_a_server(found),
    )
    rows = []
    for method, folders in sorted(runs.items()):
        told = read(folders, "inversion.json")
        if told:
            seen = [[row for row in one["rows"] if _of_a_server(row)] for one in told]
            levels = [
                spread((row[number]["tokens"] for row in seen), "{:.0%}") for number in range(4)
            ]
            guesses = [
                spread((row[number]["guess"] for row in seen), "{:.0%}") for number in range(4)
            ]
            rows.append(
                [
                    method,
                    *(f"{level} ({guess})" for level, guess in zip(levels, guesses, strict=True)),
                    spread((one["candidates"]["right"] for one in told), "{:.0%}"),
                ]
            )
    if rows:
        header = [
            "run",
            "a lot, one step of SGD, span test",
            "one client, span test",
            "sum of the clients, span test",
            "one client, gradient matching",
        ]
        yield table([*header, "the right one of ten texts (10%)"], rows)


def _of_a_server(row: dict[str, Any]) -> bool:
    """Whether a level is what a server sees, or that in one step of SGD on a whole lot."""
    return bool(row["observed"]) or row["level"].startswith("a lot of ")


def trap(runs: Runs) -> Iterator[str]:
    """Words told by a package made for it, a row for each run: of a client with few examples, and
    with all that it has."""
    rows = []
    for method, folders in sorted(runs.items()):
        figures = read(folders, "trap.json")
        if figures:
            told = [
                f"{spread((one['rows'][number]['right'] for one in figures), '{:.0%}')} of"
                f" {sum(one['rows'][number]['words'] for one in figures)}"
                for number in (0, 1)
            ]
            seen = [
                f"{sum(bool(one['unusual'][which]) for one in figures)} of {len(figures)}"
                for which in ("the run's own", "the trap")
            ]
            rows.append([method, *told, *seen])
    if rows:
        sizes = next(one for folders in runs.values() for one in read(folders, "trap.json"))["rows"]
        few, everything = (f"{size['examples']:.0f} examples a client" for size in sizes)
        yield table(
            ["run", few, everything, "honest packages called unusual", "traps called unusual"], rows
        )


def model(runs: Runs) -> Iterator[str]:
    names = {
        "disclosed_share": "{:.0%}",
        "nearly_disclosed_share": "{:.0%}",
        "agreement": "{:.0%}",
        "embedding_distance_aligned": "{:.2f}",
        "embedding_cka": "{:.2f}",
        "auxiliary_perplexity": "{:.0f}",
        "kl": "{:.2f}",
        "cka": "{:.2f}",
        "federated_loss": "{:.3f}",
        "client_alone_loss": "{:.3f}",
        "gap": "{:+.3f}",
    }
    rows = []
    for method, folders in sorted(runs.items()):
        figures = read(folders, "model.json")
        if figures:
            attacker = [
                spread((min(row[key] for row in one["extraction"]) for one in figures), "{:.0f}")
                for key in ("from_package", "from_nothing")
            ]
            rows.append(
                [
                    method,
                    *(spread((one[name] for one in figures), form) for name, form in names.items()),
                    *attacker,
                ]
            )
    if rows:
        header = [
            "package",
            "bit for bit",
            "nearly",
            "same next token",
            "embeddings, after rotation",
            "embedding CKA",
            "perplexity",
            "KL, nats",
            "CKA of states",
        ]
        yield table(
            [
                *header,
                "federated prompt",
                "client alone",
                "gap",
                "attacker from the package, at best",
                "attacker from nothing, at best",
            ],
            rows,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, nargs="+", help="folders of studies")
    for study in parser.parse_args().study:
        found = runs_of(study)
        for tables in (utility, strongest, membership, inversion, trap, model):
            for one in tables(found):
                print(f"\n{study.name}, {tables.__name__}\n\n{one}")
