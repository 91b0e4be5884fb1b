"""Admission, means and server optimizers, by hand and by slow references."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedsp.federation.aggregation.mean import (
    STEPS,
    Aggregator,
    ServerOptimizer,
    update_cosine,
    validate_update,
    weighted_mean,
)
from fedsp.federation.aggregation.private import private_mean
from fedsp.federation.messages import Failure, Request, Update
from fedsp.models.payload import Payload

SENT: Payload = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0])}
REQUEST = Request(run="run", round=2, client="x", seed=0, payload=SENT)
REPLY = Update(round=2, client="x", payload={"a": SENT["a"] + 0.5, "b": SENT["b"] + 0.5})


def test_a_reply_of_one_number_is_as_far_as_that_number() -> None:
    sent, reply = {"a": torch.tensor([1.0])}, {"a": torch.tensor([3.0])}
    request = Request(run="run", round=2, client="x", seed=0, payload=sent)
    update = Update(round=2, client="x", payload=reply)
    assert "differs from the broadcast by 2 per" in str(
        validate_update(update, {"x": request}, {}, 1.9)
    )
    assert validate_update(update, {"x": request}, {}, 2.0) is None


@pytest.mark.parametrize(
    ("reply", "seen", "most", "why"),
    [
        (REPLY, {}, 0.5, None),
        (REPLY, {"y": 0}, 0.5, None),
        (
            REPLY,
            {},
            0.4999,
            (
                "the reply differs from the broadcast by 0.5 per value (root mean square), more"
                " than round.max_change = 0.4999"
            ),
        ),
        (Failure(round=2, client="x", reason="it failed"), {}, 1.0, "it failed"),
        (replace(REPLY, client="z"), {}, 1.0, "client 'z' was not asked in this round"),
        (REPLY, {"x": 0}, 1.0, "a second reply to one request"),
        (replace(REPLY, round=1), {}, 1.0, "a reply to round 1 in round 2"),
        (replace(REPLY, payload={"a": REPLY.payload["a"]}), {}, 1.0, "expected"),
        (
            replace(REPLY, payload={**REPLY.payload, "b": torch.tensor([math.nan])}),
            {},
            1.0,
            "finite",
        ),
    ],
)
def test_what_is_admitted(
    reply: Update | Failure, seen: dict[str, object], most: float, why: str | None
) -> None:
    found = validate_update(reply, {"x": REQUEST}, seen, most)
    assert found == why if why is None or len(why) > 20 else why in str(found)


def test_the_distance_is_over_all_numbers_of_all_tensors_however_many() -> None:
    """Parts are looked at one by one: none is left out, and the first counts as much as the
    last."""
    sent = {"a": torch.zeros(3, 1 << 16), "b": torch.zeros(7)}
    for name, place in (("a", 0), ("a", 3 * (1 << 16) - 1), ("b", 6)):
        payload = {key: tensor.clone() for key, tensor in sent.items()}
        payload[name].view(-1)[place] = 100.0
        exact = 100.0 / math.sqrt(3 * (1 << 16) + 7)
        for most, admitted in ((exact * (1 + 1e-9), True), (exact * (1 - 1e-9), False)):
            assert (
                validate_update(
                    Update(round=1, client="x", payload=payload),
                    {"x": Request(run="run", round=1, client="x", seed=0, payload=sent)},
                    {},
                    most,
                )
                is None
            ) is admitted


def test_a_weighted_mean_is_that_in_any_order() -> None:
    payloads = {
        "q": {"b": torch.tensor([1.0]), "a": torch.tensor([2.0, -4.0])},
        "p": {"b": torch.tensor([5.0]), "a": torch.tensor([6.0, 0.0])},
    }
    mean = weighted_mean(payloads, {"p": 3.0, "q": 1.0, "absent": 100.0})
    assert (
        list(mean) == ["a", "b"]
        and mean["a"].tolist() == [5.0, -1.0]
        and mean["b"].tolist() == [4.0]
        and mean["a"].dtype == torch.float32
    )
    turned = weighted_mean(dict(reversed(payloads.items())), {"q": 1.0, "p": 3.0})
    assert all(torch.equal(mean[name], turned[name]) for name in mean)
    assert not (Aggregator().by_reference or Aggregator().always)
    called = Aggregator()(SENT, payloads, {"p": 3.0, "q": 1.0}, 2, None)
    assert all(torch.equal(mean[name], called[name]) for name in mean)


def test_a_mean_is_summed_in_float64() -> None:
    payloads = {
        str(number): {"a": torch.tensor([value])}
        for number, value in enumerate((2.0**25, 1.0, 1.0, -(2.0**25)))
    }
    assert weighted_mean(payloads, dict.fromkeys(payloads, 1.0))["a"].item() == 0.5


def test_the_cosine_between_updates_is_the_mean_over_pairs() -> None:
    changes = {
        "p": (3.0, 4.0, 0.0),
        "q": (0.0, 2.0, 0.0),
        "r": (0.0, 0.0, -7.0),
        "still": (0.0, 0.0, 0.0),
    }
    sent = {"a": torch.tensor([10.0, -20.0]), "b": torch.tensor([5.0])}
    payloads = {
        client: {"a": sent["a"] + torch.tensor(change[:2]), "b": sent["b"] + change[2]}
        for client, change in changes.items()
    }
    assert update_cosine(payloads, sent) == pytest.approx((0.8 + 0.0 + 0.0) / 3)
    assert update_cosine({name: payloads[name] for name in "pq"}, sent) == pytest.approx(0.8)
    assert (
        update_cosine({name: payloads[name] for name in ("p", "still")}, sent) is None
        and update_cosine({}, sent) is None
    )
    generator = torch.Generator().manual_seed(0)
    zero = {"a": torch.zeros(1000)}
    small = {name: {"a": 1e-4 * torch.randn(1000, generator=generator)} for name in "pqr"}
    unit = [small[name]["a"].double() / small[name]["a"].double().norm() for name in "pqr"]
    exact = sum(float(unit[one] @ unit[other]) for one, other in ((0, 1), (0, 2), (1, 2))) / 3
    assert update_cosine(small, zero) == pytest.approx(exact, abs=1e-14), (
        "however short, and in float64"
    )


@pytest.mark.parametrize("kind", ["none", "momentum"])
def test_a_server_optimizer_is_its_paper_s(kind: str) -> None:
    optimizer = ServerOptimizer(kind, learning_rate=0.5, momentum=0.8)  # type: ignore[arg-type]
    sent: Payload = {"a": torch.tensor([1.0, -2.0])}
    state: Payload = {}
    value, momentum = [1.0, -2.0], [0.0, 0.0]
    for mean in ([3.0, -2.5], [0.0, 1.0], [2.0, 2.0]):
        stepped, state = optimizer.step(sent, {"a": torch.tensor(mean)}, state, lambda _: 0.0)
        for place in range(2):
            momentum[place] = 0.8 * momentum[place] + mean[place] - value[place]
            value[place] = (
                value[place] + 0.5 * momentum[place] if kind == "momentum" else mean[place]
            )
        assert (
            stepped["a"].tolist() == pytest.approx(value, rel=1e-5)
            and stepped["a"].dtype == torch.float32
        )
        assert set(state) == ({"a"} if kind == "momentum" else set()) and all(
            tensor.dtype == torch.float32 for tensor in state.values()
        )
        sent = stepped


@pytest.mark.parametrize(
    ("target", "length"), [(0.4, 1.0), (1.4, 1.5), (1.9, 2.0), (9.0, 3.0), (math.nan, 1.0)]
)
def test_a_line_search_goes_as_far_as_validation_falls(target: float, length: float) -> None:
    """In both tensors alike; where every loss is not finite, no further than the mean."""
    sent: Payload = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[5.0]])}
    mean: Payload = {"a": torch.tensor([2.0, -2.5]), "b": torch.tensor([[3.0]])}

    def loss(payload: Payload) -> float:
        return abs(float(payload["a"][0]) - 1.0 - target)

    stepped, state = ServerOptimizer("line_search").step(sent, mean, {}, loss)
    assert not state and stepped["a"].tolist() == [1.0 + length, -2.0 - length / 2]
    assert stepped["b"].tolist() == [[5.0 - 2 * length]] and (length > 1 or stepped is mean)


def test_a_line_search_never_goes_where_the_loss_is_no_number() -> None:
    """Whatever comes first: nothing is smaller than NaN."""
    mean: Payload = {"a": torch.tensor([1.0])}

    def loss(payload: Payload) -> float:
        length = float(payload["a"])
        return length if length > 1 else math.nan

    stepped, _ = ServerOptimizer("line_search").step({"a": torch.zeros(1)}, mean, {}, loss)
    assert math.isfinite(loss(stepped)) and float(stepped["a"]) == min(
        times for times in STEPS if times > 1
    )


def test_the_private_mean_goes_where_its_clients_go_divided_by_those_expected() -> None:
    """Without noise: each whole change, over all tensors together, is cut to the bound, and none is
    weighted."""
    changes = {"p": [0.3, 0.0, 0.0, 0.0, 0.4], "q": [0.0, -30.0, 0.0, 40.0, 0.0]}
    replies = {
        client: {"a": SENT["a"] + torch.tensor(change[:4]).view(2, 2), "b": SENT["b"] + change[4]}
        for client, change in changes.items()
    }
    mean = private_mean(SENT, replies, bound=1.0, noise_multiplier=0.0, expected=4.0)
    moved = [*(mean["a"] - SENT["a"]).flatten().tolist(), *(mean["b"] - SENT["b"]).tolist()]
    assert moved == pytest.approx([0.3 / 4, -0.6 / 4, 0.0, 0.8 / 4, 0.4 / 4], abs=1e-6)
    nobody = private_mean(SENT, {}, bound=1.0, noise_multiplier=0.0, expected=4.0)
    assert all(torch.equal(nobody[name], SENT[name]) for name in SENT)
