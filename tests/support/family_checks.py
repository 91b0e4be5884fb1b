"""What must hold of a family of models, each as a check against a slow reference; and, run as a
program, the matrix of all families (`make families`).

The reference is a second copy of the Hugging Face model that reads one unpadded row at a time,
without a batch, and behind a prompt with Hugging Face's own cache.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from fedsp.config_file import make_config
from fedsp.data.batching import pad
from fedsp.data.encoding import Encoded, collate, encode_pairs
from fedsp.data.tasks import Example
from fedsp.deployment.package_check import FAMILIES
from fedsp.errors import FedspError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.plan import make_plan
from fedsp.models.auxiliary import build_auxiliary, load_auxiliary, parse_plan
from fedsp.models.loading import load_tokenizer
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt, initial_values
from fedsp.training.dp_sgd import PrivateSteps, examples_together, private_gradient
from fedsp.training.evaluation import score
from fedsp.training.loop import answer_loss
from fedsp.training.per_example_gradients import example_gradients
from support.letters import LETTERS
from support.tiny_families import REGISTERED, tiny_causal_lm, tiny_config

ROWS = [[5, 9, 33, 8, 71, 2, 60, 11, 40, 7], [12, 50, 3, 3, 91, 18], [44, 6, 29], [77]]
PROMPT = 3
PLANS: list[Any] = ["shared(0)", "every(2)", "first(3)", "ends(1)", "ends(1, 1)", [3, 1]]
TOKENIZER = load_tokenizer(str(EMBEDDED / "model"))


class Family:
    """One family: fedsp's model, and the reference."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reference = tiny_causal_lm(name)
        self.model = PromptedLM(tiny_causal_lm(name), name)
        self.moved: dict[str, tuple[float, int]] = {}
        """By precision: how far one of eight examples moves the clipped sum of a private step, in
        units of the bound, and how many of them share a call."""

    def prompt(self, space: str) -> SoftPrompt:
        spec = PromptSpec(space=space, length=PROMPT, model=self.model.shape)  # type: ignore[arg-type]
        return SoftPrompt(spec, torch.randn(spec.shape, generator=torch.Generator().manual_seed(1)))

    @torch.no_grad()
    def alone(self, row: list[int]) -> Tensor:
        """Logits (T, V) of one row by Hugging Face."""
        logits: Tensor = (
            self.reference(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
        )
        return logits

    def behind(self, row: list[int], prefix: Tensor) -> Tensor:
        """The same behind keys and values (P, L, 2, H, K), in Hugging Face's own cache."""
        cache, length = DynamicCache(), len(prefix)
        for layer in range(prefix.shape[1]):
            cache.update(
                *(prefix[:, layer, which].transpose(0, 1)[None] for which in (0, 1)), layer
            )
        places = torch.arange(length, length + len(row))[None]
        mask = torch.ones(1, length + len(row), dtype=torch.long)
        logits: Tensor = self.reference(
            input_ids=torch.tensor([row]),
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
        return logits


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    return pad(rows, torch.device("cpu"))


@torch.no_grad()
def plain_forward(family: Family, _: Path) -> None:
    for row in ROWS:
        close(family.model.logits(family.model(torch.tensor([row])))[0], family.alone(row))


@torch.no_grad()
def masked_forward(family: Family, _: Path) -> None:
    for read in (family.model, family.model.read_padded):
        logits = family.model.logits(read(*padded(ROWS)))
        for found, row in zip(logits, ROWS, strict=True):
            close(found[: len(row)], family.alone(row))


def _as_text(family: Family, space: str) -> None:
    tokens = torch.tensor(ROWS[0])
    spec = PromptSpec(space=space, length=PROMPT, model=family.model.shape)  # type: ignore[arg-type]
    prompt = SoftPrompt(spec, initial_values(spec, family.model, scale=None, tokens=tokens, seed=0))
    with torch.no_grad():
        found = family.model.logits(
            family.model(tokens[None, PROMPT:], None, prompt.prefix(family.model))
        )[0]
    close(found, family.alone(ROWS[0])[PROMPT:])


def key_value_prompt(family: Family, _: Path) -> None:
    _as_text(family, "key_value")


def residual_prompt(family: Family, _: Path) -> None:
    _as_text(family, "residual")


@torch.no_grad()
def padded_is_single(family: Family, _: Path) -> None:
    prefix = family.prompt("key_value").prefix(family.model)
    for read in (family.model, family.model.read_padded):
        logits = family.model.logits(read(*padded(ROWS), prefix))
        for found, row in zip(logits, ROWS, strict=True):
            close(found[: len(row)], family.behind(row, prefix))


@torch.no_grad()
def states_at_a_depth(family: Family, _: Path) -> None:
    """From what enters the last blocks, where fedsp uses that, the model goes on as it does by
    itself."""
    depth = len(family.model.blocks) - 2
    front, texts = family.model.front(depth), [tuple(row) for row in ROWS]
    if not front.works:
        return
    entry = front.entry(texts, front.groups(texts), range(len(texts)))
    logits = family.model.logits(family.model(*padded(ROWS), None, entry))
    for found, row in zip(logits, ROWS, strict=True):
        close(found[: len(row)], family.alone(row))


QUESTIONS = [
    Example(
        id="a",
        context="Question: Is it?\nAnswer:",
        choices=(" yes", " no, never", " it is"),
        gold=(1,),
    ),
    Example(id="b", context="abc", choices=(" x", " y"), gold=(0,)),
    Example(id="c", context="abcdefgh", choices=(" x", " y"), gold=(0,)),
    Example(id="d", context="", choices=(" alone", " all"), gold=(0,)),
]


@torch.no_grad()
def scores(family: Family, _: Path) -> None:
    for prefix in (None, family.prompt("key_value").prefix(family.model)):
        for tokens_per_batch, questions in (
            (1, QUESTIONS),
            (512, QUESTIONS),
            (512, QUESTIONS[:-1]),
        ):  # an empty context leaves no cache to go on from
            found, _dropped = score(
                family.model,
                prefix,
                questions,
                LETTERS,
                max_tokens=60,
                tokens_per_batch=tokens_per_batch,
            )
            for scored, example in zip(found, questions, strict=True):
                for likelihood, pair in zip(
                    scored.log_likelihoods,
                    encode_pairs(
                        LETTERS, [(example.context, choice) for choice in example.choices], 60
                    ),
                    strict=True,
                ):
                    row = list(pair.ids)
                    logits = (
                        family.alone(row) if prefix is None else family.behind(row, prefix)
                    ).log_softmax(dim=-1)
                    answer = torch.tensor(row[pair.start :])
                    expected = float(logits[pair.start - 1 : -1].gather(1, answer[:, None]).sum())
                    assert likelihood == pytest.approx(expected, rel=1e-3, abs=1e-3)


@torch.no_grad()
def greedy(family: Family, _: Path) -> None:
    for prefix in (None, family.prompt("key_value").prefix(family.model)):
        row = list(ROWS[1])
        for token in family.model.generate(torch.tensor(row), prefix, most=5):
            logits = (family.alone(row) if prefix is None else family.behind(row, prefix))[-1]
            assert float(logits.max() - logits[token]) <= 1e-4 * float(logits.abs().max())
            row.append(token)
        assert len(row) == len(ROWS[1]) + 5


def _loss_of(family: Family, prompt: SoftPrompt) -> Tensor:
    pairs = encode_pairs(LETTERS, [(example.context, example.target) for example in QUESTIONS], 60)
    return answer_loss(family.model, prompt.prefix(family.model), collate(pairs))


def _gradient(family: Family, prompt: SoftPrompt) -> Tensor:
    prompt.zero_grad()
    _loss_of(family, prompt).backward()  # type: ignore[no-untyped-call]
    assert prompt.direct.grad is not None
    return prompt.direct.grad.clone()


def gradient(family: Family, _: Path) -> None:
    prompt = family.prompt("key_value")
    found = _gradient(family, prompt)
    prefix = prompt.values().detach().requires_grad_(True)
    logits: list[Tensor] = []
    wanted: list[int] = []
    for pair in encode_pairs(
        LETTERS, [(example.context, example.target) for example in QUESTIONS], 60
    ):
        logits.append(family.behind(list(pair.ids), prefix)[pair.start - 1 : -1])
        wanted += pair.ids[pair.start :]
    cross_entropy(torch.cat(logits).float(), torch.tensor(wanted)).backward()  # type: ignore[no-untyped-call]
    assert prefix.grad is not None
    close(found, prefix.grad, 5e-3)
    assert (found.abs().amax(dim=(0, 2, 3, 4)) > 0).all()
    inputs = family.prompt("residual").values().detach().requires_grad_(True)
    made = family.model.keys_and_values(inputs)
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(2))
    (slope,) = torch.autograd.grad((made * weights).sum(), inputs)
    step, direction = 1e-2, slope / slope.norm()
    with torch.no_grad():
        above, below = (
            float((family.model.keys_and_values(inputs + sign * step * direction) * weights).sum())
            for sign in (1, -1)
        )
    assert (above - below) / (2 * step) == pytest.approx(float(slope.norm()), rel=0.02)


def recompute(family: Family, _: Path) -> None:
    for space in ("key_value", "residual"):
        prompt = family.prompt(space)
        expected = _gradient(family, prompt)
        family.model.recompute = True
        try:
            close(_gradient(family, prompt), expected)
        finally:
            family.model.recompute = False


@torch.no_grad()
def packages(family: Family, folder: Path) -> None:
    """The slow reference: the very blocks of the model, in another list."""
    refused: list[str] = []
    for number, text in enumerate(PLANS):
        plan = parse_plan(text, 4)
        try:
            auxiliary = build_auxiliary(family.model, plan, TOKENIZER)
        except FedspError as error:
            refused.append(f"{text}: {error}")
            continue
        expected = _of_these_blocks(family, list(plan.sources))
        auxiliary.save(folder / str(number))
        again = load_auxiliary(
            folder / str(number), device=torch.device("cpu"), positions="hugging_face"
        )
        for model in (auxiliary, again):
            close(model.logits(model(torch.tensor([ROWS[0]])))[0], expected)
    if refused:
        raise FedspError(f"{len(refused)} of {len(PLANS)} plans: {refused[0]}")


BY_LAYER = {
    "layer_types",
    "mlp_layer_types",
    "attention_layers",
    "no_rope_layers",
    "layers_block_type",
}


def _of_these_blocks(family: Family, sources: list[int]) -> Tensor:
    model = copy.deepcopy(family.reference)
    backbone = model.get_submodule(family.model.path_of_backbone)
    blocks = backbone.get_submodule(family.model.path_of_blocks)
    chosen = [copy.deepcopy(blocks[source]) for source in sources]
    blocks._modules = {str(index): block for index, block in enumerate(chosen)}
    configs = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    texts = {id(config.get_text_config()): config.get_text_config() for config in configs.values()}
    for text in texts.values():
        for key in BY_LAYER & set(vars(text)):
            setattr(text, key, [getattr(text, key)[source] for source in sources])
        text.num_hidden_layers = len(sources)
    logits: Tensor = model(input_ids=torch.tensor([ROWS[0]]), use_cache=False).logits[0]
    return logits


@torch.no_grad()
def peft_export(family: Family, folder: Path) -> None:
    prompt = family.prompt("residual")
    prompt.export(family.model, folder / "adapter")
    adapted = peft.PeftModel.from_pretrained(
        copy.deepcopy(family.reference), folder / "adapter"
    ).eval()
    row = torch.tensor([ROWS[0]])
    theirs = adapted(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
    close(theirs, family.behind(ROWS[0], prompt.prefix(family.model)))


@torch.no_grad()
def bfloat16(family: Family, _: Path) -> None:
    reference, model = (
        tiny_causal_lm(family.name, dtype=torch.bfloat16),
        PromptedLM(tiny_causal_lm(family.name, dtype=torch.bfloat16), family.name),
    )
    prefix = family.prompt("key_value").prefix(model)
    behind = model.logits(model.read_padded(*padded(ROWS), prefix))
    for place, row in enumerate(ROWS):
        tokens = torch.tensor([row])
        for found, expected in (
            (
                model.logits(model(tokens))[0],
                reference(input_ids=tokens, use_cache=False).logits[0].float(),
            ),
            (behind[place, : len(row)], model.logits(model(tokens, None, prefix))[0]),
        ):
            assert float((found - expected).abs().max()) <= 0.1 * float(expected.abs().max())


@torch.no_grad()
def longest_text(family: Family, _: Path) -> None:
    room = family.model.max_positions
    if room > 512:
        return  # nothing in its configuration ends it
    row = [(7 * place + 3) % 90 + 3 for place in range(room)]
    close(family.model.logits(family.model(torch.tensor([row])))[0], family.alone(row))


def one_example_moves_one_bound(family: Family, _: Path) -> None:
    drawn = torch.randint(3, 97, (8, 12), generator=torch.Generator().manual_seed(5)).tolist()
    lot = [Encoded(tuple(row[: 6 + place % 7]), 3) for place, row in enumerate(drawn)]
    for dtype in (torch.float32, torch.bfloat16):
        model = PromptedLM(
            tiny_causal_lm(family.name, dtype=dtype).requires_grad_(False), family.name
        )
        prompt = family.prompt("residual")
        together = examples_together(model, prompt, 12)
        bound = 0.1 * float(example_gradients(model, prompt, collate(lot[:1]))[1].norm())
        quiet = PrivateSteps(bound=bound, noise_multiplier=0.0, sampling_rate=1.0, count=1)
        whole, *without = (
            private_gradient(model, prompt, some, 1, quiet, together).double()
            for some in (lot, *(lot[:out] + lot[out + 1 :] for out in range(8)))
        )
        moved = max(float((whole - rest).norm()) for rest in without) / bound
        family.moved[str(dtype).removeprefix("torch.")] = moved, together
        assert 0.5 < moved <= 1.0005, moved


CHECKS: dict[str, Callable[[Family, Path], None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        plain_forward,
        masked_forward,
        longest_text,
        key_value_prompt,
        residual_prompt,
        padded_is_single,
        states_at_a_depth,
        scores,
        greedy,
        gradient,
        recompute,
        packages,
        peft_export,
        bfloat16,
        one_example_moves_one_bound,
    )
}


@dataclass
class Outcome:
    """What became of a family: `refused` by fedsp as a whole, `not_made` by this transformers from
    a tiny configuration, and of each check why it was refused, or what went wrong."""

    family: str
    refused: str | None = None
    not_made: str | None = None
    refusals: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    moved: dict[str, tuple[float, int]] = field(default_factory=dict)


def outcome(name: str) -> Outcome:
    """Try a family."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = Outcome(name)
    try:
        tiny_causal_lm(name)
    except Exception as error:
        found.not_made = _line(error)
        return found
    try:
        with tempfile.TemporaryDirectory() as folder:
            tiny_config(name).save_pretrained(folder)
            make_plan(
                make_config(
                    {
                        "model": {"name": folder},
                        "data": {},
                        "auxiliary": {"plan": "every(1)"},
                        "distill": {"text": ["x"]},
                    }
                ),
                clients=2,
            )
    except FedspError:
        pass
    except Exception:
        found.wrong["plan"] = traceback.format_exc(limit=-2)
    try:
        family = Family(name)
    except FedspError as error:
        found.refused = str(error)
        return found
    except Exception:
        found.wrong["opening"] = traceback.format_exc(limit=-2)
        return found
    for check, run in CHECKS.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                run(family, Path(folder))
        except FedspError as error:
            found.refusals[check] = str(error)
        except Exception:
            found.wrong[check] = traceback.format_exc(limit=-2)
    found.moved = family.moved
    return found


def _line(error: Exception) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )[:200]


def table(outcomes: list[Outcome]) -> str:
    """The matrix as Markdown."""
    whole = [
        found
        for found in outcomes
        if not (found.refused or found.not_made or found.refusals or found.wrong)
    ]
    partly = [found for found in outcomes if found.refusals or found.wrong]
    lines = [
        "# Families of models",
        "",
        (
            f"transformers {transformers.__version__} registers {len(outcomes)} families as causal"
            " language models. Each is tried as a tiny random model (4 layers, hidden size 32, 97"
        ),
        (
            "tokens, windows of 4) against a second copy that reads one unpadded row at a time:"
            f" {', '.join(CHECKS)}. `make families` makes this page and fails"
        ),
        "where something is wrong; `make test` tries ten of them.",
        "",
        *_moves(outcomes),
        f"**Right in everything, {len(whole)}:** {', '.join(found.family for found in whole)}.",
        "",
        f"**Right, but for what is refused in a sentence, {len(partly)}:**",
        "",
        "| family | what | why |",
        "|---|---|---|",
    ]
    for found in partly:
        lines += [f"| {found.family} | {check} | {why} |" for check, why in found.refusals.items()]
        lines += [f"| {found.family} | {check} | **wrong** |" for check in found.wrong]
    for title, reason in (
        ("Refused when they are opened", "refused"),
        ("Not tried: this transformers does not make them from a tiny configuration", "not_made"),
    ):
        rows = [
            (found.family, getattr(found, reason)) for found in outcomes if getattr(found, reason)
        ]
        lines += [
            "",
            f"**{title}, {len(rows)}:**",
            "",
            "| family | why |",
            "|---|---|",
            *(f"| {family} | {why} |" for family, why in rows),
        ]
    return "\n".join(line.replace("<", "&lt;") for line in lines) + "\n"


def _moves(outcomes: list[Outcome]) -> list[str]:
    """A sentence for each precision on what one example does to the clipped sum of a private
    step."""
    lines = []
    for precision in ("float32", "bfloat16"):
        moved = {
            found.family: found.moved[precision] for found in outcomes if precision in found.moved
        }
        alone = sum(together == 1 for _, together in moved.values())
        most = max((most for most, _ in moved.values()), default=0.0)
        lines.append(
            f"In {precision} one of eight examples moves the clipped sum of a private step by"
            f" {most:.4f} bounds at most, over {len(moved)} families, {alone} of which read"
            " examples one by one there."
        )
    return [*lines, ""]


def right_in_everything(page: str) -> set[str]:
    """The families that a page of the matrix calls so."""
    line = next(
        (line for line in page.splitlines() if line.startswith("**Right in everything")), ":** ."
    )
    return set(line.partition(":** ")[2].rstrip(".").split(", "))


def main() -> None:
    """Try every family, write the page, and end with 1 where something is wrong, or is refused that
    was right on the page before."""
    page = Path(sys.argv[1])
    before = right_in_everything(page.read_text(encoding="utf-8")) if page.exists() else set()
    with ProcessPoolExecutor() as pool:
        outcomes = list(pool.map(outcome, REGISTERED))
    page.write_text(table(outcomes), encoding="utf-8")
    for found in outcomes:
        for check, what in found.wrong.items():
            print(f"{found.family}, {check}:\n{what}")
    lost = sorted(before - right_in_everything(page.read_text(encoding="utf-8")) - {""})
    if lost:
        print(f"right before, and no longer: {', '.join(lost)}")
    packaged = [
        found
        for found in outcomes
        if not found.refusals.get("packages", "").startswith(f"{len(PLANS)} of")
    ]
    useful = {
        found.family for found in packaged if not (found.refused or found.not_made or found.wrong)
    }
    unlisted = sorted(useful ^ FAMILIES)
    if unlisted:
        print(f"not as fedsp.deployment.package_check.FAMILIES has it: {', '.join(unlisted)}")
    sys.exit(bool(lost or unlisted or any(found.wrong for found in outcomes)))


if __name__ == "__main__":
    main()
