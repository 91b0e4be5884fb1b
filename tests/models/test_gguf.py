"""Models in GGUF files: the weights that were written, read once; packages of them; what is
refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fedsp.config_file import make_config
from fedsp.errors import ModelError, StorageError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.plan import make_plan
from fedsp.models import gguf as reading
from fedsp.models.auxiliary import build_auxiliary, parse_plan
from fedsp.models.gguf import folder_of_gguf
from fedsp.models.loading import load_model, load_tokenizer
from support.gguf_made import tiny_llama, write_gguf
from support.small_runs import settings

TOKENS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedsp" / "gguf"


def test_the_model_is_the_one_that_was_written_and_makes_packages(tmp_path: Path) -> None:
    written = tiny_llama()
    folder = folder_of_gguf(write_gguf(tmp_path / "tiny.gguf", written))
    model = load_model(str(folder), device="cpu")
    with torch.no_grad():
        expected = written(input_ids=TOKENS).logits
        torch.testing.assert_close(model.logits(model(TOKENS)), expected, rtol=1e-4, atol=1e-5)
    tokenizer, own = load_tokenizer(str(folder)), load_tokenizer(str(EMBEDDED / "model"))
    text = "Question: Which of these is a planet?\nAnswer: Mars"
    assert tokenizer.encode(text) == own.encode(text)
    assert tokenizer.chat_template
    package = build_auxiliary(model, parse_plan("emulator(1, 1)", 3), tokenizer)
    package.save(tmp_path / "package")


def test_quantized_weights_are_within_their_rounding(tmp_path: Path) -> None:
    written = tiny_llama()
    folder = folder_of_gguf(write_gguf(tmp_path / "tiny.gguf", written, quantized=True))
    model = load_model(str(folder), device="cpu")
    for name, parameter in written.named_parameters():
        found = model.model.get_parameter(name)
        step = float(parameter.abs().max()) / 127
        assert float((found - parameter).abs().max()) <= (step if parameter.dim() > 1 else 0.0)


def test_a_file_is_read_once_until_it_changes(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    first = folder_of_gguf(file)
    assert first.parent == own_cache and first.name.startswith("tiny-")
    with monkeypatch.context() as changed:
        changed.setattr(reading, "_convert", None)
        assert folder_of_gguf(file) == first
    file.write_bytes(file.read_bytes() + b"\0")
    assert folder_of_gguf(file) != first
    assert not [path for path in own_cache.iterdir() if path.name.startswith(".")]


def test_plans_know_it_by_its_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    given = settings(tmp_path, model={"name": str(file)}, auxiliary={"plan": "ends(1)"})
    plan = make_plan(make_config(given), clients=2)
    assert plan["model"] == str(file)
    assert plan["global_parameters"] == sum(part.numel() for part in tiny_llama().parameters())


def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf: No such file"):
        folder_of_gguf(tmp_path / "none.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 an archive")
    with pytest.raises(ModelError, match=r"other\.gguf is not a GGUF file"):
        folder_of_gguf(other)
    damaged = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    damaged.write_bytes(damaged.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"transformers cannot read .*tiny\.gguf .*another quanti"):
        folder_of_gguf(damaged)
    whole = write_gguf(tmp_path / "whole.gguf", tiny_llama())
    (tmp_path / "file").write_text("no folder")
    with monkeypatch.context() as changed:
        changed.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(StorageError, match=r"cannot keep the model of .*whole\.gguf"):
            folder_of_gguf(whole)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("fedsp.errors.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"whole\.gguf needs `pip install 'fedsp\[gguf\]'`"):
        folder_of_gguf(whole)
