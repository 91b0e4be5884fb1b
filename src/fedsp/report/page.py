"""`fedsp report`: one self-contained page, and the same tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from fedsp.audit.findings import found_tables
from fedsp.audit.summary import account
from fedsp.errors import RunError
from fedsp.experiments.privacy_statement import STATEMENT
from fedsp.federation.methods.registry import find_method
from fedsp.report.collect import Line, Results, Section, read_results
from fedsp.report.figures import against, bars, clients, depths, learning_curves
from fedsp.report.finished_run import Run
from fedsp.report.tables import (
    PRIVACY,
    Entry,
    Table,
    comparison_table,
    cost_table,
    heterogeneity_table,
    score_table,
    stability_table,
)
from fedsp.storage import write_bytes

PAGE = "report.html"


@dataclass(frozen=True)
class Picture:
    """A drawing and its heading."""

    title: str
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class TableView:
    """A table as the page shows it: which entries are the best of their column, and which are
    words."""

    table: Table
    best: frozenset[int]
    hints: dict[str, str]
    anchor: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)

    def kind(self, entry: Entry) -> str:
        """The entry's CSS class on the page."""
        return (
            "best"
            if id(entry) in self.best
            else "words"
            if entry.value is None and len(entry.text) > 3 and not entry.runs
            else ""
        )

    def link(self, entry: Entry, row: int, lines: Sequence[Mapping[str, Any]]) -> str:
        """Where an entry leads: to its run, or to the list of the runs of its line."""
        if len(entry.runs) == 1:
            return f"#{entry.runs[0]}"
        return next(
            f"#{line['anchor']}" for line in lines if line["label"] == self.table.lines[row]
        )

    def hint(self, entry: Entry) -> str:
        """The tooltip of an entry: its runs."""
        named = [self.hints[key] for key in entry.runs[:3]]
        return (
            f"{len(entry.runs)} run{'s' if len(entry.runs) > 1 else ''}: "
            + "; ".join(named)
            + ("; ..." if len(entry.runs) > 3 else "")
        )


def write_report(folders: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """Read the finished runs of studies, or below any folders, and write the report; returns the
    files and what is missing.

    Raises:
        RunError: there is no finished run, or the output is a file.
        StorageError: the disk did not take it.
    """
    output = Path(output)
    if output.is_file():
        raise RunError(f"{output} is a file: give a folder")
    results = read_results([Path(folder) for folder in folders])
    tables = [section_tables(section, results) for section in results.sections]
    audited = audited_runs(results)
    write_bytes(output / PAGE, page(results, tables, audited).encode())
    write_bytes(output / "report.md", _markdown(results, tables, audited).encode())
    write_bytes(output / "report.tex", _latex(results, tables).encode())
    for old in (output / "csv").glob("*.csv"):
        old.unlink()
    write_bytes(output / "csv" / "runs.csv", _runs_csv(results).encode())
    for number, shown in enumerate(tables, start=1):
        for table in shown:
            write_bytes(output / "csv" / f"{number}-{table.name}.csv", _csv(table).encode())
    return {
        "page": str(output / PAGE),
        "runs": len(results.runs),
        "sections": len(results.sections),
        "missing": sum(len(section.missing) for section in results.sections),
        "failed": len(results.failures),
    }


def section_tables(section: Section, results: Results) -> list[Table]:
    """All tables of a section, in the order in which they are read."""
    tables = [
        score_table(section, "accuracy"),
        score_table(section, "answer_loss"),
        comparison_table(section),
        cost_table(section),
    ]
    return [
        table
        for table in [*tables, heterogeneity_table(section), stability_table(section)]
        if table is not None
    ]


def _pictures(section: Section) -> list[Picture]:
    loss, accuracy = (
        (lambda run: run.loss, "answer loss, nats"),
        (
            lambda run: 100 * run.score,
            "accuracy, %",
        ),
    )
    sent, computed = (
        (lambda run: run.bytes, "bytes, all messages and packages"),
        (
            lambda run: run.client_operations,
            "operations of all clients",
        ),
    )
    compared = [
        ("Answer loss, mean over tasks", bars(section)),
        ("Accuracy against bytes sent", against(section, *sent, *accuracy)),
        ("Answer loss against bytes sent", against(section, *sent, *loss)),
        ("Accuracy against the clients' computing", against(section, *computed, *accuracy)),
        ("Answer loss against the clients' computing", against(section, *computed, *loss)),
    ]
    drawn = [
        ("Learning curves", learning_curves(section)),
        *(compared if len(section.lines) > 1 else []),
        ("Accuracy by client", clients(section)),
        ("Signals along the auxiliary model's depths", depths(section)),
    ]
    return [Picture(title, Markup(svg)) for title, svg in drawn if svg]


def page(
    results: Results, tables: Sequence[Sequence[Table]], audited: Sequence[Mapping[str, Any]]
) -> str:
    """The page: no script but one line, no font, no image from elsewhere."""
    environment = Environment(
        loader=PackageLoader("fedsp.report"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    hints = {key: run.name for key, run in results.runs.items()}
    commits = sorted(
        {_short(run.about["versions"].get("commit", "unknown")) for run in results.runs.values()}
    )
    return environment.get_template("report.html").render(
        title=_title(results),
        commits=f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}",
        sections=[
            {
                "title": section.title,
                "text": section.text,
                "missing": len(section.missing),
                "tables": [
                    TableView(
                        table=table,
                        best=_best(table),
                        hints=hints,
                        anchor=f"section-{number}-line-",
                    )
                    for table in shown
                ],
                "lines": [
                    _line(line, f"section-{number}-line-{place}")
                    for place, line in enumerate(section.lines)
                ],
                "pictures": _pictures(section),
            }
            for number, (section, shown) in enumerate(
                zip(results.sections, tables, strict=True), start=1
            )
        ],
        audits=audited,
        failures=results.failures,
        runs=[_run(run, results) for run in results.runs.values()],
    )


def _title(results: Results) -> str:
    return f"{'Run' if len(results.runs) == 1 else 'Study'}: {results.name}"


def audited_runs(results: Results) -> list[dict[str, Any]]:
    """For each run with audits or a privacy statement: its account, and its audits' findings as
    text tables."""
    audited = []
    for run in results.runs.values():
        tables = [
            (f"{name}: {finding.title}", finding)
            for name, some in found_tables(run.folder).items()
            for finding in some
        ]
        if tables or (run.folder / STATEMENT).exists():
            account_of_run = account(run.folder)
            audited.append(
                {
                    "key": run.key,
                    "name": run.name,
                    "account": account_of_run,
                    "tables": [
                        (
                            title,
                            list(found.rows[0]),
                            [list(row.values()) for row in found.rows],
                            found.note,
                        )
                        for title, found in tables
                    ],
                }
            )
    return audited


def _best(table: Table) -> frozenset[int]:
    """The best entry of each column of a table of scores."""
    if table.name not in ("accuracy", "answer_loss"):
        return frozenset()
    best = max if table.name == "accuracy" else min
    found = set()
    for place, column in enumerate(table.columns):
        entries = [row[place] for row in table.rows if row[place].value is not None]
        if len(entries) > 1 and column not in PRIVACY:
            found.add(id(best(entries, key=lambda entry: entry.value or 0.0)))
    return frozenset(found)


def _line(line: Line, anchor: str) -> dict[str, Any]:
    """The runs of a line, for the list that its numbers lead to."""
    paper = find_method(line.all[0].config.method) if line.all else None
    runs = [(run.key, f"{run.task}, seed {run.seed}") for run in line.all]
    return {
        "anchor": anchor,
        "label": line.label,
        "paper": f"{paper.title}: {paper.paper}" if paper else "",
        "runs": runs,
    }


def _short(commit: str) -> str:
    """A commit as people write it; the + of a changed checkout stays."""
    return commit[:12] + ("+" if commit.endswith("+") else "")


def _run(run: Run, results: Results) -> dict[str, Any]:
    figures = run.figures
    versions = dict(run.about["versions"])
    return {
        "key": run.key,
        "name": run.name,
        "folder": run.folder.name,
        "seed": run.seed,
        "commit": versions.pop("commit", "unknown"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "figures": [
            *((f"test: {name}", f"{value:.5g}") for name, value in figures["test"].items()),
            ("validation loss", figures["validation_loss"]),
            ("best round", figures["best_round"]),
            ("bytes, down and up", f"{figures['bytes_down']:,}, {figures['bytes_up']:,}"),
            ("seconds", f"{figures['seconds']:.1f}"),
        ],
        "others": [
            (other.key, other.seed)
            for other in results.runs.values()
            if other is not run and other.cell == run.cell
        ],
        "toml": tomli_w.dumps(
            run.config.model_dump(exclude_none=True, exclude_defaults=True, exclude={"tracking"})
        ),  # its address may hold a password
    }


def _markdown(
    results: Results, tables: Sequence[Sequence[Table]], audited: Sequence[Mapping[str, Any]]
) -> str:
    lines = [f"# {_title(results)}", ""]
    for section, shown in zip(results.sections, tables, strict=True):
        lines += [f"## {section.title}", "", *([section.text, ""] if section.text else [])]
        if section.missing:
            lines += [f"{len(section.missing)} cells have no finished run yet.", ""]
        for table in shown:
            lines += [
                f"### {table.title}",
                "",
                "| " + " | ".join(table.columns) + " |",
                "|---" * len(table.columns) + "|",
            ]
            lines += [
                "| " + " | ".join(entry.text.replace("|", "\\|") for entry in row) + " |"
                for row in table.rows
            ]
            lines += ["", *([table.note, ""] if table.note else [])]
    for one in audited:
        lines += [
            f"## Audits: {one['name']}",
            "",
            *(f"- **{row['question']}** {row['answer']}" for row in one["account"].rows),
            "",
            one["account"].note,
            "",
        ]
        for title, columns, rows, note in one["tables"]:
            lines += [
                f"### {title}",
                "",
                "| " + " | ".join(columns) + " |",
                "|---" * len(columns) + "|",
            ]
            lines += [
                *(
                    "| " + " | ".join(str(value).replace("|", "\\|") for value in row) + " |"
                    for row in rows
                ),
                "",
                *([note, ""] if note else []),
            ]
    return "\n".join(lines)


def _csv(table: Table) -> str:
    """Every column twice: as it is shown, and its number."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [name for column in table.columns for name in (column, f"{column.strip()}, number")]
        + ["runs"]
    )
    for row in table.rows:
        keys = dict.fromkeys(key for entry in row for key in entry.runs)
        writer.writerow(
            [
                value
                for entry in row
                for value in (entry.text, "" if entry.value is None else repr(entry.value))
            ]
            + [" ".join(keys)]
        )
    return buffer.getvalue()


def _runs_csv(results: Results) -> str:
    """What each key of the other files stands for."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["run", "folder", "method", "choice", "task", "model", "partition", "seed", "commit"]
    )
    for run in results.runs.values():
        where = [run.method, run.choice, run.task, run.model, run.partition, run.seed]
        writer.writerow(
            [run.key, run.folder.name, *where, run.about["versions"].get("commit", "unknown")]
        )
    return buffer.getvalue()


_TEX = {
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "<": "$<$",
    ">": "$>$",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def _latex(results: Results, tables: Sequence[Sequence[Table]]) -> str:
    """Tables for `booktabs`."""
    lines = ["% \\usepackage{booktabs}"]
    for section, shown in zip(results.sections, tables, strict=True):
        for table in shown:
            lines += [
                "\\begin{table}",
                f"\\caption{{{_tex(section.title)}: {_tex(table.title)}. {_tex(table.note)}}}",
                f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
                "\\toprule",
                " & ".join(_tex(column) for column in table.columns) + r" \\",
                "\\midrule",
                *(" & ".join(_tex(entry.text) for entry in row) + r" \\" for row in table.rows),
                "\\bottomrule",
                "\\end{tabular}",
                "\\end{table}",
                "",
            ]
    return "\n".join(lines)
