"""Texts that a model writes by itself, to be distilled on where there are no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsp import api as commands
from fedsp.experiments.embedded import EMBEDDED
from fedsp.federation.callbacks import Callbacks
from fedsp.models.loading import load_model
from fedsp.models.prompted_lm import PromptedLM
from fedsp.training import generation
from fedsp.training.generation import own_texts
from support.small_runs import settings


@pytest.fixture(scope="module")
def model() -> PromptedLM:
    return load_model(str(EMBEDDED / "model"), device="cpu")


def test_own_texts_are_drawn_from_the_model_s_own_distribution(
    model: PromptedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token as from the logits of transformers' own forward over the whole text."""
    monkeypatch.setattr(generation, "AT_ONCE", 3)
    generator = torch.Generator().manual_seed(5)
    expected: list[list[int]] = []
    for count in (3, 1):
        ids = torch.full((count, 1), 7)
        for _ in range(9):
            with torch.no_grad():
                likely = model.model(input_ids=ids).logits[:, -1].softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], dim=1)
        expected += ids.tolist()
    assert own_texts(model, first=7, length=10, count=4, seed=5) == expected
    assert own_texts(model, first=7, length=10, count=4, seed=6) != expected


def test_texts_that_grow_together_are_read_as_each_alone(model: PromptedLM) -> None:
    prefix = torch.randn(3, model.shape.layers, 2, model.shape.heads, model.shape.head_size)
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])
    for front in (None, prefix):
        together = model.reader(front)
        apart = [model.reader(front) for _ in ids]
        for length in (2, 3, 4):
            found = together(ids[:, :length])
            for row, read in enumerate(apart):
                torch.testing.assert_close(found[row], read(ids[row, :length]))


def test_a_run_without_text_distils_on_what_the_model_writes(tmp_path: Path) -> None:
    values = settings(tmp_path, distill={"sequences": 6, "sequence_length": 16})
    del values["distill"]["text"]
    said: list[str] = []
    figures = commands.run(values, callbacks=Callbacks(info=said.append))
    assert figures["seconds_distillation"] > 0
    assert any("the global model writes 38 texts by itself" in text for text in said)
    assert any("nats a token worse" in text or "worse than" in text for text in said)
