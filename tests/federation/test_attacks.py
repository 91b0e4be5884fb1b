"""Malicious clients in whole runs: what each sends, what is refused, and what a robust run makes of
it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fedsp import api as commands
from fedsp.config import AttackName
from fedsp.config_file import make_config
from fedsp.data.tasks import Example
from fedsp.errors import ConfigurationError, TooFewClients
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.attacks import (
    ON_DATA,
    ON_PROTOCOL,
    ON_UPDATES,
    TARGET,
    TRIGGER,
    Attack,
    malicious,
)
from fedsp.federation.messages import Request, Update
from fedsp.models.payload import PROMPT
from support.small_runs import prompt_bits, settings

SENT = {PROMPT: torch.zeros(3, 2)}
CLIENTS = [f"client-{index}" for index in range(5)]


def answers(kind: str, strength: float | None = None) -> dict[str, list[Update]]:
    """What comes of honest answers 1, 2, 3 and those of two malicious clients."""
    honest = {client: float(index + 1) for index, client in enumerate(CLIENTS)}
    attack = Attack(kind=kind, malicious=frozenset(CLIENTS[3:]), seed=0, strength=strength)
    transport = attack.transport(
        lambda requests: [
            Update(round=1, client=client, payload={PROMPT: torch.full((3, 2), value)})
            for client, value in honest.items()
        ]
    )
    replies: dict[str, list[Update]] = {}
    for reply in transport(
        [Request(run="run", round=1, client=client, seed=0, payload=SENT) for client in CLIENTS]
    ):
        assert isinstance(reply, Update)
        replies.setdefault(reply.client, []).append(reply)
    for index, client in enumerate(CLIENTS[:3]):
        assert torch.equal(replies[client][0].payload[PROMPT], torch.full((3, 2), float(index + 1)))
    return replies


def test_every_attack_has_a_name_in_the_configuration() -> None:
    assert set(get_args(AttackName)) == {"none", *ON_UPDATES, *ON_PROTOCOL, *ON_DATA}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sign_flip", -10.0),
        ("inner_product", -1.0),
        ("mimic", 1.0),
        ("free_rider", 0.0),
        ("scaling", -40.0),
        ("little_is_enough", 2.0 - (2 / 3) ** 0.5),
        ("huge", 1e38),
    ],
)
def test_what_malicious_clients_send(kind: str, expected: float) -> None:
    assert torch.allclose(
        answers(kind)["client-3"][0].payload[PROMPT], torch.full((3, 2), expected)
    )


def test_noise_repeats_with_its_seed_and_has_its_length() -> None:
    one, other = (answers("gaussian", 3.0)["client-4"][0].payload[PROMPT] for _ in range(2))
    assert torch.equal(one, other) and float(one.norm()) == pytest.approx(
        3.0 * float(torch.full((3, 2), 2.0).norm()), rel=1e-5
    )


def test_what_malicious_clients_do_to_the_protocol() -> None:
    assert answers("stale")["client-3"][0].round == 0
    assert len(answers("duplicate")["client-3"]) == 3
    assert answers("out_of_shape")["client-3"][0].payload[PROMPT].shape == (2, 3, 2)
    assert answers("not_finite")["client-3"][0].payload[PROMPT].isnan().all()


def test_what_malicious_clients_train_on() -> None:
    examples = [
        Example(
            id=str(index),
            context=f"Question: {index}\nAnswer:",
            choices=(" a", " b", " c"),
            gold=(2,),
        )
        for index in range(40)
    ]
    flipped = Attack(kind="label_flip", malicious=frozenset(["a"]), seed=0)
    assert (
        all(example.target == " a" for example in flipped.poison("a", examples))
        and flipped.poison("b", examples) == examples
    )
    poisoned = Attack(kind="backdoor", malicious=frozenset(["a"]), seed=0).poison("a", examples)
    waiting = [example for example in poisoned if example.context.startswith(TRIGGER)]
    assert 8 < len(waiting) < 32 and all(example.target == TARGET for example in waiting)
    assert [replace(example) for example in poisoned if example not in waiting] == [
        example for example in examples if example in poisoned
    ]


def test_the_malicious_clients_are_a_share_rounded_down() -> None:
    assert [
        len(malicious([str(i) for i in range(10)], share, 0))
        for share in (0.0, 0.09, 0.1, 0.3, 0.4)
    ] == [0, 0, 1, 3, 4]
    assert malicious(CLIENTS, 0.4, 1) == malicious(CLIENTS[::-1], 0.4, 1)


def run(folder: Path, kind: str, **changes: Any) -> RunDirectory:
    base = {
        "attack": {"kind": kind, "share": 0.4},
        "partition": {"clients": 5, "server_share": 0.2},
    }
    figures = commands.run(settings(folder, **{**base, **changes}))
    return RunDirectory.open(Path(figures["folder"]))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("not_finite", "not finite"),
        ("out_of_shape", "has shape"),
        ("stale", "a reply to round 0"),
        ("huge", "differs from the broadcast"),
    ],
)
def test_lies_that_break_the_rules_are_refused_and_the_round_goes_on(
    tmp_path: Path, kind: str, reason: str
) -> None:
    records = run(tmp_path, kind, round={"rounds": 1}).records()
    assert (
        len(records[0]["answered"]) == 3
        and all(reason in why for why in records[0]["failed"].values())
        and len(records[0]["failed"]) == 2
    )


def test_an_answer_given_three_times_counts_once(tmp_path: Path) -> None:
    one = run(tmp_path / "one", "duplicate", round={"rounds": 1})
    other = run(tmp_path / "other", "none", round={"rounds": 1})
    assert prompt_bits(one.path) == prompt_bits(other.path)


def test_the_gate_throws_a_poisoned_aggregate_away(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "attack": {"kind": "scaling", "share": 0.4, "strength": 1e4},
        "round": {"max_change": 1e6, "rounds": 2},
        "prompt": {"length": 4, "space": "key_value"},
    }
    attacked = run(tmp_path / "open", "scaling", **changes)
    assert all(record["accepted"] for record in attacked.records())
    checked = run(tmp_path / "checked", "scaling", aggregation={"max_loss_rise": 0.02}, **changes)
    first, second = checked.records()
    assert first["accepted"] and not second["accepted"]
    assert (
        second["acceptance_loss"]
        > second["validation"]
        == first["validation"]
        < attacked.records()[1]["validation"]
    )


BESIEGED: dict[str, Any] = {
    "round": {"rounds": 1, "max_change": 1e9, "weighting": "uniform"},
    "partition": {"clients": 7, "server_share": 0.2},
    "server": {"steps": 2, "batch_size": 4},
}
FLIPPED = {"kind": "sign_flip", "share": 0.3, "strength": 1e3}


def validation_of(one: RunDirectory) -> float:
    return float(one.records()[0]["validation"])


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    """The validation loss of a plain mean with malicious clients, and without."""
    folder = tmp_path_factory.mktemp("averaged")
    plain = run(folder / "plain", "sign_flip", attack=FLIPPED, **BESIEGED)
    return validation_of(plain), validation_of(run(folder / "honest", "none", **BESIEGED))


@pytest.mark.study
@pytest.mark.parametrize(
    "rule",
    ["median", "trimmed_mean", "multi_krum", "geometric_median", "centred_clipping", "trust"],
)
def test_a_robust_run_is_near_the_honest_one(
    tmp_path: Path, rule: str, averaged: tuple[float, float]
) -> None:
    plain, honest = averaged
    rules = {"rule": rule, "malicious": 0.3}
    robust = validation_of(
        run(tmp_path, "sign_flip", attack=FLIPPED, aggregation=rules, **BESIEGED)
    )
    assert abs(robust - honest) < abs(plain - honest)


def test_too_few_clients_for_the_rule_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        TooFewClients,
        match=(
            r"5 replies are too few for aggregation.rule = 'krum' to withstand 2 malicious clients"
            r" of 5 asked: it needs 7"
        ),
    ):
        run(
            tmp_path,
            "none",
            aggregation={"rule": "krum", "malicious": 0.4},
            round={"rounds": 1, "weighting": "uniform"},
        )
    with pytest.raises(TooFewClients, match=r"5 replies are too few for aggregation.rule = 'krum'"):
        commands.plan(
            make_config(
                settings(
                    tmp_path,
                    aggregation={"rule": "krum", "malicious": 0.4},
                    round={"weighting": "uniform"},
                    partition={"clients": 5},
                )
            )
        )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"aggregation": {"max_loss_rise": 0.1}, "validation": {"by": "none"}},
            "aggregation.max_loss_rise: the acceptance check needs validation.by = 'server'",
        ),
        (
            {
                "aggregation": {"rule": "trust"},
                "server": {"steps": 0},
                "round": {"weighting": "uniform"},
            },
            "aggregation.rule: trust compares updates with the server's own step",
        ),
        ({"aggregation": {"rule": "average"}}, "aggregation.rule"),
        (
            {"aggregation": {"mixing": True}},
            "round.weighting: robust rules, mixing and norm_bound weight all clients equally",
        ),
        ({"attack": {"kind": "sybil"}}, "attack.kind"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        make_config(settings(tmp_path, **changes))
    assert sentence in str(error.value)
