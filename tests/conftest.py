"""What the tests share: tiny random models, and the reference material that may lie beside a
checkout."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

from support.reference import REFERENCE

# read when huggingface_hub is imported: no test asks a hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file

# nothing is left in the user's own cache
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fedsp-cache-")

# tiny models: a second thread costs more than it gives, and much more on a busy machine
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def costs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process do not measure what a round costs, a third of their time here, but where
    a test reads it (marked `costs`)."""
    if not request.node.get_closest_marker("costs"):
        monkeypatch.setattr("fedsp.experiments.run.measure", lambda *_: {})


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
