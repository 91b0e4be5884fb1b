"""Your own messenger: the biases of the layers that both sides hold, as in BitFit.

Ben Zaken, Ravfogel, Goldberg. *BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models*. ACL 2022. https://arxiv.org/abs/2106.10199.

A messenger (`fedsp.Messenger`) is made at the server in the global model and at each client in the
auxiliary model, with tensors of the same names and shapes; `fedsp.Weights` is one of any parameters
of the model. After registration its name is a value of `messenger.kind` in every
configuration of this process; by an entry point (docs/how-to/extend.md) everywhere. Run it:
`python examples/new_messenger.py`
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fedsp
from fedsp.config import Section
from fedsp.experiments.embedded import EMBEDDED


class Options(Section):
    """The keys of `messenger.options`: checked and described as those of fedsp's own sections."""

    norms: bool = True
    """whether the biases of the layers' norms are tuned too"""


def is_tuned(name: str, settings: Mapping[str, Any]) -> bool:
    module, _, parameter = name.rpartition(".")
    norm = module.rpartition(".")[2].startswith("ln_")
    return parameter == "bias" and (settings["options"]["norms"] or not norm)


def make(place: fedsp.Place) -> fedsp.Weights:
    """The biases of each layer, at the depth that stands for it, named after the layer."""
    found = {
        f"layers.{number:03d}.{name}": parameter
        for number, (depth, *_) in place.blocks.items()
        for name, parameter in place.model.blocks[depth].named_parameters()
        if is_tuned(name, place.settings)
    }
    return fedsp.Weights(found, first_depth=min(depth for (depth, *_) in place.blocks.values()))


def shapes(sizes: fedsp.Sizes) -> dict[str, list[int]]:
    """The same, counted before a model is loaded."""
    return {
        f"{layer}.{name}": shape
        for layer, about in sizes.layers.items()
        for name, shape in about["parameters"].items()
        if is_tuned(name, sizes.settings)
    }


BIASES = fedsp.MessengerEntry(
    name="biases", make=make, shapes=shapes, options=Options, learning_rate=1e-2
)
fedsp.register_messenger(BIASES)


def main(folder: Path, *, norms: bool = True) -> dict[str, float]:
    """Three rounds of FedSP with the biases of the first and the last layer: how many numbers
    travel, and the validation loss behind."""
    values: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"name": "embedded", "device": "cpu"},
        "data": {
            "task": "continuation",
            "train": str(EMBEDDED / "train.jsonl"),
            "validation": str(EMBEDDED / "validation.jsonl"),
        },
        "partition": {"clients": 4},
        "messenger": {"kind": "biases", "options": {"norms": norms}},
        "distill": {"steps": 20, "sequence_length": 64, "text": [str(EMBEDDED / "public.txt")]},
        "round": {"rounds": 3},
        "client": {"prompt_steps": 3},
        "validation": {"examples": 50},
    }
    numbers = fedsp.plan(values)["messenger_parameters"]
    result = fedsp.run(values)
    return {
        "numbers_sent": numbers,
        "best_round": result["best_round"],
        "validation_loss": result["validation_loss"],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(main(Path(temporary)))
