"""Promises on the assembled path. Each part has tests of its own; what stands here is that the
parts are put together as the promise says: how much is clipped, drawn, noised and paid for in what
really leaves, in which order things reach the disk, and what a package really holds.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp import api as commands
from fedsp import privacy, storage
from fedsp.config_file import make_config
from fedsp.data.encoding import Encoded
from fedsp.errors import PrivacyError, StorageError
from fedsp.experiments import run_directory as runs
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.run_directory import RunDirectory, trained_rounds, validations
from fedsp.federation.aggregation.mean import ServerOptimizer, validate_update
from fedsp.federation.aggregation.private import DPAggregator
from fedsp.federation.agreement import agreement_of
from fedsp.federation.clients import make_method
from fedsp.federation.loop import RoundConfig, RunState, federate
from fedsp.federation.messages import Request, RoundRecord, Update
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.models.auxiliary import build_auxiliary, disclosed_share, parse_plan
from fedsp.models.loading import load_tokenizer
from fedsp.models.payload import PROMPT, Payload
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.privacy import Ledger, Release
from fedsp.training import dp_sgd as private_fitting
from fedsp.training.dp_sgd import PrivateSteps, fit_privately
from fedsp.training.loop import Optimisation
from fedsp.training.per_example_gradients import example_gradients
from support.small_runs import settings
from support.tiny_families import tiny_causal_lm
from support.tiny_models import tiny_model

TOKENIZER = load_tokenizer(str(EMBEDDED / "model"))


@pytest.fixture()
def fitted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A private fit of 60 examples whose gradients all point one way and are far longer than the
    bound; its lots, and the gradient that each step releases."""
    model = tiny_model("gpt2")
    prompt = SoftPrompt(
        PromptSpec(space="key_value", length=3, model=model.shape), torch.zeros(3, 4, 2, 4, 8)
    )
    model.together = 8
    monkeypatch.setattr(
        private_fitting,
        "example_gradients",
        lambda _m, _p, batch: (None, torch.full((len(batch.input_ids), 3, 4, 2, 4, 8), 50.0)),
    )

    def fit(steps: PrivateSteps, count: int = 60) -> list[tuple[int, torch.Tensor]]:
        released: list[tuple[int, torch.Tensor]] = []

        def optimize(_train: Any, gradients: Any, lots: Any, *_: Any, **__: Any) -> Any:
            for lot in lots:
                gradients(lot)
                assert prompt.direct.grad is not None
                released.append((len(lot), prompt.direct.grad.clone()))

        monkeypatch.setattr(private_fitting, "optimize", optimize)
        fit_privately(
            model,
            prompt,
            [Encoded((5, 6, 7, 8), 2)] * count,
            steps,
            Optimisation(learning_rate=1e-3),
        )
        return released

    return fit


def test_lots_are_poisson_samples_at_the_accounted_rate(fitted: Any) -> None:
    """Two thousand lots of 60 examples at a rate of 0.05: their mean, their spread, and that an
    empty one is a step like any other."""
    sizes = [
        size
        for size, _ in fitted(
            PrivateSteps(bound=1.0, noise_multiplier=1.0, sampling_rate=0.05, count=2000)
        )
    ]
    mean, variance = sum(sizes) / 2000, 60 * 0.05 * 0.95
    assert len(sizes) == 2000
    assert abs(mean - 3.0) < 5 * math.sqrt(variance / 2000)
    assert 0.8 * variance < sum((size - mean) ** 2 for size in sizes) / 2000 < 1.25 * variance
    assert 0.5 * 0.95**60 < sizes.count(0) / 2000 < 2 * 0.95**60


def test_lots_are_drawn_by_nobody_s_seed(fitted: Any) -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        drawn.append(
            [
                size
                for size, _ in fitted(
                    PrivateSteps(bound=1.0, noise_multiplier=1.0, sampling_rate=0.5, count=40)
                )
            ]
        )
    assert drawn[0] != drawn[1]


def test_what_a_step_releases_is_clipped_to_the_bound_and_divided_by_what_was_expected(
    fitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        privacy, "gaussian", lambda shape: torch.zeros(tuple(shape), dtype=torch.float64)
    )
    for size, gradient in fitted(
        PrivateSteps(bound=0.7, noise_multiplier=1.0, sampling_rate=0.1, count=30)
    ):
        assert float(gradient.norm()) == pytest.approx(0.7 * size / 6.0, rel=1e-5)


def test_what_an_empty_lot_releases_is_noise_of_the_accounted_size(
    fitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard deviation noise x bound / expected in every number, over lots that hold nobody."""
    monkeypatch.setattr(private_fitting, "poisson_sample", lambda *_: [])
    released = torch.stack(
        [
            gradient
            for _, gradient in fitted(
                PrivateSteps(bound=0.5, noise_multiplier=3.0, sampling_rate=0.1, count=60)
            )
        ]
    ).double()
    assert (
        float(released.std()) == pytest.approx(3.0 * 0.5 / 6.0, rel=0.02)
        and abs(float(released.mean())) < 0.01
    )
    assert not torch.equal(released[0], released[1])


def test_noise_has_all_the_digits_and_all_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "urandom", first(asked.append, os.urandom))
    noise = privacy.gaussian((1001,))
    assert noise.dtype == torch.float64 and sum(asked) == 4 * 16 * 501, (
        "four Box-Muller draws to a number, 16 bytes to a pair"
    )
    assert (noise.float().double() != noise).float().mean() > 0.99, (
        "numbers of float64, and not of float32 in its dress"
    )
    assert float(noise.std()) == pytest.approx(1.0, abs=0.1)


def test_every_bit_of_a_draw_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest of its 53 too, and what is added to a sum is not rounded on the way."""
    drawn = []
    for lowest in (0, 1):
        numbers = torch.full((4, 2), (1 << 52) + lowest, dtype=torch.int64)
        parts = iter([row.numpy().tobytes() for row in numbers])
        monkeypatch.setattr(os, "urandom", lambda _count, parts=parts: next(parts))
        drawn.append(privacy.gaussian((1,)))
    monkeypatch.undo()
    assert not torch.equal(*drawn)
    noised = privacy.noised_mean(torch.zeros(1000), bound=1.0, noise_multiplier=1.0, expected=1.0)
    assert (noised.float().double() != noised).double().mean() > 0.99


def first(note: Callable[..., object], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is noted before it is done."""

    def both(*arguments: Any, **named: Any) -> Any:
        note(*arguments)
        return function(*arguments, **named)

    return both


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches the disk, in order: every fsync and every rename, by the last name of the
    path."""
    events: list[str] = []
    monkeypatch.setattr(
        os,
        "fsync",
        first(
            lambda file: events.append(f"sync {Path(f'/proc/self/fd/{file}').readlink().name}"),
            os.fsync,
        ),
    )
    for name in ("replace", "rename"):
        monkeypatch.setattr(
            Path,
            name,
            first(
                lambda _, target: events.append(f"place {Path(target).name}"), getattr(Path, name)
            ),
        )
    return events


def test_a_client_pays_on_the_disk_before_it_trains_and_keeps_its_answer_before_it_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2")
    spec = PromptSpec(space="residual", length=4, model=model.shape)
    config = make_config(
        settings(
            tmp_path,
            privacy={"unit": "example", "epsilon": 4.0},
            round={"rounds": 2},
            prompt={"length": 4},
        )
    )
    party = Party(
        id="a",
        model=model,
        messenger=SoftPrompt(spec, torch.zeros(spec.shape)),
        examples=[Encoded((5, 6, 7, 8), 2)] * 20,
        store=StateStore(tmp_path / "rest"),
        ledger=Ledger(tmp_path / "own" / privacy.LEDGER),
    )
    method = make_method(agreement_of(config, 64), None)
    private_fitting.examples_together(model, party.prompt, 4)
    events = written(monkeypatch)
    monkeypatch.setattr(
        private_fitting,
        "example_gradients",
        first(lambda *_: events.append("train"), example_gradients),
    )
    monkeypatch.setattr(private_fitting, "poisson_sample", lambda count, _rate: list(range(4)))
    method.client_update(
        party,
        Request(run="run", round=1, client="a", seed=7, payload={PROMPT: torch.zeros(spec.shape)}),
    )
    assert (
        events.index("sync privacy.jsonl")
        < events.index("sync own")
        < events.index("place privacy.jsonl.head")
        < events.index("train")
    )
    assert events[-1] == "place round-00001.safetensors" and len(events) - 1 > max(
        place for place, event in enumerate(events) if event == "train"
    )


def reply(client: str, payload: Payload, round: int = 1) -> Update:
    return Update(round=round, client=client, payload=payload)


class Nothing:
    """A method whose server takes what it is given."""

    def init(self, server: Any) -> Payload:
        return {PROMPT: torch.zeros(400)}

    def server_update(
        self, server: Any, aggregated: Payload, round: int, seed: int
    ) -> tuple[Payload, float | None]:
        return aggregated, None


def rounds_of(
    settings: RoundConfig,
    transport: Any,
    register: dict[str, int],
    validate: Any = lambda payload: 1.0,
) -> list[RunState]:
    kept: list[RunState] = []
    method: Any = Nothing()
    federate(
        method,
        None,
        register,
        transport,
        settings,
        state=None,
        validate=validate,
        save=lambda state, _record: kept.append(state),
    )
    return kept


RULES = RoundConfig(
    run="run",
    seed=0,
    rounds=1,
    clients=None,
    min_clients=0,
    weighting="uniform",
    max_change=1.0,
    validate_by="none",
)


def test_a_private_round_without_replies_is_paid_for_and_noised(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / privacy.LEDGER)
    aggregator = DPAggregator(
        bound=2.0,
        noise_multiplier=3.0,
        sampling_rate=0.5,
        expected=2.0,
        delta=1e-5,
        epsilon=None,
        ledger=ledger,
    )
    (state,) = rounds_of(
        replace(RULES, aggregator=aggregator, sampling_rate=0.5),
        lambda requests: [],
        {f"c{index}": 1 for index in range(4)},
    )
    assert float(state.payload[PROMPT].double().std()) == pytest.approx(3.0 * 2.0 / 2.0, rel=0.15)
    assert ledger.releases() == (Release(3.0, 0.5, 1),)


def test_a_budget_pays_for_exactly_as_many_rounds_as_it_holds(tmp_path: Path) -> None:
    """At the very edge: what three rounds cost is enough for three, and a hair less is not."""
    cost = privacy.epsilon((Release(2.0, 1.0, 3),), 1e-5, 1e-3)
    for budget, rounds in ((cost, 3), (cost * (1 - 1e-6), 2)):
        ledger = Ledger(tmp_path / f"{rounds}" / privacy.LEDGER)
        aggregator = DPAggregator(
            bound=1.0,
            noise_multiplier=2.0,
            sampling_rate=1.0,
            expected=1.0,
            delta=1e-5,
            epsilon=budget,
            ledger=ledger,
        )
        with pytest.raises(PrivacyError, match="another round would exceed"):
            rounds_of(
                replace(RULES, rounds=9, aggregator=aggregator), lambda requests: [], {"a": 1}
            )
        assert sum(release.count for release in ledger.releases()) == rounds


def test_weights_come_from_the_register_alone() -> None:
    register = {"a": 3, "b": 1}
    (state,) = rounds_of(
        replace(RULES, weighting="examples"),
        lambda requests: [
            reply("a", {PROMPT: torch.ones(400)}),
            reply("b", {PROMPT: torch.zeros(400)}),
        ],
        register,
    )
    assert torch.allclose(state.payload[PROMPT], torch.full((400,), 0.75))


@pytest.mark.parametrize("most", [0.25, 4.0])
def test_a_change_is_judged_by_its_root_mean_square_at_the_very_edge(most: float) -> None:
    request = Request(run="run", round=1, client="a", seed=0, payload={PROMPT: torch.zeros(400)})
    one = torch.zeros(400)
    one[0] = (
        19.9 * most
    )  # its root mean square is 0.995 of the most: neither its largest number nor its length is
    for payload, admitted in (
        (torch.full((400,), 0.999 * most), True),
        (torch.full((400,), 1.001 * most), False),
        (one, True),
    ):
        refusal = validate_update(reply("a", {PROMPT: payload}), {"a": request}, {}, most)
        assert (refusal is None) == admitted, refusal


def test_an_aggregate_that_is_thrown_away_leaves_no_momentum() -> None:
    losses = iter([1.0, 9.0, 1.0, 1.0, 0.9, 0.9, 0.9])
    transport: Any = lambda requests: [
        reply("a", {PROMPT: requests[0].payload[PROMPT] + 0.1}, requests[0].round)
    ]
    settings = replace(
        RULES,
        rounds=2,
        validate_by="server",
        optimizer=ServerOptimizer("momentum", 1.0, 0.9),
        max_loss_rise=0.05,
    )
    first, second = rounds_of(settings, transport, {"a": 1}, lambda payload: next(losses))
    assert not first.optimizer and torch.equal(first.payload[PROMPT], torch.zeros(400))
    assert torch.allclose(second.payload[PROMPT], torch.full((400,), 0.1)), (
        "as if there had been no first round"
    )


def test_a_line_search_validates_each_length_once_and_its_choice_is_broadcast() -> None:
    asked: list[float] = []

    def loss(payload: Payload) -> float:
        asked.append(float(payload[PROMPT][0]))
        return abs(asked[-1] - 0.21)

    transport: Any = lambda requests: [
        reply("a", {PROMPT: requests[0].payload[PROMPT] + 0.1}, requests[0].round)
    ]
    settings = replace(
        RULES, rounds=1, validate_by="server", optimizer=ServerOptimizer("line_search")
    )
    (state,) = rounds_of(settings, transport, {"a": 1}, loss)
    assert asked == pytest.approx([0.0, 0.1, 0.15, 0.2, 0.3])
    assert torch.allclose(state.payload[PROMPT], torch.full((400,), 0.2))
    assert state.best_loss == pytest.approx(0.01, abs=1e-6) and state.best is state.payload


def test_a_file_is_replaced_in_one_step_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    storage.write_bytes(path, b"old")
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(StorageError):
        storage.write_bytes(path, b"new and longer")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_is_what_makes_a_round_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal first, the checkpoint last; and a round that is done again stands in the journal
    once."""
    write = storage.write_tensors

    def killed(path: Path, *rest: Any) -> str:
        if path.parent.name == "checkpoint" and path.stem == "round-00002":
            assert [
                record["round"] for record in RunDirectory.open(tmp_path / "run").records()
            ] == [1, 2]
            assert (tmp_path / "run" / "prompts" / "round-00002.safetensors").exists()
            raise KeyboardInterrupt
        return write(path, *rest)

    monkeypatch.setattr(runs, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        commands.run(settings(tmp_path))
    monkeypatch.undo()
    commands.resume(tmp_path / "run")
    assert [record["round"] for record in RunDirectory.open(tmp_path / "run").records()] == [
        1,
        2,
        3,
    ]
    assert sorted(path.stem for path in (tmp_path / "run" / "checkpoint").iterdir()) == [
        "round-00002",
        "round-00003",
    ]


def test_an_agreement_names_no_file_of_the_server(tmp_path: Path) -> None:
    values = settings(
        tmp_path, prompt={"length": 4, "init": "text", "init_text": str(EMBEDDED / "public.txt")}
    )
    text = agreement_of(make_config(values), 64).model_dump_json()
    assert str(EMBEDDED) not in text and str(tmp_path) not in text and "public.txt" not in text


def pieces(tensor: torch.Tensor) -> set[bytes]:
    data = tensor.detach().float().contiguous().numpy().tobytes()
    return {data[start : start + 64] for start in range(0, len(data) - 63, 64)}


@pytest.mark.parametrize("policy", ["verbatim", "low_rank", "fresh"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_package_holds_of_the_embeddings_what_its_policy_says(family: str, policy: Any) -> None:
    """Of tokens, of positions, and of a head that is not tied: 64-byte pieces of the global
    model's, looked for in all of a package."""
    untied: dict[str, Any] = {"tie_word_embeddings": False} if family != "gpt2" else {}
    made = tiny_causal_lm(family, vocab_size=160, **untied)
    model = PromptedLM(made, family)
    auxiliary = build_auxiliary(
        model, parse_plan("ends(1)", 4), TOKENIZER, embeddings=policy, rank=4
    )
    held = set().union(*(pieces(tensor) for tensor in auxiliary.weights().values()))
    tables = {
        "tokens": made.get_input_embeddings().weight,
        "head": made.get_output_embeddings().weight,
    }
    tables |= {
        name: module.weight
        for name, module in made.named_modules()
        if isinstance(module, torch.nn.Embedding)
    }
    for name, table in tables.items():
        assert bool(held & pieces(table)) == (policy == "verbatim"), name
    ends = [
        set().union(
            *(
                pieces(parameter)
                for parameter in model.blocks[layer].parameters()
                if parameter.dim() > 1
            )
        )
        for layer in (0, 3)
    ]
    assert all(end <= held for end in ends)


def test_what_a_package_discloses_is_counted_whole() -> None:
    """Held against a plain count of equal numbers, tensor by tensor."""
    model = PromptedLM(tiny_causal_lm("llama"), "llama")
    auxiliary = build_auxiliary(model, parse_plan("ends(1)", 4), TOKENIZER)
    with torch.no_grad():
        for parameter in auxiliary.distillable().values():
            parameter.add_(1.0)
    same: int = sum(
        parameter.numel()
        for name, parameter in model.model.named_parameters()
        if ".layers.1." not in name and ".layers.2." not in name
    )
    assert disclosed_share(auxiliary, model) == pytest.approx(
        same / sum(parameter.numel() for parameter in model.model.parameters()), abs=1e-6
    )


@pytest.mark.parametrize("lies", [False, True])
def test_one_malicious_client_of_ten_does_not_choose_the_round(lies: bool) -> None:
    """What clients report in a round is their loss under the prompt of the round before. A mean
    would go by the one who says 0 once, and the most otherwise."""
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}

    def transport(requests: list[Request]) -> list[Update]:
        told = [
            Update(
                round=request.round,
                client=request.client,
                payload=request.payload,
                validation=losses[request.round] + int(request.client[1:]) / 100,
            )
            for request in requests
        ]
        if lies:
            told[0] = replace(told[0], validation=0.0 if requests[0].round == 3 else 1e4)
        return told

    method: Any = Nothing()
    settings = replace(RULES, rounds=3, validate_by="clients")
    final = federate(
        method,
        None,
        {f"c{index}": 1 for index in range(10)},
        transport,
        settings,
        state=None,
        validate=lambda _: 0.0,
        save=lambda *_: None,
    )
    assert final.best_round == 1 and final.best_loss == pytest.approx(
        1.045 if not lies else 1.055, abs=0.011
    )


def judged(losses: list[dict[str, float]], **changes: Any) -> tuple[RunState, list[RoundRecord]]:
    """Rounds whose clients report these losses, each of what the round before left."""

    def transport(requests: list[Request]) -> list[Update]:
        told = losses[requests[0].round - 1]
        return [
            replace(reply(one.client, one.payload, one.round), validation=told.get(one.client))
            for one in requests
            if one.client in told
        ]

    records: list[RoundRecord] = []
    method: Any = Nothing()
    final = federate(
        method,
        None,
        dict.fromkeys("abc", 1),
        transport,
        replace(RULES, rounds=len(losses) - 1, validate_by="clients", **changes),
        state=None,
        validate=lambda _: 0.0,
        save=lambda _, record: records.append(record),
    )
    return final, records


def test_rounds_are_compared_by_clients_that_have_judged_both() -> None:
    """Where `c`, whose text is hard, is away, a round is not better for that."""
    final, _ = judged(
        [
            {"a": 2.0, "b": 2.0, "c": 9.0},
            {"a": 1.0, "b": 1.0, "c": 8.0},
            {"a": 1.5, "b": 1.5},
            {"c": 7.0},
            {"a": 1.2, "b": 1.2, "c": 8.5},
        ]
    )
    assert final.best_round == 3 and final.best_losses == {"c": 7.0}
    final, _ = judged([{"a": 1.0}, {"b": 2.0}, {"b": 3.0}])
    assert final.best_round == 1, "nobody has judged the first and another one"


def test_what_clients_report_stands_at_the_round_that_it_is_of() -> None:
    final, records = judged([dict.fromkeys("abc", loss) for loss in (3.0, 1.0, 2.0)])
    assert final.best_round == 1 and final.best_loss == 1.0
    lines = [asdict(record) for record in records]
    assert validations(lines) == {0: 3.0, 1: 1.0, 2: 2.0}
    assert [line["trained"] for line in lines] == [True, True, False]
    assert len(trained_rounds(lines)) == 2 and lines[-1]["asked"] == ["a", "b", "c"]


def test_where_no_client_has_judged_the_last_round_stands() -> None:
    final, _ = judged([{"a": math.nan}, {}, {}])
    assert (final.best_round, final.best_loss) == (2, None)
