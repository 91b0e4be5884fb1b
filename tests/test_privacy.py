"""Differential privacy: the accountant's golden values, sensitivity, noise, ledgers, and the runs
that keep the promise."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from fedsp import api as commands
from fedsp import privacy
from fedsp.algorithm import FedSP
from fedsp.config import Agreement, PolicySection
from fedsp.config_file import make_config, validated
from fedsp.data.encoding import Encoded, collate
from fedsp.deployment import join as joining
from fedsp.errors import ConfigurationError, DataError, PolicyError, PrivacyError, StorageError
from fedsp.experiments import build
from fedsp.experiments import run as experiment
from fedsp.experiments.privacy_statement import privacy_statement
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.aggregation.private import private_mean
from fedsp.federation.agreement import agreement_of
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.clients import make_method
from fedsp.federation.messages import Request
from fedsp.federation.methods.private import PrivateAnswers
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.models.loading import reduce_precision
from fedsp.models.payload import PROMPT, Payload, as_row
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.privacy import (
    Ledger,
    Release,
    clipped_sum,
    epsilon,
    gaussian,
    noise_for,
    noised_mean,
    poisson_sample,
)
from fedsp.storage import locked, write_json
from fedsp.training import dp_sgd as private_fitting
from fedsp.training.dp_sgd import (
    ALONE,
    ExamplePrivacy,
    PrivateSteps,
    examples_together,
    fit_privately,
    private_gradient,
)
from fedsp.training.loop import Optimisation
from fedsp.training.per_example_gradients import example_gradients, example_losses
from support.private_runs import CLIENT, DELTA, EXAMPLE, private_party
from support.small_runs import settings
from support.tiny_families import LONG_ROPE, tiny_causal_lm
from support.tiny_models import tiny_model

FAMILIES = ["gpt2", "llama", "gemma", "opt"]


@pytest.mark.parametrize(
    ("release", "expected"),
    [(Release(1.0), 4.377), (Release(4.0, 1.0, 50), 8.596), (Release(1.0, 0.01, 1000), 1.828)],
    ids=["gaussian", "fifty gaussians", "poisson"],
)
def test_golden_epsilons(release: Release, expected: float) -> None:
    assert epsilon((release,), DELTA) == pytest.approx(expected, abs=2e-3)


def test_a_search_for_noise_keeps_under_the_target_and_near_it() -> None:
    noise = noise_for(3.0, DELTA, 0.05, 60)
    assert 2.95 < epsilon((Release(noise, 0.05, 60),), DELTA) <= 3.0


def test_opacus_agrees() -> None:
    accountants = pytest.importorskip(
        "opacus.accountants", reason="opacus is only a second opinion"
    )
    other = accountants.PRVAccountant()
    other.history = [(1.2, 0.02, 400)]
    assert epsilon((Release(1.2, 0.02, 400),), DELTA) == pytest.approx(
        other.get_epsilon(DELTA), rel=0.02
    )


def test_releases_of_several_kinds_are_composed() -> None:
    one, other = Release(1.0, 0.1, 10), Release(2.0, 1.0, 1)
    both = epsilon((one, other), DELTA)
    assert (
        max(epsilon((one,), DELTA), epsilon((other,), DELTA))
        < both
        < epsilon((one,), DELTA) + epsilon((other,), DELTA)
    )
    assert epsilon((Release(0.0),), DELTA) == float("inf")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("space", ["key_value", "residual"])
def test_gradients_of_a_batch_equal_a_loop(family: str, space: Any) -> None:
    model = tiny_model(family)
    prompt = SoftPrompt(
        PromptSpec(space=space, length=5, model=model.shape),
        torch.randn(
            PromptSpec(space=space, length=5, model=model.shape).shape,
            generator=torch.Generator().manual_seed(1),
        ),
    )
    rows = [
        Encoded(tuple(range(3, 3 + length)), start)
        for length, start in ((6, 2), (9, 8), (4, 1), (12, 5))
    ]
    losses, gradients = example_gradients(model, prompt, collate(rows))
    for index, row in enumerate(rows):
        loss = example_losses(model, prompt.prefix(model), collate([row]))
        (alone,) = torch.autograd.grad(loss.sum(), prompt.direct)
        assert float(loss.detach()) == pytest.approx(float(losses[index]), rel=1e-5)
        assert float((gradients[index] - alone).norm() / alone.norm()) < 1e-5


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=1, max_size=6),
    st.floats(1e-3, 1e3),
)
def test_one_row_more_or_less_changes_a_clipped_sum_by_the_bound_at_most(
    rows: list[list[float]], bound: float
) -> None:
    table = torch.tensor(rows, dtype=torch.float64)
    whole = clipped_sum(table, bound)
    for index in range(len(rows)):
        without = clipped_sum(torch.cat([table[:index], table[index + 1 :]]), bound)
        assert float((whole - without).norm()) <= bound * (1 + 1e-9)


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=6, max_size=6),
        min_size=1,
        max_size=5,
    ),
    st.floats(1e-3, 1e3),
)
def test_one_client_more_or_less_changes_the_private_mean_by_the_bound_at_most(
    rows: list[list[float]], bound: float
) -> None:
    sent = {"a": torch.zeros(2, 2), "b": torch.ones(2)}
    replies = {
        f"client-{i}": {"a": torch.tensor(row[:4]).view(2, 2), "b": torch.tensor(row[4:])}
        for i, row in enumerate(rows)
    }

    def mean(some: dict[str, Payload]) -> Tensor:
        return as_row(private_mean(sent, some, bound=bound, noise_multiplier=0.0, expected=1.0))

    whole = mean(replies)
    for client in replies:
        without = mean({other: payload for other, payload in replies.items() if other != client})
        assert float((whole - without).norm()) <= bound * (1 + 1e-5) + 1e-5


def test_noise_has_the_stated_variance_and_shape() -> None:
    draws = noised_mean(torch.zeros(400_000), bound=0.5, noise_multiplier=3.0, expected=4.0)
    assert (
        float(draws.std()) == pytest.approx(3.0 * 0.5 / 4.0, rel=0.01)
        and abs(float(draws.mean())) < 0.004
    )
    standard = gaussian((400_000,)).sort().values
    normal = torch.special.ndtr(standard)
    steps = torch.arange(1, len(normal) + 1, dtype=torch.float64) / len(normal)
    assert (
        float((normal - steps).abs().max()) < 2.8 / len(normal) ** 0.5
    )  # Kolmogorov-Smirnov, one chance in three million
    assert gaussian(()).shape == () and gaussian((0, 3)).shape == (0, 3)


def _draw(_: int) -> list[float]:
    torch.manual_seed(0)
    return gaussian((4,)).tolist()


def test_noise_and_samples_depend_on_no_seed_and_no_process() -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        drawn = [tuple(numbers) for numbers in pool.map(_draw, range(6), chunksize=1)]
    assert len({*drawn, tuple(_draw(0)), tuple(_draw(0))}) == 8
    torch.manual_seed(0)
    one = poisson_sample(200, 0.5)
    torch.manual_seed(0)
    assert one != poisson_sample(200, 0.5) and 50 < len(one) < 150


def test_a_lot_is_divided_by_what_was_expected_and_an_empty_one_releases_noise() -> None:
    model = tiny_model("gpt2")
    prompt = SoftPrompt(
        PromptSpec(space="residual", length=3, model=model.shape), torch.zeros(3, 4, 32)
    )
    rows = [Encoded((5, 6, 7, 8), 2), Encoded((9, 4, 3), 1)]
    quiet = PrivateSteps(bound=1e6, noise_multiplier=0.0, sampling_rate=0.1, count=1)
    _, each = example_gradients(model, prompt, collate(rows))
    assert torch.allclose(
        private_gradient(model, prompt, rows, 40, quiet, at_once=2),
        each.sum(dim=0).flatten() / 4,
        atol=1e-6,
    )
    assert not private_gradient(model, prompt, [], 40, quiet).any()
    assert private_gradient(model, prompt, [], 40, replace(quiet, noise_multiplier=1e-6)).all()


def test_a_broken_example_does_not_stop_a_private_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    prompt = SoftPrompt(
        PromptSpec(space="key_value", length=3, model=model.shape), torch.zeros(3, 4, 2, 4, 8)
    )
    broken = 0
    assert examples_together(model, prompt, 40) == 8

    def one_is_not_a_number(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal broken
        losses, each = example_gradients(*arguments)
        each[0] = torch.nan
        broken += 1
        return losses, each

    monkeypatch.setattr(private_fitting, "example_gradients", one_is_not_a_number)
    fitted = fit_privately(
        model,
        prompt,
        [Encoded((5, 6, 7), 2)] * 9,
        PrivateSteps(bound=1.0, noise_multiplier=1.0, sampling_rate=0.3, count=4),
        Optimisation(learning_rate=1e-2),
    )
    assert (
        broken
        and fitted.losses == []
        and torch.isfinite(prompt.values()).all()
        and prompt.values().any()
    )


BOUND = 0.01


def most_that_one_moves(
    model: PromptedLM, prompt: SoftPrompt, lot: list[Encoded], at_once: int
) -> float:
    """How far leaving out one example moves the clipped sum of a lot, at most, in units of the
    bound."""
    quiet = PrivateSteps(bound=BOUND, noise_multiplier=0.0, sampling_rate=1.0, count=1)

    def clipped(some: list[Encoded]) -> torch.Tensor:
        return private_gradient(model, prompt, some, 1, quiet, at_once).double().flatten()

    whole = clipped(lot)
    return (
        max(float((whole - clipped(lot[:out] + lot[out + 1 :])).norm()) for out in range(len(lot)))
        / BOUND
    )


def lot_of(count: int) -> list[Encoded]:
    drawn = torch.randint(3, 97, (count, 12), generator=torch.Generator().manual_seed(5)).tolist()
    return [Encoded(tuple(row[: 6 + place % 7]), 3) for place, row in enumerate(drawn)]


def with_outliers(precision: Any) -> PromptedLM:
    """A model one of whose tokens makes activations that LLM.int8 takes for outliers, and others do
    not."""
    made = tiny_causal_lm("llama", hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        made.get_input_embeddings().weight[lot_of(1)[0].ids[1], :8] = 40.0
        for layer in made.model.layers:
            layer.input_layernorm.weight[:8] = 4.0
    model = PromptedLM(made, "a model")
    if precision != "float32":
        reduce_precision(model, precision, "precision")
    return model


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "8bit"])
def test_an_example_moves_a_clipped_sum_by_the_bound_at_most_in_any_precision(
    precision: Any,
) -> None:
    pytest.importorskip("bitsandbytes", reason="8 bits come with the large extra")
    model = with_outliers(precision)
    prompt = SoftPrompt(
        PromptSpec(space="residual", length=3, model=model.shape),
        torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(3)),
    )
    together = examples_together(model, prompt, 40)
    assert together == (8 if precision == "float32" else 1)
    assert most_that_one_moves(model, prompt, lot_of(8), together) <= 1.0005
    if precision == "8bit":
        assert most_that_one_moves(model, prompt, lot_of(8), 8) > 1.005, (
            "together they would not keep the promise"
        )


def test_what_was_tried_out_in_one_precision_is_not_taken_for_another() -> None:
    model = PromptedLM(tiny_causal_lm("llama"), "a model")
    prompt = SoftPrompt(
        PromptSpec(space="key_value", length=3, model=model.shape),
        torch.randn(3, 4, 2, 2, 8, generator=torch.Generator().manual_seed(3)),
    )
    assert examples_together(model, prompt, 40) == 8
    reduce_precision(model, "bfloat16", "precision")
    assert examples_together(model, prompt, 40) == 1


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "gpt_oss", "mpt", "gemma2"])
def test_an_example_moves_a_clipped_sum_by_the_bound_at_most_in_families_that_could_mix_a_batch(
    family: str,
) -> None:
    model = PromptedLM(tiny_causal_lm(family), "a model")
    prompt = SoftPrompt(
        PromptSpec(space="residual", length=3, model=model.shape),
        torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(3)),
    )
    assert (
        most_that_one_moves(model, prompt, lot_of(8), examples_together(model, prompt, 40))
        <= 1.0005
    )


@pytest.mark.parametrize("where", ["run", "join"])
def test_no_private_run_starts_on_a_model_that_is_refused(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> int:
        raise PrivacyError("the model reads an example otherwise after another was read")

    if where == "run":
        monkeypatch.setattr(build, "examples_together", refuses)
        with pytest.raises(PrivacyError, match="reads an example otherwise"):
            commands.run(settings(tmp_path, **EXAMPLE))
        assert not RunDirectory.open(tmp_path / "run").records() and not list(
            (tmp_path / "run").rglob(privacy.LEDGER)
        )
        return
    from support.small_federation import make_federation, party_of

    _, place = make_federation(tmp_path, **EXAMPLE)
    monkeypatch.setattr(joining, "examples_together", refuses)
    with pytest.raises(PrivacyError, match="reads an example otherwise"):
        joining.Client(party_of(place), Callbacks())


def test_examples_that_change_each_other_are_read_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mechanism, and not the precision: a model whose batch is mixed, by whatever cause."""
    model = PromptedLM(tiny_causal_lm("llama"), "a model")
    prompt = SoftPrompt(
        PromptSpec(space="key_value", length=3, model=model.shape),
        torch.randn(3, 4, 2, 2, 8, generator=torch.Generator().manual_seed(3)),
    )
    block = model.blocks[1].forward
    monkeypatch.setattr(
        model.blocks[1],
        "forward",
        lambda hidden, *rest, **named: block(
            hidden + 0.1 * hidden.mean(dim=0, keepdim=True), *rest, **named
        ),
    )
    assert most_that_one_moves(model, prompt, lot_of(8), 8) > 1.01
    read: list[int] = []
    model.blocks[0].register_forward_pre_hook(
        lambda _module, arguments: read.append(len(arguments[0]))
    )
    assert examples_together(model, prompt, 40) == 1
    read.clear()
    fit_privately(
        model,
        prompt,
        lot_of(8),
        PrivateSteps(bound=1.0, noise_multiplier=1.0, sampling_rate=1.0, count=2),
        Optimisation(learning_rate=1e-2),
    )
    assert read == [1] * 16
    assert most_that_one_moves(model, prompt, lot_of(8), 1) <= 1.0005


def test_a_model_that_remembers_what_it_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PromptedLM(tiny_causal_lm("llama"), "a model")
    prompt = SoftPrompt(
        PromptSpec(space="key_value", length=3, model=model.shape),
        torch.randn(3, 4, 2, 2, 8, generator=torch.Generator().manual_seed(3)),
    )
    block, longest = model.blocks[1].forward, 0

    def remembers(hidden: torch.Tensor, *rest: Any, **named: Any) -> Any:
        nonlocal longest
        longest = max(longest, hidden.shape[1])
        return block(hidden * (1 + 0.01 * longest), *rest, **named)

    monkeypatch.setattr(model.blocks[1], "forward", remembers)
    with pytest.raises(
        PrivacyError,
        match="a model gives an example another gradient after reading other text",
    ):
        fit_privately(
            model,
            prompt,
            lot_of(8),
            PrivateSteps(bound=1.0, noise_multiplier=1.0, sampling_rate=1.0, count=2),
            Optimisation(learning_rate=1e-2),
        )


@pytest.mark.parametrize("length", [4, 40])
def test_a_long_neighbour_does_not_turn_the_rotations_of_a_short_example(length: int) -> None:
    """Long rope: read together in the rotations of the longest, one example moved the sum by
    several bounds."""
    model = PromptedLM(tiny_causal_lm("phi3", **LONG_ROPE), "a model")
    prompt = SoftPrompt(
        PromptSpec(space="key_value", length=3, model=model.shape),
        torch.randn(3, 4, 2, 2, 8, generator=torch.Generator().manual_seed(3)),
    )
    tokens = torch.randint(3, 97, (40,), generator=torch.Generator().manual_seed(6)).tolist()
    lot = [*lot_of(7), Encoded(tuple(tokens[:length]), 2)]
    assert examples_together(model, prompt, 40) == 8
    assert most_that_one_moves(model, prompt, lot, 8) <= 1.0005


def test_a_lock_is_for_one(tmp_path: Path) -> None:
    with locked(tmp_path / "state" / "lock", wait=False) as mine:
        assert mine
        with locked(tmp_path / "state" / "lock", wait=False) as theirs:
            assert not theirs
    with locked(tmp_path / "state" / "lock", wait=False) as again:
        assert again


def test_a_ledger_is_on_the_disk_first_and_a_torn_line_is_no_release(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "privacy.jsonl")
    ledger.spend(Release(1.0, 0.5, 3), run="a")
    ledger.spend(Release(2.0), run="b")
    with open(ledger.path, "ab") as file:
        file.write(b'{"noise_mult')
    again = Ledger(ledger.path)
    assert again.releases() == (Release(1.0, 0.5, 3), Release(2.0)) and again.releases("b") == (
        Release(2.0),
    )
    again.spend(Release(1.0, 0.5, 1))
    assert Ledger(ledger.path).releases() == (Release(1.0, 0.5, 4), Release(2.0))
    ledger.path.write_text("nonsense\n" + ledger.path.read_text())
    with pytest.raises(StorageError, match="line 1 of the privacy ledger .* is damaged"):
        Ledger(ledger.path)


def test_a_private_run_pays_first_and_tells_nothing_else(tmp_path: Path) -> None:
    folder = Path(commands.run(settings(tmp_path, **EXAMPLE))["folder"])
    run = RunDirectory.open(folder)
    for record in run.records():
        assert (
            not record["client_losses"]
            and not record["spikes"]
            and not record["shortened_examples"]
            and not record["failed"]
        )
    for client in ("client-0", "client-1", "client-2"):
        ledger = Ledger(run.state_store(f"client {client}").folder / privacy.LEDGER)
        assert sum(release.count for release in ledger.releases()) == 6
        assert ledger.epsilon(DELTA) <= 8.0
    statement = json.loads((folder / "privacy_statement.json").read_text())
    assert (
        statement["unit"] == "example"
        and 7 < statement["epsilon"] <= 8.0
        and statement["delta"] == DELTA
    )
    assert "epsilon" in statement["sentence"] and statement["not_covered"]
    assert (
        0
        < statement["self_test"]["largest_difference"]
        <= ALONE
        == statement["self_test"]["allowed"]
        and statement["self_test"]["examples_together"] == 8
    )


@pytest.mark.study
def test_two_private_runs_of_one_seed_differ(tmp_path: Path) -> None:
    one, other = (
        commands.run(settings(tmp_path / name, **EXAMPLE))["folder"] for name in ("one", "other")
    )
    assert (Path(one) / "best.safetensors").read_bytes() != (
        Path(other) / "best.safetensors"
    ).read_bytes()


def test_an_answer_is_given_once_and_a_budget_is_kept(tmp_path: Path) -> None:
    method, party, request = private_party(tmp_path)
    other = {PROMPT: request.payload[PROMPT] + 1}
    first = method.client_update(party, request)
    assert (
        torch.equal(method.client_update(party, request).payload[PROMPT], first.payload[PROMPT])
        and not first.losses
    )
    assert (
        party.ledger is not None and sum(release.count for release in party.ledger.releases()) == 2
    )
    method.client_update(party, replace(request, round=2))
    with pytest.raises(
        PolicyError, match="round 1 was answered already: another answer would be another release"
    ):
        method.client_update(party, replace(request, payload=other))
    with pytest.raises(PolicyError, match=r"more than the run's budget of epsilon = 4"):
        method.client_update(party, replace(request, round=3))
    with pytest.raises(PolicyError, match="validation by clients"):
        method.client_update(party, replace(request, train=False))
    with pytest.raises(PolicyError, match="more than this client's budget of epsilon = 0.5"):
        method.client_update(
            replace(party, max_epsilon=0.5, store=StateStore(tmp_path / "another")),
            replace(request, run="another", payload=other),
        )


def test_a_client_whose_ledger_was_taken_away_answers_nothing(tmp_path: Path) -> None:
    """The ledger and its head may both be gone: what was answered is still there."""
    method, party, request = private_party(tmp_path)
    method.client_update(party, request)
    assert party.ledger is not None
    for path in (party.ledger.path, party.ledger.path.with_name(f"{privacy.LEDGER}.head")):
        path.unlink()
    with pytest.raises(
        StorageError,
        match="has no entry for round 1, which was answered.* restore the ledger from a backup",
    ):
        method.client_update(
            replace(party, ledger=Ledger(party.ledger.path)), replace(request, round=2)
        )


def test_a_round_is_answered_once_for_ever_also_when_its_answer_is_no_longer_kept(
    tmp_path: Path,
) -> None:
    config = make_config(
        settings(
            tmp_path,
            privacy={"unit": "example", "noise_multiplier": 4.0},
            round={"rounds": 9},
            prompt={"length": 4},
        )
    )
    _, party, request = private_party(tmp_path)
    method = make_method(agreement_of(config, 64), None)
    for round in range(1, 7):
        method.client_update(party, replace(request, round=round))
    assert StateStore(party.store.folder / "answers").rounds() == [4, 5, 6]
    assert party.ledger is not None
    paid = party.ledger.releases()
    for round in (1, 2, 3):
        with pytest.raises(PolicyError, match=f"round {round} was answered already"):
            method.client_update(party, replace(request, round=round))
    method.client_update(party, replace(request, round=5))
    assert party.ledger.releases() == paid


@pytest.mark.parametrize(
    "what",
    [
        "removed",
        "a line less",
        "a line less and its head",
        "changed",
        "another",
        "head changed",
        "head removed",
        "the head of two lines before",
    ],
)
def test_a_ledger_that_is_not_the_one_written_last_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / privacy.LEDGER
    head = tmp_path / f"{privacy.LEDGER}.head"
    ledger = Ledger(path)
    for round in (1, 2, 3):
        ledger.spend(Release(1.0, 0.5, 2), run="run", round=round)
        assert Ledger(path).releases() == (Release(1.0, 0.5, 2 * round),)
    lines = path.read_bytes().splitlines(keepends=True)
    if what == "removed":
        path.unlink()
    elif what.startswith("a line less"):
        path.write_bytes(b"".join(lines[:2]))
        if "head" in what:  # a file of another number of lines, as if it had been kept from before
            head.write_text(json.dumps({"lines": 2, "chain": json.loads(lines[0])["chain"]}))
    elif what == "changed":
        path.write_bytes(
            path.read_bytes().replace(b'"noise_multiplier": 1.0', b'"noise_multiplier": 9.0', 1)
        )
    elif what == "another":
        other = Ledger(tmp_path / "other.jsonl")
        for round in (1, 2, 3):
            other.spend(Release(9.0, 0.5, 2), run="run", round=round)
        path.write_bytes(other.path.read_bytes())
    elif what == "head changed":
        head.write_text("nonsense")
    elif what == "head removed":
        head.unlink()
    else:
        head.write_text(json.dumps({"lines": 1, "chain": json.loads(lines[0])["chain"]}))
    with pytest.raises(StorageError, match="restore .* from a backup"):
        Ledger(path)


def test_a_crash_between_a_line_of_the_ledger_and_its_head_loses_nothing(tmp_path: Path) -> None:
    """However often it comes: each time the head is a line behind, and before the first line there
    is none."""
    path, head = tmp_path / privacy.LEDGER, tmp_path / f"{privacy.LEDGER}.head"

    def killed_at(round: int, written: list[int], where: Path, values: dict[str, Any]) -> None:
        if values["lines"] == round:
            raise OSError(5, "killed")
        written.append(values["lines"])
        write_json(where, values)

    for round in (1, 2, 3, 4):
        ledger, written = Ledger(path), list[int]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(privacy, "write_json", partial(killed_at, round, written))
            with pytest.raises(StorageError, match="nothing was released"):
                ledger.spend(Release(1.0, 0.5, 2), run="run", round=round)
        assert Ledger(path).releases() == (Release(1.0, 0.5, 2 * round),) and written == (
            [round - 1] if round > 1 else []
        )
    assert json.loads(head.read_bytes())["lines"] == 3


def test_a_crash_between_a_line_and_its_head_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / privacy.LEDGER)
    ledger.spend(Release(1.0))
    monkeypatch.setattr(privacy, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ledger.spend(Release(2.0))
    monkeypatch.undo()
    again = Ledger(ledger.path)
    assert again.releases() == (Release(1.0), Release(2.0))
    again.spend(Release(3.0))
    assert Ledger(ledger.path).releases() == (Release(1.0), Release(2.0), Release(3.0))


@pytest.mark.parametrize(
    "release",
    [
        Release(1.0, 0.5, 0),
        Release(float("inf")),
        Release(float("nan")),
        Release(0.0),
        Release(1.0, 0.0),
        Release(1.0, 2.0),
        Release(1.0, 1.0, -1),
    ],
)
def test_what_is_no_release_is_not_written_down(release: Release, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / privacy.LEDGER)
    with pytest.raises(ValueError, match="is not a valid release"):
        ledger.spend(release)
    assert not ledger.path.exists()


def test_hardly_any_noise_is_no_promise_and_costs_no_work() -> None:
    assert epsilon((Release(0.001, 0.5, 1000),), DELTA) == float("inf")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
@pytest.mark.parametrize(
    "key",
    [
        "privacy.epsilon",
        "privacy.clip",
        "privacy.noise_multiplier",
        "round.max_change",
        "client.learning_rate",
    ],
)
def test_no_number_of_a_configuration_is_infinite(key: str, value: float, tmp_path: Path) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigurationError, match=key):
        make_config(settings(tmp_path, **{section: {name: value}}))


def test_a_private_client_level_run(tmp_path: Path) -> None:
    said: list[str] = []
    folder = Path(
        commands.run(settings(tmp_path, **CLIENT), callbacks=Callbacks(info=said.append))["folder"]
    )
    assert (
        any("noise on the mean of 3 clients has 42.7 times" in line for line in said)
        and "learns of any one client" in said[-1]
    )
    assert Ledger(folder / privacy.LEDGER).releases() == (Release(2.0, 1.0, 3),)
    statement = json.loads((folder / "privacy_statement.json").read_text())
    assert statement["unit"] == "client" and statement["epsilon"] == pytest.approx(
        epsilon((Release(2.0, 1.0, 3),), DELTA), rel=1e-3
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"privacy": {"unit": "example"}}, "privacy.epsilon: set it, or privacy.noise_multiplier"),
        ({"privacy": {"epsilon": 3.0}}, "privacy.unit: it is 'none', so no noise is added"),
        (
            {"profile": "dp-example", "privacy": {"unit": "none"}},
            "privacy.unit: it is 'none', so no noise is added",
        ),
        (
            {"privacy": {"unit": "example", "epsilon": 1.0}, "client": {"auxiliary_steps": 2}},
            "client.auxiliary_steps: alternating training fits the auxiliary model",
        ),
        (
            {"privacy": {"unit": "example", "epsilon": 1.0}, "prompt": {"projection": 8}},
            "prompt.projection: private steps",
        ),
        (
            {"privacy": {"unit": "example", "epsilon": 1.0}, "client": {"proximal": 1.0}},
            "client.proximal: private steps",
        ),
        (
            {"privacy": {"unit": "example", "epsilon": 1.0}, "validation": {"by": "clients"}},
            "validation.by: losses that clients report",
        ),
        (
            {"privacy": {"unit": "client", "epsilon": 1.0}},
            "round.weighting: with privacy.unit = 'client'",
        ),
        (
            {"privacy": {"unit": "client", "epsilon": 1.0}, "round": {"weighting": "uniform"}},
            "round.min_clients: with privacy.unit = 'client'",
        ),
        (
            {
                "privacy": CLIENT["privacy"],
                "round": CLIENT["round"],
                "aggregation": {"rule": "median"},
            },
            "aggregation.rule: with privacy.unit = 'client'",
        ),
        (
            {"method": "fedprompt", "privacy": {"unit": "example", "epsilon": 1.0}},
            "privacy.unit: needs method = 'fedsp'",
        ),
    ],
)
def test_what_would_break_the_promise_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        make_config(settings(tmp_path, **changes))
    assert sentence in str(error.value)


def test_a_client_refuses_what_would_break_the_promise_whoever_signed_it(tmp_path: Path) -> None:
    """The same sentences from the agreement that comes with a package, and where a stage of a
    private method promises nothing, no answer."""
    config = make_config(settings(tmp_path, privacy={"unit": "example", "epsilon": 1.0}))
    honest = agreement_of(config, 64)
    for changes, sentence in (
        (
            {"client": honest.client.model_dump() | {"auxiliary_steps": 10}},
            "client.auxiliary_steps: alternating training fits the auxiliary model",
        ),
        ({"clients_validate": True}, "validation.by: losses that clients report"),
        (
            {"prompt": honest.prompt.model_dump() | {"projection": 8}},
            "prompt.projection: private steps",
        ),
        ({"privacy": {"unit": "example"}}, "privacy.epsilon: set it, or privacy.noise_multiplier"),
    ):
        with pytest.raises(ConfigurationError) as error:
            validated(Agreement, honest.model_dump() | changes, "agreement.json")
        assert sentence in str(error.value)
    method = make_method(honest, None)
    assert isinstance(method, PrivateAnswers) and isinstance(method.method, FedSP)
    leaking = replace(
        method,
        method=replace(
            method.method, auxiliary_stage=replace(method.method.auxiliary_stage, steps=1)
        ),
    )
    model = tiny_model("gpt2")
    prompt = SoftPrompt(
        PromptSpec(space="residual", length=4, model=model.shape), torch.zeros(4, 4, 32)
    )
    party = Party(
        id="a",
        model=model,
        messenger=prompt,
        examples=[Encoded((5, 6, 7, 8), 2)] * 20,
        store=StateStore(tmp_path / "rest"),
        ledger=Ledger(tmp_path / privacy.LEDGER),
    )
    with pytest.raises(PolicyError, match="the stage 'auxiliary' has no differential privacy"):
        leaking.client_update(
            party,
            Request(
                run="run", round=1, client="a", seed=7, payload={PROMPT: torch.zeros(4, 4, 32)}
            ),
        )
    with pytest.raises(
        ConfigurationError,
        match=r"policy.max_epsilon: policy.require_differential_privacy needs it",
    ):
        validated(PolicySection, {"require_differential_privacy": True}, "party.toml")


def test_where_clients_are_elsewhere_their_own_ledgers_are_what_is_stated(tmp_path: Path) -> None:
    """The server's register says how much a prompt weighs, not how many examples there are."""
    values = settings(tmp_path, privacy={"unit": "example", "epsilon": 2.0})
    del values["partition"]
    for promise, stated in (({"epsilon": 2.0}, 2.0), ({"noise_multiplier": 1.0}, None)):
        config = make_config(
            {
                **values,
                "output": str(tmp_path / str(stated)),
                "privacy": {"unit": "example", **promise},
                "federation": {"folder": "."},
            }
        )
        statement = privacy_statement(RunDirectory.create(config), {"a": 1, "b": 100_000}, 64)
        assert (
            statement is not None
            and statement["epsilon"] == stated
            and statement["by"] == "each client's own ledger"
        )
        assert (
            "epsilon = 2 at" if stated else "an epsilon that only its own ledger knows at"
        ) in statement["sentence"]


@pytest.mark.study
def test_a_statement_is_never_behind_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        RunDirectory, "save_round", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        commands.run(settings(tmp_path, **EXAMPLE))
    assert json.loads((tmp_path / "run" / "privacy_statement.json").read_text())["releases"] == 2


@pytest.mark.parametrize("changes", [EXAMPLE, CLIENT])
def test_costs_are_measured_on_nobodys_text(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[set[Encoded]] = []

    def measure(method: object, party: Party, *_: object, **__: object) -> dict[str, float]:
        measured.append(set(party.examples))
        return {}

    monkeypatch.setattr(experiment, "measure", measure)
    folder = Path(commands.run(settings(tmp_path, **changes))["folder"])
    clients = RunDirectory.open(folder).partition()
    assert clients and len(measured) == 2 and len(measured[1]) == 12, (
        "the twelve validation questions, not what a client holds"
    )


def test_a_promise_to_clients_that_nobody_asks_stops_nothing(tmp_path: Path) -> None:
    alone = {"round": {**CLIENT["round"], "clients": 0}, "server": {"steps": 1, "batch_size": 2}}
    assert "epsilon" not in commands.run(settings(tmp_path, **(CLIENT | alone)))


def test_a_delta_that_promises_nothing_is_refused(tmp_path: Path) -> None:
    """Before anything is trained, and no folder is left."""
    private = {"unit": "example", "epsilon": 1.0, "delta": 0.5}
    with pytest.raises(PrivacyError, match=r"privacy.delta = 0.5 is too large for \d+ examples"):
        commands.run(settings(tmp_path / "example", privacy=private))
    assert not (tmp_path / "example" / "run").exists()
    with pytest.raises(PrivacyError, match=r"privacy.delta = 0.5 is too large for 3 clients"):
        commands.run(
            settings(tmp_path, **(CLIENT | {"privacy": {**CLIENT["privacy"], "delta": 0.5}}))
        )
    with pytest.raises(PrivacyError, match=r"privacy.delta = 0.1 is too large for 20 examples"):
        ExamplePrivacy(bound=1.0, delta=0.1, rounds=3, epsilon=1.0).steps(20, 4, 2)


def test_profiles_fill_in_what_the_file_leaves_out(tmp_path: Path) -> None:
    values = settings(tmp_path)
    for section in ("round", "client"):
        values[section] = {
            key: value for key, value in values[section].items() if key not in ("batch_size",)
        }
    example = make_config(
        {**values, "profile": "dp-example", "preset": "paper", "prompt": {"length": 4}}
    )
    assert (
        example.privacy.unit == "example"
        and example.privacy.epsilon == 8.0
        and example.client.auxiliary_steps == 0
        and example.client.batch_size == 32
    )
    client = make_config({**values, "profile": "dp-client", "privacy": {"noise_multiplier": 3.0}})
    assert (
        client.privacy.epsilon is None
        and client.privacy.noise_multiplier == 3.0
        and client.round.min_clients == 0
    )
    robust = make_config({**values, "profile": "robust", "aggregation": {"malicious": 0.1}})
    assert (
        robust.aggregation.rule == "trimmed_mean"
        and robust.aggregation.mixing
        and robust.aggregation.malicious == 0.1
    )
    assert (
        make_config(robust.model_dump(exclude_none=True)) == robust
        and make_config(client.model_dump(exclude_none=True)) == client
    )
    with pytest.raises(ConfigurationError, match="profile"):
        make_config({**values, "profile": "secure"})


def run_killed_in_its_second_round(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between what it releases and the checkpoint that makes the round count."""
    keep, kept = RunDirectory.save_round, 0

    def killed(self: RunDirectory, *arguments: Any) -> None:
        nonlocal kept
        kept += 1
        if kept == 2:
            raise KeyboardInterrupt
        keep(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_round", killed)
        with pytest.raises(KeyboardInterrupt):
            commands.run(values)


def test_a_resumed_private_run_is_never_behind_its_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the release and the checkpoint: the answers that were given are given again,
    and nothing is paid twice."""
    values = settings(tmp_path, **EXAMPLE)
    run_killed_in_its_second_round(values, monkeypatch)
    run = RunDirectory.open(tmp_path / "run")
    ledger = run.state_store("client client-0").folder / privacy.LEDGER
    assert sum(release.count for release in Ledger(ledger).releases()) == 4
    given = StateStore(run.state_store("client client-0").folder / "answers").at(2)
    commands.resume(tmp_path / "run")
    assert sum(release.count for release in Ledger(ledger).releases()) == 6
    again = StateStore(run.state_store("client client-0").folder / "answers").at(2)
    assert all(torch.equal(given[name], again[name]) for name in given)


def test_a_client_level_server_pays_before_it_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        RunDirectory, "save_round", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        commands.run(settings(tmp_path, **CLIENT))
    assert (
        sum(release.count for release in Ledger(tmp_path / "run" / privacy.LEDGER).releases()) == 1
    )


def test_a_client_level_run_whose_ledger_was_taken_away_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_killed_in_its_second_round(settings(tmp_path, **CLIENT), monkeypatch)
    for path in (tmp_path / "run").glob(f"{privacy.LEDGER}*"):
        path.unlink()
    with pytest.raises(
        StorageError,
        match="has fewer releases than the 1 finished rounds.* restore it from a backup",
    ):
        commands.resume(tmp_path / "run")


def test_a_spent_budget_stops_a_client_level_run(tmp_path: Path) -> None:
    changes = {**CLIENT, "privacy": {"unit": "client", "epsilon": 4.0, "clip": 0.5}}
    (tmp_path / "run").mkdir()
    values = settings(tmp_path, **changes)
    Ledger(tmp_path / "spent.jsonl").spend(Release(0.5))
    directory = RunDirectory.create(make_config(values))
    (directory.path / privacy.LEDGER).write_bytes((tmp_path / "spent.jsonl").read_bytes())
    with pytest.raises(PrivacyError, match=r"another round would exceed privacy.epsilon = 4"):
        commands.resume(directory.path)


def test_no_text_of_a_client_is_in_any_file_of_a_run(tmp_path: Path) -> None:
    canary = "Quixotryanvil"
    values = settings(tmp_path, **EXAMPLE)
    rows = [json.loads(line) for line in Path(values["data"]["train"]).read_text().splitlines()]
    Path(values["data"]["train"]).write_text(
        "".join(
            json.dumps(row | {"question": f"{canary} {row['question']}"}) + "\n" for row in rows
        )
    )
    said: list[str] = []
    folder = Path(commands.run(values, callbacks=Callbacks(info=said.append))["folder"])
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20 and not any(canary.encode() in path.read_bytes() for path in files)
    assert said and not any(canary in line for line in said)
    Path(values["data"]["train"]).write_text(
        json.dumps({"question": canary, "choices": canary, "answer": canary}) + "\n"
    )
    with pytest.raises(DataError) as error:
        commands.run(values | {"output": str(tmp_path / "broken")})
    assert canary not in str(error.value)
