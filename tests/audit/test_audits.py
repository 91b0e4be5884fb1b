"""Audits: each attack succeeds where it must (else its failures would say nothing), and finds
nothing where there is nothing to find."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsp import api as commands
from fedsp import privacy
from fedsp.audit.inversion import audit as inverting
from fedsp.audit.inversion import gradient_matching as matching
from fedsp.audit.inversion.scenarios import Recovery, guess, level, without_template
from fedsp.audit.inversion.span_test import (
    gradient_rows,
    key_dictionary,
    matching_pursuit,
    recall,
    recall_of,
    residual_dictionary,
    span_test,
)
from fedsp.audit.membership import likelihood_ratios, relative_ratios
from fedsp.audit.package_leakage import linear_cka
from fedsp.audit.registry import AUDITS, Audit, audit, check, findings, refusal
from fedsp.audit.shadows import Options, losses_under, open_audited, promise_of, train_shadow
from fedsp.audit.statistics import (
    auc,
    auc_ceiling,
    ceiling,
    exact_interval,
    hits_at,
    summarise_scores,
)
from fedsp.audit.summary import account
from fedsp.config_file import make_config
from fedsp.data.encoding import Encoded, collate
from fedsp.errors import AuxiliaryError, ConfigurationError, RunError
from fedsp.experiments.build import open_clients
from fedsp.experiments.embedded import EMBEDDED
from fedsp.federation.callbacks import Callbacks
from fedsp.models.auxiliary import build_auxiliary, disclosed_share, load_auxiliary, parse_plan
from fedsp.models.loading import load_tokenizer
from fedsp.models.soft_prompt import SoftPrompt
from fedsp.privacy import clipped_sum, gaussian, noised_mean
from fedsp.report.page import write_report
from fedsp.training.per_example_gradients import example_gradients
from support.attacked import TEXT, prompt_for
from support.small_runs import ROWS, distilled, questions
from support.tiny_models import tiny_model

pytestmark = pytest.mark.study


def audited(folder: Path, only: str | None = None, **options: Any) -> dict[str, dict[str, Any]]:
    """What `fedsp audit` does with one folder."""
    found = audit(folder, check(folder, only, Options(**options)), Options(**options))
    if why := refusal(found, only):
        raise RunError(why)
    return found


@pytest.mark.parametrize(
    ("family", "tokens"), [("gpt2", 6), ("llama", 3), ("gemma", 3), ("opt", 6), ("gpt_neox", 6)]
)
def test_one_step_on_one_example_gives_its_text_away(family: str, tokens: int) -> None:
    """Up to as many tokens as a head is wide; where several query heads share a key head, to that
    many times fewer."""
    model = tiny_model(family)
    prompt = prompt_for(model, "key_value", 16)
    dictionary = key_dictionary(model, prompt, tokens)
    row = Encoded(TEXT[: tokens + 1], tokens)
    gradient = example_gradients(model, prompt, collate([row]))[1][0]
    for sent in (gradient, gradient.half().float()):
        distances = span_test(gradient_rows(prompt, model, sent), dictionary, tokens)
        assert recall(distances, [row]) == 1.0
        assert distances.argmin(dim=1).tolist() == list(TEXT[:tokens])
    noised = (
        noised_mean(
            clipped_sum(gradient.flatten()[None], 1.0),
            bound=1.0,
            noise_multiplier=1.0,
            expected=1.0,
        )
        .float()
        .view_as(gradient)
    )
    assert recall(span_test(gradient_rows(prompt, model, noised), dictionary, tokens), [row]) < 0.5


def test_pursuit_reads_more_tokens_than_the_prompt_has() -> None:
    model = tiny_model("gpt2")
    prompt = prompt_for(model, "key_value", 4)
    row = Encoded(TEXT[:7], 6)  # six tokens, four rows, heads of eight
    rows = gradient_rows(prompt, model, example_gradients(model, prompt, collate([row]))[1][0])
    dictionary = key_dictionary(model, prompt, 6)
    assert recall(span_test(rows, dictionary, 4), [row]) < 1.0
    assert recall_of(matching_pursuit(rows, dictionary, 6), [row]) >= 5 / 6


def test_pursuit_takes_what_explains_the_rows() -> None:
    vectors = torch.nn.functional.normalize(
        torch.randn(3, 20, 2, 1, 6, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    coefficients = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(1))
    rows = torch.stack(
        [
            coefficients[head, :, :1] * vectors[0, 7, head]
            + coefficients[head, :, 1:] * vectors[2, 11, head]
            for head in range(2)
        ]
    )
    assert set(matching_pursuit(rows, vectors, 2)) == {(0, 7), (2, 11)}


def test_a_residual_prompts_gradient_is_no_span_to_read_from() -> None:
    """Each row passes through its own norm, so a single token's rows have full rank already: the
    test is tried as it is, and its distances stay far from zero."""
    model = tiny_model("gpt2")
    prompt = prompt_for(model, "residual", 24)
    row = Encoded(TEXT[:2], 1)
    rows = gradient_rows(prompt, model, example_gradients(model, prompt, collate([row]))[1][0])
    sizes = torch.linalg.svdvals(rows[0].double())
    assert int((sizes > 1e-6 * sizes[0]).sum()) == 24
    assert float(span_test(rows, residual_dictionary(model, prompt, 1), 1)[0, TEXT[0]]) > 0.01


def test_figures_of_scores() -> None:
    scores, members = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert auc(scores, members) == 0.75 and auc(np.zeros(4), members) == 0.5
    rng = np.random.default_rng(0)
    marks = rng.random(4000) < 0.5
    values = rng.normal(size=4000) + 2.0 * marks
    hits = hits_at(values, marks, 0.01)
    assert hits == pytest.approx(0.37, abs=0.06)
    assert hits_at(values[:400], marks[:400], 0.01) is None
    found = summarise_scores([values], [marks])
    assert found["auc"][1] < 0.921 < found["auc"][2] and found["hits_at_01"] is None
    assert found["hits_at_1"][1] < 0.3722 < found["hits_at_1"][2]


def test_intervals_hold_what_is_true_as_often_as_they_say() -> None:
    """Scores that know nothing, of six targets whose records have something in common: the share of
    members above the threshold is the share of the others."""
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        hardness = rng.normal(size=400)
        members = [rng.random(400) < 0.5 for _ in range(6)]
        found = summarise_scores(
            [hardness + rng.normal(size=400) for _ in members], members, resamples=100
        )["hits_at_1"]
        assert found is not None
        held += found[1] <= 0.01 <= found[2]
    assert held >= 51


def test_shadows_start_alike_whatever_was_tried_in_between(tmp_path: Path) -> None:
    opened = open_audited(
        Path(commands.run(distilled(tmp_path, server={"steps": 1, "batch_size": 2}))["folder"]),
        Callbacks(),
    )
    first = train_shadow(opened, 0)
    tuned = opened.federation.messenger
    assert isinstance(tuned, SoftPrompt)
    losses_under(opened.federation.model, tuned, first.broadcasts[-1], opened.encoded[:4])
    again, second = train_shadow(opened, 0), train_shadow(opened, 1)
    assert all(
        torch.equal(first.broadcasts[0][name], second.broadcasts[0][name])
        for name in first.broadcasts[0]
    )
    assert all(
        torch.equal(first.broadcasts[-1][name], again.broadcasts[-1][name])
        for name in first.broadcasts[-1]
    )
    assert not torch.equal(first.included, second.included)
    assert len(train_shadow(opened, 0, rounds=1).updates) == 1


def test_a_promise_by_its_noise_alone_is_one() -> None:
    for promise, said in (
        ({}, "no differential privacy of examples"),
        ({"unit": "client", "noise_multiplier": 1.0}, "no differential privacy of examples"),
        ({"unit": "example", "noise_multiplier": 1.5}, "noise_multiplier = 1.5"),
        ({"unit": "example", "epsilon": 2.5}, "epsilon = 2.5"),
    ):
        uniform = {"weighting": "uniform", "min_clients": 0}
        values = {"model": {"name": "x"}, "round": uniform, "privacy": promise}
        assert promise_of(make_config(values)) == said


def test_texts_that_all_give_the_same_are_no_certainty() -> None:
    """A bootstrap of them has no width; half of each is no more certain than half of them whole."""

    def row(*shares: float) -> tuple[float, ...]:
        found: tuple[float, ...] = level("a", "b", list(map(Recovery, shares)), 0.0)["tokens"]
        return found

    assert row(0.0, 0.0)[:2] == (0.0, 0.0) and row(0.0, 0.0)[2] == pytest.approx(0.842, abs=1e-3)
    assert row(*[1.0] * 20)[1] == pytest.approx(0.025 ** (1 / 20))
    assert row(0.5, 0.5)[1:] == exact_interval(1, 2)
    assert row(0.5) == (0.5, 0.0, 1.0)
    assert 0.2 < row(0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 0.5)[2] < 1.0


def test_a_template_is_no_secret() -> None:
    """What all texts begin with is cut off, and a guess knows what is common at each position."""
    rows = [Encoded((7, 8, token, 3, 4), 4) for token in (1, 1, 2)]
    bodies = without_template(rows)
    assert bodies[0] == Encoded((1, 3, 4), 2)
    assert guess([[body] for body in bodies], bodies) == pytest.approx((1 + 1 + 0.5) / 3)


def test_ceilings_of_a_promise() -> None:
    assert ceiling(0.0, 0.0, 0.3) == pytest.approx(0.3) and ceiling(np.inf, 0.0, 0.01) == 1.0
    assert ceiling(1.0, 1e-5, 0.01) == pytest.approx(np.e * 0.01 + 1e-5) and ceiling(
        3.0, 0.0, 0.9
    ) == pytest.approx(1 - np.exp(-3) * 0.1)
    assert (
        auc_ceiling(0.0, 0.0) == pytest.approx(0.5, abs=1e-3)
        and 0.5 < auc_ceiling(1.0, 0.0) < auc_ceiling(8.0, 0.0) < 1.0
    )


def test_shadows_sharpen_what_one_run_shows_dimly() -> None:
    rng = np.random.default_rng(1)
    hardness = rng.normal(size=600) * 5
    members = [rng.random(600) < 0.5 for _ in range(12)]
    losses = [3 + 0.1 * hardness - 0.1 * marks + 0.05 * rng.normal(size=600) for marks in members]
    plain = summarise_scores([-loss for loss in losses], members)["auc"][0]
    ratios = summarise_scores(likelihood_ratios([-loss for loss in losses], members), members)[
        "auc"
    ][0]
    relative = summarise_scores(relative_ratios(losses), members)["auc"][0]
    assert plain < 0.6 < 0.85 < min(ratios, relative)


def test_membership_is_seen_where_it_must_be_and_nowhere_else(tmp_path: Path) -> None:
    """Forty steps on a dozen questions with answers drawn at random, which can only be learned by
    heart."""
    rng = random.Random(0)
    answers = sorted({choice for row in ROWS for choice in row["choices"]})
    by_heart = [row | {"choices": rng.sample(answers, 4), "answer": 0} for row in ROWS[:24]]
    changes: dict[str, Any] = {
        "data": {
            "train": questions(tmp_path, "by-heart", by_heart),
            "validation": questions(tmp_path, "v", ROWS[100:104]),
            "test": questions(tmp_path, "t", ROWS[200:204]),
        },
        "partition": {"clients": 1, "server_share": 0.0},
        "round": {"rounds": 1},
        "client": {"prompt_steps": 40, "batch_size": 8, "learning_rate": 0.1},
        "prompt": {"length": 16},
    }
    folder = Path(commands.run(distilled(tmp_path, **changes))["folder"])
    figures = audited(folder, "membership", shadows=5)["membership"]
    assert max(row["auc"][0] for row in figures["rows"]) > 0.9, [
        (row["observer"], row["attack"], row["auc"]) for row in figures["rows"]
    ]
    assert all(
        control["auc"][1] - 0.1 < 0.5 < control["auc"][2] + 0.1
        for control in figures["controls"].values()
    )
    written = json.loads((folder / "membership.json").read_text())
    assert written["shadows"] == 5 and written["power"]["auc"][0] > 0.85
    with pytest.raises(ConfigurationError, match="--shadows 3: LiRA needs at least 4"):
        audited(folder, "membership", shadows=3)


def test_an_attacker_reads_what_little_the_distillation_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer sequences than a step of eight."""
    monkeypatch.setattr("fedsp.audit.package_leakage.STEPS", (0, 2))
    changes = {"distill": {"sequences": 4, "steps": 2}, "round": {"rounds": 1}}
    folder = Path(commands.run(distilled(tmp_path, **changes))["folder"])
    rows = audited(folder, "model")["model"]["extraction"]
    assert [row["tokens"] for row in rows] == [0, 2 * 4 * 32]


def test_every_audit_of_a_private_run_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inverting, "ITERATIONS", 3)
    monkeypatch.setattr(matching, "EXCHANGED", 1)
    monkeypatch.setattr("fedsp.audit.package_leakage.STEPS", (0, 4))
    folder = Path(
        commands.run(distilled(tmp_path, privacy={"unit": "example", "epsilon": 3.0}))["folder"]
    )
    found = audited(
        folder, "disclosure, depths, model, membership, inversion", shadows=4, records=20, texts=2
    )
    assert list(found) == ["disclosure", "depths", "model", "membership", "inversion"]
    assert (
        found["model"]["embeddings"] == "verbatim" and found["model"]["embedding_distance"] == 0.0
    )
    assert all(
        finding.rows for name, figures in found.items() for finding in findings(name, figures)
    )
    rows = json.loads((folder / "inversion.json").read_text())["rows"]
    assert (
        rows[0]["tokens"][0]
        > 0.9
        > 0.5
        > next(row for row in rows if "epsilon = 1" in row["level"])["tokens"][0]
    )
    assert {row["attack"] for row in rows} == {"span test", "pursuit", "gradient matching"}
    members = json.loads((folder / "membership.json").read_text())
    assert members["epsilon"] <= 3.0 and all(row["auc_ceiling"] < 1 for row in members["rows"])
    write_report([tmp_path], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert (
        "Audits" in page
        and "found at 1 % false alarms" in page
        and "What can malicious clients do?" in page
        and "learns of any one example" in page
    )
    with pytest.raises(RunError, match="the audit needs 1000 canaries"):
        audited(folder, "epsilon")
    with pytest.raises(
        ConfigurationError, match="there is no audit 'memership'; did you mean 'membership'"
    ):
        audited(folder, "memership")
    with pytest.raises(ConfigurationError, match="there is no audit ''; known: "):
        audited(folder, " ,")
    with pytest.raises(ConfigurationError, match="--shadows 3"):
        audited(folder, shadows=3)
    answers = {row["question"]: row["answer"] for row in account(folder).rows}
    assert list(answers) == [
        "What does a client learn of the model?",
        "What do others learn of the text?",
        "What is promised of the text?",
        "What can malicious clients do?",
    ]
    assert all(
        said in answers["What do others learn of the text?"]
        for said in (
            "no secure aggregation",
            "server, sums",
            "one client",
            "Out of ten plausible texts",
        )
    )
    assert "Not covered: other runs over the same text" in answers["What is promised of the text?"]
    assert "One malicious client of 3" in answers["What can malicious clients do?"]
    for name in ("membership", "disclosure"):
        whole = (folder / f"{name}.json").read_bytes()
        for damaged in (b"{}", whole[:50]):
            (folder / f"{name}.json").write_bytes(damaged)
            with pytest.raises(
                RunError, match=f"{name}.json (cannot be read|is not what fedsp wrote)"
            ):
                write_report([tmp_path], tmp_path / "report")
        (folder / f"{name}.json").write_bytes(whole)
    for damaged, why in (
        (b"{}", "best_round is missing"),
        (b"[]", "a JSON object is missing"),
        (b'{"best', "cannot be read"),
    ):
        (folder / "result.json").write_bytes(damaged)
        with pytest.raises(RunError, match=rf"holds no usable run: .*result\.json .*{why}"):
            audited(folder, "inversion")


def test_an_audit_holds_the_run_to_its_own_auxiliary_model(tmp_path: Path) -> None:
    folder, other = (
        Path(commands.run(distilled(tmp_path / name, seed=seed))["folder"])
        for name, seed in (("one", 0), ("two", 1))
    )
    shutil.rmtree(folder / "auxiliary")
    shutil.copytree(other / "auxiliary", folder / "auxiliary")
    for name in ("disclosure", "membership"):
        with pytest.raises(
            RunError, match="was started with another auxiliary model: restore the original"
        ):
            audited(folder, name, shadows=4)


def test_only_clients_that_answered_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three is asked: the others' changes are nothing, and count neither as text that was
    not found nor as scores."""
    monkeypatch.setattr(inverting, "ITERATIONS", 3)
    folder = Path(
        commands.run(
            distilled(tmp_path, round={"rounds": 1, "clients": 1, "weighting": "uniform"})
        )["folder"]
    )
    rows = audited(folder, "inversion", texts=0)["inversion"]["rows"]
    assert [row["read"] for row in rows if row["observed"]] == [1, 1, 1]
    figures = audited(folder, "membership", shadows=4)["membership"]
    assert all(0.0 <= row["auc"][0] <= 1.0 for row in figures["rows"])
    assert ("server", "cosine") in {(row["observer"], row["attack"]) for row in figures["rows"]}
    assert "cosine, others" not in {row["attack"] for row in figures["rows"]}, (
        "nobody else answered"
    )


def test_of_a_client_alone_its_own_text_alone_is_audited(tmp_path: Path) -> None:
    folder = Path(
        commands.run(distilled(tmp_path, round={"rounds": 1, "only": "client-1"}))["folder"]
    )
    opened = open_audited(folder, Callbacks())
    assert set(opened.holders) == {"client-1"}
    assert len(opened.rows) == len(opened.server.dataset.partition.clients["client-1"])
    assert train_shadow(opened, 0).answered == {"client-1"}
    clients = open_clients(opened.run.config, opened.auxiliary, opened.server.dataset, opened.run)
    assert set(clients.register) == {"client-1"}, "of which depths are measured"


def test_an_audit_with_nothing_to_compare_says_so(tmp_path: Path) -> None:
    folder = Path(commands.run(distilled(tmp_path))["folder"])
    with pytest.raises(
        RunError,
        match=(
            r"(are too few for a membership audit|too few records have a score).*take more"
            r" --records"
        ),
    ):
        audited(folder, "membership", shadows=4, records=2)


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        (
            {"aggregation": {"rule": "median", "malicious": 0.4}},
            "1 of the 3 asked in a round may be malicious (aggregation: median).",
        ),
        (
            {"aggregation": {"rule": "median", "malicious": 0.0}},
            "The rule (median) is set for no malicious client: aggregation.malicious = 0.",
        ),
        (
            {"aggregation": {"norm_bound": 2.0}},
            (
                "One malicious client of 3 can move the result: a mean tolerates none. Changes are"
                " cut to 2 times their median length."
            ),
        ),
        (
            {"privacy": {"unit": "client", "noise_multiplier": 2.0, "clip": 0.5}},
            "one malicious client moves the mean of a round by no more than 0.167, in any",
        ),
        (
            {"attack": {"kind": "sign_flip", "share": 0.4}},
            "In this run 40% of the clients lied, rounded down, by sign_flip",
        ),
    ],
)
def test_the_account_says_what_liars_can_do(
    changes: dict[str, Any], answer: str, tmp_path: Path
) -> None:
    rounds = {"rounds": 1, "weighting": "uniform", "min_clients": 0}
    folder = Path(
        commands.run(
            distilled(
                tmp_path,
                round=rounds,
                data={**distilled(tmp_path)["data"], "test": ""},
                **changes,
            )
        )["folder"]
    )
    assert answer in account(folder).rows[3]["answer"]


def test_records_without_a_score_do_not_count() -> None:
    scores, members = (
        np.array([3.0, np.nan, 1.0, 2.0, np.nan]),
        np.array([True, True, False, False, False]),
    )
    assert auc(scores, members) == auc(scores[[0, 2, 3]], members[[0, 2, 3]]) == 1.0


def test_the_epsilon_of_a_client_level_run_is_not_refuted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "privacy": {"unit": "client", "noise_multiplier": 2.0, "clip": 0.5},
        "round": {"rounds": 3, "weighting": "uniform", "min_clients": 0},
    }
    folder = Path(commands.run(distilled(tmp_path, **changes))["folder"])
    figures = audited(folder, "epsilon")["epsilon"]
    assert not figures["broken"] and figures["promised"] > figures["epsilon"]
    (finding,) = findings("epsilon", figures)
    assert finding.rows[0]["verdict"] == "not refuted"
    sampled = {
        **changes,
        "round": {**changes["round"], "rounds": 20, "clients": 1},
        "privacy": {**changes["privacy"], "noise_multiplier": 4.0},
    }
    folder = Path(commands.run(distilled(tmp_path / "sampled", **sampled))["folder"])
    figures = audited(folder, "epsilon")["epsilon"]
    assert not figures["broken"] and figures["epsilon"] < figures["promised"]
    monkeypatch.setattr(privacy, "gaussian", lambda shape: gaussian(shape) / 50)
    assert audited(folder, "epsilon")["epsilon"]["broken"], (
        "the audit goes through the run's own clipping, sum and noise"
    )
    plain = Path(commands.run(distilled(tmp_path / "plain"))["folder"])
    with pytest.raises(RunError, match="has no differential privacy"):
        audited(plain, "epsilon")


def test_what_a_run_does_not_allow_is_said_and_the_rest_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(
        commands.run(distilled(tmp_path, privacy={"unit": "example", "epsilon": 3.0}))["folder"]
    )
    for name in ("model", "membership", "inversion"):
        monkeypatch.setitem(AUDITS, name, Audit(lambda *_: {"done": 1}, lambda _: []))
    found = audited(folder)
    assert (
        found["membership"] == {"done": 1}
        and "the audit needs 1000 canaries" in found["epsilon"]["not_done"]
    )
    (finding,) = findings("epsilon", found["epsilon"])
    assert finding.title == "not done" and "1000 canaries" in finding.rows[0]["why"]
    with pytest.raises(
        ConfigurationError,
        match=(
            "attack.kind: 'backdoor' changes which choice is right, and completion has no choices"
        ),
    ):
        rows = [
            {"prompt": f"{row['question']} is", "completion": row["choices"][row["answer"]]}
            for row in ROWS[:30]
        ]
        data = {
            "task": "completion",
            **{
                split: questions(tmp_path, split, rows) for split in ("train", "validation", "test")
            },
        }
        commands.run(
            distilled(tmp_path / "no-choices", data=data, attack={"kind": "backdoor", "share": 0.4})
        )


def test_an_audit_of_a_run_without_clients_says_so(tmp_path: Path) -> None:
    folder = Path(
        commands.run(
            distilled(
                tmp_path, round={"rounds": 1, "clients": 0}, server={"steps": 1, "batch_size": 2}
            )
        )["folder"]
    )
    with pytest.raises(RunError, match="has no client updates to audit"):
        audited(folder, "membership")
    found = audited(folder)
    assert (
        "has no client updates" in found["membership"]["not_done"]
        and found["disclosure"]["disclosed_share"] == 0.0
    )
    assert refusal(found, None) == "" and "has no client updates" in refusal(
        found, "membership, disclosure"
    )
    answers = [row["answer"] for row in account(folder).rows]
    assert answers[1:] == [
        "No client was asked: what was trained on lies where the model does.",
        "Nothing: no noise was added (privacy.unit = 'none', and no client was asked).",
        "No client was asked, so none could lie.",
    ]
    (folder / "result.json").unlink()
    with pytest.raises(
        RunError, match=r"holds no finished run: finish it with `fedsp run --resume .*`"
    ):
        audited(folder)
    with pytest.raises(
        RunError, match=f"there are 1 in it: name one, such as {re.escape(str(folder))}"
    ):
        audited(folder.parent)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("policy", ["low_rank", "fresh"])
def test_embeddings_that_are_not_disclosed_share(family: str, policy: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(family), load_tokenizer(str(EMBEDDED / "model"))
    plan = parse_plan("ends(1)", model.shape.layers)
    verbatim = build_auxiliary(model, plan, tokenizer)
    other = build_auxiliary(model, plan, tokenizer, embeddings=policy, rank=4, seed=1)
    mine, theirs = (some.model.get_input_embeddings().weight for some in (other, model))
    assert not torch.equal(mine, theirs) and disclosed_share(other, model) < disclosed_share(
        verbatim, model
    )
    if policy == "low_rank":
        assert int(torch.linalg.matrix_rank(mine - mine.mean(dim=0))) == 4
    assert set(other.distillable()) > set(verbatim.distillable())
    other.save(tmp_path / "package")
    assert (
        load_auxiliary(
            tmp_path / "package", device=torch.device("cpu"), positions="hugging_face"
        ).embeddings
        == policy
    )


def test_a_package_with_other_embeddings_is_refused(tmp_path: Path) -> None:
    commands.distill(
        make_config(distilled(tmp_path, auxiliary={"embeddings": "fresh"})),
        tmp_path / "package",
    )
    with pytest.raises(
        AuxiliaryError, match="has fresh embeddings, the configuration says verbatim"
    ):
        commands.run(distilled(tmp_path / "other", auxiliary={"folder": str(tmp_path / "package")}))


def test_the_plan_knows_what_is_not_disclosed_share(tmp_path: Path) -> None:
    shares = []
    for policy in ("verbatim", "fresh"):
        values = distilled(tmp_path / policy, auxiliary={"embeddings": policy})
        planned = commands.plan(make_config(values))["disclosed_share"]
        assert commands.run(values)["disclosed_share"] == pytest.approx(planned, abs=0.01)
        shares.append(planned)
    assert shares[1] < shares[0] - 0.05


def test_alignment_of_features() -> None:
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = table - table.mean(dim=0)
    turned = (
        table
        @ torch.linalg.qr(
            torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        )[0]
    )
    other = torch.randn(50, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert (
        linear_cka(table, turned * 3) == pytest.approx(1.0)
        and linear_cka(table, other - other.mean(dim=0)) < 0.5
    )


@pytest.mark.parametrize("kind", ["adapter", "prompt+adapter"])
def test_members_are_told_by_adapters_too_where_they_are_learned_by_heart(
    tmp_path: Path, kind: str
) -> None:
    changes: dict[str, Any] = {
        "messenger": {"kind": kind, "rank": 4},
        "partition": {"clients": 2, "server_share": 0.0},
        "round": {"rounds": 1},
        "client": {"prompt_steps": 16, "batch_size": 8, "learning_rate": 0.03},
    }
    folder = Path(commands.run(distilled(tmp_path, **changes))["folder"])
    found = audited(folder, "disclosure, membership", shadows=4)["membership"]
    attacks = {(row["observer"], row["attack"]): row["auc"][0] for row in found["rows"]}
    assert found["power"]["auc"][0] > 0.85 and max(attacks.values()) > 0.6, attacks
    assert {observer for observer, _ in attacks} == {"outsider", "client", "server", "server, sums"}
    for name in ("trap", "depths", *(["inversion"] if kind == "prompt+adapter" else [])):
        with pytest.raises(RunError, match="soft prompts"):
            audited(folder, name)


def test_an_adapter_in_the_first_layer_gives_a_text_away_and_noise_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inverting, "ITERATIONS", 3)
    monkeypatch.setattr(matching, "EXCHANGED", 2)
    values = distilled(
        tmp_path,
        auxiliary={"plan": "emulator(1, 1)"},
        messenger={"kind": "adapter", "rank": 16, "train_first": True},
    )
    folder = Path(commands.run(values)["folder"])
    figures = audited(folder, "inversion", texts=3)["inversion"]
    told = {(row["level"], row["attack"]): row["tokens"][0] for row in figures["rows"]}
    seen = "one example of at most 8 tokens, one step of SGD, B of the first layer"
    assert told[seen, "span test"] == told[f"{seen}, sent in float16", "span test"] == 1.0
    assert told[f"{seen}, with the noise of epsilon = 1", "span test"] < 0.5
    assert [level for level, attack in told if attack == "gradient matching"] == [
        f"one example of 4 tokens, one step of SGD, B of {where}"
        for where in (
            "global layer 0 alone",
            "global layer 7 alone",
            "all layers",
            "all layers, with the noise of epsilon = 8",
            "all layers, with the noise of epsilon = 1",
        )
    ]
    assert sum(row["observed"] for row in figures["rows"]) == 2
    assert "Read back by span test from the run's first round" in str(account(folder).rows)


@pytest.mark.parametrize("layers", ["verbatim", "all"])
def test_behind_distilled_layers_an_adapter_tells_no_tokens_unless_they_have_adapters_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: str
) -> None:
    monkeypatch.setattr(inverting, "ITERATIONS", 3)
    monkeypatch.setattr(matching, "EXCHANGED", 2)
    values = distilled(
        tmp_path,
        auxiliary={"plan": "tail(1, 1)"},
        messenger={"kind": "adapter", "rank": 16, "layers": layers},
    )
    rows = audited(Path(commands.run(values)["folder"]), "inversion", texts=2)["inversion"]["rows"]
    dictionary = {"span test"} if layers == "all" else set()
    assert {row["attack"] for row in rows} == {"gradient matching"} | dictionary
    alone = "one step of SGD, B of global layer 3 alone"
    assert any(alone in row["level"] for row in rows) == (layers == "all")


def test_the_promise_of_a_private_adapter_is_not_refuted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsp.audit.epsilon.CANARIES", 40)
    values = distilled(
        tmp_path,
        messenger={"kind": "adapter", "rank": 2},
        privacy={"unit": "example", "epsilon": 3.0},
    )
    folder = Path(commands.run(values)["folder"])
    figures = audited(folder, "epsilon")["epsilon"]
    assert not figures["broken"] and figures["epsilon"] < figures["promised"] <= 3.0
