"""The model card of what is exported (M. Mitchell et al. *Model Cards for Model Reporting*. FAT*
2019. https://arxiv.org/abs/1810.03993): what it is, who took part, what was measured and what was
not, from the run's folder alone. It claims nothing that was not measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsp.audit.findings import Finding, found_tables
from fedsp.config import RunConfig
from fedsp.config_file import read_members
from fedsp.errors import ConfigurationError
from fedsp.experiments.run_directory import STATEMENT, RunDirectory, read_json, trained_rounds
from fedsp.federation.methods.registry import find_method

MEASURES = {
    "accuracy": "accuracy",
    "accuracy_norm": "accuracy by length",
    "exact_match": "exact match",
    "macro_f1": "macro F1",
    "answer_loss": "answer loss, nats per token",
}
"""What a card tells of the test questions, by its name in `result.json`."""

SHARES = ("accuracy", "accuracy_norm", "exact_match", "macro_f1")


def model_card(
    run: RunDirectory, *, kind: str, base_model: str, use: str, library: str = "peft"
) -> str:
    """The card of a run's messenger as Markdown with the metadata of the Hugging Face hub
    (https://huggingface.co/docs/hub/model-cards).

    kind: what the folder holds, in words. use: how it is loaded, as Python code, by the `library`.
    """
    head = {
        "base_model": base_model,
        "library_name": library,
        "tags": ["fedsp", "federated-learning"],
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in head.items()),
        "---",
        f"# {run.path.resolve().name}: {kind} of {base_model}",
        "",
        f"Tuned with fedsp {_version(run)} (run {run.identity}); written by `fedsp export`.",
        "",
        "## How it was made",
        "",
        *_table(("", ""), _made(run)),
        "",
        "## What it does",
        "",
        *_figures(run),
        "",
        "## What others may learn of the text and of the model",
        "",
        *_told(run),
        "",
        "## Limits",
        "",
        "- What was tuned may hold words of the text that it was tuned on, unless a promise above"
        " says otherwise; whoever has it can look for them.",
        "- Nothing was measured but what stands here: not bias, not safety, no other task, and no"
        " other language.",
        "- The base model's licence holds for what is made of it; what the parties have agreed upon"
        " among themselves is not known to fedsp.",
        "",
        "## Use",
        "",
        "```python",
        use.strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _version(run: RunDirectory) -> str:
    return str(run.about()["versions"].get("fedsp", "of an unknown version"))


def _made(run: RunDirectory) -> Iterable[tuple[str, Any]]:
    config, records = run.config, run.records()
    entry = find_method(config.method)
    yield "method", f"{entry.title} ({entry.paper})" if entry.paper else entry.title
    alone = not config.asks_clients
    answered = {client for record in records for client in record["answered"]}
    if not entry.rounds:
        yield "clients", "none: nothing was tuned"
    elif alone:
        yield "clients", "none: the owner of the model tuned it alone"
    elif config.privacy.unit == "client":
        yield "clients", "not told, since each is promised privacy"
    else:
        asked = {client for record in records for client in record["asked"]}
        yield "clients", f"{len(answered)} of {len(asked)} that were asked answered"
    clients = (run.partition() or {}).get("clients", {})
    held = [len(rows) for client, rows in clients.items() if client in answered]
    if held and config.privacy.unit == "none":
        yield "clients' examples", f"{sum(held)} in all, {min(held)} to {max(held)} each"
    yield "clients hold", "nothing" if alone else entry.clients_hold
    if config.data.task_column:
        tasks = run.result().get("tasks", {}) if run.finished else {}
        yield "tasks", ", ".join(tasks) or f"those that the column {config.data.task_column} names"
    else:
        yield "task", config.data.task
    yield "the parties' descriptions of their text", _described(config)
    if entry.rounds:
        yield "rounds", f"{len(trained_rounds(records))} of {config.round.rounds}"
        yield "server's steps a round", config.server.steps
    yield "seed", config.seed


def _described(config: RunConfig) -> str:
    """What each party said of its text, each once and without its name; nothing of single clients
    is told at client level."""
    if not config.federation:
        return "none was given"
    if config.privacy.unit == "client":
        return "not told, since the run promises to tell nothing of single clients"
    try:
        members = read_members(Path(config.federation.folder)).values()
    except ConfigurationError:
        return "not known here: the server's register is elsewhere"
    told = sorted({member.about for member in members if member.about})
    return "; ".join(told) or "none was given"


def _figures(run: RunDirectory) -> Iterable[str]:
    if not run.finished:
        yield "The run is not finished: nothing was measured on test questions."
        return
    result = run.result()
    if "test" not in result:
        yield "There were no test questions: nothing was measured."
        return
    test, untuned = result["test"], result.get("zero_shot") or {}
    if not find_method(run.config.method).rounds:
        test, untuned = {"examples": test["examples"]}, test
    yield f"Measured once, on {int(test['examples'])} test questions, with one seed."
    yield ""
    yield from _table(
        ("", "base model", "tuned"),
        (
            (words, _shown(name, untuned), _shown(name, test))
            for name, words in MEASURES.items()
            if name in test or name in untuned
        ),
    )


def _shown(name: str, figures: Mapping[str, Any]) -> str:
    if name not in figures:
        return "not measured"
    return f"{figures[name]:.1%}" if name in SHARES else f"{figures[name]:.3f}"


def _told(run: RunDirectory) -> Iterable[str]:
    if run.finished:
        share = run.result()["disclosed_share"]
        yield f"- Clients held {share:.1%} of the global model's parameters bit for bit."
    if (run.path / STATEMENT).exists():
        promise = read_json(run.path / STATEMENT)
        epsilon = promise["epsilon"]
        spent = "that only its own ledger knows" if epsilon is None else f"{epsilon:.3g}"
        yield (
            f"- Differential privacy for each {promise['unit']}: epsilon {spent} at delta"
            f" {promise['delta']:.3g}. Not covered: {'; '.join(promise['not_covered'])}."
        )
    else:
        yield "- No differential privacy: nothing is promised about single examples or clients."
    tables = found_tables(run.path)
    if not tables:
        yield "- No audit was made of this run (`fedsp audit RUN` makes them)."
    for name, findings in tables.items():
        yield ""
        yield f"### Audit: {name}"
        for finding in findings:
            yield ""
            yield from _finding(finding)


def _finding(finding: Finding) -> Iterable[str]:
    yield f"{finding.title[:1].upper()}{finding.title[1:]}:"
    if finding.rows:
        columns = list(dict.fromkeys(key for row in finding.rows for key in row))
        yield ""
        rows = ([row.get(column, "") for column in columns] for row in finding.rows)
        yield from _table(columns, rows)
    if finding.note:
        yield ""
        yield finding.note


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterable[str]:
    yield _line(head)
    yield "|---" * len(head) + "|"
    yield from map(_line, rows)


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
