"""Checks a package, the folder that clients get, before anything in it is loaded, whoever signed
it: known file names, known configuration keys, bounded values. So no package can make a client run
or fetch code, or take memory that its own files do not account for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedsp.errors import AuxiliaryError, did_you_mean
from fedsp.models.loading import known_keys
from fedsp.storage import parse_json

_FILE_NAMES = """
agreement.json auxiliary.json signature config.json model.safetensors tokenizer.json
tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt
tokenizer.model spiece.model sentencepiece.bpe.model spm.model source.spm target.spm
chat_template.jinja
"""
FILES = frozenset(_FILE_NAMES.split())
_MODEL_TYPES = """
afmoe apertus arcee aria_text bart beam bert bert-generation bigbird_pegasus biogpt bitnet
blenderbot blenderbot-small bloom codegen cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm
diffllama doge dots1 electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon flex_olmo flint
fuyu gemma gemma2 gemma3 gemma3_text glm glm4 glm4_moe got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo
gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder
jais2 jetmoe kolibri1 laguna lfm2 lfm2_moe llama llama4 llama4_text marian mbart mellum minimax_m2
minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moshi
moss_transcribe_diarize mpt mvp nanochat nemotron olmo olmo2 olmo3 olmoe opt pegasus persimmon phi
phi3 phi4_multimodal phimoe plbart qwen2 qwen2_moe qwen3 qwen3_moe roformer seed_oss smollm3
solar_open stablelm starcoder2 trocr vaultgemma whisper xglm
"""
FAMILIES = frozenset(_MODEL_TYPES.split())
"""The model types (`model_type`) that a package may have: those that pass `make families`. Others
may need compilers or code from the hub when they are built."""

LARGEST = 1 << 24
"""The largest integer that a configuration may have: above any vocabulary size and any sequence
length that is practical here."""

LONGEST = 100_000
"""Characters of a text, and entries of a list or table, that a configuration may have."""


def require_harmless(folder: Path) -> None:
    """Hold the names of a package's files and its configurations against what a package may hold.

    Raises:
        AuxiliaryError: the first thing that it may not.
    """
    odd = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
    if odd:
        raise AuxiliaryError(
            f"the package {folder} holds {odd[0]!r}, which is not allowed: expected"
            f" {', '.join(sorted(FILES)[:5])}, ...; ask the owner of the model"
        )
    values = _read(folder / "config.json")
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise AuxiliaryError(
            f"the package {folder} has the model type {family!r}, which is not allowed in a"
            f" package{did_you_mean(str(family), FAMILIES)};"
            " docs/results/families.md has the list"
        )
    _hold(folder / "config.json", values, CONFIG_MAPPING[family])
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists() and "auto_map" in _read(folder / name):
            raise AuxiliaryError(
                f"{folder / name} refers to custom code (auto_map), which is not allowed: ask the"
                " owner of the model"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AuxiliaryError(
            f"{path} cannot be read ({error.strerror if isinstance(error, OSError) else error}):"
            " get the package again from the owner of the model"
        ) from error
    if not isinstance(values, dict):
        raise AuxiliaryError(
            f"{path} is no JSON object: get the package again from the owner of the model"
        )
    return values


def _hold(path: Path, values: dict[str, Any], kind: type[PretrainedConfig]) -> None:
    unknown = sorted(set(values) - known_keys(kind))
    if unknown:
        raise AuxiliaryError(
            f"{path} has the key {unknown[0]!r}, which a {kind.model_type} model does not have: no"
            " package may; ask the owner of the model"
        )
    for key, value in values.items():
        part = kind.sub_configs.get(key)
        if isinstance(value, dict) and part is not None:
            inner = (
                CONFIG_MAPPING[value["model_type"]]
                if value.get("model_type") in CONFIG_MAPPING
                else part
            )
            if inner.model_type:
                _hold(path, value, inner)
        _bounded(path, key, value)


def _bounded(path: Path, key: str, value: Any) -> None:
    """Numbers, texts and lists of a size that a configuration needs, however deep they stand."""
    if isinstance(value, dict | list):
        if len(value) > LONGEST:
            raise AuxiliaryError(
                f"{path}: {key} has {len(value)} entries, more than any model needs; ask the owner"
                " of the model"
            )
        for name, inner in (
            value.items() if isinstance(value, dict) else ((key, inner) for inner in value)
        ):
            _bounded(path, name, inner)
    elif (
        isinstance(value, int) and abs(value) > LARGEST and "theta" not in key
    ):  # the base of rotations, by which nothing is made
        raise AuxiliaryError(
            f"{path}: {key} is larger than any model needs ({LARGEST}); ask the owner of the model"
        )
    elif isinstance(value, str) and (len(value) > LONGEST or re.search(r"kernels?[-_/]", value)):
        raise AuxiliaryError(
            f"{path}: {key} is too long or names a kernel, which is not allowed; ask the owner of"
            " the model"
        )
