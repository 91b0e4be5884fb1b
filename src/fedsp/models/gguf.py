"""Models in a GGUF file, as llama.cpp has them: read once by transformers, and kept as a folder of
safetensors that everything else reads like any other model.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from fedsp.errors import ModelError, StorageError, first_line, require_installed
from fedsp.storage import cache_folder, locked

MAGIC = b"GGUF"
ENDING = ".gguf"


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.lower().endswith(ENDING)


def folder_of_gguf(file: Path) -> Path:
    """The folder with the model of a GGUF file, float32, its tokenizer and configuration; made at
    the first call for a file of this name, size and time of change.

    Raises:
        ModelError: there is no such file, it is no GGUF file, transformers cannot read it, or the
            package gguf is missing.
        StorageError: the disk did not take the folder.
    """
    file = file.expanduser()
    try:
        state = file.stat()
        with file.open("rb") as opened:
            start = opened.read(len(MAGIC))
    except OSError as error:
        raise ModelError(f"cannot read the model {file}: {error.strerror or error}") from error
    if start != MAGIC:
        raise ModelError(
            f"{file} is not a GGUF file: it does not begin with {MAGIC.decode()}; get it again"
        )
    told = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{file.stem}-{key}"
    if folder.is_dir():
        return folder
    require_installed("gguf", f"{file.name} needs", "gguf", error=ModelError)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(folder.parent / f"{folder.name}.lock", wait=True):
            if not folder.is_dir():
                _convert(file, folder)
    except OSError as error:
        raise StorageError(
            f"cannot keep the model of {file} in {folder.parent} ({error.strerror or error}): free"
            " some space, or set XDG_CACHE_HOME to a folder with more room"
        ) from error
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write the folder, which is whole or not there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # as many kinds as there are architectures and quantizations
        raise ModelError(
            f"transformers cannot read {file} ({first_line(error)}): get it again if it may be cut"
            " off, take another quantization of it, or the model's own folder"
        ) from error
    # while it is marked as quantized, which it no longer is, it cannot be saved
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    made = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
