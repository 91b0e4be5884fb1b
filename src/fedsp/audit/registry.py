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
from fedsp.audit.shadows import check_audited
from fedsp.audit.summary import account
from fedsp.audit.traffic import traffic
from fedsp.audit.trap import audit_trap
from fedsp.errors import ConfigurationError, RunError, did_you_mean
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.callbacks import Callbacks


@dataclass(frozen=True)
class Options:
    """How thorough: shadow runs of the membership audit, records that it looks at (None: all), and
    single texts of the inversion audit."""

    shadows: int = 16
    records: int | None = None
    texts: int = 20


@dataclass(frozen=True)
class Audit:
    """An audit: its measurement, the tables of its figures, and the check of its preconditions."""

    measure: Callable[[Path, Options, Callbacks], Figures]
    tables: Callable[[Figures], list[Finding]]
    check: Callable[[RunDirectory, Options], object] = lambda run, options: run.result()


def audit_runs(
    folders: Sequence[Path],
    only: str | None,
    options: Options,
    callbacks: Callbacks,
    show: Callable[[Finding], None],
) -> tuple[dict[str, Figures], str]:
    """Audit finished runs, all of them checked before any work, and give an account of each; `show`
    gets every table as soon as it is known.

    Returns the figures by folder and audit, and the first reason why something was not done that
    was asked for, or nothing.

    Raises:
        ConfigurationError: there is no audit of that name, or an option or a library is not as it
            needs.
        RunError: a run is not finished, or one that was named, or all, are not for it.
    """
    wanted = {folder: check(folder, only, options) for folder in folders}
    found: dict[str, Figures] = {}
    refused = []
    for folder, names in wanted.items():
        figures = audit(folder, names, options, callbacks)
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


def audit(
    folder: Path, names: dict[str, str], options: Options, callbacks: Callbacks
) -> dict[str, Figures]:
    """The figures of these audits by name; `not_done` and why of one that this run, once opened,
    does not allow."""
    found: dict[str, Figures] = {}
    for name, why in names.items():
        try:
            found[name] = (
                {"not_done": why} if why else AUDITS[name].measure(folder, options, callbacks)
            )
        except RunError as error:
            found[name] = {"not_done": str(error)}
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


def _membership(run: RunDirectory, options: Options) -> None:
    check_audited(run)
    check_membership(options.shadows)


def _inversion(run: RunDirectory, options: Options) -> None:
    check_audited(run)
    check_inversion()


AUDITS: dict[str, Audit] = {
    "traffic": Audit(
        lambda folder, options, callbacks: {"messages": traffic(folder)},
        lambda figures: [Finding("messages", figures["messages"])],
        lambda run, options: traffic(run.path),
    ),
    "depths": Audit(
        lambda folder, options, callbacks: {"rows": measure_depths(folder)},
        lambda figures: [Finding("signals along the auxiliary model", figures["rows"])],
        lambda run, options: check_depths(run),
    ),
    "disclosure": Audit(
        lambda folder, options, callbacks: dict(measure_disclosure(folder)), TABLES["disclosure"]
    ),
    "model": Audit(
        lambda folder, options, callbacks: audit_model(folder, callbacks=callbacks),
        TABLES["model"],
        lambda run, options: check_audited(run),
    ),
    "membership": Audit(
        lambda folder, options, callbacks: audit_membership(
            folder, shadows=options.shadows, most=options.records, callbacks=callbacks
        ),
        TABLES["membership"],
        _membership,
    ),
    "inversion": Audit(
        lambda folder, options, callbacks: audit_inversion(
            folder, examples=options.texts, callbacks=callbacks
        ),
        TABLES["inversion"],
        _inversion,
    ),
    "trap": Audit(
        lambda folder, options, callbacks: audit_trap(folder, callbacks=callbacks),
        TABLES["trap"],
        lambda run, options: check_audited(run),
    ),
    "epsilon": Audit(
        lambda folder, options, callbacks: audit_epsilon(folder, callbacks=callbacks),
        TABLES["epsilon"],
        lambda run, options: check_promise(run),
    ),
}
