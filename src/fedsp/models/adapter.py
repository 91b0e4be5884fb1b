"""Low-rank adapters: messengers that live in layers that both sides hold, or in those that are
distilled of them too.

The output of a linear module becomes W x + (alpha / rank) B (A x), with A (rank, in) and B (out,
rank) (E. J. Hu et al. *LoRA*. ICLR 2022. https://arxiv.org/abs/2106.09685). What is tuned in layers
of the auxiliary model that are the global model's own means the same there. A is drawn from the
run's seed on both sides and never sent, so that the mean over clients is exact (Y. Sun et al. *FFA-
LoRA*. ICLR 2024. https://arxiv.org/abs/2403.12313), or trained and sent too.

A distilled layer begins as a copy of a global layer and stays near it, so an adapter that was tuned
in it is read by that global layer: not the same thing, but much of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsp.data.seeding import derive_seed
from fedsp.errors import ModelError, PrivacyError
from fedsp.models.blocks import runs_on
from fedsp.models.loading import in_few_bits
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.weights import Weights
from fedsp.storage import write_json, write_tensors

FIRST, SECOND = "A", "B"


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Of all adapters of a model: rank, the factor alpha / rank of their output, the last parts of
    the names of the linear modules that get one (empty: all), and whether A is trained and sent."""

    rank: int
    alpha: float
    targets: Sequence[str] = ()
    train_first: bool = False


Blocks = Mapping[int, Sequence[int]]
"""Layers of the global model by number, each with the blocks of a model that stand for it."""


def global_blocks(numbers: Iterable[int]) -> Blocks:
    """These layers in the global model itself."""
    return {number: [number] for number in numbers}


class LowRank:
    """One linear module's update; as a forward hook of modules it adds to their output.

    first: A (rank, in). second: B (out, rank), zero at first. copies: while gradients are taken
    apart, A and B of each example (B, ...) in their place.
    """

    def __init__(self, linear: nn.Module, first: Tensor, scale: float) -> None:
        self.first = nn.Parameter(first, requires_grad=False)
        second = torch.zeros(_sizes(linear)[1], len(first), device=first.device)
        self.second = nn.Parameter(second, requires_grad=False)
        self.scale = scale
        self.copies: dict[str, Tensor] = {}

    def __call__(self, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = arguments[0]
        first, second = self.copies.get(FIRST, self.first), self.copies.get(SECOND, self.second)
        if self.copies:
            hidden = self._by_row(hidden, len(second))
        low = hidden @ first.to(hidden.dtype).transpose(-1, -2)
        change = self.scale * (low @ second.to(hidden.dtype).transpose(-1, -2))
        return output + change.view(output.shape)

    def _by_row(self, hidden: Tensor, count: int) -> Tensor:
        """What a batch's rows read (count, T, in); some modules get all their tokens in one list,
        row by row. That they are in this order is what `examples_together` tries out."""
        if hidden.dim() == 3 and len(hidden) == count:
            return hidden
        if hidden.dim() != 2 or len(hidden) % count:
            raise PrivacyError(
                "a linear module reads examples in another form than row by row, so their gradients"
                " cannot be told apart: name other modules in messenger.targets"
            )
        return hidden.view(count, -1, hidden.shape[-1])


class Adapter(Weights):
    """Adapters of the linear modules in some blocks of a model, as one messenger.

    Tensors are named after the global layers that the blocks stand for, so that both sides name
    them alike; blocks of one layer have one adapter. The model keeps the adapters for as long as it
    lives; it is as if untouched while B is zero. Parties that share a model in one process share
    its adapter. `paths`: the module of each update in the model, the first if it has several;
    `readings`: how many blocks the layer of the first of them is.

    Raises:
        ModelError: no linear module there is named by the settings' `targets`.
    """

    def __init__(
        self,
        model: PromptedLM,
        blocks: Blocks,
        settings: AdapterSettings,
        *,
        seed: int,
    ) -> None:
        self.settings = settings
        self.updates: dict[str, LowRank] = {}
        self.paths: dict[str, str] = {}
        self.readings = len(next(iter(blocks.values()), ()))
        inside = f"{model.path_of_backbone}.".lstrip(".") + model.path_of_blocks
        for number, (first_depth, *others) in blocks.items():
            for path, module in linears(model.blocks[first_depth]):
                if settings.targets and path.rpartition(".")[2] not in settings.targets:
                    continue
                name = f"layers.{number:03d}.{path}"
                where = runs_on(module, module.weight)
                first = _drawn(module, settings.rank, derive_seed(seed, "adapter", name))
                scale = settings.alpha / settings.rank
                update = self.updates[name] = LowRank(module, first.to(where), scale)
                self.paths[name] = f"{inside}.{first_depth}.{path}"
                module.register_forward_hook(update)
                for depth in others:
                    model.blocks[depth].get_submodule(path).register_forward_hook(update)
        if not self.updates:
            known = {path.rpartition(".")[2] for path, _ in linears(model.blocks[0])}
            raise ModelError(
                f"messenger.targets: {model.name} has no linear module named"
                f" {', '.join(settings.targets) or 'in these layers'}; its blocks have"
                f" {', '.join(sorted(known)) or 'none'}"
            )
        super().__init__(
            {
                f"{name}.{part}": getattr(update, attribute)
                for name, update in self.updates.items()
                for part, attribute in self._parts()
            },
            first_depth=min(depth for depths in blocks.values() for depth in depths),
        )

    def _parts(self) -> list[tuple[str, str]]:
        return [*([(FIRST, "first")] if self.settings.train_first else []), (SECOND, "second")]

    @contextmanager
    def apart(self, count: int) -> Iterator[Mapping[str, Tensor]]:
        """Copies (count, *shape) of every tensor, with gradients, that the model reads within the
        context, each row of a batch its own."""
        copies: dict[str, Tensor] = {}
        for name, update in self.updates.items():
            for part, attribute in self._parts():
                tensor = getattr(update, attribute).detach()
                own = tensor[None].expand(count, *tensor.shape).clone().requires_grad_(True)
                copies[f"{name}.{part}"] = update.copies[part] = own
        try:
            yield dict(sorted(copies.items()))
        finally:
            for update in self.updates.values():
                update.copies = {}

    def export(self, model: PromptedLM, folder: Path) -> dict[str, Any]:
        """Write it, which lives in the global model, as a PEFT LoRA adapter of that.

        Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
        """
        tensors = {}
        for name, update in self.updates.items():
            path = f"base_model.model.{self.paths[name]}"
            tensors[f"{path}.lora_A.weight"] = update.first.detach().cpu()
            tensors[f"{path}.lora_B.weight"] = update.second.detach().cpu()
        write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
        linears = (model.model.get_submodule(path) for path in self.paths.values())
        about = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model.name,
            "inference_mode": True,
            "r": self.settings.rank,
            "lora_alpha": self.settings.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(isinstance(linear, Conv1D) for linear in linears),
            "target_modules": sorted(self.paths.values()),
        }
        write_json(folder / "adapter_config.json", about)
        return lora_figures(self.settings.rank, merged=False)

    @torch.no_grad()
    def merge(self, model: PromptedLM) -> dict[str, Any]:
        """Add it to the weights of the global model that it lives in, of which it says nothing more
        from then on.

        Raises:
            ModelError: the weights are in 8 or 4 bits, which would round it away, or not in memory.
        """
        if in_few_bits(model):
            raise ModelError(
                f"{model.name} is held in 8 or 4 bits, into which an adapter cannot be merged:"
                " export it without merging"
            )
        weights = [model.model.get_submodule(path).weight for path in self.paths.values()]
        if any(weight.is_meta for weight in weights):
            raise ModelError(
                f"{model.name} is spread over devices and the disk, where an adapter cannot be"
                " merged: export it without merging, or set model.device to one device"
            )
        for name, update in self.updates.items():
            module = model.model.get_submodule(self.paths[name])
            change = update.scale * (update.second @ update.first)
            module.weight += (change.T if isinstance(module, Conv1D) else change).to(module.weight)
            update.second.zero_()
        return lora_figures(self.settings.rank, merged=True)


def lora_figures(rank: int, *, merged: bool) -> dict[str, Any]:
    """What is said of an exported adapter."""
    kind = f"{'merged model with a' if merged else 'PEFT'} LoRA adapter (rank {rank})"
    return {"kind": kind, "peft_type": "LORA", "rank": rank}


def _drawn(linear: nn.Module, rank: int, seed: int) -> Tensor:
    """A (rank, in), uniform within one over the root of the inputs, as LoRA draws it; the same
    numbers on every machine."""
    inputs, _ = _sizes(linear)
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(rank, inputs, generator=generator) - 1) / math.sqrt(inputs)


def _sizes(linear: nn.Linear | Conv1D) -> tuple[int, int]:
    if isinstance(linear, Conv1D):
        return int(linear.nx), int(linear.nf)
    return linear.in_features, linear.out_features


def linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """The linear modules of a block, each with its path in the block."""
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield path, module


def linear_sizes(block: nn.Module) -> dict[str, list[int]]:
    """The inputs and outputs of each linear module of a block, by its path."""
    return {path: list(_sizes(module)) for path, module in linears(block)}
