"""What the tests share: tiny random models, and the reference material that may lie beside a checkout."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: no test asks a hub

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

from fedsp.models import PromptedLM

torch.set_num_threads(1)  # tiny models: a second thread costs more than it gives, and a busy machine makes it cost much more
REFERENCE = Path(os.environ.get("FEDSP_REFERENCE", Path(__file__).resolve().parents[2] / "shared"))

_LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "opt": OPTConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
        dropout=0.0,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    ),
    "llama": LlamaConfig(**_LLAMA, num_key_value_heads=2),
    "qwen2": Qwen2Config(**_LLAMA, num_key_value_heads=2),
    "mistral": MistralConfig(**_LLAMA, num_key_value_heads=2),
    "gemma": GemmaConfig(**_LLAMA, num_key_value_heads=1, head_dim=16),
    "gpt_neox": GPTNeoXConfig(**_LLAMA),
}


def tiny_model(family: str, *, seed: int = 0, positions: Any = "hugging_face") -> PromptedLM:
    """A random model of a family: 4 layers, hidden size 32, 97 tokens; weights large enough that logits differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(deepcopy(FAMILIES[family]), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.requires_grad_(False)
    return PromptedLM(model, f"tiny {family}", positions=positions)


def harness_task(name: str, rows: list[dict[str, Any]], folder: Path) -> Any:
    """One of lm-evaluation-harness's own tasks, reading these rows instead of the hub's."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with the eval extra")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / {"arc_easy": "arc"}.get(name, name) / f"{name}.yaml")
    path = folder / f"{name}-harness.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": None}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")}}
    return ConfigurableTask(config={key: value for key, value in config.items() if key != "tag"} | splits | local)


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Numbers that the authors' own implementation computed; see the README beside the file."""
    path = REFERENCE / "golden" / "fedsp_reference.safetensors"
    if not path.exists():
        pytest.skip(f"the authors' reference numbers are not here: {path}")
    numbers: dict[str, torch.Tensor] = load_file(path)
    return numbers


@pytest.fixture(scope="session")
def science() -> Path:
    """A small pretrained model, with its questions beside it."""
    path = REFERENCE / "models" / "tiny-science"
    if not path.exists():
        pytest.skip(f"the pretrained test model is not here: {path}")
    return path
