"""Robust aggregation: against independent implementations, and against what malicious clients
send."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedsp.errors import TooFewClients
from fedsp.federation.aggregation.mean import validate_update
from fedsp.federation.aggregation.robust import (
    RULES,
    Robust,
    centred_clipping,
    geometric_median,
    krum,
    median,
    multi_krum,
    nearest_neighbour_mixing,
    norm_bounded,
    trimmed_mean,
    trusted,
)
from fedsp.federation.loop import RunState, _accept, _Cached
from fedsp.federation.messages import Request, Update
from fedsp.models.payload import Payload


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "f"), [(10, 2), (11, 3), (7, 0)])
def test_rules_equal_byzfl(n: int, f: int, seed: int) -> None:
    byzfl = pytest.importorskip("byzfl", reason="byzfl is a development oracle")
    table = rows(n, 30, seed)
    theirs = {
        median: byzfl.Median(),
        trimmed_mean: byzfl.TrMean(f=f),
    }
    assert torch.allclose(
        krum(table, f), torch.as_tensor(byzfl.Krum(f=f + 1)(table.numpy())), atol=1e-9
    )  # it takes one neighbour more than the paper
    for ours, other in theirs.items():
        assert torch.allclose(ours(table, f), torch.as_tensor(other(table.numpy())), atol=1e-9), (
            ours.__name__
        )
    assert torch.allclose(
        geometric_median(table, f),
        torch.as_tensor(byzfl.GeometricMedian(nu=1e-12, T=2000)(table.numpy())),
        atol=1e-5,
    )
    assert torch.allclose(
        nearest_neighbour_mixing(table, f),
        torch.as_tensor(byzfl.NNM(f=f)(table.numpy())),
        atol=1e-9,
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "f"), [(10, 2), (11, 3), (7, 1)])
def test_rules_equal_flowers(n: int, f: int, seed: int) -> None:
    flower: Any = pytest.importorskip(
        "flwr.server.strategy.aggregate", reason="Flower comes with the flower extra"
    )
    table = rows(n, 30, seed)
    results = [([row.numpy()], 1) for row in table]
    assert np.allclose(median(table, f), flower.aggregate_median(results)[0])
    assert np.allclose(trimmed_mean(table, f), flower.aggregate_trimmed_avg(results, f / n)[0])
    assert np.allclose(krum(table, f), flower.aggregate_krum(results, f, 0)[0])
    assert np.allclose(multi_krum(table, f), flower.aggregate_krum(results, f, n - f)[0])


@pytest.mark.parametrize("seed", range(5))
def test_rules_equal_plain_definitions(seed: int) -> None:
    n, f = 9, 2
    table = rows(n, 12, seed)
    array = table.numpy()
    assert np.allclose(median(table, f), np.median(array, axis=0))
    assert np.allclose(trimmed_mean(table, f), np.sort(array, axis=0)[f : n - f].mean(axis=0))
    scores = []
    for i in range(n):
        distances = sorted(float(((array[i] - array[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(distances[: n - f - 2]))
    assert np.allclose(krum(table, f), array[int(np.argmin(scores))])
    assert np.allclose(multi_krum(table, f), array[np.argsort(scores)[: n - f]].mean(axis=0))
    mixed = [
        array[
            np.argsort([float(((array[i] - array[j]) ** 2).sum()) for j in range(n)])[: n - f]
        ].mean(axis=0)
        for i in range(n)
    ]
    assert np.allclose(nearest_neighbour_mixing(table, f), mixed)
    centre = geometric_median(table, f)
    gradient = sum((centre - row) / (centre - row).norm() for row in table)
    assert float(torch.as_tensor(gradient).norm()) < 1e-4


def test_trust_follows_the_servers_own_step_and_its_length() -> None:
    own = torch.tensor([3.0, 4.0], dtype=torch.float64)
    table = torch.stack([own * 100, -own, torch.tensor([4.0, -3.0], dtype=torch.float64)])
    assert torch.allclose(trusted(table, own), own)
    assert not trusted(-own[None], own).any()


def test_trust_weighs_by_the_cosine_and_gives_the_length_of_the_servers_step() -> None:
    """Of two that agree in part; the third, which turns away, counts nothing."""
    own = torch.tensor([0.3, 0.4, 0.0], dtype=torch.float64)
    table = torch.tensor([[8.0, 0.0, 6.0], [0.0, 0.02, 0.0], [-1.0, -1.0, 5.0]]).double()
    cosines = [0.48, 0.8]
    units = table[:2] / table[:2].norm(dim=1, keepdim=True)
    expected = 0.5 * sum(c * unit for c, unit in zip(cosines, units, strict=True)) / sum(cosines)
    assert torch.allclose(trusted(table, own), torch.as_tensor(expected))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_changes_of_any_size_are_treated_alike(scale: float) -> None:
    """What guards against a division by zero is far below any change."""
    table, own = rows(9, 12, 10), rows(1, 12, 11)[0]
    own += 3 * table[0]
    for name, rule in RULES.items():
        found = rule(table * scale, 2) / scale
        assert torch.allclose(found, rule(table, 2), rtol=1e-6, atol=1e-8), name
    assert torch.allclose(norm_bounded(table * scale, 0.5) / scale, norm_bounded(table, 0.5))
    assert torch.allclose(trusted(table * scale, own * scale) / scale, trusted(table, own))
    assert trusted(table, own).any()


def payloads(table: torch.Tensor) -> dict[str, Payload]:
    return {
        f"client-{index:02d}": {"a": row[:4].view(2, 2).float(), "b": row[4:].float()}
        for index, row in enumerate(table)
    }


SENT: Payload = {"a": torch.zeros(2, 2), "b": torch.zeros(8)}


@pytest.mark.parametrize("norm_bound", [0.0, 0.5])
@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("rule", [*RULES, "mean", "trust"])
def test_a_round_is_what_was_sent_and_the_rule_s_change(
    rule: str, mixing: bool, norm_bound: float
) -> None:
    """Of changes from what was sent, not of the replies: with a start far from zero, and of the
    server's own step too, for the rule that looks at it."""
    start, changes = rows(1, 12, 7)[0] * 30, rows(9, 12, 8)
    own = changes[0] + changes[1]
    sent = payloads(start[None])["client-00"]
    made = Robust(rule=rule, malicious=0.3, mixing=mixing, norm_bound=norm_bound)(
        sent, payloads(start + changes), {}, 9, payloads((start + own)[None])["client-00"]
    )
    expected, f = changes, 2
    if norm_bound:
        lengths = changes.norm(dim=1, keepdim=True)
        expected = changes * (0.5 * lengths.median() / lengths).clamp(max=1.0)
    if mixing:
        expected = nearest_neighbour_mixing(expected, f)
    if rule == "mean":
        change = expected.mean(dim=0)
    elif rule == "trust":
        change = trusted(expected, own)
    else:
        change = RULES[rule](expected, f)
    found = torch.cat([tensor.flatten() for tensor in made.values()]).double() - start
    assert torch.allclose(found, change, atol=1e-4)
    assert float(change.norm()) > 0.1


@pytest.mark.parametrize("lie", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("rule", [*RULES, "mean"])
def test_two_of_ten_malicious_clients_never_get_a_number_in_that_is_not_finite(
    rule: str, lie: float
) -> None:
    table = rows(10, 12, 0) * 0.1 + 1.0
    replies = payloads(table)
    for malicious_client in ("client-03", "client-07"):
        replies[malicious_client] = {"a": torch.full((2, 2), lie), "b": torch.full((8,), lie)}
    requests = {
        client: Request(run="run", round=1, client=client, seed=0, payload=SENT)
        for client in replies
    }
    admitted = {
        client: payload
        for client, payload in replies.items()
        if validate_update(
            Update(round=1, client=client, payload=payload),
            requests,
            {},
            math.inf if lie == 1e38 else 100.0,
        )
        is None
    }
    assert len(admitted) == (10 if lie == 1e38 else 8)
    combined = Robust(rule=rule, malicious=0.2, mixing=True, norm_bound=2.0)(
        SENT, admitted, {}, 10, None
    )
    numbers = torch.cat([tensor.flatten() for tensor in combined.values()])
    assert torch.isfinite(numbers).all() and float((numbers - 1).abs().max()) < 0.5


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(RULES)),
    st.booleans(),
    st.lists(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=12, max_size=12),
        min_size=2,
        max_size=2,
    ),
)
def test_rules_stay_within_the_honest_range(
    rule: str, mixing: bool, lies: list[list[float]]
) -> None:
    table = rows(8, 12, 3)
    replies = payloads(torch.cat([table, torch.tensor(lies, dtype=torch.float64)]))
    combined = Robust(rule=rule, malicious=0.2, mixing=mixing, norm_bound=2.0)(
        SENT, replies, {}, 10, None
    )
    numbers = torch.cat([tensor.flatten() for tensor in combined.values()])
    assert torch.isfinite(numbers).all() and float(numbers.norm()) <= 4 * float(
        table.norm(dim=1).max()
    )


@pytest.mark.parametrize("rule", sorted(RULES))
def test_too_few_clients_are_refused_and_never_clamped(rule: str) -> None:
    needed = 9 if "krum" in rule else 7
    with pytest.raises(
        TooFewClients,
        match=(
            f"{needed - 1} replies are too few .* to withstand 3 malicious clients of 10 asked: it"
            f" needs {needed}"
        ),
    ):
        Robust(rule=rule, malicious=0.3)(SENT, payloads(rows(needed - 1, 12, 0)), {}, 10, None)
    Robust(rule=rule, malicious=0.3)(SENT, payloads(rows(needed, 12, 0)), {}, 10, None)


@pytest.mark.parametrize("rule", [*sorted(RULES), "mean"])
def test_the_order_of_arrival_changes_no_bit(rule: str) -> None:
    replies: dict[str, Any] = payloads(rows(9, 12, 5))
    shuffled = dict(sorted(replies.items(), key=lambda item: hash(item[0])))
    one, other = (
        Robust(rule=rule, malicious=0.2, mixing=True, norm_bound=2.0)(SENT, some, {}, 9, None)
        for some in (replies, shuffled)
    )
    assert all(torch.equal(one[name], other[name]) for name in SENT)


def test_centred_clipping_equals_its_definition_and_withstands_a_liar() -> None:
    honest = rows(9, 12, 6) * 0.1 + 1.0
    poisoned = torch.cat([honest, torch.full((1, 12), 1e30, dtype=torch.float64)])
    for some in (honest, poisoned):
        point = np.median(some.numpy(), axis=0)
        for _ in range(3):
            lengths = [float(np.linalg.norm(row - point)) for row in some.numpy()]
            radius = sorted(lengths)[(len(lengths) - 1) // 2]
            point = point + sum(
                (row - point) * min(1.0, radius / length)
                for row, length in zip(some.numpy(), lengths, strict=True)
            ) / len(some)
        assert np.allclose(centred_clipping(some, 1).numpy(), point)
        assert float((centred_clipping(some, 1) - honest.mean(dim=0)).norm()) < 0.2


def test_less_than_one_malicious_client_is_refused() -> None:
    """A fifth of four clients is nobody: the rule would bear none and look as if it did."""
    for rule, mixing in (("trimmed_mean", False), ("mean", True), ("krum", False)):
        with pytest.raises(
            TooFewClients,
            match=r"malicious = 0.2 of 4 clients asked is less than one.*ask at least 5",
        ):
            Robust(rule=rule, malicious=0.2, mixing=mixing)(
                SENT, payloads(rows(4, 12, 0)), {}, 4, None
            )
    Robust(rule="mean", malicious=0.2, norm_bound=2.0)(SENT, payloads(rows(4, 12, 0)), {}, 4, None)
    for answered in (1, 2):  # a mean withstands nobody, with however many
        replies = payloads(rows(answered, 12, 0))
        Robust(rule="mean", malicious=0.4, norm_bound=2.0)(SENT, replies, {}, 5, None)
    Robust(rule="trimmed_mean", malicious=0.0)(SENT, payloads(rows(4, 12, 0)), {}, 4, None)
    with pytest.raises(TooFewClients, match="6 replies are too few"):
        Robust(rule="krum", malicious=0.4).malicious_among(6)


def test_the_acceptance_check_does_not_let_small_rises_add_up() -> None:
    losses = {1.0: 1.0, 2.0: 1.04, 3.0: 1.08}
    payload = {value: {"p": torch.tensor([value])} for value in losses}
    validate = lambda some: losses[float(some["p"])]
    state = RunState(round=1, payload=payload[2.0], best=payload[1.0], best_round=0, best_loss=1.0)
    assert _accept(
        RunState(round=0, payload=payload[1.0], best=payload[1.0], best_round=0, best_loss=1.0),
        payload[2.0],
        validate,
        0.05,
    )[1]
    assert not _accept(state, payload[3.0], validate, 0.05)[1]
    assert not _accept(state, payload[3.0], lambda some: float("nan"), 0.05)[1]


def test_a_prompt_is_tried_once() -> None:
    tried: list[float] = []

    def measure(payload: Payload) -> float:
        tried.append(float(payload["p"]))
        return tried[-1]

    validate = _Cached(measure, 3)
    one, other = {"p": torch.tensor([1.0])}, {"p": torch.tensor([2.0])}
    assert [validate(some) for some in (one, other, one, one, other)] == [
        1.0,
        2.0,
        1.0,
        1.0,
        2.0,
    ] and tried == [1.0, 2.0]
