"""Where models and tokenizers come from: a hub name, a folder, or a configuration alone."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fedsp.errors import ModelError, first_line
from fedsp.models import Positions, PromptedLM, Tokenizer


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU."""
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"model.device = {device!r} cannot be used on this machine ({first_line(error)}): choose auto, cpu, cuda or mps") from error
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def load_model(name: str, *, device: str = "auto", positions: Positions = "hugging_face", full_precision: bool = False) -> PromptedLM:
    """A causal LM by hub name or folder, frozen, in float32 (bfloat16 on CUDA, unless its weights are to be tuned in `full_precision`).

    Raises:
        ModelError: nothing of that name can be loaded, or the model cannot carry a soft prompt.
    """
    where = choose_device(device)
    read_model_config(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16 if where.type == "cuda" and not full_precision else torch.float32, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(_not_loaded(name, error)) from error
    model.requires_grad_(False)
    return PromptedLM(model.to(where), name, positions=positions)


def read_model_config(name: str) -> Any:
    """The configuration of a causal LM, without its weights.

    Raises:
        ModelError: there is no such model, or it is an encoder-decoder.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_not_loaded(name, error)) from error
    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}): fedsp tunes causal language models")
    return config


def _not_loaded(name: str, error: Exception) -> str:
    return f"cannot load the model {name!r}: it is neither a folder with a model nor a name that the hub answers to ({first_line(error)})"


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that lies beside a model.

    Raises:
        ModelError: there is none.
    """
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a tokenizer from {name!r}: {first_line(error)}") from error
    return tokenizer


def empty_model(config: Any) -> PreTrainedModel:
    """A model of this configuration on torch's default device, its weights as its family draws them."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


PROBE = "Which of these, if any, isn't 1,234.5\u00a0m tall?\n\tThe na\u00efve \u2014 \u4f60\u597d \U0001f642 --- answer:  two  "


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what a tokenizer does to text: its vocabulary, its merges where it has them, and the tokens of a probe."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges") if backend is not None else None
    content = [sorted(tokenizer.get_vocab().items()), merges, tokenizer.encode(PROBE), tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
