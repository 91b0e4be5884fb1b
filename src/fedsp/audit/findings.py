"""What audits found, as tables for people, each with what must be known to read it: from the files
that they leave in a run's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsp.errors import RunError
from fedsp.experiments.run_directory import read_json

NEAR = 0.1
"""Relative distance of a tensor up to which it counts as nearly disclosed."""

Rows = list[dict[str, Any]]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """A table, and what its words mean."""

    title: str
    rows: Rows
    note: str = ""


def read_found(folder: Path, audit: str) -> Figures | None:
    """The figures that an audit left in a run's folder; None where it was not done.

    Raises:
        RunError: the file is damaged.
    """
    file = folder / f"{audit}.json"
    return read_json(file) if file.exists() else None


def found_tables(folder: Path) -> dict[str, list[Finding]]:
    """The tables of the audits that were done in a folder before.

    Raises:
        RunError: a file is damaged.
    """
    tables = {}
    for name, tables_of in TABLES.items():
        if (figures := read_found(folder, name)) is not None:
            try:
                tables[name] = tables_of(figures)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RunError(
                    f"{folder / name}.json is not what fedsp wrote ({error!r}): measure it again"
                    f" with `fedsp audit {folder} --only {name}`"
                ) from error
    return tables


def disclosure_tables(figures: Figures) -> list[Finding]:
    """How much of the global model do clients hold?"""
    row = {
        "bit for bit": f"{figures['disclosed_share']:.1%}",
        "nearly": f"{figures['nearly_disclosed_share']:.1%}",
    }
    note = (
        f"Nearly: in tensors whose distance from the global model's is at most {NEAR:.0%} of their"
        " length. Distillation changes every number a little."
    )
    return [Finding("the global model's parameters that clients hold", [row], note)]


def membership_tables(figures: Figures) -> list[Finding]:
    """Can it be told whether an example was trained on?"""
    private = figures["epsilon"] is not None

    def row(head: dict[str, Any], found: Mapping[str, Any], **tail: str) -> dict[str, Any]:
        limits = (
            {
                "AUC at most, by epsilon": f"{found['auc_ceiling']:.3f}",
                "found at most, by epsilon": f"{found['hits_at_1_ceiling']:.1%}",
            }
            if private and "auc_ceiling" in found
            else {}
        )
        return head | {
            "AUC": interval(found["auc"], "{:.3f}"),
            "found at 1 % false alarms": interval(found["hits_at_1"], "{:.1%}"),
            **limits,
            **tail,
        }

    title = (
        f"who was trained on, by {figures['shadows']} shadow runs and {figures['records']} records"
        + (f", epsilon = {figures['epsilon']:.3g}" if private else ", no differential privacy")
    )
    few = (
        " With fewer than 16 shadow runs the likelihood ratios (LiRA) are weak."
        if figures["shadows"] < 16
        else ""
    )
    note = (
        "AUC: the chance that an example that was trained on scores higher than one that was not;"
        " 0.5 is guessing. In brackets 95 % intervals. `fedsp.audit.membership` names the attacks"
        f" and their papers. What no attack finds here another may find.{few}"
    )
    controls = [
        row({"control": name}, found, verdict="holds" if holds(found) else "FAILS")
        for name, found in figures["controls"].items()
    ]
    learned = row(
        {"control": "half of some examples learned by heart"},
        figures["power"],
        verdict="is seen" if figures["power"]["auc"][1] > 0.5 else "IS NOT SEEN",
    )
    return [
        Finding(
            title,
            [
                row({"who": found["observer"], "attack": found["attack"]}, found)
                for found in figures["rows"]
            ],
            note,
        ),
        Finding(
            "controls, in which there is nothing to find",
            controls,
            "A failed control makes the audit invalid, except by chance: in about one audit of"
            " seven one of the three fails. Increase --records or --shadows.",
        ),
        Finding("power: what there is to find must be seen", [learned]),
    ]


def holds(control: Mapping[str, Any]) -> bool:
    """Whether a control's interval has 0.5 in it."""
    _, low, high = control["auc"]
    return bool(low <= 0.5 <= high)


def inversion_tables(figures: Figures) -> list[Finding]:
    """Which tokens can be read back?"""
    rows = [
        {
            "what is seen": found["level"],
            "attack": found["attack"],
            "tokens read back": (
                interval(found["tokens"], "{:.0%}")
                if found["read"] > 1
                else f"{found['tokens'][0]:.0%}"
            ),
            "a guess has": f"{found['guess']:.0%}",
            "whole texts": "-" if found["texts"] is None else interval(found["texts"], "{:.0%}"),
            "ROUGE-L": "-" if found["rouge"] is None else f"{found['rouge']:.2f}",
            "looked at": found["read"],
        }
        for found in figures["rows"]
    ]
    note = (
        "The guess only uses the token frequencies at each position, counted on these very texts;"
        " only what exceeds it was reconstructed from a change. Looked at: number of texts or of"
        " clients' updates. For a residual prompt only the first 4 tokens of a text are sought. A"
        " row that names an epsilon shows the effect of the noise of one such release, whatever"
        " this run guarantees."
    )
    candidates = figures["candidates"]
    picked = {
        "texts": candidates["texts"],
        "the right one of ten": interval(candidates["right"], "{:.0%}"),
        "a guess has": f"{candidates['guess']:.0%}",
    }
    return [
        Finding("tokens read back out of a change", rows, note),
        Finding(
            "ten plausible texts, one of them trained on, and a client's update: which was it?",
            [picked],
        ),
    ]


def model_tables(figures: Figures) -> list[Finding]:
    """What does a client learn of the model?"""
    package = {
        "plan": str(figures["plan"]),
        "embeddings": figures["embeddings"],
        "bit for bit": f"{figures['disclosed_share']:.0%}",
        "nearly": f"{figures['nearly_disclosed_share']:.0%}",
        "same next token": f"{figures['agreement']:.0%}",
        "embedding distance": f"{figures['embedding_distance']:.3g}",
        "after rotation": f"{figures['embedding_distance_aligned']:.3g}",
        "embedding CKA": f"{figures['embedding_cka']:.3g}",
        "auxiliary perplexity": f"{figures['auxiliary_perplexity']:.3g}",
        "global perplexity": f"{figures['global_perplexity']:.3g}",
        "KL, nats": f"{figures['kl']:.3g}",
        "CKA of states": f"{figures['cka']:.3g}",
    }
    gap = {
        "federated prompt, global model": f"{figures['federated_loss']:.3f}",
        "a client alone, its package fine-tuned": f"{figures['client_alone_loss']:.3f}",
        "gap": f"{figures['gap']:+.3f}",
    }
    attacker = [
        {
            "tokens of public text": f"{row['tokens']:,}",
            "from the package": f"{row['from_package']:.4g}",
            "from nothing": f"{row['from_nothing']:.4g}",
            "the package's share of the way": f"{row['advantage']:.0%}",
        }
        for row in figures["extraction"]
    ]
    return [
        Finding(
            "the package",
            [package],
            "On public text that the distillation did not read. CKA (centred kernel alignment): 1"
            " where two sets of vectors differ by a rotation and a scale, 0 where nothing is"
            " alike.",
        ),
        Finding(
            "answer loss on the test questions, nats",
            [gap],
            "Above zero the federation serves a client better than its package does. Below zero the"
            " package is worth more to a client by itself than the federation gives it.",
        ),
        Finding(
            "perplexity of an attacker who trains on",
            attacker,
            f"The global model has {figures['global_perplexity']:.4g}. Share of the way from"
            " nothing to it that the package spares the attacker; above 100 % the attacker's model"
            " is the better one on this text.",
        ),
    ]


def trap_tables(figures: Figures) -> list[Finding]:
    """What would a dishonest owner of the model learn?"""
    rows = [
        {
            "examples of a client": f"{row['examples']:.0f}",
            "words": row["words"],
            "told rightly": interval(row["right"], "{:.0%}"),
            "by guessing": "50%",
        }
        for row in figures["rows"]
    ]
    packages = [
        {"package": name, "unusual": "; ".join(found) or "nothing"}
        for name, found in figures["unusual"].items()
    ]
    title = (
        f"a package made to tell words: {figures['clients']} clients, one round of"
        f" {figures['steps']} steps of {figures['batch_size']} examples, {figures['privacy']}"
    )
    note = (
        "For each word: does it occur in the client's text? Half of them do. This package is one"
        " example of the attack: others may reveal more, or be harder to detect."
    )
    return [Finding(title, rows, note), Finding("what `fedsp inspect` says of it", packages)]


def epsilon_tables(figures: Figures) -> list[Finding]:
    """Is the promise kept, as far as can be seen?"""
    row = {
        "unit": figures["unit"],
        "promised epsilon": f"{figures['promised']:.3g}",
        "at least, at 95 %": f"{figures['epsilon']:.3g}",
        "so many canaries show at most": f"{figures['most']:.3g}",
        "canaries": figures["canaries"],
        "guessed": figures["guesses"],
        "right": figures["right"],
        "verdict": (
            "BROKEN: more was given away than promised" if figures["broken"] else "not refuted"
        ),
    }
    note = (
        f"Canaries: {figures['canaries_are']}; score: {figures['score']}. A bound above the"
        " guaranteed epsilon proves the guarantee broken; one below it proves nothing."
    )
    return [Finding("the promise, held against canaries", [row], note)]


def interval(found: Any, form: str) -> str:
    """A value with its 95 % interval."""
    if found is None:
        return "too few others"
    value, low, high = (form.format(number) for number in found)
    return f"{value} [{low}, {high}]"


TABLES: dict[str, Callable[[Figures], list[Finding]]] = {
    "disclosure": disclosure_tables,
    "model": model_tables,
    "membership": membership_tables,
    "inversion": inversion_tables,
    "trap": trap_tables,
    "epsilon": epsilon_tables,
}
"""The tables of what the audit of each name left in its file."""
