"""`fedsp report`: one self-contained page, and the same tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from fedsp.audit.findings import found_tables
from fedsp.audit.summary import account
from fedsp.errors import RunError
from fedsp.experiments.run_directory import STATEMENT
from fedsp.report.collect import Line, Results, Section, read_results
from fedsp.report.figures import against, bars, clients, depths, learning_curves
from fedsp.report.finished_run import Run
from fedsp.report.tables import PRIVACY, Entry, Table, section_tables
from fedsp.storage import write_bytes

PAGE = "report.html"


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
    tables = [section_tables(section) for section in results.sections]
    audited = audited_runs(results)
    write_bytes(output / PAGE, page(results, tables, audited).encode())
    write_bytes(output / "report.md", _markdown(results, tables, audited).encode())
    write_bytes(output / "report.tex", _latex(results, tables).encode())
    for old in (output / "csv").glob("*.csv"):
        old.unlink()
    write_bytes(output / "csv" / "runs.csv", _csv(_run_rows(results)))
    for number, shown in enumerate(tables, start=1):
        for table in shown:
            write_bytes(output / "csv" / f"{number}-{table.name}.csv", _csv(_entry_rows(table)))
    return {
        "page": str(output / PAGE),
        "runs": len(results.runs),
        "sections": len(results.sections),
        "missing": sum(len(section.missing) for section in results.sections),
        "failed": len(results.failures),
    }


def _pictures(section: Section) -> list[tuple[str, Markup]]:
    """The drawings of a section, each below its heading."""
    loss = (lambda run: run.loss, "answer loss, nats")
    accuracy = (lambda run: 100 * run.score, "accuracy, %")
    sent = (lambda run: run.bytes, "bytes, all messages and packages")
    computed = (lambda run: run.client_operations, "operations of all clients")
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
    return [(title, Markup(svg)) for title, svg in drawn if svg]


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
    made_with = (run.about["versions"].get("commit", "unknown") for run in results.runs.values())
    # as people write them; the + of a changed checkout stays
    commits = sorted({commit[:12] + "+" * commit.endswith("+") for commit in made_with})
    return environment.get_template("report.html").render(
        title=_title(results),
        commits=f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}",
        sections=[
            _section(number, section, shown, results)
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


def _section(
    number: int, section: Section, tables: Sequence[Table], results: Results
) -> dict[str, Any]:
    anchors = {
        id(line): f"section-{number}-line-{place}" for place, line in enumerate(section.lines)
    }
    shown = []
    for table in tables:
        best = _best(table)
        rows = [
            [_cell(entry, anchors[id(line)], id(entry) in best, results) for entry in row]
            for line, row in zip(table.lines, table.rows, strict=True)
        ]
        shown.append(vars(table) | {"rows": rows})
    return {
        "title": section.title,
        "text": section.text,
        "missing": len(section.missing),
        "tables": shown,
        "lines": [_line(line, anchors[id(line)]) for line in section.lines],
        "pictures": _pictures(section),
    }


def _cell(entry: Entry, anchor: str, best: bool, results: Results) -> dict[str, str]:
    """An entry as the page shows it: its text, its CSS class, where it leads (to its run, or to the
    list of the runs of its line), and the tooltip: its runs."""
    words = entry.value is None and len(entry.text) > 3 and not entry.runs
    several = len(entry.runs) > 1
    named = [results.runs[key].name for key in entry.runs[:3]] + ["..."] * (len(entry.runs) > 3)
    return {
        "text": entry.text,
        "kind": "best" if best else "words" if words else "",
        "link": anchor if several else "".join(entry.runs),
        "hint": f"{len(entry.runs)} run{'s' if several else ''}: {'; '.join(named)}",
    }


def audited_runs(results: Results) -> list[dict[str, Any]]:
    """For each run with audits or a privacy statement: its account, and its audits' findings as
    text tables."""
    audited = []
    for run in results.runs.values():
        found = found_tables(run.folder)
        if found or (run.folder / STATEMENT).exists():
            tables = [
                (
                    f"{name}: {finding.title}",
                    list(finding.rows[0]),
                    [list(row.values()) for row in finding.rows],
                    finding.note,
                )
                for name, findings in found.items()
                for finding in findings
            ]
            about = {"key": run.key, "name": run.name, "account": account(run.folder)}
            audited.append({**about, "tables": tables})
    return audited


def _best(table: Table) -> frozenset[int]:
    """The best entries of each column of a table of scores: all that read like the best."""
    if table.name not in ("accuracy", "answer_loss"):
        return frozenset()
    best = max if table.name == "accuracy" else min
    found = set()
    for place, column in enumerate(table.columns):
        entries = [row[place] for row in table.rows if row[place].value is not None]
        if len(entries) > 1 and column not in PRIVACY:
            shown = best(entries, key=lambda entry: entry.value or 0.0).text
            found |= {id(entry) for entry in entries if entry.text == shown}
    return frozenset(found)


def _line(line: Line, anchor: str) -> dict[str, Any]:
    """The runs of a line, for the list that its numbers lead to."""
    entry = line.all[0].entry if line.all else None
    return {
        "anchor": anchor,
        "label": line.label,
        "paper": f"{entry.title}: {entry.paper}" if entry else "",
        "runs": [(run.key, f"{run.task}, seed {run.seed}") for run in line.all],
    }


def _run(run: Run, results: Results) -> dict[str, Any]:
    figures = run.figures
    versions = dict(run.about["versions"])
    # the address of tracking may hold a password
    shown = run.config.model_dump(exclude_none=True, exclude_defaults=True, exclude={"tracking"})
    return {
        "key": run.key,
        "name": run.name,
        "folder": run.folder.name,
        "seed": run.seed,
        "commit": versions.pop("commit", "unknown"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "figures": [
            *((f"test: {name}", f"{value:.5g}") for name, value in figures["test"].items()),
            *(
                (f"test through the auxiliary model: {name}", f"{value:.5g}")
                for name, value in figures.get("auxiliary_test", {}).items()
            ),
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
        "toml": tomli_w.dumps(shown),
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
            rows = ([entry.text for entry in row] for row in table.rows)
            lines += _markdown_table(table.title, table.columns, rows, table.note)
    for one in audited:
        lines += [
            f"## Audits: {one['name']}",
            "",
            *(f"- **{row['question']}** {row['answer']}" for row in one["account"].rows),
            "",
            one["account"].note,
            "",
        ]
        for table in one["tables"]:
            lines += _markdown_table(*table)
    return "\n".join(lines)


def _markdown_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], note: str
) -> list[str]:
    return [
        f"### {title}",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows),
        "",
        *([note, ""] if note else []),
    ]


def _csv(rows: Iterable[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


def _entry_rows(table: Table) -> Iterable[list[str]]:
    """Every column twice: as it is shown, and its number."""
    names = [name for column in table.columns for name in (column, f"{column.strip()}, number")]
    yield [*names, "runs"]
    for row in table.rows:
        numbers = ("" if entry.value is None else repr(entry.value) for entry in row)
        shown = zip((entry.text for entry in row), numbers, strict=True)
        keys = dict.fromkeys(key for entry in row for key in entry.runs)
        yield [*(text for pair in shown for text in pair), " ".join(keys)]


def _run_rows(results: Results) -> Iterable[list[object]]:
    """What each key of the other files stands for."""
    where = ["method", "choice", "task", "model", "partition", "seed"]
    yield ["run", "folder", *where, "commit"]
    for run in results.runs.values():
        commit = run.about["versions"].get("commit", "unknown")
        yield [run.key, run.folder.name, *(getattr(run, name) for name in where), commit]


_TEX = str.maketrans(
    {letter: f"\\{letter}" for letter in "&%_#${}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"±": r"$\pm$", "<": "$<$", ">": "$>$"}
)


def _tex(text: str) -> str:
    return text.translate(_TEX)


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
