"""What the tests share: tiny random models, and the reference material that may lie beside a
checkout."""

from __future__ import annotations

import os
from pathlib import Path

from support.reference import REFERENCE

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # read when huggingface_hub is imported: no test asks a hub

import pytest
import torch
from safetensors.torch import load_file

torch.set_num_threads(
    1
    # tiny models: a second thread costs more than it gives, and a busy machine makes it cost much
    # more
)


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
