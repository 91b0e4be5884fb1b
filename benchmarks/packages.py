"""Which layers a package is made of, and how it is distilled: tables of docs/results/packages.md.

    python benchmarks/packages.py MODEL OUTPUT --text FILE... --other FILE [--parts layers,recipes]
    [--plan "emulator(1, 3)"] [--seeds 0,1,2] [--draws 240,800] [--length 64] [--device cpu]
    [--recipes "NAME;NAME"]

How well a package reads is told by its *excess*, the loss that it has more than the global model,
nats per token, on sequences of the text that it is distilled on but does not read, and on some of
another text; and by its *divergence*, the KL divergence of its next tokens from the global model's.

- layers: packages that are not distilled, by how many layers they have: spread evenly; both ends
  and others spread between; chosen by the loss, alone or between both ends; and clusters of
  neighbours that are alike by CKA (CRaSh, https://arxiv.org/abs/2310.15477), each represented once,
  or as often as it has layers, which discloses as much and costs as much as the whole depth.
- recipes: each with each number of texts that it reads, from the layers of the plan. *Operations*
  are counted by torch as they are done (products of matrices and attention): those of the student
  in each step, those of the teacher once for each text, whose states are kept.

Appends a line of JSON for each package to OUTPUT, and prints the tables of all that stand there.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from spread import mean
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.flop_counter import FlopCounterMode

from fedsp.audit.package_leakage import linear_cka
from fedsp.cli import quiet_libraries
from fedsp.data.batching import Padded, pad
from fedsp.data.encoding import Tokenizer
from fedsp.data.files import read_passages
from fedsp.errors import TrainingDiverged
from fedsp.models.auxiliary import AuxiliaryModel, LayerPlan, build_auxiliary, parse_plan
from fedsp.models.loading import load_model, load_tokenizer
from fedsp.models.prompted_lm import PromptedLM, hidden_at_depths
from fedsp.training.distillation import masked_mse, packed
from fedsp.training.layer_choice import drop_layers
from fedsp.training.loop import Optimisation, fit, predicted_loss, text_loss

READ, TO_CHOOSE_BY = 512, 4
Texts = Sequence[Sequence[int]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Weights of losses: `states` and `depths`, mean squared errors relative to the teacher's mean
    square, of last states and of those at all depths; `cut`, of states that enter the last verbatim
    layers; `raw`, of last states as they are; `logits`, KL divergence; `highest`, the same of 64
    tokens and the rest; `text`, cross-entropy."""

    losses: dict[str, float]
    rate: float = 3e-3
    batch: int = 4
    holds: bool = True
    texts: int = READ
    start: str = ""
    teacher: torch.dtype = torch.float32


STATES = Recipe({"states": 1.0})
RECIPES = {
    "default: states, rate 1e-3, batches of 8, rate falls": Recipe(
        {"raw": 1.0}, rate=1e-3, batch=8, holds=False
    ),
    "states": STATES,
    "states, rate 1e-3": replace(STATES, rate=1e-3),
    "states and text": Recipe({"states": 1.0, "text": 0.2}),
    "logits and states": Recipe({"states": 1.0, "logits": 0.2}),
    "states at all depths": Recipe({"states": 1.0, "depths": 1.0}),
    "states at the last verbatim layers": Recipe({"cut": 1.0}),
    "logits": Recipe({"logits": 1.0}),
    "text": Recipe({"text": 1.0}),
    "text and 30 times states (offsite-tuning)": Recipe({"raw": 30.0, "text": 1.0}),
    "states, from chosen layers": replace(STATES, start="chosen"),
    "states, layers leave one by one": replace(STATES, start="progressive"),
    "states, batches of 2": replace(STATES, batch=2),
    "states, batches of 8": replace(STATES, batch=8),
    "states, rate falls": replace(STATES, holds=False),
    "states, 128 texts": replace(STATES, texts=128),
    "states, teacher in bfloat16": replace(STATES, teacher=torch.bfloat16),
    "states, rate 6e-3": replace(STATES, rate=6e-3),
    "states, rate 3e-4": replace(STATES, rate=3e-4),
    "logits, the highest 64": Recipe({"highest": 1.0}),
}


def relative_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return masked_mse(student, teacher, mask) / masked_mse(teacher, torch.zeros_like(teacher), mask)


def divergence(student: PromptedLM, teacher: PromptedLM, own: Tensor, theirs: Tensor) -> Tensor:
    """Of next tokens, nats, from last states (tokens, hidden)."""
    found = torch.log_softmax(student.logits(own).float(), dim=-1)
    wanted = torch.log_softmax(teacher.logits(theirs).float(), dim=-1)
    return kl_div(found, wanted, log_target=True, reduction="batchmean")


def divergence_of_highest(
    student: PromptedLM, teacher: PromptedLM, own: Tensor, theirs: Tensor, count: int = 64
) -> Tensor:
    """`divergence` where all tokens but the teacher's likeliest are one."""
    likely, which = torch.log_softmax(teacher.logits(theirs).float(), dim=-1).topk(count)
    found = torch.log_softmax(student.logits(own).float(), dim=-1).gather(-1, which)
    rest, own_rest = ((1 - part.exp().sum(-1)).clamp_min(1e-6) for part in (likely, found))
    named = (likely.exp() * (likely - found)).sum(-1)
    return (named + rest * (rest.log() - own_rest.log())).mean()


def loss_of(
    recipe: Recipe,
    student: AuxiliaryModel,
    teacher: PromptedLM,
    states: list[Tensor],
    batch: Padded,
) -> Tensor:
    """`states`: the teacher's at all depths."""
    hidden, real = hidden_at_depths(student, batch.ids, batch.mask), batch.mask.bool()
    last = states[-1].to(hidden[-1].dtype)
    sources = student.plan.sources

    def at_depths() -> Tensor:
        pairs = zip(hidden[:-1], sources, strict=True)
        each = [relative_error(own, states[at].float(), batch.mask) for own, at in pairs]
        return torch.stack(each).mean()

    def at_cut() -> Tensor:
        depth = last_verbatim(student.plan)
        return relative_error(hidden[depth], states[sources[depth]].float(), batch.mask)

    ways: dict[str, Callable[[], Tensor]] = {
        "raw": lambda: masked_mse(hidden[-1], last, batch.mask),
        "states": lambda: relative_error(hidden[-1], last, batch.mask),
        "depths": at_depths,
        "cut": at_cut,
        "logits": lambda: divergence(student, teacher, hidden[-1][real], states[-1][real]),
        "highest": lambda: divergence_of_highest(
            student, teacher, hidden[-1][real], states[-1][real]
        ),
        "text": lambda: predicted_loss(student, hidden[-1], batch),
    }
    return torch.stack([weight * ways[name]() for name, weight in recipe.losses.items()]).sum()


def last_verbatim(plan: LayerPlan) -> int:
    """The first of the verbatim depths at the end."""
    depth = plan.depth
    while depth and plan.frozen[depth - 1]:
        depth -= 1
    return depth


class Held(Optimisation):
    """Warm-up, a constant rate, and a fall to zero in the last quarter."""

    def rate(self, step: int) -> float:
        rising, falling = math.ceil(0.1 * self.total_steps), math.ceil(0.25 * self.total_steps)
        left = self.total_steps - step
        return self.learning_rate * min(1.0, (step + 1) / rising, left / falling)


@dataclass
class Material:
    """What a package is made of and judged by, of one seed."""

    teacher: PromptedLM
    tokenizer: Tokenizer
    read: Texts
    unread: Texts
    other: Texts

    def __post_init__(self) -> None:
        self.known = {name: text_loss(self.teacher, texts) for name, texts in self.texts.items()}

    @property
    def texts(self) -> dict[str, Texts]:
        return {"excess": self.unread, "elsewhere": self.other}

    def judged(self, package: PromptedLM) -> Row:
        found = {
            name: text_loss(package, texts) - self.known[name] for name, texts in self.texts.items()
        }
        with torch.no_grad():
            each = [
                float(divergence(package, self.teacher, package(ids)[0], self.teacher(ids)[0]))
                for ids in (torch.tensor([text], device=package.device) for text in self.unread)
            ]
        return found | {"divergence": sum(each) / len(each)}


def material(given: argparse.Namespace, seed: int) -> Material:
    teacher = load_model(given.model, device=given.device)
    tokenizer = load_tokenizer(given.model)

    def rows(files: list[str], count: int) -> list[list[int]]:
        found = packed(tokenizer, read_passages(files), length=given.length, count=count, seed=seed)
        return [row for row in found if len(row) == given.length]

    own = rows(given.text, READ + given.judge)
    other = rows([given.other], given.judge)
    return Material(teacher, tokenizer, own[: -given.judge], own[-given.judge :], other)


def layer_rows(given: argparse.Namespace, made: Material) -> Iterator[Row]:
    teacher = made.teacher
    layers = teacher.shape.layers
    by_loss = made.read[:TO_CHOOSE_BY]
    free = [one.layer for one in drop_layers(teacher, by_loss, layers - 2)]
    ends = max(1, layers // 15)
    kept = {*range(ends), *range(layers - ends, layers)}
    between = [one.layer for one in drop_layers(teacher, by_loss, layers - 2 * ends - 1, keep=kept)]
    alike = similarities(teacher, by_loss)
    counts = range(layers - 1, 2, -1) if layers <= 12 else range(layers - 3, 5, -3)
    for count in counts:
        plans: dict[str, Any] = {
            "spread evenly": [(2 * index + 1) * layers // (2 * count) for index in range(count)],
            "chosen": sorted(set(range(layers)) - set(free[: layers - count])),
        }
        if count > 2 * ends:
            plans[f"{ends} at each end, others evenly"] = f"emulator({ends}, {count - 2 * ends})"
            middle = set(range(layers)) - kept - set(between[: layers - count])
            plans[f"{ends} at each end, others chosen"] = f"emulator({ends}, {sorted(middle)})"
        groups = clusters(alike, count)
        stands = [max(group, key=lambda one: float(alike[one, group].sum())) for group in groups]
        plans["clusters, each once"] = stands
        plans["clusters, repeated"] = [
            stand for stand, group in zip(stands, groups, strict=True) for _ in group
        ]
        for way, plan in plans.items():
            package = build_auxiliary(teacher, parse_plan(plan, layers), made.tokenizer)
            yield {
                "part": "layers",
                "way": way,
                "layers": count,
                "plan": str(plan),
                **made.judged(package),
            }


@torch.no_grad()
def similarities(model: PromptedLM, texts: Texts) -> Tensor:
    """Linear CKA (S. Kornblith et al. ICML 2019) of the outputs of layers, (layers, layers)."""
    ids = torch.tensor(texts, device=model.device)
    outputs = hidden_at_depths(model, ids, torch.ones_like(ids))[1:]
    flat = [state.flatten(0, 1).double() for state in outputs]
    centred = [state - state.mean(dim=0) for state in flat]
    return torch.tensor([[linear_cka(one, other) for other in centred] for one in centred])


def clusters(alike: Tensor, count: int) -> list[list[int]]:
    """So many runs of neighbouring layers: those two that are most alike on average join first."""
    groups = [[layer] for layer in range(len(alike))]
    while len(groups) > count:
        near = [float(alike[left][:, right].mean()) for left, right in pairwise(groups)]
        first = near.index(max(near))
        groups[first : first + 2] = [groups[first] + groups[first + 1]]
    return groups


def recipe_rows(
    given: argparse.Namespace, made: Material, names: list[str], seed: int
) -> Iterator[Row]:
    layers = made.teacher.shape.layers
    plan = parse_plan(given.plan, layers)
    yield {
        "part": "recipes",
        "recipe": "not distilled",
        "texts": 0,
        "operations": 0.0,
        **made.judged(build_auxiliary(made.teacher, plan, made.tokenizer)),
    }
    for name in names:
        recipe = RECIPES[name]
        counts = given.default if name.startswith("default") else given.draws
        for count in map(int, counts.split(",")):
            started = time.perf_counter()
            try:
                package, operations = distilled(recipe, made, plan, count // recipe.batch, seed)
                found: Row = made.judged(package)
            except TrainingDiverged:
                found, operations = {"failed": "diverged"}, math.nan
            yield {
                "part": "recipes",
                "recipe": name,
                "texts": count,
                "operations": operations,
                "seconds": time.perf_counter() - started,
                **found,
            }


def distilled(
    recipe: Recipe, made: Material, plan: LayerPlan, steps: int, seed: int
) -> tuple[AuxiliaryModel, float]:
    """The package, and the operations done for it."""
    teacher, layers = made.teacher, made.teacher.shape.layers
    ends, depth = plan.frozen.index(False), plan.depth
    keep = {*range(ends), *range(layers - ends, layers)}
    if recipe.start == "chosen":
        gone = drop_layers(teacher, made.read[:TO_CHOOSE_BY], layers - depth, keep=keep)
        middle = sorted({*range(layers)} - keep - {one.layer for one in gone})
        plan = parse_plan(f"emulator({ends}, {middle})", layers)
    extra = min(2, layers - depth) if recipe.start == "progressive" else 0
    if extra:
        plan = parse_plan(f"emulator({ends}, {depth - 2 * ends + extra})", layers)
    package = build_auxiliary(teacher, plan, made.tokenizer)
    order = drawn(min(recipe.texts, len(made.read)), steps, recipe.batch, seed)
    total = 0.0
    parts = 1 + extra
    schedule = Held if recipe.holds else Optimisation
    optimisation = schedule(learning_rate=recipe.rate, total_steps=steps)
    known: set[int] = set()
    kept: dict[int, dict[int, Tensor]] = {}

    def read(texts: Texts) -> list[Tensor]:
        batch = pad(texts, teacher.device)
        with (
            torch.no_grad(),
            torch.autocast(
                teacher.device.type, recipe.teacher, enabled=recipe.teacher != torch.float32
            ),
        ):
            return hidden_at_depths(teacher, batch.ids, batch.mask)

    def states_of(indices: list[int]) -> list[Tensor]:
        """The teacher's at all depths that the recipe asks for; empty tensors at others."""
        for index in indices:
            if index not in kept:
                found = read([made.read[index]])
                wanted = {layers} | (
                    {*plan.sources} if {"depths", "cut"} & {*recipe.losses} else set()
                )
                kept[index] = {depth: found[depth] for depth in wanted}
        return [
            torch.cat([kept[index][depth] for index in indices])
            if depth in kept[indices[0]]
            else torch.empty(0)
            for depth in range(layers + 1)
        ]

    for part in range(parts):
        if part:
            package = one_fewer(package, made, ends)
        first, end = part * steps // parts, (part + 1) * steps // parts
        counts: dict[str, float] = {}

        def loss(
            indices: list[int],
            package: AuxiliaryModel = package,
            counts: dict[str, float] = counts,
        ) -> Tensor:
            texts = [made.read[index] for index in indices]
            batch, states = pad(texts, teacher.device), states_of(indices)
            if not counts:
                with FlopCounterMode(display=False) as teachers:
                    read(texts)
                with FlopCounterMode(display=False) as students:
                    torch.autograd.backward(loss_of(recipe, package, teacher, states, batch))
                for parameter in package.distillable().values():
                    parameter.grad = None
                counts["student"] = float(students.get_total_flops())
                asked = bool(set(recipe.losses) - {"text"})
                counts["teacher"] = float(teachers.get_total_flops()) * asked
            return loss_of(recipe, package, teacher, states, batch)

        fit(
            package.distillable(),
            loss,
            order[first:end],
            optimisation,
            first_step=first,
        )
        new = {index for indices in order[first:end] for index in indices} - known
        known |= new
        total += (end - first) * counts["student"] + len(new) / recipe.batch * counts["teacher"]
    return package, total


def one_fewer(package: AuxiliaryModel, made: Material, ends: int) -> AuxiliaryModel:
    """The package without the layer that it reads best without."""
    depth = package.plan.depth
    keep = {*range(ends), *range(depth - ends, depth)}
    gone = drop_layers(package, made.read[:TO_CHOOSE_BY], 1, keep=keep)[0].layer
    left = tuple(at for at in range(depth) if at != gone)
    frozen = tuple(at in keep for at in left)
    plan = LayerPlan(sources=left, groups=left, frozen=frozen, prompt_layers=left)
    return build_auxiliary(package, plan, made.tokenizer)


def drawn(count: int, steps: int, batch: int, seed: int) -> list[list[int]]:
    """Which texts each step reads: all of them before any again."""
    rng, found = random.Random(seed), list[int]()
    while len(found) < steps * batch:
        found += rng.sample(range(count), count)
    return [found[start : start + batch] for start in range(0, steps * batch, batch)]


def tables(rows: list[Row]) -> Iterator[str]:
    shown = ("excess", "elsewhere", "divergence")
    for part, keys in (("layers", ("layers", "way")), ("recipes", ("recipe", "texts"))):
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            if row["part"] == part:
                groups.setdefault(tuple(row[key] for key in keys), []).append(row)
        if not groups:
            continue
        more = ("operations, 10^12",) if part == "recipes" else ()
        head = [*keys, *more, *shown]
        yield "\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|"
        for name, some in groups.items():
            cells = [str(one) for one in name]
            if more:
                cells.append(f"{some[0]['operations'] / 1e12:.2f}")
            for key in shown:
                numbers = [row[key] for row in some if key in row]
                cells.append(mean(numbers, ".3f") if len(numbers) == len(some) else "diverged")
            yield "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--other", required=True)
    parser.add_argument("--parts", default="layers,recipes")
    parser.add_argument("--recipes", default="")
    parser.add_argument("--plan", default="emulator(1, 3)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--draws", default="240,800", help="texts that are read, again or not")
    parser.add_argument(
        "--default", default="480,2400", help="the same for the recipe that is the default"
    )
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--judge", type=int, default=32, help="texts of each kind to judge by")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    quiet_libraries()
    names = [name for name in RECIPES if not given.recipes or name in given.recipes.split(";")]
    for seed in map(int, given.seeds.split(",")):
        made = material(given, seed)
        parts: dict[str, Iterator[Row]] = {
            "layers": layer_rows(given, made),
            "recipes": recipe_rows(given, made, names, seed),
        }
        for part in given.parts.split(","):
            for row in parts[part]:
                with given.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | {"seed": seed}) + "\n")
    print("\n".join(tables(list(map(json.loads, given.output.read_text().splitlines())))))


if __name__ == "__main__":
    main()
