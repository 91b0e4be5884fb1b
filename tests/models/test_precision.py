"""Frozen weights in fewer bits, on either side, and a model that lies in several places: what comes
out, and that prompts still learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from fedsp import api as commands
from fedsp.audit.package_leakage import audit_model
from fedsp.audit.shadows import Options
from fedsp.config_file import make_config
from fedsp.data.encoding import Encoded, collate
from fedsp.errors import ConfigurationError, ModelError, RunError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.plan import make_plan
from fedsp.experiments.run_directory import RunDirectory
from fedsp.models.auxiliary import build_auxiliary, parse_plan
from fedsp.models.loading import load_model, load_tokenizer, reduce_precision
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt, Space
from fedsp.training.loop import answer_loss
from support.small_runs import distilled, settings
from support.tiny_models import FAMILIES, tiny_model

MODEL = str(EMBEDDED / "model")
BATCH = collate([Encoded(tuple(range(5 + 9 * row, 30 + 9 * row)), 20) for row in range(4)])


def learned(model: PromptedLM, space: Space = "residual") -> tuple[float, torch.Tensor]:
    """A loss, and the gradient of a prompt, after the model has been read without gradients too."""
    spec = PromptSpec(space=space, length=4, model=model.prompt_shape)
    prompt = SoftPrompt(
        spec, torch.randn(spec.shape, generator=torch.Generator().manual_seed(0)) * 0.3
    )
    with torch.no_grad():
        without = float(answer_loss(model, prompt.prefix(model), BATCH))
    loss = answer_loss(model, prompt.prefix(model), BATCH)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(without, rel=1e-5)
    assert prompt.direct.grad is not None and prompt.direct.dtype == torch.float32
    return without, prompt.direct.grad.flatten()


def near(
    found: tuple[float, torch.Tensor], exact: tuple[float, torch.Tensor], loss: float, cosine: float
) -> None:
    assert found[0] == pytest.approx(exact[0], rel=loss)
    assert float(torch.nn.functional.cosine_similarity(found[1], exact[1], dim=0)) > cosine


SPACES: tuple[Space, ...] = ("residual", "key_value")
BITS: dict[Any, tuple[float, float, float]] = {
    "bfloat16": (0.01, 0.999, 0.55),
    "8bit": (0.02, 0.98, 0.6),
    "4bit": (0.1, 0.85, 0.5),
}
"""Of each precision: how far the loss may be off, the cosine of the gradient, and the share of the
memory."""


def size(model: PromptedLM) -> int:
    return sum(
        parameter.numel() * parameter.element_size() for parameter in model.model.parameters()
    )


@pytest.mark.parametrize("space", ["residual", "key_value"])
@pytest.mark.parametrize("precision", BITS)
def test_a_global_model_in_fewer_bits_gives_nearly_the_same_gradients(
    precision: Any, space: Any
) -> None:
    whole, few = (
        load_model(MODEL, device="cpu"),
        load_model(MODEL, device="cpu", precision=precision),
    )
    loss, cosine, share = BITS[precision]
    near(learned(few, space), learned(whole, space), loss, cosine)
    assert size(few) < share * size(whole)
    config = make_config(
        {
            "model": {"name": MODEL, "device": "cpu", "precision": precision},
            "data": {},
            "preset": "prompt",
            "prompt": {"init": "normal"},
            "auxiliary": {"folder": "package"},
        }
    )
    planned = make_plan(config, 3)
    assert planned["server_memory_bytes"] - 16 * planned["messenger_parameters"] == pytest.approx(
        size(few), rel=0.1
    )


@pytest.mark.parametrize(
    ("family", "precision"),
    [("embedded", "bfloat16"), ("embedded", "8bit"), ("embedded", "4bit"), ("llama", "8bit")],
)
def test_an_auxiliary_model_is_reduced_where_it_stands_and_shares_go_on(
    precision: Any, family: str
) -> None:
    model = load_model(MODEL, device="cpu") if family == "embedded" else tiny_model(family)
    whole, few = (
        build_auxiliary(model, parse_plan("shared(0)", model.shape.layers), load_tokenizer(MODEL))
        for _ in range(2)
    )
    announced, digest = few.bytes, few.digest()
    reduce_precision(few, precision, "auxiliary.precision")
    loss, cosine, _ = BITS[precision]
    near(learned(few), learned(whole), loss, cosine - 0.1)
    assert few.bytes == announced == whole.bytes, "what was handed out does not change"
    assert (
        few.digest() != digest
        and len(
            {id(p) for p in few.blocks[0].parameters()}
            & {id(p) for p in few.blocks[1].parameters()}
        )
        >= 4
    )


@pytest.mark.parametrize("space", ["residual", "key_value"])
def test_a_model_in_several_places_gives_the_same_numbers(
    tmp_path: Path, space: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate brings the last layers from the disk, each time they are needed."""
    whole = load_model(MODEL, device="cpu")
    outside = dict.fromkeys(
        ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"), "cpu"
    )
    places = outside | {
        f"transformer.h.{layer}": "cpu" if layer < 5 else "disk" for layer in range(8)
    }
    monkeypatch.setenv("TMPDIR", str(tmp_path / "large"))
    (tmp_path / "large").mkdir()
    older = tmp_path / "older"
    whole.model.config.save_pretrained(older)
    torch.save(whole.model.state_dict(), older / "pytorch_model.bin")
    read = AutoModelForCausalLM.from_pretrained
    expected = learned(whole, space)
    for name, device_map in ((MODEL, "auto"), (MODEL, places), (str(older), places)):
        monkeypatch.setattr(
            AutoModelForCausalLM,
            "from_pretrained",
            lambda name, to=device_map, **given: read(name, **given | {"device_map": to}),
        )
        spread = load_model(name, device="split")
        on_disk = [
            parameter for parameter in spread.model.parameters() if parameter.device.type == "meta"
        ]
        assert bool(on_disk) == (device_map == places)
        loss, gradient = learned(spread, space)
        assert loss == expected[0] and torch.equal(gradient, expected[1])
        if name == str(older):
            assert any((tmp_path / "large").rglob("*.safetensors")), (
                "what is no safetensors is written anew, where it can be read in parts"
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_that_are_computed_again_are_the_same(family: str) -> None:
    model = tiny_model(family)
    sizes, found = [], []
    for recompute in (False, True):
        model.recompute = recompute
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            found.append([learned(model, space) for space in SPACES])
        sizes.append(sum(kept.values()))
    assert all(
        one[0] == other[0] and torch.equal(one[1], other[1])
        for one, other in zip(*found, strict=True)
    )
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.study
def test_an_auxiliary_model_in_few_bits_is_measured_in_as_few_later(tmp_path: Path) -> None:
    figures = commands.run(distilled(tmp_path, auxiliary={"precision": "bfloat16"}))
    rows = commands.evaluate(figures["folder"], zero_shot=False, auxiliary=True)
    (own,) = [row for row in rows if row["prompt"] == "auxiliary model, tuned"]
    assert own["answer_loss"] == pytest.approx(figures["auxiliary_test"]["answer_loss"], abs=1e-6)


@pytest.mark.study
def test_a_run_with_both_sides_in_few_bits(tmp_path: Path) -> None:
    first = commands.run(
        distilled(tmp_path / "whole", distill={"steps": 2, "batch_size": 2, "sequence_length": 32})
    )
    package = {"folder": str(Path(first["folder"]) / "auxiliary"), "precision": "4bit"}
    figures = commands.run(
        distilled(
            tmp_path / "few",
            model={"name": "embedded", "device": "cpu", "precision": "8bit"},
            auxiliary=package,
            server={"steps": 1},
        )
    )
    assert (
        figures["disclosed_share"] == first["disclosed_share"]
        and figures["package_bytes"] == first["package_bytes"]
    )
    assert figures["test"]["answer_loss"] == pytest.approx(first["test"]["answer_loss"], rel=0.2)
    assert figures["cost"] == {}, "nothing is counted that the counter does not see"
    with pytest.raises(
        RunError,
        match="has weights of reduced precision or on several devices, which this audit",
    ):
        audit_model(Path(figures["folder"]), Options())
    resumed = commands.run(
        distilled(
            tmp_path / "again",
            model={"name": "embedded", "device": "cpu", "precision": "8bit"},
            auxiliary=package,
            server={"steps": 1},
        )
    )
    assert resumed["validation_loss"] == figures["validation_loss"]
    assert RunDirectory.open(Path(figures["folder"])).finished


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model": {"name": "embedded", "precision": "4bit"}},
            (
                "model.precision: an auxiliary model cannot be built from a '4bit' model; build it"
                " first with"
            ),
        ),
        (
            {"model": {"name": "embedded", "device": "split"}},
            (
                "model.device: an auxiliary model cannot be built from a 'split' model; build it"
                " first with"
            ),
        ),
        (
            {"model": {"name": "embedded", "precision": "bfloat16"}, "method": "finetune"},
            "model.precision: method = 'finetune' trains the weights, in float32",
        ),
        (
            {"model": {"name": "embedded", "precision": "8bit"}, "method": "lora"},
            "model.precision: method = 'lora' needs unquantized weights",
        ),
        ({"model": {"name": "embedded", "precision": "2bit"}}, "model.precision"),
        (
            {"auxiliary": {"precision": "8bit"}, "client": {"auxiliary_steps": 1}},
            "auxiliary.precision: only simulated clients that leave",
        ),
        (
            {"auxiliary": {"precision": "8bit"}, "method": "fedprompt"},
            "auxiliary.precision: needs method = 'fedsp', but method is 'fedprompt'",
        ),
    ],
)
def test_what_few_bits_cannot_do_is_one_clear_sentence(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        commands.run(settings(tmp_path, **changes))


def test_half_precision_leaves_rotations_by_position_alone() -> None:
    model = tiny_model("llama")
    whole, few = (
        build_auxiliary(model, parse_plan("every(1)", 4), load_tokenizer(MODEL)) for _ in range(2)
    )
    reduce_precision(few, "bfloat16", "auxiliary.precision")
    tokens = torch.randint(3, 90, (1, 500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, found = whole(tokens), few(tokens).float()
    near, far = (
        (found - exact)[:, part].norm() / exact[:, part].norm()
        for part in (slice(0, 50), slice(450, 500))
    )
    assert float(far) < 2 * float(near) < 0.1


def test_a_package_is_made_of_the_whole_model_whatever_the_run_holds_it_in(tmp_path: Path) -> None:
    values = settings(
        tmp_path,
        model={"name": "embedded", "device": "cpu", "precision": "8bit"},
        auxiliary={"folder": "package"},
    )
    made = commands.distill(make_config(values), tmp_path / "package")
    assert made["disclosed_share"] > 0.3
    values["auxiliary"] = {"folder": made["folder"]}
    assert commands.run(values)["disclosed_share"] == made["disclosed_share"]


def test_rows_that_bitsandbytes_reads_wrong_are_refused() -> None:
    auxiliary = build_auxiliary(
        tiny_model("llama"), parse_plan("shared(0)", 4), load_tokenizer(MODEL)
    )
    with pytest.raises(
        ModelError,
        match=(
            r"precision = '4bit': the layer .* has 32 inputs, and bitsandbytes needs a multiple of"
            r" 64; take 8bit"
        ),
    ):
        reduce_precision(auxiliary, "4bit", "precision")


def test_without_the_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsp.errors.find_spec", lambda name: None)
    for wanted in ({"device": "split"}, {"device": "cpu", "precision": "8bit"}):
        with pytest.raises(
            ModelError,
            match=(
                r"accelerate is not installed: model\.\w+ = '\w+' needs `pip install"
                r" 'fedsp\[large\]'`"
            ),
        ):
            load_model(MODEL, **wanted)  # type: ignore[arg-type]
    auxiliary = build_auxiliary(
        load_model(MODEL, device="cpu"), parse_plan("ends(1)", 8), load_tokenizer(MODEL)
    )
    with pytest.raises(ModelError, match="bitsandbytes is not installed: precision = '4bit'"):
        reduce_precision(auxiliary, "4bit", "precision")


def test_a_package_that_does_not_say_what_it_discloses_is_named(tmp_path: Path) -> None:
    from fedsp.experiments.build import _disclosed_share

    auxiliary = build_auxiliary(
        load_model(MODEL, device="cpu"), parse_plan("ends(1)", 8), load_tokenizer(MODEL)
    )
    server: Any = type(
        "Server", (), {"config": type("C", (), {"model": type("M", (), {"precision": "8bit"})})}
    )
    with pytest.raises(ConfigurationError, match="the package does not say what it discloses"):
        _disclosed_share(server, auxiliary)
    auxiliary.discloses = 0.25
    assert _disclosed_share(server, auxiliary) == 0.25
