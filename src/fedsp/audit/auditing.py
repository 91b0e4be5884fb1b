"""The audits of a finished run, by name: each writes a file of its own into the run's folder, and gives tables for people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedsp.audit.depths import measure_depths
from fedsp.audit.disclosure import measure_disclosure
from fedsp.audit.inverting import audit_inversion
from fedsp.audit.membership import audit_membership
from fedsp.audit.model import audit_model
from fedsp.audit.promise import audit_epsilon
from fedsp.audit.tables import Tables, epsilon_tables, inversion_tables, membership_tables, model_tables
from fedsp.commands import traffic
from fedsp.errors import ConfigurationError, RunError, did_you_mean
from fedsp.runs import RunDirectory
from fedsp.server import Watcher


@dataclass(frozen=True)
class Options:
    """How thorough: shadow runs of the membership audit, records that it looks at (None: all), and single texts of the inversion audit."""

    shadows: int = 16
    records: int | None = None
    texts: int = 20


def audit(
    folder: Path, *, only: str | None = None, shadows: int = 16, records: int | None = None, texts: int = 20, watcher: Watcher | None = None
) -> dict[str, Tables]:
    """Run audits of a finished run: those named in `only`, or all that the run allows, and then a sentence for each that it does not.

    Raises:
        ConfigurationError: there is no audit of that name.
        RunError: the run is not finished, or an audit is not for it.
    """
    run = RunDirectory.open(folder)
    private = run.config.privacy.unit != "none"
    names = [name.strip() for name in only.split(",")] if only else ["disclosure", "model", "membership", "inversion", *(["epsilon"] if private else [])]
    unknown = next((name for name in names if name not in AUDITS), None)
    if unknown is not None:
        raise ConfigurationError(f"--only: there is no audit {unknown!r}{did_you_mean(unknown, AUDITS) or '; known: ' + ', '.join(AUDITS)}")
    found: dict[str, Tables] = {}
    refusals: list[RunError] = []
    for name in names:
        try:
            found[name] = AUDITS[name](folder, Options(shadows, records, texts), watcher or Watcher())
        except RunError as error:  # what nobody asked for by name, and this run does not allow
            found[name] = {"not done": [{"why": str(error)}]}
            refusals.append(error)
    if refusals and (only or len(refusals) == len(names)):
        raise refusals[0]
    return found


def _membership(folder: Path, options: Options, watcher: Watcher) -> Tables:
    return membership_tables(audit_membership(folder, shadows=options.shadows, most=options.records, watcher=watcher))


AUDITS: dict[str, Callable[[Path, Options, Watcher], Tables]] = {
    "traffic": lambda folder, options, watcher: {"messages": traffic(folder)},
    "disclosure": lambda folder, options, watcher: {"shares of the global model's parameters that clients hold": [dict(measure_disclosure(folder))]},
    "depths": lambda folder, options, watcher: {"signals along the auxiliary model": measure_depths(folder)},
    "model": lambda folder, options, watcher: model_tables(audit_model(folder, watcher=watcher)),
    "membership": _membership,
    "inversion": lambda folder, options, watcher: inversion_tables(audit_inversion(folder, examples=options.texts, watcher=watcher)),
    "epsilon": lambda folder, options, watcher: epsilon_tables(audit_epsilon(folder, watcher=watcher)),
}
