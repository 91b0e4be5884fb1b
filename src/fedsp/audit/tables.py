"""What audits found, as tables for people: from the files that they leave in a run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MEMBERSHIP, INVERSION, MODEL, EPSILON = "membership.json", "inversion.json", "model.json", "epsilon.json"
Rows = list[dict[str, Any]]
Tables = dict[str, Rows]


def found_tables(folder: Path) -> dict[str, Tables]:
    """The tables of the audits that were run in a folder before."""
    readers: dict[str, tuple[str, Callable[[dict[str, Any]], Tables]]] = {
        "model": (MODEL, model_tables),
        "membership": (MEMBERSHIP, membership_tables),
        "inversion": (INVERSION, inversion_tables),
        "epsilon": (EPSILON, epsilon_tables),
    }
    return {name: read(json.loads((folder / file).read_text(encoding="utf-8"))) for name, (file, read) in readers.items() if (folder / file).exists()}


def membership_tables(figures: Mapping[str, Any]) -> Tables:
    """Can it be told whether an example was trained on?"""
    private = figures["epsilon"] is not None

    def row(head: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        limits = {"AUC at most": f"{found['auc_ceiling']:.3f}", "at most": f"{found['hits_at_1_ceiling']:.1%}"} if private and "auc_ceiling" in found else {}
        return head | {
            "AUC": _interval(found["auc"], "{:.3f}"),
            "members found at 1 % false alarms": _interval(found["hits_at_1"], "{:.1%}"),
            **limits,
        }

    title = f"{figures['shadows']} shadow runs, {figures['records']} records, 95 % intervals" + (
        f", epsilon = {figures['epsilon']:.3g}" if private else ", no differential privacy"
    )
    return {
        title: [row({"who": found["observer"], "attack": found["attack"]}, found) for found in figures["rows"]],
        "controls (a valid audit has an AUC of 0.5 in all of them)": [row({"control": name}, found) for name, found in figures["controls"].items()],
        "power (a valid audit has an AUC near 1)": [row({"control": "half of some examples learned by heart"}, figures["power"])],
    }


def inversion_tables(figures: Mapping[str, Any]) -> Tables:
    """Which tokens can be read back?"""
    rows = [
        {
            "what is seen": found["level"],
            "attack": found["attack"],
            "tokens read back": _interval(found["tokens"], "{:.0%}") if found["read"] > 1 else f"{found['tokens'][0]:.0%}",
            "whole texts": "-" if found["texts"] is None else _interval(found["texts"], "{:.0%}"),
            "ROUGE-L": "-" if found["rouge"] is None else f"{found['rouge']:.2f}",
            "by guessing": f"{found['guess']:.0%}",
            "read": found["read"],
        }
        for found in figures["rows"]
    ]
    candidates = figures["candidates"]
    picked = {"texts": candidates["texts"], "the right one of ten": _interval(candidates["right"], "{:.0%}"), "by guessing": f"{candidates['guess']:.0%}"}
    return {"tokens read back out of a prompt's change": rows, "ten plausible texts, one of them trained on, and a client's update": [picked]}


def model_tables(figures: Mapping[str, Any]) -> Tables:
    """What does a client learn of the model?"""
    shares = {
        name: f"{figures[key]:.0%}"
        for name, key in (("bit for bit", "disclosed_share"), ("nearly", "nearly_disclosed_share"), ("same next token", "agreement"))
    }
    numbers = {
        "embedding distance": "embedding_distance",
        "after rotation": "embedding_distance_aligned",
        "embedding CKA": "embedding_cka",
        "auxiliary perplexity": "auxiliary_perplexity",
        "global perplexity": "global_perplexity",
        "KL, nats": "kl",
        "CKA of states": "cka",
    }
    package = {"plan": str(figures["plan"]), "embeddings": figures["embeddings"], **shares, **{name: f"{figures[key]:.3g}" for name, key in numbers.items()}}
    gap = {
        "federated prompt, global model": f"{figures['federated_loss']:.3f}",
        "a client alone, its package fine-tuned": f"{figures['client_alone_loss']:.3f}",
        "gap (above zero: federating pays)": f"{figures['gap']:+.3f}",
    }
    attacker = [
        {
            "tokens of public text": f"{row['tokens']:,}",
            "from the package": f"{row['from_package']:.4g}",
            "from nothing": f"{row['from_nothing']:.4g}",
            "advantage": f"{row['advantage']:.2f}",
        }
        for row in figures["extraction"]
    ]
    return {"the package": [package], "answer loss on the test questions, nats": [gap], "perplexity of an attacker who trains on": attacker}


def epsilon_tables(figures: Mapping[str, Any]) -> Tables:
    """Is the promise kept, as far as can be seen?"""
    verdict = "BROKEN: more was given away than promised" if figures["broken"] else "not refuted"
    row = {
        "unit": figures["unit"],
        "promised epsilon": f"{figures['promised']:.3g}",
        "at least, at 95 %": f"{figures['epsilon']:.3g}",
        "so many canaries show at most": f"{figures['most']:.3g}",
        "canaries": figures["canaries"],
        "guessed": figures["guesses"],
        "right": figures["right"],
        "verdict": verdict,
    }
    return {f"canaries: {figures['canaries_are']}; score: {figures['score']}": [row]}


def _interval(found: Any, form: str) -> str:
    if found is None:
        return "too few others"
    value, low, high = (form.format(number) for number in found)
    return f"{value} [{low}, {high}]"
