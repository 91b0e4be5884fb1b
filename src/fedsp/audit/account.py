"""The account of a run for whoever must sign it off: four questions, answered by its configuration, by its statement, and by what its audits found."""

from __future__ import annotations

from pathlib import Path

from fedsp.attacks import liars
from fedsp.audit.tables import DISCLOSURE, EPSILON, INVERSION, MEMBERSHIP, MODEL, OWN, Finding, holds, interval, read_found
from fedsp.config import RunConfig
from fedsp.errors import TooFewClients
from fedsp.experiment import check_liars
from fedsp.runs import RunDirectory, read_json
from fedsp.statement import STATEMENT


def account(folder: Path) -> Finding:
    """The four answers of a finished run, from what lies in its folder.

    Raises:
        RunError: there is no finished run, or a file in it is damaged.
    """
    run = RunDirectory.open(folder)
    questions = {
        "What does a client learn of the model?": _of_the_model(run),
        "What do others learn of the text?": _of_the_text(run),
        "What is promised of the text?": _promise(run),
        "What can malicious clients do?": _malice(run),
    }
    return Finding(
        "account",
        [{"question": question, "answer": answer} for question, answer in questions.items()],
        "What attacks found is a floor: what is not found here may be found by others. docs/security.md says what no setting gives.",
    )


def _of_the_model(run: RunDirectory) -> str:
    held, found = read_found(run.path, DISCLOSURE, "disclosed_share", "nearly_disclosed_share"), read_found(run.path, MODEL, "extraction")
    said = [
        f"It holds {run.result()['disclosed_share']:.1%} of the global model's parameters bit for bit"
        + (f", {held['nearly_disclosed_share']:.1%} nearly." if held else ".")
    ]
    if not found:
        return f"{said[0]} What can be done with them has not been measured (the audit `model`)."
    best, nothing = (min(found["extraction"], key=lambda row: row[start])[start] for start in ("from_package", "from_nothing"))
    said += [
        f"Its package has a perplexity of {found['auxiliary_perplexity']:.4g} on public text, the global model {found['global_perplexity']:.4g}; trained on with at most "
        f"{found['extraction'][-1]['tokens']:,} tokens of such text {best:.4g} at best, where the same training from nothing gives {nothing:.4g}.",
    ]
    if found["gap"] <= 0:
        said.append("Fine-tuned by its client alone the package serves it better than the federation does.")
    return " ".join(said)


def _of_the_text(run: RunDirectory) -> str:
    said = [] if run.config.method == "zero_shot" else ["The server sees every client's update: there is no secure aggregation."]
    told, read = read_found(run.path, MEMBERSHIP, "rows", "controls", "power"), read_found(run.path, INVERSION, "rows", "candidates")
    if told:
        best = {}
        for row in sorted(told["rows"], key=lambda row: row["auc"][0]):
            best[row["observer"]] = row
        each = "; ".join(f"{who} {interval(row['auc'], '{:.2f}')} by {row['attack']}" for who, row in best.items())
        said.append(f"Who was trained on, AUC of the strongest attack of each observer, 0.5 being a guess: {each}.")
        failed = [name for name, control in told["controls"].items() if not holds(control)]
        if failed:
            said.append(f"THIS AUDIT IS NOT VALID unless by chance: its control fails ({', '.join(failed)}).")
        if told["power"]["auc"][1] <= 0.5:
            said.append("THIS AUDIT HAS NO POWER: it does not even see what was learned by heart.")
    if read:
        for row in read["rows"]:
            if row["level"].startswith(OWN):
                said.append(f"Read back by {row['attack']} from {row['level']}: {row['tokens'][0]:.0%} of the tokens sought; a guess has {row['guess']:.0%}.")
    missing = [name for name, found in (("membership", told), ("inversion", read)) if not found]
    if missing:
        said.append(f"Not measured: the audit{'s' if len(missing) > 1 else ''} {' and '.join(f'`{name}`' for name in missing)}.")
    return " ".join(said)


def _promise(run: RunDirectory) -> str:
    path = run.path / STATEMENT
    if not path.exists():
        return "Nothing: there is no differential privacy (privacy.unit = 'none'). That the text itself stays with its owners is no promise about what can be inferred of it."
    statement = read_json(path, "sentence", "not_covered")
    said = [statement["sentence"], f"Not covered: {'; '.join(statement['not_covered'])}."]
    if found := read_found(run.path, EPSILON, "broken", "canaries", "epsilon"):
        verdict = "BREAK the promise" if found["broken"] else "do not refute it"
        said.append(f"{found['canaries']} canaries {verdict}: they show at least {found['epsilon']:.3g}.")
    return " ".join(said)


def _malice(run: RunDirectory) -> str:
    config, section = run.config, run.config.aggregation
    clients = len((run.partition() or {}).get("clients", {})) or config.partition.clients
    said = [_rule(config, clients)]
    if section.norm_bound:
        said.append(f"Changes are cut to {section.norm_bound:g} times their median length.")
    if section.max_loss_rise is not None:
        said.append(f"A prompt that raises the server's validation loss by more than {section.max_loss_rise:.0%} is thrown away.")
    said.append(
        f"What is not finite, out of shape, or differs from the broadcast by more than {config.round.max_change:g} a number (root mean square) is never let in. Lies that stay among honest answers, backdoors among them, are not told from them."
    )
    if config.attack.kind != "none":
        lying = liars([str(index) for index in range(clients)], config.attack.share, config.seed)
        said.append(f"In this run {len(lying)} of {clients} clients lied, by {config.attack.kind}.")
    return " ".join(said)


def _rule(config: RunConfig, clients: int) -> str:
    section = config.aggregation
    if section.rule == "trust":
        return "Answers count by how far they agree with the server's own step."
    try:
        borne = check_liars(config, clients)
    except TooFewClients:
        borne = 0
    asked = config.round.asked(clients)
    if not borne:
        return f"One of {asked} is enough to move the prompt: the {section.rule.replace('_', ' ')} bears no lying client."
    return f"{borne} of the {asked} asked in a round may lie without carrying the prompt away (aggregation.rule = {section.rule!r}{' with mixing' if section.mixing else ''})."
