"""Steps, evaluation and distillation on one GPU, at the shapes of GPT2-XL and OPT-1.3B with random
weights: `make bench-gpu`.

    python benchmarks/gpu.py FOLDER [--device cuda] [--models gpt2-xl,opt-1.3b] [--minutes 8]

Nothing is fetched: texts are random tokens, about as long as the questions of ARC-Easy (a mean of
38 tokens, the answer has 5; the plain way pads to 130), for evaluation about as HellaSwag's
(contexts of 36 to 158 tokens, four endings of 17 to 46), for distillation 128 tokens. Everything is
in bfloat16, but trained weights of models in float32.

- steps: as in step.py, whose ways and floor these are: the plain way (a), PEFT or Trainer (b), and
  fedsp with `torch.compile`, which is measured last.
- evaluation: the plain way (a) pads every choice to the longest of all; (b) orders them by length,
  as lm-evaluation-harness does, each in batches of 16, 64 and 256, of which the fastest counts. The
  log-likelihoods are compared in float32.
- distillation into `emulator(1, n)`, a sixth of the layers, four passes: with the teacher's states
  kept, and read again (a).

Figures beside each speed: how many times fedsp is faster, the share of the rate at which this GPU
multiplies matrices of the model's shapes in bfloat16 (operations that the examples need, over the
time), and the most memory held. What does not fit into the minutes is named and left out. Writes
gpu.json and gpu.md into the folder.
"""

from __future__ import annotations

import argparse
import gc
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import step
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsp.cli import quiet_libraries
from fedsp.data.encoding import Encoded, encode_choices
from fedsp.data.tasks import Example
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.run import peak_memory
from fedsp.models.auxiliary import build_auxiliary, parse_plan
from fedsp.models.loading import load_tokenizer
from fedsp.models.prompted_lm import PromptedLM
from fedsp.storage import write_json
from fedsp.training import distillation, evaluation
from fedsp.training.distillation import Distillation
from fedsp.training.loop import Optimisation

VOCABULARY = 1000
Row = dict[str, Any]


class Clock:
    """What of the minutes is left, and what was left out for lack of them."""

    def __init__(self, minutes: float) -> None:
        self.until = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def allows(self, what: str) -> bool:
        if time.monotonic() < self.until:
            return True
        self.left_out.append(what)
        return False


def questions_of(count: int, *, context: int, longest: int, answer: int) -> list[Encoded]:
    """Random tokens; lengths of contexts are drawn, with this mean, up to the longest."""
    drawn = random.Random(0)
    rows = []
    for _ in range(count):
        length = min(longest, max(8, round(drawn.lognormvariate(math.log(context), 0.4)))) + answer
        ids = tuple(drawn.randrange(VOCABULARY) for _ in range(length))
        rows.append(Encoded(ids, length - answer))
    return rows


def examples_of(given: argparse.Namespace) -> list[Encoded]:
    return questions_of(given.steps * given.batch, context=30, longest=125, answer=5)


def sixth(given: argparse.Namespace) -> str:
    """The plan of a package with a sixth of the layers between the first and the last."""
    layers = step.MODELS[given.model].get_text_config().num_hidden_layers
    return f"emulator(1, {max(1, layers // 6)})"


def steps(given: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    """Each way of each stage, and adapters in a package of a sixth of the layers."""
    for stage, ways in step.WAYS.items():
        for way in ways:
            yield from one_step(given, clock, stage, way)
        if stage == "adapter":
            yield from one_step(given, clock, stage, "fedsp", plan=sixth(given))


def compiled_steps(given: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    """fedsp's own with compiled blocks; nothing without a GPU, where a compiler may be missing."""
    if given.device.startswith("cuda"):
        for stage, way in (("adapter", "fedsp"), ("prompt", "fedsp residual")):
            yield from one_step(given, clock, stage, way, compiled=True)


def one_step(
    given: argparse.Namespace,
    clock: Clock,
    stage: str,
    way: str,
    *,
    plan: str = "ends(2)",
    compiled: bool = False,
) -> Iterator[Row]:
    name = way + (", compiled" if compiled else "") + ("" if plan == "ends(2)" else f", {plan}")
    if not clock.allows(f"{given.model}, {stage}, {name}"):
        return
    chosen = argparse.Namespace(
        **vars(given) | {"stage": stage, "way": way, "compile": compiled, "plan": plan}
    )
    try:
        found = step.one(chosen, examples_of(given), 130)
    except torch.OutOfMemoryError:
        yield {"stage": stage, "way": name, "failed": "out of memory"}
    else:
        yield {"stage": stage, "way": name, **found}
    forget(given)


def forget(given: argparse.Namespace) -> None:
    gc.collect()
    torch.compiler.reset()
    if given.device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def held(given: argparse.Namespace) -> float:
    """The most memory held since it was last forgotten, MiB."""
    cuda = given.device.startswith("cuda")
    return (torch.cuda.max_memory_allocated() if cuda else peak_memory()) / 2**20


def random_model(given: argparse.Namespace, dtype: torch.dtype) -> PromptedLM:
    torch.manual_seed(0)
    with torch.device(given.device):
        model = AutoModelForCausalLM.from_config(step.MODELS[given.model], dtype=dtype)
    return PromptedLM(model.requires_grad_(False), given.model)


def seconds_of(given: argparse.Namespace, work: Callable[[], Any]) -> tuple[float, Any]:
    step.wait(given)
    started = time.perf_counter()
    found = work()
    step.wait(given)
    return time.perf_counter() - started, found


@torch.no_grad()
def padded_scores(
    model: PromptedLM, rows: list[Encoded], batch: int, longest: int | None
) -> list[float]:
    """Log-likelihoods of answers by the library's own forward, logits at all positions. Padded to
    `longest`; where that is None, ordered by length and padded to each batch's longest."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids) * (longest is None))
    found = [0.0] * len(rows)
    for start in range(0, len(order), batch):
        some = [rows[index] for index in order[start : start + batch]]
        wide = longest or max(len(row.ids) for row in some)
        ids, mask = torch.zeros(2, len(some), wide, dtype=torch.long).unbind()
        for line, row in enumerate(some):
            ids[line, : len(row.ids)] = torch.tensor(row.ids)
            mask[line, : len(row.ids)] = 1
        ids = ids.to(model.device)
        logits: Tensor = model.model(input_ids=ids, attention_mask=mask.to(model.device)).logits
        each = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:, None])
        for line, row in enumerate(some):
            answer = each[line, row.start - 1 : len(row.ids) - 1]
            found[order[start + line]] = float(answer.sum())
    return found


def evaluations(given: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    tokenizer = load_tokenizer(given.tokenizer)
    words = random.Random(0).choices(
        ["water", "light", "energy", "the", "of", "is", "heat", "moves", "when", "in"], k=4000
    )

    def text(length: int) -> str:
        return " ".join(random.Random(length).sample(words, length))

    examples = [
        Example(
            id=str(number),
            context=text(20 + number % 40),
            choices=tuple(f" {text(8 + (number + choice) % 12)}" for choice in range(4)),
            gold=(0,),
        )
        for number in range(given.documents)
    ]
    rows = [row for pairs in encode_choices(tokenizer, examples, 1024) for row in pairs]
    longest = max(len(row.ids) for row in rows)

    def ours(model: PromptedLM, some: list[Example]) -> list[float]:
        scored, _ = evaluation.score(model, None, some, tokenizer, max_tokens=1024)
        return [likelihood for row in scored for likelihood in row.log_likelihoods]

    def fastest(ways: dict[str, Callable[[], list[float]]]) -> Row:
        """Of the way that is fastest in its best call: its name, its times and its memory."""
        found = []
        for name, way in ways.items():
            forget(given)
            way()
            times = [seconds_of(given, way)[0] for _ in range(given.repeats)]
            found.append({"batch": name, "times": times, "memory": held(given)})
        return min(found, key=lambda one: min(one["times"]))

    model = random_model(given, torch.float32)
    few = examples[: max(2, given.documents // 16)]
    exact = padded_scores(model, rows[: 4 * len(few)], 16, longest)
    off = max(abs(a - b) for a, b in zip(ours(model, few), exact, strict=True))
    model.model.to(getattr(torch, given.dtype))
    forget(given)
    batches = (16, 64, 256)
    ways: dict[str, dict[str, Callable[[], list[float]]]] = {
        "fedsp": {"": partial(ours, model, examples)}
    }
    for name, width in (("plain", longest), ("by length", None)):
        ways[name] = {
            str(batch): partial(padded_scores, model, rows, batch, width) for batch in batches
        }
    for name, some in ways.items():
        if clock.allows(f"{given.model}, evaluation, {name}"):
            best = fastest(some)
            times, batch = best["times"], best["batch"]
            yield {
                "stage": "evaluation",
                "way": f"{name}, batches of {batch}" if batch else name,
                "rate": len(examples) / statistics.median(times),
                "low": len(examples) / max(times),
                "high": len(examples) / min(times),
                "memory": best["memory"],
                "largest difference": off,
            }
    forget(given)


def distillations(given: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    texts = [list(row.ids) for row in questions_of(given.texts, context=123, longest=123, answer=5)]
    teacher = random_model(given, getattr(torch, given.dtype))
    plan = parse_plan(sixth(given), teacher.shape.layers)
    how = Distillation(
        steps=4 * len(texts) // given.batch,
        batch_size=given.batch,
        optimisation=Optimisation(learning_rate=1e-4),
    )
    kept = distillation.TeacherStates.get
    for way in ("fedsp, states kept", "states read again"):
        if not clock.allows(f"{given.model}, distillation, {way}"):
            continue
        if way == "states read again":
            setattr(distillation.TeacherStates, "get", lambda self, indices, read: read(indices))
        auxiliary = build_auxiliary(teacher, plan, load_tokenizer(given.tokenizer))
        work = partial(distillation.distill, auxiliary, teacher, texts, how, seed=0)
        try:
            times = [seconds_of(given, work)[0] for _ in range(given.repeats + 1)][1:]
        finally:
            setattr(distillation.TeacherStates, "get", kept)
        tokens = 4 * sum(map(len, texts))
        yield {
            "stage": "distillation",
            "way": way,
            "rate": tokens / statistics.median(times),
            "low": tokens / max(times),
            "high": tokens / min(times),
            "memory": held(given),
        }
        del auxiliary, work
        forget(given)


def measure(given: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    """All rows, what is compiled last; the share of the rate of products in bfloat16 is told of
    steps in a model as deep as the global one."""
    for parts in ((steps, evaluations, distillations), (compiled_steps,)):
        for name in given.models.split(","):
            chosen = argparse.Namespace(**vars(given) | {"model": name})
            rate = step.rate_of_products(chosen, torch.bfloat16)
            for part in parts:
                for row in as_far_as_it_fits(part(chosen, clock), part.__name__):
                    if row["stage"] in step.WAYS and "emulator" not in row["way"] and "rate" in row:
                        needed = step.floor_operations(chosen, row["stage"], examples_of(chosen))
                        row["share of bfloat16"] = row["rate"] * needed / rate
                    yield {"model": name, "bfloat16 products, Tflop/s": rate / 1e12, **row}


def as_far_as_it_fits(rows: Iterator[Row], part: str) -> Iterator[Row]:
    """The rows of a part, up to where the GPU's memory is too small."""
    try:
        yield from rows
    except torch.OutOfMemoryError:
        yield {"stage": part, "way": "the rest", "failed": "out of memory"}


def table(rows: list[Row]) -> str:
    """Tokens or, in evaluation, documents per second; the first way of a stage is fedsp's."""
    lines = [
        "| model | stage | way | tokens, or documents, per second (lowest to highest) | fedsp is"
        " faster by | share of the bfloat16 rate | memory, MiB |",
        "|---" * 7 + "|",
    ]
    first: dict[tuple[str, str], float] = {}
    for row in rows:
        if "failed" in row:
            lines.append(
                f"| {row['model']} | {row['stage']} | {row['way']} | {row['failed']} | | | |"
            )
            continue
        if row["way"].startswith("fedsp"):
            first.setdefault((row["model"], row["stage"]), row["rate"])
        ours = first.get((row["model"], row["stage"]), math.nan)
        share = row.get("share of bfloat16")
        lines.append(
            f"| {row['model']} | {row['stage']} | {row['way']} | {row['rate']:.0f}"
            f" ({row['low']:.0f} to {row['high']:.0f}) | {ours / row['rate']:.2f} |"
            f" {'' if share is None else f'{share:.0%}'} | {row['memory']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--models", default="gpt2-xl,opt-1.3b")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--texts", type=int, default=256)
    given = parser.parse_args()
    quiet_libraries()
    given.recompute, given.tokenizer = False, str(EMBEDDED / "model")
    clock, rows = Clock(given.minutes), []
    for row in measure(given, clock):
        rows.append(row)
        print(table(rows).splitlines()[-1], flush=True)
        write(given, rows, clock.left_out)  # after each row, in case the machine is taken back
    write(given, rows, clock.left_out)


def write(given: argparse.Namespace, rows: list[Row], left_out: list[str]) -> None:
    cuda = given.device.startswith("cuda")
    about = {
        "machine": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__,
        "settings": {key: str(value) for key, value in vars(given).items()},
        "left out": left_out,
    }
    write_json(given.folder / "gpu.json", about | {"rows": rows})
    left = f"\nLeft out, as the time was over: {'; '.join(left_out)}.\n" if left_out else ""
    text = (
        f"{about['machine']}, torch {about['torch']}, {given.dtype}, batches of"
        f" {given.batch}.\n\n{table(rows)}{left}"
    )
    (given.folder / "gpu.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
