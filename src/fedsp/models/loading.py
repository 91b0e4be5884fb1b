"""Where models and tokenizers come from, a hub name, a folder, or a configuration alone; and in
what precision their frozen weights are held."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, cached_file

from fedsp.data.encoding import Tokenizer
from fedsp.errors import ModelError, StorageError, first_line, require_installed
from fedsp.models.prompted_lm import Positions, PromptedLM
from fedsp.storage import move_into_place, room_for_large_files, unfinished_beside

Precision = Literal["auto", "float32", "bfloat16", "8bit", "4bit"]
"""Of frozen weights; prompts, gradients and optimizer state are float32 always. `8bit` is LLM.int8
(Dettmers et al., NeurIPS 2022, https://arxiv.org/abs/2208.07339), `4bit` NF4 (Dettmers et al.,
NeurIPS 2023, https://arxiv.org/abs/2305.14314), both of bitsandbytes."""

NF4_BLOCK = 64
"""Weights that share a scale in `4bit`."""

HUB_SECONDS = 10.0
"""Within which the hub must answer."""

SPLIT = "split"
"""A device that is all devices: layers are spread over GPUs, then memory, then the disk, by
accelerate."""


def choose_device(device: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU; so is `split`, for whatever is not spread."""
    if device not in ("auto", SPLIT):
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ModelError(
                f"model.device = {device!r} cannot be used on this machine ({first_line(error)}):"
                " choose auto, cpu, cuda, mps or split"
            ) from error
    return torch.device(
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )


def load_model(
    name: str,
    *,
    device: str = "auto",
    positions: Positions = "hugging_face",
    precision: Precision = "auto",
) -> PromptedLM:
    """A causal LM by hub name or folder, frozen. `auto` is bfloat16 on CUDA and float32 elsewhere;
    where weights are rounded to 8 or 4 bits, so is what stays beside them.

    Raises:
        ModelError: nothing of that name can be loaded, the model cannot carry a soft prompt, or a
            library that the device or the precision needs is missing.
    """
    where, few_bits = choose_device(device), precision in ("8bit", "4bit")
    _require(("accelerate",) if device == SPLIT else (), f"model.device = {device!r}")
    _require(("accelerate", "bitsandbytes") if few_bits else (), f"model.precision = {precision!r}")
    read_model_config(name)
    half = precision == "bfloat16" or (precision != "float32" and where.type == "cuda")
    placed: dict[str, Any] = {}
    if few_bits:
        placed["device_map"] = {"": where}
        placed["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=precision == "8bit",
            load_in_4bit=precision == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if half else torch.float32,
        )
    if device == SPLIT:
        folder = room_for_large_files()
        offloaded = tempfile.TemporaryDirectory(prefix="fedsp-offloaded-", dir=folder)
        placed |= {"device_map": "auto", "offload_folder": offloaded.name}
    try:
        dtype = torch.bfloat16 if half else torch.float32
        model, found = AutoModelForCausalLM.from_pretrained(
            _place(name),
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **placed,
        )
    except Exception as error:  # whatever a family's own code raises
        raise ModelError(
            f"cannot load the weights of the model {name!r}: {first_line(error)}"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"the model {name!r} lacks {len(missing)} of its weights (first: {missing[0]}), which"
            " would be random: download it again, or use a causal language model"
        )
    if device == SPLIT:
        weakref.finalize(model, offloaded.cleanup)
    model.requires_grad_(False)
    _mend_4bit(model, "model.precision")
    return PromptedLM(model if placed else model.to(where), name, positions=positions)


def reduce_precision(model: PromptedLM, precision: Precision, key: str) -> None:
    """Convert a model's frozen weights in place: all of them to bfloat16, or the linear layers of
    its blocks to 8 or 4 bits. Shared weights stay shared. `key` is the configuration key to name in
    errors.

    Raises:
        ModelError: bitsandbytes is missing.
    """
    model.together = None
    if precision == "bfloat16":
        # and not its buffers: rotations by position need their digits
        for parameter in model.model.parameters():
            parameter.data = parameter.data.bfloat16()
    if precision not in ("8bit", "4bit"):
        return
    _require(("bitsandbytes",), f"{key} = {precision!r}")
    rounded: dict[int, nn.Module] = {}
    for block in model.blocks:
        for path, module in list(block.named_modules()):
            if isinstance(module, nn.Linear | Conv1D):
                if id(module.weight) not in rounded:
                    rounded[id(module.weight)] = _in_few_bits(module, precision).to(model.device)
                block.set_submodule(path, rounded[id(module.weight)])
    _mend_4bit(model.model, key)


def save_model(model: PromptedLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a model and its tokenizer as a folder that transformers loads, whole or not at all.

    Raises:
        StorageError: the disk did not take it.
        ModelError: its settings are such that transformers will not save them.
    """
    unfinished = unfinished_beside(folder.resolve())
    try:
        model.model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        move_into_place(unfinished, folder.resolve(), last="config.json")
    except ValueError as error:
        raise ModelError(
            f"{model.name} cannot be saved ({first_line(error)}): mend its generation_config.json"
        ) from error
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{folder} could not be written ({first_line(error)}): free some space, or name another"
            " folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def in_few_bits(model: PromptedLM) -> bool:
    """Whether its linear layers are bitsandbytes' own."""
    return any(
        type(module).__module__.startswith("bitsandbytes") for module in model.model.modules()
    )


def _in_few_bits(linear: nn.Module, precision: Precision) -> nn.Module:
    import bitsandbytes

    assert isinstance(linear.weight, nn.Parameter)
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    weight = weight.detach().cpu().contiguous()
    wide, bias = (weight.shape[1], weight.shape[0]), linear.bias
    if precision == "8bit":
        made: nn.Module = bitsandbytes.nn.Linear8bitLt(
            *wide, bias=bias is not None, has_fp16_weights=False, threshold=6.0
        )
        made.weight = bitsandbytes.nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False
        )
    else:
        made = bitsandbytes.nn.Linear4bit(
            *wide, bias=bias is not None, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
        made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    made.bias = bias
    return made.eval()


def _mend_4bit(model: nn.Module, key: str) -> None:
    """Turn off bitsandbytes' packing of 4-bit weights on a CPU, which starts in the first call
    without gradients and blocks them from then on. It also misreads weights whose row length is
    not a multiple of NF4_BLOCK.

    Raises:
        ModelError: the model has such rows.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  not an attribute of every module
            if module.in_features % NF4_BLOCK:
                raise ModelError(
                    f"{key} = '4bit': the layer {name} has {module.in_features} inputs, and"
                    f" bitsandbytes needs a multiple of {NF4_BLOCK}; take 8bit or bfloat16"
                )


def _require(libraries: tuple[str, ...], what: str) -> None:
    require_installed("large", f"{what} needs", *libraries, error=ModelError)


def read_model_config(name: str) -> Any:
    """The configuration of a causal LM, without its weights.

    Raises:
        ModelError: there is no such model, or it is an encoder-decoder.
    """
    try:
        config = AutoConfig.from_pretrained(_place(name), trust_remote_code=False)
    except Exception as error:  # a configuration's own checks raise what they like
        raise ModelError(_not_loaded(name, error)) from error
    if config.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder ({config.model_type}): fedsp tunes causal language"
            " models"
        )
    return config


def _place(name: str) -> str:
    """A model's name, or, where the hub does not answer, the folder in the cache of what was
    fetched of that name before: the hub's client would try again for half a minute, file by file,
    before it looked there.

    Raises:
        ConnectionError: the hub does not answer, and nothing was fetched before.
    """
    if os.path.isdir(name):  # noqa: PTH112  a hub name is no path
        return name
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # OSError or httpx's, by the client's version
        found = try_to_load_from_cache(name, CONFIG_NAME)
        if not isinstance(found, str):
            raise ConnectionError(
                f"{constants.ENDPOINT} does not answer, and nothing was fetched of it before"
            ) from error
        return str(Path(found).parent)
    return name


def _not_loaded(name: str, error: Exception, what: str = "model") -> str:
    if os.path.isdir(name):  # noqa: PTH112  a hub name is no path
        return f"cannot load the {what} in the folder {name!r}: {first_line(error)}"
    return (
        f"cannot load the {what} {name!r}: it is neither a folder with a {what} nor a name that the"
        f" hub answers to ({first_line(error)})"
    )


def require_vocabulary(model: PromptedLM, tokenizer: Tokenizer) -> None:
    """See that a model has an embedding for every token of its tokenizer.

    Raises:
        ModelError: it has not; the message has both sizes.
    """
    tokens = 1 + max(tokenizer.get_vocab().values(), default=0)
    embeddings = model.model.get_input_embeddings().num_embeddings
    if tokens > embeddings:
        raise ModelError(
            f"{model.name} has embeddings for {embeddings} tokens, but its tokenizer has {tokens}:"
            " use the tokenizer of this model"
        )


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that lies beside a model.

    Raises:
        ModelError: there is none.
    """
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(_place(name), trust_remote_code=False)
    except Exception as error:  # as many kinds as there are tokenizers
        raise ModelError(_not_loaded(name, error, "tokenizer")) from error
    return tokenizer


def known_keys(kind: type[Any]) -> set[str]:
    """The keys of a configuration class: constructor arguments, annotations, aliases and default
    entries; without those that name remote code, kernels, quantization or parallelism plans."""
    named = set(inspect.signature(kind.__init__).parameters).union(
        *(getattr(base, "__annotations__", {}) for base in kind.__mro__), kind.attribute_map
    )
    with contextlib.suppress(Exception):  # a configuration that has no default form
        named |= set(kind().to_dict())
    return {
        key
        for key in named
        if not re.search("auto_map|implementation|quantization|_plan$|^self$|kwargs", key)
    }


def empty_model(config: Any) -> PreTrainedModel:
    """A model of this configuration on torch's default device, its weights as its family draws
    them.

    Raises:
        ModelError: the family cannot be built from it.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # whatever a family's own code raises
        raise ModelError(
            f"a model of the type {config.model_type!r} cannot be built from its configuration:"
            f" {first_line(error)}"
        ) from error
    return model


PROBE = (
    "Which of these, if any, isn't 1,234.5\u00a0m tall?\n\tThe na\u00efve \u2014 \u4f60\u597d"
    " \U0001f642 --- answer:  two  "
)


WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def model_digest(model: PromptedLM, tokenizer: Tokenizer) -> str:
    """SHA-256 of what a model and its tokenizer are: its configuration, its weight files, and what
    the tokenizer does to text. A model of the hub is its snapshot in the cache.

    Raises:
        ModelError: a file cannot be read.
    """
    found = hashlib.sha256(tokenizer_digest(tokenizer).encode())
    try:
        config = Path(str(cached_file(model.name, CONFIG_NAME, local_files_only=True)))
        weights = {path for kind in WEIGHTS for path in config.parent.glob(kind)}
        for path in [config, *sorted(weights)]:
            found.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise ModelError(
            f"the files of {model.name} cannot be read again ({first_line(error)})"
        ) from error
    return found.hexdigest()


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what a tokenizer does to text: its vocabulary, its merges where it has them, and
    the tokens of a probe."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges") if backend is not None else None
    content = [
        sorted(tokenizer.get_vocab().items()),
        merges,
        tokenizer.encode(PROBE),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
