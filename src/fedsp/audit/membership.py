"""Membership inference: how well can an observer tell training examples from others? One result
for each observer and each attack that the observer's data allows.

observer          sees
server            each client's update in every round
server, sums      only the sum of the updates
client            the broadcasts and the auxiliary model
outsider          the outputs of the global model with the final prompt

attack            score, higher for a member
loss              negative loss (Yeom et al. 2018, https://arxiv.org/abs/1709.01604)
calibrated        loss before any tuning minus loss after it (Watson et al. 2022,
                  https://arxiv.org/abs/2111.08440)
LiRA              likelihood ratio of the calibrated loss under normal distributions fitted to the
                  shadows with and without the example (Carlini et al. 2022)
RMIA              share of the population with a smaller likelihood ratio (Zarifzadeh et al. 2024,
                  https://arxiv.org/abs/2312.03262)
cosine            cosine between the update and the example's negative gradient
cosine, others    the same, standardised by the cosines with the updates of clients that do not
                  hold the example (FedMIA, https://arxiv.org/abs/2402.06289)
cosine, LiRA      likelihood ratio of the cosine
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsp.audit.shadows import (
    Opened,
    Options,
    Shadow,
    alignment,
    changes_of,
    check_audited,
    losses_under,
    open_audited,
    promised,
    train_shadow,
)
from fedsp.audit.statistics import (
    Marks,
    Numbers,
    auc_ceiling,
    ceiling,
    summarise_scores,
)
from fedsp.data.encoding import Encoded, training_batches
from fedsp.data.seeding import derive_seed
from fedsp.errors import ConfigurationError, RunError, require_installed
from fedsp.experiments.run_directory import RunDirectory
from fedsp.models.messengers.registry import find_messenger
from fedsp.models.payload import Payload, as_row
from fedsp.models.soft_prompt import SoftPrompt
from fedsp.training.loop import Optimisation, answer_loss, fit

ROUNDS = 4
LEARNED, LEARNING = 16, 80
"""Rows of the power test, of which every other one is learned by heart, and the steps that takes.
"""


def audit_membership(folder: Path, options: Options) -> dict[str, Any]:
    """Audit a finished run: a row for each observer and attack, the controls and the power test.
    Each shadow trains on a random half of all examples; `options.records` limits how many examples
    are scored (None: all).

    Raises:
        RunError: the folder holds no finished run of FedSP with simulated clients, or too few
            records for an estimate.
    """
    opened, shadows = open_audited(folder, options.callbacks), options.shadows
    count = len(opened.rows)
    rng = random.Random(derive_seed(opened.run.config.seed, "audited"))
    looked_at = sorted(rng.sample(range(count), min(options.records or count, count)))
    rows = [opened.encoded[index] for index in looked_at]
    holders = [opened.holders[index] for index in looked_at]
    before = {
        f"{name} before": _losses(opened, name, opened.start, rows)
        for name in ("outsider", "client")
    }
    seen: dict[str, list[Numbers]] = {}
    coins: list[Marks] = []
    asked: list[Marks] = []
    promises: list[float] = []
    for index in range(shadows):
        shadow = train_shadow(opened, index)
        promises.append(promised(opened, shadow))
        coins.append(shadow.included[looked_at].numpy())
        asked.append(np.array([holder in shadow.answered for holder in holders]))
        for name, values in (before | _seen(opened, shadow, rows, holders)).items():
            seen.setdefault(name, []).append(values)
        options.callbacks.info(f"shadow {index + 1} of {shadows} is trained and looked at")
    members = [heads & there for heads, there in zip(coins, asked, strict=True)]
    epsilon, delta = max(promises), opened.run.config.privacy.delta
    table = [
        {
            "observer": observer,
            "attack": attack,
            **summarise_scores(scores, members),
            "auc_ceiling": auc_ceiling(epsilon, delta),
            "hits_at_1_ceiling": ceiling(epsilon, delta, 0.01),
        }
        for (observer, attack), every in _scores(seen, members).items()
        if _comparable(scores := _where(every, asked), members)
    ]
    if not table:
        raise RunError(
            f"{folder}: too few of the {len(rows)} records are held by clients that answered: take"
            " more --records"
        )
    return {
        "shadows": shadows,
        "records": len(rows),
        "epsilon": None if np.isinf(epsilon) else epsilon,
        "delta": delta,
        "rows": table,
        "controls": {
            "bag of words, blind": summarise_scores(*_blind(rows, coins)),
            "before any tuning": summarise_scores(
                _where([-seen["outsider before"][0]] * shadows, asked), members
            ),
            "who was in the shadow before": summarise_scores(
                _where(seen["server"], asked), [coins[-1], *coins[:-1]]
            ),
        },
        "power": _power(opened, rows),
    }


def check_membership(run: RunDirectory, options: Options) -> None:
    """Refuse a run that cannot be audited (RunError), and fewer than four shadows, or to begin
    without scikit-learn (ConfigurationError)."""
    check_audited(run)
    kind = run.config.messenger.kind
    if not find_messenger(kind).per_example:
        raise RunError(
            f"{run.path} has messenger.kind = {kind!r}, which has no gradient for each example:"
            " audit a run with 'prompt' or 'adapter'"
        )
    if options.shadows < 4:
        raise ConfigurationError(
            f"--shadows {options.shadows}: LiRA needs at least 4 shadow runs, pass --shadows 4 or"
            " more"
        )
    require_installed("study", "the blind control of the membership audit needs", "sklearn")


def _where(scores: list[Numbers], asked: list[Marks]) -> list[Numbers]:
    """The scores (N,) of each shadow, NaN for records of clients that did not answer in it: those
    records are known not to have been trained on."""
    return [np.where(there, row, np.nan) for row, there in zip(scores, asked, strict=True)]


def _comparable(scores: list[Numbers], members: list[Marks]) -> bool:
    """Whether any shadow has scores of both members and non-members: if one client answers a round,
    there are no updates of other clients to compare with."""
    return any(
        len(set(marks[~np.isnan(row)])) == 2 for row, marks in zip(scores, members, strict=True)
    )


def _power(opened: Opened, rows: list[Encoded]) -> dict[str, Any]:
    """The power test: memorise half of some rows with the messenger, and score all of them by the
    drop of their loss."""
    rng = random.Random(derive_seed(opened.run.config.seed, "power"))
    drawn = rng.sample(rows, min(LEARNED, len(rows) // 2 * 2))
    inside = [index % 2 == 0 for index in range(len(drawn))]
    messenger = opened.messenger
    before = losses_under(opened.auxiliary, messenger, opened.start, drawn)
    learned = [row for row, there in zip(drawn, inside, strict=True) if there]
    batches = training_batches(
        learned, steps=LEARNING, batch_size=len(learned), seed=opened.run.config.seed
    )
    fit(
        messenger.trained(),
        lambda batch: answer_loss(
            opened.auxiliary, messenger.prefix(opened.auxiliary), batch.to(opened.auxiliary.device)
        ),
        batches,
        Optimisation(learning_rate=0.1 if isinstance(messenger, SoftPrompt) else 0.01),
    )
    after = losses_under(opened.auxiliary, messenger, messenger.payload(), drawn)
    return summarise_scores([(before - after).double().numpy()], [np.array(inside)])


def _losses(opened: Opened, observer: str, payload: Payload, rows: list[Encoded]) -> Numbers:
    model, messenger = (
        (opened.federation.model, opened.federation.messenger)
        if observer == "outsider"
        else (opened.auxiliary, opened.messenger)
    )
    return losses_under(model, messenger, payload, rows).double().numpy()


def _seen(
    opened: Opened, shadow: Shadow, rows: list[Encoded], holders: list[str]
) -> dict[str, Numbers]:
    """Each observer's values (N,) for the N rows in one shadow: losses after the last round, and
    cosines averaged over at most ROUNDS evenly spaced rounds, first and last included."""
    clients = sorted(set(opened.holders))
    count = len(shadow.updates)
    looked_at = np.linspace(0, count - 1, min(ROUNDS, count)).round().astype(int).tolist()
    holder = torch.tensor([clients.index(client) for client in holders])
    single, sums = [], []
    for number in looked_at:
        total = as_row(shadow.broadcasts[number + 1]) - as_row(shadow.broadcasts[number])
        changes = torch.cat([changes_of(shadow, number, clients), total[None]])
        cosines = alignment(opened, shadow.broadcasts[number], changes, rows)
        silent = torch.tensor([client not in shadow.updates[number] for client in clients])
        single.append(cosines[:, :-1].masked_fill(silent, torch.nan))
        sums.append(cosines[:, -1])
    # (N, C), no number for a client that was silent in all of these rounds
    each = torch.stack(single).nanmean(dim=0)
    own = each.gather(1, holder[:, None])[:, 0]
    found = {
        "server": own.double().numpy(),
        "server, sums": torch.stack(sums).mean(dim=0).double().numpy(),
    }
    for observer in ("outsider", "client"):
        found[observer] = _losses(opened, observer, shadow.broadcasts[-1], rows)
    if len(clients) > 2:
        others = each.scatter(1, holder[:, None], torch.nan)
        mean = others.nanmean(dim=1)
        spread = ((others - mean[:, None]) ** 2).nanmean(dim=1).sqrt()
        found["server against others"] = ((own - mean) / spread.clamp_min(1e-12)).double().numpy()
    return found


def _scores(
    seen: dict[str, list[Numbers]], members: list[Marks]
) -> dict[tuple[str, str], list[Numbers]]:
    """The scores of each attack (K of N)."""
    scores: dict[tuple[str, str], list[Numbers]] = {}
    for observer in ("outsider", "client"):
        fell = [
            before - after
            for before, after in zip(seen[f"{observer} before"], seen[observer], strict=True)
        ]
        scores[observer, "loss"] = [-after for after in seen[observer]]
        scores[observer, "calibrated"] = fell
        scores[observer, "LiRA"] = likelihood_ratios(fell, members)
        scores[observer, "RMIA"] = relative_ratios(seen[observer])
    for observer in ("server", "server, sums"):
        scores[observer, "cosine"] = seen[observer]
        scores[observer, "cosine, LiRA"] = likelihood_ratios(seen[observer], members)
    if "server against others" in seen:
        scores["server", "cosine, others"] = seen["server against others"]
    return scores


def likelihood_ratios(values: list[Numbers], members: list[Marks]) -> list[Numbers]:
    """Online LiRA: log likelihood ratios, K arrays (N,), of `values` (K shadows, N records) given
    `members`. Each shadow is the target once, the others fit the normals. Each shadow's median is
    subtracted, and all records share one variance, as few shadows allow no estimate per record."""
    table, marks = np.stack([some - np.nanmedian(some) for some in values]), np.stack(members)
    scores = []
    for target in range(len(table)):
        others = np.arange(len(table)) != target
        inside, outside = (
            np.where(marks[others] == side, table[others], np.nan) for side in (True, False)
        )
        with warnings.catch_warnings():
            # a record that is in all of the others, or in none
            warnings.simplefilter("ignore", RuntimeWarning)
            means = [np.nanmean(some, axis=0) for some in (inside, outside)]
        means = [
            np.where(np.isnan(mean), np.nanmean(some), mean)
            for mean, some in zip(means, (inside, outside), strict=True)
        ]
        variances = [
            float(np.nansum((some - mean) ** 2))
            / max(1, int((~np.isnan(some)).sum(axis=0).clip(1).sum()) - some.shape[1])
            + 1e-12
            for mean, some in zip(means, (inside, outside), strict=True)
        ]
        normals = [
            -((table[target] - mean) ** 2) / (2 * variance) - np.log(variance) / 2
            for mean, variance in zip(means, variances, strict=True)
        ]
        scores.append(normals[0] - normals[1])
    return scores


def relative_ratios(losses: list[Numbers]) -> list[Numbers]:
    """Online RMIA with each shadow as the target once: a record's likelihood over its mean under
    the other shadows, as a rank in [0, 1) among all records."""
    table = np.exp(-np.stack(losses))
    scores = []
    for target in range(len(table)):
        others = np.arange(len(table)) != target
        ratio = table[target] / table[others].mean(axis=0)
        scores.append(ratio.argsort(kind="stable").argsort(kind="stable") / len(ratio))
    return scores


def _blind(rows: list[Encoded], coins: list[Marks]) -> tuple[list[Numbers], list[Marks]]:
    """The blind control: scores and memberships in four shadows, from a bag-of-words classifier
    trained on half of the records; NaN for that half. An AUC off 0.5 means that membership depends
    on the words, so the audit is invalid. (Stratified folds would bias the score below 0.5.)"""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression

    words = DictVectorizer().fit_transform(
        [{str(token): count for token, count in Counter(row.ids).items()} for row in rows]
    )
    learned = np.random.default_rng(0).random(len(rows)) < 0.5
    few = coins[:4]
    if any(len(set(marks[learned])) < 2 for marks in few):
        raise RunError(
            f"{len(rows)} records are too few for a membership audit: take more --records, or a run"
            " with more text"
        )
    scores = [
        LogisticRegression(C=0.1, max_iter=200)
        .fit(words[learned], marks[learned])
        .decision_function(words)
        for marks in few
    ]
    return [np.where(learned, np.nan, row) for row in scores], few
