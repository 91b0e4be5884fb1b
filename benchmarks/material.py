"""Questions, a tokenizer and models to measure with: those of a folder with models/tiny-science and
data/qa, or else of the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from fedsp.data.encoding import Tokenizer
from fedsp.data.files import Row
from fedsp.data.tasks import Example, examples_of, find_task, load_rows


def add_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference",
        type=Path,
        default=None,
        help=(
            "a folder with models/tiny-science and data/qa; none: gpt2 and the tasks' own data"
            " sets, from the hub"
        ),
    )


def question_rows(reference: Path | None, task: str, split: str) -> list[Row]:
    path = reference / "data" / "qa" / task / f"{split}.jsonl.gz" if reference else None
    return load_rows(find_task(task), str(path) if path else None, split)


def questions(reference: Path | None, task: str, split: str) -> list[Example]:
    return examples_of(find_task(task), question_rows(reference, task, split))


def model_name(reference: Path | None) -> str:
    return str(reference / "models" / "tiny-science") if reference else "gpt2"


def random_gpt2(folder: str, tokenizer: Tokenizer) -> str:
    """A folder with random weights in the shape of GPT-2, its vocabulary included, and this
    tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GPT2Config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
