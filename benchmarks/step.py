"""The local step against its floor, the plain way and PEFT: the first tables of docs/results/performance.md.

    python benchmarks/step.py [--reference FOLDER] [--model gpt2] [--device cpu] [--threads 2] [--tasks arc_easy,piqa] [--batch 16] [--steps 6] [--dtype float32]
                                        [--compile] [--recompute]

A model with random weights in the shape of GPT-2, GPT2-XL or OPT-1.3B; an auxiliary model `ends(2)` of it, as deep as it is; questions of real tasks. Each figure is tokens of real text per second (padding and prompt do not count) over the same
examples, and the peak memory of a process of its own.

- speak and align: fedsp's two stages at a client, by the functions of a run (`fedsp.methods.base.take_steps`).
- plain: every example padded to the data set's longest, logits at all positions, batches as they are drawn.
- peft: prefix-tuning by PEFT and Trainer, batches padded to their own longest; for align, all weights by Trainer.

The floor is the fewest operations that the examples need (2 for each weight and token forward, as many again to the inputs, as many again to the weights where
they are trained; attention; logits at answer tokens alone) over the rate of a product of matrices measured here, in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from material import add_reference, model_name, questions
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, PretrainedConfig

from fedsp.auxiliary import AuxiliaryModel, build_auxiliary, parse_plan
from fedsp.data.encoding import Encoded, collate, encode_targets, training_batches
from fedsp.display import quiet_libraries
from fedsp.fitting import Optimisation, trainable
from fedsp.loading import load_tokenizer
from fedsp.methods.base import Stage, Work, take_steps
from fedsp.models import PromptedLM
from fedsp.parties import Party, Rest
from fedsp.plan import shape_of
from fedsp.prompts import PromptSpec, SoftPrompt

LENGTH, SEED = 20, 0
MODELS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "opt-1.3b": OPTConfig(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, ffn_dim=8192, word_embed_proj_dim=2048, max_position_embeddings=2048),
}
WAYS = {"speak": ("fedsp key_value", "fedsp residual", "plain", "peft"), "align": ("fedsp", "plain", "trainer")}


def rows_of(reference: Path | None, task: str, count: int) -> tuple[list[Encoded], int]:
    """So many training examples as tokens, and the length of the longest of the whole data set."""
    rows = encode_targets(load_tokenizer(model_name(reference)), questions(reference, task, "train"), 512)
    return rows[:count], max(len(row.ids) for row in rows)


def open_model(given: argparse.Namespace) -> AuxiliaryModel:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(MODELS[given.model], dtype=torch.float32).requires_grad_(False)
    whole = PromptedLM(model, given.model)
    tokenizer = load_tokenizer(model_name(given.reference))
    auxiliary = build_auxiliary(whole, parse_plan("ends(2)", whole.shape.layers), tokenizer)
    auxiliary.model.to(given.device, getattr(torch, given.dtype))
    auxiliary.recompute = given.recompute
    if given.compile:
        for block in auxiliary.blocks:
            block.compile(dynamic=True)
    return auxiliary


def wait(given: argparse.Namespace) -> None:
    if given.device.startswith("cuda"):
        torch.cuda.synchronize()


def fedsp(given: argparse.Namespace, stage: str, way: str, rows: list[Encoded], longest: int) -> Iterator[tuple[int, float]]:
    """(tokens, seconds) of each call after the first, which warms up: a call is all steps of a round."""
    model = open_model(given)
    space: Any = way.removeprefix("fedsp").strip() or "residual"
    spec = PromptSpec(space, LENGTH, model.prompt_shape)
    prompt = SoftPrompt(spec, torch.randn(spec.shape) * 0.02).to(given.device)
    with tempfile.TemporaryDirectory() as folder:
        party = Party("a", model, prompt, rows, Rest(Path(folder)))
        train = prompt.trained() if stage == "speak" else trainable(model.model)
        for parameter in train.values():
            parameter.data = parameter.data.float()
        prompt.requires_grad_(stage == "speak")
        work = Work(stage, Stage(given.steps, given.batch, Optimisation(1e-4, warmup=0.0)), train)
        tokens = sum(int(batch.attention_mask.sum()) for batch in training_batches(rows, steps=given.steps, batch_size=given.batch, seed=1))
        for _ in range(given.repeats + 1):
            wait(given)
            started = time.perf_counter()
            take_steps(party, work, prompt.payload(), 1, 1, None)  # one seed: the same batches as the token count
            wait(given)
            yield tokens, time.perf_counter() - started


def plain(given: argparse.Namespace, stage: str, way: str, rows: list[Encoded], longest: int) -> Iterator[tuple[int, float]]:
    """Padded to the data set's longest, the library's own loss over all positions."""
    model = open_model(given)
    spec = PromptSpec("key_value", LENGTH, model.prompt_shape)
    prompt = SoftPrompt(spec, torch.randn(spec.shape) * 0.02).to(given.device)
    train = list(prompt.parameters() if stage == "speak" else model.model.parameters())
    for parameter in train:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(train, lr=1e-4)
    wide = Encoded(tuple([0] * longest), longest)
    for _ in range(given.repeats + 1):
        seconds, tokens = 0.0, 0
        for step in range(max(1, given.steps // 2)):
            drawn = [rows[(step * given.batch + index) % len(rows)] for index in range(given.batch)]
            batch = collate([*drawn, wide]).to(torch.device(given.device))
            wait(given)
            started = time.perf_counter()
            ids, mask, labels = batch.input_ids[:-1], batch.attention_mask[:-1], batch.labels[:-1]
            mask = torch.cat([mask.new_ones(len(mask), LENGTH), mask], dim=1)
            cache = model.cache(prompt.prefix(model), len(ids))
            loss: Tensor = model.model(input_ids=ids, attention_mask=mask, past_key_values=cache, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            wait(given)
            seconds += time.perf_counter() - started
            tokens += sum(len(row.ids) for row in drawn)
        yield tokens, seconds


def peft(given: argparse.Namespace, stage: str, way: str, rows: list[Encoded], longest: int) -> Iterator[tuple[int, float]]:
    """Trainer, and PEFT's prefix-tuning for speak."""
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model: Any = open_model(given).model
    if stage == "speak":
        model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    else:
        model.requires_grad_(True)
    seen: list[tuple[int, float]] = []
    pending: list[int] = []

    def collated(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate([Encoded(tuple(one["input_ids"]), one["start"]) for one in some])
        pending.append(int(batch.attention_mask.sum()))
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait(given)
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(given)
            seen.append((pending[len(seen)], time.perf_counter() - self.started))

    steps = given.steps * (given.repeats + 1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=given.batch,
            use_cpu=given.device == "cpu",
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        data = [{"input_ids": list(row.ids), "start": row.start} for row in rows] * math.ceil(steps * given.batch / len(rows))
        Trainer(model=model, args=arguments, train_dataset=data, data_collator=collated, callbacks=[Clock()]).train()
    for start in range(0, steps, given.steps):
        part = seen[start : start + given.steps]
        yield sum(tokens for tokens, _ in part), sum(seconds for _, seconds in part)


def floor_operations(given: argparse.Namespace, stage: str, rows: list[Encoded]) -> float:
    """Operations for each token of these examples that no way can do without."""
    text = MODELS[given.model].get_text_config()
    shape = shape_of(MODELS[given.model])
    torch.manual_seed(SEED)
    with torch.device("meta"):
        blocks = AutoModelForCausalLM.from_config(MODELS[given.model])
    outside = {id(p) for module in blocks.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()}
    weights = sum(p.numel() for p in blocks.parameters() if p.dim() > 1 and id(p) not in outside)
    passes = 2 if stage == "speak" else 3
    total = 0.0
    for row in rows:
        tokens, asked = len(row.ids), len(row.ids) - row.start
        pairs = tokens * LENGTH + tokens * (tokens + 1) / 2
        total += passes * (2.0 * weights * tokens + 2.0 * shape.hidden * text.vocab_size * asked) + 2 * passes / 2 * 4.0 * shape.layers * shape.hidden * pairs
    return total / sum(len(row.ids) for row in rows)


def machine(given: argparse.Namespace) -> dict[str, float]:
    """The rate of products of matrices in the model's shapes, and of copying memory: the best of several."""
    hidden = shape_of(MODELS[given.model]).hidden
    dtype = getattr(torch, given.dtype)
    tokens = given.batch * 48
    left, right = (torch.randn(shape, device=given.device).to(dtype) for shape in ((tokens, hidden), (hidden, 4 * hidden)))
    large = torch.empty(2**26, device=given.device)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            wait(given)
            started = time.perf_counter()
            work()
            wait(given)
            times.append(time.perf_counter() - started)
        return min(times)

    return {
        "operations_per_second": 2.0 * tokens * hidden * 4 * hidden / best(lambda: left @ right),
        "bytes_per_second": 8.0 * large.numel() / best(large.clone),
    }


def one(given: argparse.Namespace) -> dict[str, float]:
    """One way in this process: tokens per second (median of the calls after the first) and peak memory, MiB."""
    rows, longest = rows_of(given.reference, given.tasks, given.steps * given.batch)
    way = {"fedsp": fedsp, "plain": plain, "peft": peft, "trainer": peft}[given.way.split()[0]]
    rates = [tokens / seconds for tokens, seconds in way(given, given.stage, given.way, rows, longest)][1:]
    cuda = given.device.startswith("cuda")
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rate": statistics.median(rates), "low": min(rates), "high": max(rates), "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_reference(parser)
    parser.add_argument("--model", choices=list(MODELS), default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", default="arc_easy,piqa")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--recompute", action="store_true", help="activations are computed again in the backward pass")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(given.threads)
    if given.way:
        print(json.dumps(one(given)))
        return
    rates = machine(given)
    print(f"\n{given.model}, {given.dtype}, {given.device}, {given.threads} threads, batches of {given.batch}, prompts of {LENGTH}", flush=True)
    print(f"measured: {rates['operations_per_second'] / 1e9:.0f} Gflop/s, {rates['bytes_per_second'] / 1e9:.1f} GB/s", flush=True)
    for task in given.tasks.split(","):
        rows, longest = rows_of(given.reference, task, given.steps * given.batch)
        tokens = [len(row.ids) for row in rows]
        print(f"\n{task}: {statistics.fmean(tokens):.0f} tokens an example, the longest of the data set {longest}\n", flush=True)
        print(
            "| stage | way | tokens per second (lowest to highest) | fedsp is faster by | time over the floor | peak memory, MiB |\n|---|---|---|---|---|---|",
            flush=True,
        )
        for stage, ways in WAYS.items():
            most = rates["operations_per_second"] / floor_operations(given, stage, rows)
            found: dict[str, dict[str, float]] = {}
            for way in ways:
                command = [sys.executable, __file__, *sys.argv[1:], "--tasks", task, "--way", way, "--stage", stage]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[way] = json.loads(printed.splitlines()[-1])
                ours = found[ways[0]]["rate"]
                mine = found[way]
                print(
                    f"| {stage} | {way} | {mine['rate']:.0f} ({mine['low']:.0f} to {mine['high']:.0f}) | {ours / mine['rate']:.2f} | {most / mine['rate']:.2f} | {mine['memory']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
