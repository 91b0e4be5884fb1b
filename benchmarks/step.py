"""The local step against its floor, the plain way and PEFT: the first tables of
docs/results/performance.md.

    python benchmarks/step.py [--reference FOLDER] [--model gpt2] [--device cpu] [--threads 2]
    [--tasks arc_easy,piqa] [--batch 16] [--steps 4] [--dtype float32]
                                        [--compile] [--recompute]

A model with random weights in the shape of GPT-2, GPT2-XL or OPT-1.3B, without dropout; an
auxiliary model `ends(2)` of it, as deep as it is; questions of real tasks. Each figure is tokens of
real text per second (padding and prompt do not count) over the same examples, and the peak memory
of a process of its own once the model is there. Weights that are trained (auxiliary) are float32.

- prompt, adapter (rank 64 in all layers) and auxiliary (all weights): what a client tunes, by the
  functions of a run (`fedsp.federation.party.LocalRound`).
- plain: every example padded to the data set's longest, logits at all positions, batches as they
  are drawn.
- peft: prefix-tuning or LoRA by PEFT and Trainer, batches padded to their own longest; for the
  auxiliary model, all weights by Trainer.

The rivals' model is as transformers makes it, with its own GELU in GPT-2. `--compile` is for all,
`--recompute` for fedsp alone.

The floor is the larger of two times, here always the first; a call is held against the rate of
products just before and after it. The fewest operations that the examples need (2 for each weight
and token forward, as many again to the inputs, as many again to the weights where they are trained;
attention; logits at answer tokens alone; those of adapters themselves are not counted) over the
rate of a product of matrices measured here, in the same run. And the fewest bytes (each weight once
forward and once back; where it is trained its gradient, and what AdamW reads and writes) over the
rate of copying memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from material import add_reference, model_name, questions
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, PretrainedConfig
from transformers.activations import NewGELUActivation

from fedsp.cli import quiet_libraries
from fedsp.data.encoding import Encoded, collate, encode_targets, training_batches
from fedsp.data.seeding import derive_seed
from fedsp.experiments.run import forget_peak_memory, peak_memory
from fedsp.federation.party import LocalRound, Party
from fedsp.federation.state_store import StateStore
from fedsp.models.adapter import Adapter, AdapterSettings
from fedsp.models.auxiliary import AuxiliaryModel, build_auxiliary, parse_plan
from fedsp.models.blocks import find_blocks
from fedsp.models.loading import load_tokenizer
from fedsp.models.messengers.making import blocks_of
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.shape_counts import shape_of
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.models.trainable import Messenger, trainable
from fedsp.training.loop import Optimisation
from fedsp.training.stage import Stage

LENGTH, RANK, SEED = 20, 64, 0
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
MODELS: dict[str, PretrainedConfig] = {
    "tiny": GPT2Config(vocab_size=2048, n_embd=32, n_layer=6, n_head=2, **NO_DROPOUT),
    "gpt2": GPT2Config(**NO_DROPOUT),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25, **NO_DROPOUT),
    "opt-1.3b": OPTConfig(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        ffn_dim=8192,
        word_embed_proj_dim=2048,
        dropout=0.0,
    ),
}
WAYS = {
    "prompt": ("fedsp key_value", "fedsp residual", "plain", "peft"),
    "adapter": ("fedsp", "plain", "peft"),
    "auxiliary": ("fedsp", "plain", "trainer"),
}


def rows_of(reference: Path | None, task: str, count: int) -> tuple[list[Encoded], int]:
    """So many training examples as tokens, and the length of the longest of the whole data set."""
    rows = encode_targets(
        load_tokenizer(model_name(reference)), questions(reference, task, "train"), 512
    )
    return rows[:count], max(len(row.ids) for row in rows)


def open_model(given: argparse.Namespace, stage: str, *, rival: bool) -> AuxiliaryModel:
    torch.manual_seed(SEED)
    with torch.device(given.device):
        model = AutoModelForCausalLM.from_config(MODELS[given.model], dtype=torch.float32)
    whole = PromptedLM(model.requires_grad_(False), given.model)
    tokenizer = load_tokenizer(given.tokenizer)
    auxiliary = build_auxiliary(whole, parse_plan(given.plan, whole.shape.layers), tokenizer)
    auxiliary.model.to(given.device, dtype_of(given, stage))
    auxiliary.recompute = given.recompute
    if rival and given.model.startswith("gpt2"):
        for block in auxiliary.blocks:
            setattr(block.mlp, "act", NewGELUActivation())
    if given.compile:
        setattr(torch._dynamo.config, "recompile_limit", 2 * len(auxiliary.blocks))  # by layer
        for block in auxiliary.blocks:
            block.compile(dynamic=True)
    del model, whole
    gc.collect()
    forget_peak_memory()
    if given.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    return auxiliary


def dtype_of(given: argparse.Namespace, stage: str) -> torch.dtype:
    dtype: torch.dtype = torch.float32 if stage == "auxiliary" else getattr(torch, given.dtype)
    return dtype


def messenger_of(
    given: argparse.Namespace, stage: str, way: str, model: AuxiliaryModel
) -> Messenger:
    """The adapters of all layers, or a prompt, which the stage of the auxiliary model has too."""
    if stage == "adapter":
        settings = AdapterSettings(rank=RANK, alpha=2.0 * RANK, train_first=True)
        return Adapter(model, blocks_of(model.plan, "all"), settings, seed=SEED)
    ours = way.startswith("fedsp")
    space: Any = way.removeprefix("fedsp").strip() or "residual" if ours else "key_value"
    spec = PromptSpec(space=space, length=LENGTH, model=model.prompt_shape)
    return SoftPrompt(spec, torch.randn(spec.shape) * 0.02).to(given.device)


def wait(given: argparse.Namespace) -> None:
    if given.device.startswith("cuda"):
        torch.cuda.synchronize()


def fedsp(
    given: argparse.Namespace, stage: str, way: str, rows: list[Encoded], longest: int
) -> Iterator[tuple[int, float]]:
    """(tokens, seconds) of each call after the first, which warms up: a call is all steps of a
    round."""
    model = open_model(given, stage, rival=False)
    messenger = messenger_of(given, stage, way, model)
    with tempfile.TemporaryDirectory() as folder:
        party = Party(
            id="a", model=model, messenger=messenger, examples=rows, store=StateStore(Path(folder))
        )
        settings = Stage(
            name=stage,
            seed_label=stage,
            steps=given.steps,
            batch_size=given.batch,
            optimisation=Optimisation(learning_rate=1e-4, warmup=0.0),
        )
        tokens = sum(
            int(batch.attention_mask.sum())
            for batch in training_batches(
                rows, steps=given.steps, batch_size=given.batch, seed=derive_seed(1, stage)
            )
        )
        for _ in range(given.repeats + 1):
            wait(given)
            started = time.perf_counter()
            LocalRound(
                party=party, round=1, seed=1, received=messenger.payload(), earlier={}
            ).train(model if stage == "auxiliary" else messenger, settings)
            wait(given)
            yield tokens, time.perf_counter() - started


def plain(
    given: argparse.Namespace, stage: str, way: str, rows: list[Encoded], longest: int
) -> Iterator[tuple[int, float]]:
    """Padded to the data set's longest, the library's own loss over all positions."""
    model = open_model(given, stage, rival=True)
    messenger = messenger_of(given, stage, way, model)
    train = list((model if stage == "auxiliary" else messenger).trained().values())
    for parameter in train:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(train, lr=1e-4)
    wide = Encoded(tuple([0] * longest), longest)
    for _ in range(2):  # its steps are all of one length
        seconds, tokens = 0.0, 0
        for step in range(given.steps):
            drawn = [rows[(step * given.batch + index) % len(rows)] for index in range(given.batch)]
            batch = collate([*drawn, wide]).to(torch.device(given.device))
            wait(given)
            started = time.perf_counter()
            ids, mask, labels = batch.input_ids[:-1], batch.attention_mask[:-1], batch.labels[:-1]
            prefix = messenger.prefix(model)
            cache = None if prefix is None else model.cache(prefix, len(ids))
            if cache is not None:
                mask = torch.cat([mask.new_ones(len(mask), LENGTH), mask], dim=1)
            loss: Tensor = model.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, labels=labels
            ).loss
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            wait(given)
            seconds += time.perf_counter() - started
            tokens += sum(len(row.ids) for row in drawn)
        yield tokens, seconds


def peft(
    given: argparse.Namespace, stage: str, way: str, rows: list[Encoded], longest: int
) -> Iterator[tuple[int, float]]:
    """Trainer, and PEFT's prefix-tuning for the prompt, its LoRA for adapters."""
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model: Any = open_model(given, stage, rival=True).model
    if stage == "prompt":
        model = get_peft_model(
            model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
        )
    elif stage == "adapter":
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"
            ),
        )
    else:
        model.requires_grad_(True)
    seen: list[tuple[int, float]] = []
    pending: list[int] = []

    def collated(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate([Encoded(tuple(one["input_ids"]), one["start"]) for one in some])
        pending.append(int(batch.attention_mask.sum()))
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
        }

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
        data = [{"input_ids": list(row.ids), "start": row.start} for row in rows] * math.ceil(
            steps * given.batch / len(rows)
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=collated,
            callbacks=[Clock()],
        ).train()
    for start in range(0, steps, given.steps):
        part = seen[start : start + given.steps]
        yield sum(tokens for tokens, _ in part), sum(seconds for _, seconds in part)


def floor_operations(given: argparse.Namespace, stage: str, rows: list[Encoded]) -> float:
    """Operations for each token of these examples that no way can do without. In the last block
    tokens that answer nothing need only keys and values; in the first, nothing goes back below the
    keys and values of a key/value prompt."""
    text = MODELS[given.model].get_text_config()
    shape = shape_of(MODELS[given.model])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MODELS[given.model])
    blocks = find_blocks(model, shape.layers, given.model)[1]
    block = sum(parameter.numel() for parameter in blocks[0].parameters() if parameter.dim() > 1)
    below = 2 * shape.hidden * shape.heads * shape.head_size  # what makes keys and values
    passes, prompt = 3 if stage == "auxiliary" else 2, 0 if stage == "adapter" else LENGTH
    total = 0.0
    for row in rows:
        tokens, asked = len(row.ids), len(row.ids) - row.start
        matrices = (shape.layers - 1) * block * tokens + below * tokens + (block - below) * asked
        first = 0 if stage == "auxiliary" else (below + shape.hidden**2) * tokens
        pairs = tokens * prompt + tokens * (tokens + 1) / 2
        # going back twice as many as forth; at the first block next to none
        attention = 4.0 * shape.hidden * pairs * (3 * shape.layers - 2)
        total += (
            2.0 * (passes * (matrices + shape.hidden * text.vocab_size * asked) - first) + attention
        )
    return total / sum(len(row.ids) for row in rows)


def floor_bytes(given: argparse.Namespace, stage: str) -> float:
    """Bytes that a step cannot do without, weights alone: read going forth and back; where trained
    a gradient written, then four numbers read and three written."""
    model = open_model(given, stage, rival=False).model
    weights = sum(parameter.numel() for parameter in trainable(model).values())
    return float(
        weights * (10 * 4 if stage == "auxiliary" else 2 * dtype_of(given, stage).itemsize)
    )


def rate_of_products(given: argparse.Namespace, dtype: torch.dtype) -> float:
    """Operations per second of products of matrices in the model's shapes: the best of several."""
    hidden, tokens = shape_of(MODELS[given.model]).hidden, given.batch * 48
    found = []
    for wide in ((hidden, 4 * hidden), (4 * hidden, hidden), (hidden, 3 * hidden)):
        left, right = (
            torch.randn(shape, device=given.device).to(dtype) for shape in ((tokens, wide[0]), wide)
        )
        found.append(2.0 * tokens * wide[0] * wide[1] / best(given, partial(torch.mm, left, right)))
    return float(max(found))


def rate_of_copying(given: argparse.Namespace) -> float:
    """Bytes per second, read and written."""
    source, target = (torch.ones(2**26, device=given.device) for _ in range(2))
    return 8.0 * source.numel() / best(given, partial(target.copy_, source))


def best(given: argparse.Namespace, work: Callable[[], object]) -> float:
    """Seconds of a piece of work: of five runs of five, the fastest."""
    times = []
    for _ in range(5):
        wait(given)
        started = time.perf_counter()
        for _ in range(5):
            work()
        wait(given)
        times.append((time.perf_counter() - started) / 5)
    return min(times)


def one(given: argparse.Namespace, rows: list[Encoded], longest: int) -> dict[str, float]:
    """One way in this process: tokens per second (median of the calls after the first), the time
    over the floor and peak memory, MiB.

    A machine that others share changes its speed, so each call is held against the rate of products
    measured just before and just after it.
    """
    way = {"fedsp": fedsp, "plain": plain, "peft": peft, "trainer": peft}[given.way.split()[0]]
    operations, dtype = floor_operations(given, given.stage, rows), dtype_of(given, given.stage)
    rates, over, before = [], [], rate_of_products(given, dtype)
    for tokens, seconds in way(given, given.stage, given.way, rows, longest):
        after = rate_of_products(given, dtype)
        rates.append(tokens / seconds)
        over.append((before + after) / 2 * seconds / (operations * tokens))
        before = after
    rates, over = rates[1:], over[1:]
    cuda = given.device.startswith("cuda")
    memory = (torch.cuda.max_memory_allocated() if cuda else peak_memory()) / 2**20
    return {
        "rate": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "over": statistics.median(over),
        "memory": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_reference(parser)
    parser.add_argument("--model", choices=list(MODELS), default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", default="arc_easy,piqa")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="activations are computed again in the backward pass",
    )
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(given.threads)
    given.tokenizer, given.plan = model_name(given.reference), "ends(2)"
    if given.way:
        rows, longest = rows_of(given.reference, given.tasks, given.steps * given.batch)
        print(json.dumps(one(given, rows, longest)))
        return
    options = "".join(f", {name}" for name in ("compile", "recompute") if getattr(given, name))
    print(
        f"\n{given.model}, {given.dtype}, {given.device}, {given.threads} threads, batches of"
        f" {given.batch}, prompts of {LENGTH}{options}",
        flush=True,
    )
    of_type = {
        dtype: rate_of_products(given, dtype)
        for dtype in {dtype_of(given, stage) for stage in WAYS}
    }
    operations, copied = (
        {stage: of_type[dtype_of(given, stage)] for stage in WAYS},
        rate_of_copying(given),
    )
    rates = ", ".join(f"{rate / 1e9:.0f} Gflop/s ({stage})" for stage, rate in operations.items())
    print(f"measured: {rates}, {copied / 1e9:.1f} GB/s", flush=True)
    for task in given.tasks.split(","):
        rows, longest = rows_of(given.reference, task, given.steps * given.batch)
        tokens = [len(row.ids) for row in rows]
        print(
            f"\n{task}: {statistics.fmean(tokens):.0f} tokens an example, the longest of the data"
            f" set {longest}",
            flush=True,
        )
        for stage in WAYS:
            by_operations = operations[stage] / floor_operations(given, stage, rows)
            by_bytes = copied * given.batch * statistics.fmean(tokens) / floor_bytes(given, stage)
            print(
                f"floor, {stage}: {by_operations:.0f} tokens a second by operations, {by_bytes:.0f}"
                " by bytes",
                flush=True,
            )
        print()
        print(
            "| stage | way | tokens per second (lowest to highest) | fedsp is faster by | time over"
            " the floor | peak memory, MiB |\n|---|---|---|---|---|---|",
            flush=True,
        )
        for stage, ways in WAYS.items():
            found: dict[str, dict[str, float]] = {}
            for way in ways:
                command = [
                    sys.executable,
                    __file__,
                    *sys.argv[1:],
                    "--tasks",
                    task,
                    "--way",
                    way,
                    "--stage",
                    stage,
                ]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[way] = json.loads(printed.splitlines()[-1])
                ours = found[ways[0]]["rate"]
                mine = found[way]
                print(
                    f"| {stage} | {way} | {mine['rate']:.0f} ({mine['low']:.0f} to"
                    f" {mine['high']:.0f}) | {ours / mine['rate']:.2f} | {mine['over']:.2f} |"
                    f" {mine['memory']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
