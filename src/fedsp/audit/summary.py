"""The account of a run for whoever must sign it off: four questions, answered by its configuration,
its journal and its statement, and by what its audits found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsp.audit.findings import Finding, holds, interval, read_found
from fedsp.config import malicious_of
from fedsp.errors import RunError
from fedsp.experiments.run_directory import STATEMENT, RunDirectory, read_json
from fedsp.federation.methods.registry import find_method


def account(folder: Path) -> Finding:
    """The four answers of a finished run, from what lies in its folder.

    Raises:
        RunError: there is no finished run, or a file in it is damaged.
    """
    run = RunDirectory.open(folder)
    questions = {
        "What does a client learn of the model?": _of_the_model,
        "What do others learn of the text?": _of_the_text,
        "What is promised of the text?": _promise,
        "What can malicious clients do?": _malice,
    }
    asked = max((len(record["asked"]) for record in run.records()), default=0)
    try:
        rows = [
            {"question": question, "answer": " ".join(answer(run, asked))}
            for question, answer in questions.items()
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RunError(
            f"{folder}: what its audits left is not what fedsp wrote ({error!r}): do them again"
        ) from error
    return Finding(
        "account",
        rows,
        "What these attacks found is a lower bound: others may find more. What no setting"
        " guarantees: docs/explanation/security.md.",
    )


def of_the_text(folder: Path, runs: Sequence[str]) -> dict[str, str]:
    """What others learn of the clients' text, and what is promised of it, from a finished run and
    its audits, for an owner of text who took part in `runs`.

    Raises:
        RunError: there is no finished run, or a file in it is damaged.
    """
    identity = RunDirectory.open(folder).identity
    whose = "the run of this journal" if identity in runs else "ANOTHER RUN than this journal's"
    answers = {row["question"]: row["answer"] for row in account(folder).rows}
    asked = "What do others learn of the text?", "What is promised of the text?"
    told = {question: answers[question] for question in asked}
    return {"Audits are those of": f"{whose} ({identity}).", **told}


def _of_the_model(run: RunDirectory, asked: int) -> list[str]:
    held, found = read_found(run.path, "disclosure"), read_found(run.path, "model")
    nearly = f", {held['nearly_disclosed_share']:.1%} nearly" if held else ""
    sentences = [
        f"It holds {run.result()['disclosed_share']:.1%} of the global model's parameters bit for"
        f" bit{nearly}."
    ]
    if found:
        best, nothing = (
            min(row[start] for row in found["extraction"])
            for start in ("from_package", "from_nothing")
        )
        sentences.append(
            f"Its package has a perplexity of {found['auxiliary_perplexity']:.4g} on public text,"
            f" the global model {found['global_perplexity']:.4g}; trained on with at most"
            f" {max(row['tokens'] for row in found['extraction']):,} tokens of such text {best:.4g}"
            f" at best, where the same training from nothing gives {nothing:.4g}."
        )
        if found["gap"] <= 0:
            sentences.append(
                "Fine-tuned by its client alone the package serves it better than the federation"
                " does."
            )
    elif _audited(run, asked):
        sentences.append("What can be done with them has not been measured (the audit `model`).")
    return sentences


def _of_the_text(run: RunDirectory, asked: int) -> list[str]:
    if not asked:
        return ["No client was asked: what was trained on lies where the model does."]
    sentences = ["The server sees every client's update: there is no secure aggregation."]
    membership, read, trapped = (
        read_found(run.path, file) for file in ("membership", "inversion", "trap")
    )
    if membership:
        best = {
            row["observer"]: row
            for row in sorted(membership["rows"], key=lambda row: float(row["auc"][0]))
        }
        each = "; ".join(
            f"{who} {interval(row['auc'], '{:.2f}')} by {row['attack']}"
            for who, row in best.items()
        )
        sentences.append(
            "Who was trained on, AUC of each observer's strongest attack (0.5 is a guess; the best"
            f" of several is above it by chance too): {each}."
        )
        if failed := [
            name for name, control in membership["controls"].items() if not holds(control)
        ]:
            sentences.append(
                "THIS AUDIT IS NOT VALID unless by chance: its control fails"
                f" ({', '.join(failed)})."
            )
        if membership["power"]["auc"][1] <= 0.5:
            sentences.append(
                "THIS AUDIT HAS NO POWER: it does not even see what was learned by heart."
            )
    if read:
        sentences += [
            f"Read back by {row['attack']} from {row['level']}: {row['tokens'][0]:.0%} of the"
            f" tokens sought; a guess has {row['guess']:.0%}."
            for row in read["rows"]
            if row["observed"]
        ]
        picked = read["candidates"]
        sentences.append(
            "Out of ten plausible texts a client's update picks the right one in"
            f" {interval(picked['right'], '{:.0%}')}; a guess does in {picked['guess']:.0%}."
        )
    if trapped:
        row = trapped["rows"][0]
        sentences.append(
            "With a package made for it, a malicious model owner correctly infers for"
            f" {interval(row['right'], '{:.0%}')} of the words it seeks whether they occur in"
            f" a client's {row['examples']:.0f} examples, in one round; guessing gets 50%."
        )
    missing = [
        f"`{name}`"
        for name, found in (("membership", membership), ("inversion", read), ("trap", trapped))
        if not found
    ]
    if missing and _audited(run, asked):
        sentences.append(
            f"Not measured: the audit{'s' if len(missing) > 1 else ''} {' and '.join(missing)}."
        )
    return sentences


def _promise(run: RunDirectory, asked: int) -> list[str]:
    path, found = run.path / STATEMENT, read_found(run.path, "epsilon")
    if not path.exists():
        why = f"privacy.unit = {run.config.privacy.unit!r}" + (
            "" if asked else ", and no client was asked"
        )
        stays = (
            " That text stays with its owners is no promise about what can be inferred of it."
            if asked
            else ""
        )
        return [f"Nothing: no noise was added ({why}).{stays}"]
    statement = read_json(path, "sentence", "not_covered")
    sentences = [statement["sentence"], f"Not covered: {'; '.join(statement['not_covered'])}."]
    if found:
        verdict = "BREAK the promise" if found["broken"] else "do not refute it"
        sentences.append(
            f"{found['canaries']} canaries {verdict}: they show at least {found['epsilon']:.3g}."
        )
    return sentences


def _malice(run: RunDirectory, asked: int) -> list[str]:
    config, section = run.config, run.config.aggregation
    if not asked:
        return ["No client was asked, so none could lie."]
    robust = section.rule not in ("mean", "trust")
    borne = malicious_of(section.malicious, asked) if robust or section.mixing else 0
    rule = section.rule.replace("_", " ") + (" after mixing" if section.mixing else "")
    if config.privacy.unit == "client":
        expected = read_json(run.path / STATEMENT, "clients_expected")["clients_expected"]
        sentences = [
            f"Each change is clipped to a length of {config.privacy.clip:g}, and the sum divided by"
            f" the {expected} clients expected, however many are asked: one malicious client moves"
            f" the mean of a round by no more than {config.privacy.clip / expected:.3g}, in any"
            " direction."
        ]
    elif section.rule == "trust":
        sentences = ["Answers count by how far they agree with the server's own step."]
    elif borne:
        sentences = [
            f"{borne} of the {asked} asked in a round may be malicious (aggregation: {rule})."
        ]
    elif robust:
        sentences = [
            f"The rule ({rule}) is set for no malicious client: aggregation.malicious ="
            f" {section.malicious:g}."
        ]
    else:
        sentences = [f"One malicious client of {asked} can move the result: a mean tolerates none."]
    if section.norm_bound:
        sentences.append(f"Changes are cut to {section.norm_bound:g} times their median length.")
    if section.max_loss_rise is not None:
        sentences.append(
            "A candidate that raises the server's validation loss by more than"
            f" {section.max_loss_rise:.0%} is thrown away."
        )
    sentences.append(
        "What is not finite, out of shape, or further from the broadcast than"
        f" {config.round.max_change:g} per value (root mean square) is rejected. Malicious updates,"
        " such as backdoors, within the spread of the honest ones are not detected."
    )
    if config.attack.kind != "none":
        sentences.append(
            f"In this run {config.attack.share:.0%} of the clients lied, rounded down, by"
            f" {config.attack.kind}; in the audits' shadow runs nobody tampers with updates."
        )
    return sentences


def _audited(run: RunDirectory, asked: int) -> bool:
    """Whether the audits of text and package are for this run."""
    return (
        bool(asked) and find_method(run.config.method).deployable and run.config.federation is None
    )
