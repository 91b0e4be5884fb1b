"""The audits of a finished run, by name: what each needs, what it measures and leaves in a file of
the run's folder, and the tables that people read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsp.audit.epsilon import audit_epsilon, check_promise
from fedsp.audit.findings import TABLES, Figures, Finding
from fedsp.audit.inversion.audit import audit_inversion, check_inversion
from fedsp.audit.layer_signals import check_depths, measure_depths
from fedsp.audit.membership import audit_membership, check_membership
from fedsp.audit.package_leakage import audit_model, measure_disclosure
from fedsp.audit.shadows import Options, check_audited, check_prompt
from fedsp.audit.summary import account
from fedsp.audit.traffic import traffic
from fedsp.audit.trap import audit_trap
from fedsp.errors import ConfigurationError, RunError, did_you_mean
from fedsp.experiments.run_directory import RunDirectory
from fedsp.storage import write_json


@dataclass(frozen=True)
class Audit:
    """An audit: its measurement, the tables of its figures, the check of its preconditions, and
    whether its figures are kept in a file of the run's folder."""

    measure: Callable[[Path, Options], Figures]
    tables: Callable[[Figures], list[Finding]]
    check: Callable[[RunDirectory, Options], object] = lambda run, options: run.result()
    kept: bool = True


def audit_runs(
    folders: Sequence[Path],
    only: str | None,
    options: Options,
    show: Callable[[Finding], None],
) -> tuple[dict[str, Figures], str]:
    """Audit finished runs, all of them checked before any work, and give an account of each; `show`
    gets every table as soon as it is known.

    Returns the figures by folder and audit, and the first reason why something was not done that
    was asked for, or nothing. Raises what `check` raises.
    """
    wanted = {folder: check(folder, only, options) for folder in folders}
    found: dict[str, Figures] = {}
    refused = []
    for folder, names in wanted.items():
        figures = audit(folder, names, options)
        for name, some in figures.items():
            for finding in findings(name, some):
                show(replace(finding, title=f"{folder}, {name}: {finding.title}"))
        refused.append(refusal(figures, only))
        found[str(folder)] = dict(figures)
        if not RunDirectory.open(folder).finished:
            continue
        try:
            account_of_run = account(folder)
        # a damaged file of an earlier audit must not cost what was found now
        except RunError as error:
            refused.append(str(error))
            continue
        show(replace(account_of_run, title=f"{folder}: {account_of_run.title}"))
        found[str(folder)] = {
            "account": {row["question"]: row["answer"] for row in account_of_run.rows},
            **figures,
        }
    return found, next(filter(None, refused), "")


def check(folder: Path, only: str | None, options: Options) -> dict[str, str]:
    """The audits to do on a run: those named in `only`, or all that tell who learns what. To each
    the reason why this run does not allow it, or nothing.

    Raises:
        ConfigurationError: there is no audit of that name, or an option or a library is not as it
            needs.
        RunError: the run is not finished, or one that was named, or all, are not for it.
    """
    run = RunDirectory.open(folder)
    usual = [
        "disclosure",
        "model",
        "membership",
        "inversion",
        "trap",
        *(["epsilon"] if run.config.privacy.unit != "none" else []),
    ]
    names = usual if only is None else [name.strip() for name in only.split(",") if name.strip()]
    unknown = next((name for name in names if name not in AUDITS), None)
    if unknown is not None or not names:
        unknown = unknown or ""
        known = did_you_mean(unknown, AUDITS) or f"; known: {', '.join(AUDITS)}"
        raise ConfigurationError(f"--only: there is no audit {unknown!r}{known}")
    refused: dict[str, RunError] = {}
    for name in names:
        try:
            AUDITS[name].check(run, options)
        except RunError as error:
            refused[name] = error
    if refused and (only is not None or len(refused) == len(names)):
        raise next(iter(refused.values()))
    return {name: str(refused.get(name, "")) for name in names}


def audit(folder: Path, names: dict[str, str], options: Options) -> dict[str, Figures]:
    """The figures of these audits by name, each written to a file of that name in the run's folder;
    `not_done` and why of one that this run, once opened, does not allow."""
    found: dict[str, Figures] = {}
    for name, why in names.items():
        try:
            found[name] = {"not_done": why} if why else AUDITS[name].measure(folder, options)
        except RunError as error:
            found[name] = {"not_done": str(error)}
        if AUDITS[name].kept and "not_done" not in found[name]:
            write_json(folder / f"{name}.json", found[name])
    return found


def refusal(found: dict[str, Figures], only: str | None) -> str:
    """Why audits were not done that were asked for by name, or none at all; empty where all is
    well."""
    reasons = [figures["not_done"] for figures in found.values() if "not_done" in figures]
    return reasons[0] if reasons and (only is not None or len(reasons) == len(found)) else ""


def findings(name: str, figures: Figures) -> list[Finding]:
    """An audit's figures as tables."""
    if "not_done" in figures:
        return [Finding("not done", [{"why": figures["not_done"]}])]
    return AUDITS[name].tables(figures)


AUDITS: dict[str, Audit] = {
    "traffic": Audit(
        lambda folder, _: {"messages": traffic(folder)},
        lambda figures: [Finding("messages", figures["messages"])],
        lambda run, _: traffic(run.path),
        kept=False,
    ),
    "depths": Audit(
        lambda folder, _: {"rows": measure_depths(folder)},
        lambda figures: [Finding("signals along the auxiliary model", figures["rows"])],
        lambda run, _: check_depths(run),
    ),
    "disclosure": Audit(lambda folder, _: measure_disclosure(folder), TABLES["disclosure"]),
    "model": Audit(audit_model, TABLES["model"], lambda run, _: check_audited(run)),
    "membership": Audit(audit_membership, TABLES["membership"], check_membership),
    "inversion": Audit(audit_inversion, TABLES["inversion"], lambda run, _: check_inversion(run)),
    "trap": Audit(audit_trap, TABLES["trap"], lambda run, _: check_prompt(run)),
    "epsilon": Audit(audit_epsilon, TABLES["epsilon"], lambda run, _: check_promise(run)),
}
