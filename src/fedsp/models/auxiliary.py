"""The auxiliary model: the small model that clients get, made of layers of the global one.

A layer plan says which global layer stands at each depth. Depths that share a layer share its
parameters and keep a cache slot each (FedSP, https://arxiv.org/abs/2311.06805, section 3: depth
reduction and cross-layer sharing). As a folder it holds everything that a client needs and nothing
else: safetensors, configuration, tokenizer, plan, and the SHA-256 digest of its weights.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoConfig

from fedsp.data.encoding import Tokenizer
from fedsp.errors import AuxiliaryError, ConfigurationError, ModelError, StorageError, first_line
from fedsp.models.blocks import difference, find_blocks, fused
from fedsp.models.loading import empty_model, known_keys, load_tokenizer, tokenizer_digest
from fedsp.models.payload import shapes_of
from fedsp.models.prompted_lm import ModelShape, Positions, PromptedLM
from fedsp.models.trainable import Tensors, trainable
from fedsp.storage import (
    MANIFEST,
    parse_json,
    read_tensors,
    tensors_digest,
    write_json,
    write_tensors,
)

Embeddings = Literal["verbatim", "low_rank", "fresh"]
WEIGHTS = "model.safetensors"
OF_NO_LAYER = re.compile("architectures|_ids?$|only_layers|indices")
"""Configuration keys whose lists are not per layer, even if their length equals the number of
layers."""

PLAN = re.compile(r"\w+\(\s*\d+\s*(?:[,-]\s*\d+\s*)?\)")
NAMED = re.compile(r"emulator\(\s*(\d+)\s*,\s*\[([\d\s,]+)\]\s*\)")
CHOSEN = re.compile(r"chosen\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\)")

MOST_LAYERS = 4096
MOST_BUFFERS = 1 << 30
"""Most bytes of buffers, such as masks and tables, that a loaded auxiliary model may allocate."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One entry per depth of the auxiliary model.

    Attributes:
        sources: the global layer that is copied to each depth.
        groups: depths with the same number share their parameters.
        frozen: for each depth, whether it stays verbatim when the rest is distilled; with any,
            embeddings and head stay verbatim too.
        prompt_layers: the layer of the soft prompt that each depth reads.
    """

    sources: tuple[int, ...]
    groups: tuple[int, ...]
    frozen: tuple[bool, ...]
    prompt_layers: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.sources)

    @property
    def cut(self) -> int | None:
        """The first of the verbatim depths, where only others stand before them and none behind;
        None in other plans."""
        front = self.frozen.index(True) if any(self.frozen) else 0
        return front if front and all(self.frozen[front:]) else None


def parse_plan(
    text: str | Sequence[int], layers: int, prompt_layers: Sequence[int] | None = None
) -> LayerPlan:
    """The plan that a configuration names, for a global model of `layers` layers.

    `shared(i)`: layer i at every depth. `every(k)`: layers 0, k, 2k, ... `first(n)`: layers 0 to n
    - 1. `cells(a-b)`: layers a to b over and over. `ends(n, m)`: the first and last n verbatim and
    frozen, one shared layer m times between (all the depths between, if m is left out).
    `emulator(n, m)`: the same with m layers between, each its own, spread evenly over those
    dropped, and `emulator(n, [i, j])` with those layers between. `tail(n, m)`: the last n verbatim
    and frozen, behind m others, each its own, spread evenly over those before (FedBiOT,
    https://arxiv.org/abs/2406.17706). `copies(i)`: layer i at every depth, each a copy of its own.
    A list gives the layer at each depth; equal numbers share.

    When depths are as many as layers, each depth reads its own prompt layer; otherwise it reads
    that of its source, and the shared middle of `ends` reads layers spread evenly over those it
    stands for.

    Raises:
        ConfigurationError: the plan cannot be read, or does not fit the model.
    """
    if named := NAMED.fullmatch(str(text).strip()):
        between = [int(number) for number in re.findall(r"\d+", named[2])]
        if between != sorted(set(between)):
            raise ConfigurationError(
                f"auxiliary.plan: {text} names layers twice or out of order: each stands once, from"
                " the first to the last"
            )
        return _ends(layers, int(named[1]), between=between, prompt_layers=prompt_layers)
    if CHOSEN.fullmatch(str(text).strip()):
        raise ConfigurationError(
            f"auxiliary.plan: the layers of {text} are not chosen yet: `fedsp plan` and the start"
            " of a run do so, and print them"
        )
    words = re.findall(r"\w+", str(text)) if PLAN.fullmatch(str(text).strip()) else [""]
    name, numbers = words[0], [int(word) for word in words[1:]]
    if not isinstance(text, str):
        sources = list(text)
    elif name in ("shared", "copies") and len(numbers) == 1:
        sources = numbers * layers
    elif name == "every" and len(numbers) == 1 and numbers[0]:
        sources = list(range(0, layers, numbers[0]))
    elif name == "first" and len(numbers) == 1:
        sources = list(range(numbers[0]))
    elif name == "cells" and len(numbers) == 2 and numbers[0] <= numbers[1]:
        cell = range(numbers[0], numbers[1] + 1)
        if layers % len(cell):
            raise ConfigurationError(
                f"auxiliary.plan: {text} repeats {len(cell)} layers, which do not divide the"
                f" model's {layers}"
            )
        sources = list(cell) * (layers // len(cell))
    elif name == "ends" and len(numbers) in (1, 2):
        return _ends(layers, *numbers, prompt_layers=prompt_layers)
    elif name == "emulator" and len(numbers) == 2:
        return _ends(layers, *numbers, prompt_layers=prompt_layers, shared=False)
    elif name == "tail" and len(numbers) == 2:
        return _tail(layers, *numbers, prompt_layers=prompt_layers)
    else:
        raise ConfigurationError(
            f"auxiliary.plan: {text!r} is not a valid layer plan: write shared(0), copies(0),"
            " every(2), first(4), cells(0-1), ends(2), ends(2, 3), emulator(2, 2),"
            " emulator(1, [2, 5]), tail(2, 2), chosen(4), chosen(4, 1), or a list such as"
            " [0, 0, 5, 5]"
        )
    groups = range(layers) if name == "copies" else sources
    own = range(layers) if len(sources) == layers else sources
    plan = LayerPlan(
        sources=tuple(sources),
        groups=tuple(groups),
        frozen=(False,) * len(sources),
        prompt_layers=tuple(own if prompt_layers is None else prompt_layers),
    )
    return _checked(plan, layers, text)


def chosen_counts(plan: str | Sequence[int]) -> tuple[int, int] | None:
    """How many layers `chosen(n, ends)` chooses, and how many it keeps verbatim at each end; None
    for other plans."""
    found = CHOSEN.fullmatch(str(plan).strip())
    return (int(found[1]), int(found[2] or 0)) if found else None


def named_counts(plan: str | Sequence[int]) -> tuple[int, int] | None:
    """The same of a plan that names its layers; None for others."""
    if not isinstance(plan, str):
        return len(plan), 0
    found = NAMED.fullmatch(plan.strip())
    return (len(re.findall(r"\d+", found[2])), int(found[1])) if found else None


def chosen_plan(layers: Sequence[int], ends: int) -> str | list[int]:
    """The plan that names these layers, so many of them verbatim at each end."""
    between = list(layers[ends : len(layers) - ends])
    return f"emulator({ends}, {between})" if ends else between


def _read_plan(values: Mapping[str, Any]) -> LayerPlan:
    """The plan in a manifest, which anybody may have written.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    kinds = {"sources": int, "groups": int, "frozen": bool, "prompt_layers": int}
    found = {key: tuple(values[key]) for key in kinds}
    if any(type(entry) is not kinds[key] for key in kinds for entry in found[key]):
        raise ValueError("an entry of the plan is of the wrong type")
    if len({len(entries) for entries in found.values()}) > 1 or not found["sources"]:
        raise ValueError("the plan does not say the same number of depths everywhere")
    return LayerPlan(**found)


def plan_of_package(folder: Path) -> tuple[LayerPlan, int]:
    """The plan in the manifest of a package, and the number of the global model's layers.

    Raises:
        AuxiliaryError: the folder holds no manifest that can be read.
    """
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        return _read_plan(manifest["plan"]), int(manifest["prompt_shape"]["layers"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AuxiliaryError(
            f"the auxiliary model in {folder} cannot be used: {error}; `fedsp distill` makes one"
        ) from error


def _ends(
    layers: int,
    ends: int,
    middle: int | None = None,
    *,
    prompt_layers: Sequence[int] | None,
    shared: bool = True,
    between: Sequence[int] | None = None,
) -> LayerPlan:
    """`between` are the layers in the middle, each its own; None: they are spread evenly."""
    shared = shared and between is None
    name, room = "ends" if shared else "emulator", layers - 2 * ends
    middle = len(between) if between is not None else middle
    repeats = room if middle is None else middle
    if ends < 1 or room < 1 or repeats < 1 or (repeats > room and not shared):
        raise ConfigurationError(
            f"auxiliary.plan: {name}({ends}{'' if middle is None else f', {middle}'}) leaves no"
            f" middle in a model of {layers} layers: keep fewer verbatim"
        )
    first, last = list(range(ends)), list(range(layers - ends, layers))
    if not set(between or []) <= set(range(ends, layers - ends)):
        raise ConfigurationError(
            f"auxiliary.plan: emulator({ends}, {list(between or [])}) names layers that are not"
            f" between its ends: those are {ends} to {layers - ends - 1}"
        )
    spread = [ends + (2 * index + 1) * room // (2 * repeats) for index in range(repeats)]
    spread = spread if between is None else list(between)
    source = ends + room // 2
    stand, groups = ([source] * repeats, [layers] * repeats) if shared else (spread, spread)
    reads = list(prompt_layers) if prompt_layers is not None else [*first, *spread, *last]
    frozen = [True] * ends + [False] * repeats + [True] * ends
    plan = LayerPlan(
        sources=(*first, *stand, *last),
        groups=(*first, *groups, *last),
        frozen=tuple(frozen),
        prompt_layers=tuple(reads),
    )
    return _checked(plan, layers, f"{name}({ends}, {repeats})")


def _tail(layers: int, end: int, front: int, *, prompt_layers: Sequence[int] | None) -> LayerPlan:
    before = layers - end
    if end < 1 or not 1 <= front <= before:
        raise ConfigurationError(
            f"auxiliary.plan: tail({end}, {front}) does not fit a model of {layers} layers: keep"
            " fewer verbatim, or put fewer before them"
        )
    sources = [
        *((2 * index + 1) * before // (2 * front) for index in range(front)),
        *range(before, layers),
    ]
    plan = LayerPlan(
        sources=tuple(sources),
        groups=tuple(sources),
        frozen=(False,) * front + (True,) * end,
        prompt_layers=tuple(sources if prompt_layers is None else prompt_layers),
    )
    return _checked(plan, layers, f"tail({end}, {front})")


def _checked(plan: LayerPlan, layers: int, text: object) -> LayerPlan:
    if not plan.depth or not all(0 <= source < layers for source in plan.sources):
        raise ConfigurationError(
            f"auxiliary.plan: {text} names layers {sorted(set(plan.sources))}, but the model has"
            f" layers 0 to {layers - 1}"
        )
    if len(plan.prompt_layers) != plan.depth or not all(
        0 <= layer < layers for layer in plan.prompt_layers
    ):
        raise ConfigurationError(
            f"auxiliary.prompt_layers: {list(plan.prompt_layers)} must give one layer from 0 to"
            f" {layers - 1} for each of the {plan.depth} depths of {text}"
        )
    return plan


class AuxiliaryModel(PromptedLM):
    """A PromptedLM that knows its plan, and the shape of the global model, whose prompt it
    reads."""

    def __init__(
        self,
        model: Any,
        plan: LayerPlan,
        tokenizer: Tokenizer,
        *,
        positions: Positions,
        prompt_shape: ModelShape,
        embeddings: Embeddings = "verbatim",
    ) -> None:
        super().__init__(
            model,
            "the auxiliary model",
            positions=positions,
            prompt_layers=plan.prompt_layers,
            prompt_shape=prompt_shape,
        )
        self.plan = plan
        self.embeddings: Embeddings = embeddings
        self.tokenizer = tokenizer
        self.bytes = 4 * sum(parameter.numel() for parameter in trainable(self.model).values())
        """Size of the weights as they are handed out, float32, each once."""
        self.discloses: float | None = None
        """Share (0 to 1) of the global model's parameters that it contains bit for bit; None if it
        was not measured when the model was built."""
        self.excess_text_loss: float | None = None
        """How much more loss than the global model it has on public text that it was not distilled
        on, nats per token; None if there was none."""

    def weights(self) -> Tensors:
        """Every parameter once, and every buffer that belongs to the model (a mixture's routing
        bias is one), on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in _stored(self.model).items()}

    @torch.no_grad()
    def load_weights(self, weights: Tensors) -> None:
        """Copy weights into place; depths that share keep sharing."""
        for name, tensor in _stored(self.model).items():
            tensor.copy_(weights[name])

    def distillable(self) -> dict[str, nn.Parameter]:
        """What distillation trains: everything, or, where a plan keeps layers verbatim, only the
        depths that are not, and embeddings that are not."""
        if not any(self.plan.frozen):
            return trainable(self.model)
        free = {
            id(parameter)
            for block, frozen in zip(self.blocks, self.plan.frozen, strict=True)
            if not frozen
            for parameter in block.parameters()
        }
        if self.embeddings != "verbatim":
            free |= {id(parameter) for parameter in embedding_parameters(self.model).values()}
        return {
            name: parameter
            for name, parameter in trainable(self.model).items()
            if id(parameter) in free
        }

    def digest(self) -> str:
        """SHA-256 over the weights, each once."""
        return tensors_digest(self.weights())

    def save(self, folder: Path) -> str:
        """Write the folder that a client gets; returns the digest.

        Raises:
            StorageError: the disk did not take it.
        """
        digest = write_tensors(folder / WEIGHTS, self.weights(), {"format": "pt"})
        try:
            self.model.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        except OSError as error:
            raise StorageError(
                f"cannot write the auxiliary model to {folder}: {error.strerror or error}; free"
                " some space or choose another folder"
            ) from error
        measured = {"discloses": self.discloses, "excess_text_loss": self.excess_text_loss}
        write_json(
            folder / MANIFEST,
            {
                "plan": asdict(self.plan),
                "embeddings": self.embeddings,
                "prompt_shape": asdict(self.prompt_shape),
                "sha256": digest,
                "tokenizer_sha256": tokenizer_digest(self.tokenizer),
                **{name: number for name, number in measured.items() if number is not None},
            },
        )
        return digest


def build_auxiliary(
    model: PromptedLM,
    plan: LayerPlan,
    tokenizer: Tokenizer,
    *,
    embeddings: Embeddings = "verbatim",
    rank: int = 32,
    seed: int = 0,
) -> AuxiliaryModel:
    """An auxiliary model with copies of the global model's final norm and planned layers, and its
    embeddings and head as they are, of a lower rank, or drawn afresh at their scale.

    Its weights are float32 on every device, since clients train them.
    """
    config = planned_config(model.model.config, plan)
    try:
        auxiliary = fused(empty_auxiliary(config, plan)).to(model.device)
    except ModelError as error:
        raise AuxiliaryError(
            f"auxiliary.plan: {model.name} has no form with the layers {list(plan.sources)}:"
            f" {error}"
        ) from error
    _fill(auxiliary, model, plan)
    built = AuxiliaryModel(
        auxiliary.requires_grad_(False),
        plan,
        tokenizer,
        positions=model.positions,
        prompt_shape=model.shape,
        embeddings=embeddings,
    )
    outputs = {layer: model.block_output(layer, model.dtype) for layer in set(plan.sources)}
    for depth, layer in enumerate(plan.sources):
        own, expected = built.block_output(depth, model.dtype), outputs[layer]
        if float((own - expected).abs().max()) > 1e-3 * float(expected.abs().max()):
            raise AuxiliaryError(
                f"auxiliary.plan: layer {layer} of {model.name} gives other outputs at depth"
                f" {depth}, since in this family a layer's computation depends on its index; keep"
                f" it at depth {layer}"
            )
    if embeddings != "verbatim":
        _reduce_embeddings(built, rank if embeddings == "low_rank" else 0, seed)
    return built


def _fill(auxiliary: Any, model: PromptedLM, plan: LayerPlan) -> None:
    """Copy the planned layers and everything outside of the layers into place.

    Raises:
        AuxiliaryError: a layer is of another kind than what stands at its depth, or a weight has no
            place.
    """
    blocks = find_blocks(auxiliary, plan.depth, model.name)[1]
    require_kinds(model.blocks, blocks, plan, model.name)
    inside = f"{model.path_of_backbone}.".lstrip(".") + f"{model.path_of_blocks}."
    outside, places = (
        {name: tensor for name, tensor in made.state_dict().items() if not name.startswith(inside)}
        for made in (model.model, auxiliary)
    )
    odd = sorted(name for name, _ in shapes_of(outside).items() ^ shapes_of(places).items())
    if odd:
        raise AuxiliaryError(
            f"auxiliary.plan: {odd[0]} of {model.name} is made for all of its layers: this family"
            f" has no form with the layers {list(plan.sources)}"
        )
    auxiliary.load_state_dict(outside, strict=False)
    for depth, layer in enumerate(plan.sources):
        blocks[depth].load_state_dict(model.blocks[layer].state_dict())


def require_kinds(layers: nn.ModuleList, blocks: nn.ModuleList, plan: LayerPlan, name: str) -> None:
    """Verify that the block at each depth is built like its source layer: a block's structure may
    depend on its layer index.

    Raises:
        AuxiliaryError: one is not; the message names the first difference.
    """
    for depth, layer in enumerate(plan.sources):
        other = difference(layers[layer], blocks[depth])
        if other:
            raise AuxiliaryError(
                f"auxiliary.plan: layer {layer} of {name} is not of the kind that stands at depth"
                f" {depth}: {other}; choose layers of one kind"
            )


def embedding_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of a Hugging Face model's embeddings of tokens and positions and of its head,
    each once, by name."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)] + [
        model.get_output_embeddings()
    ]
    wanted = {id(parameter) for module in modules for parameter in module.parameters()}
    return {
        name: parameter for name, parameter in trainable(model).items() if id(parameter) in wanted
    }


@torch.no_grad()
def _reduce_embeddings(model: PromptedLM, rank: int, seed: int) -> None:
    """Replace each embedding matrix in place by its mean row plus a rank-`rank` SVD of the rest,
    or, with rank 0, by normal values of its standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in embedding_parameters(model.model).values():
        if parameter.dim() < 2:
            continue
        numbers = parameter.cpu()
        if rank:
            mean = numbers.mean(dim=0)
            left, sizes, right = torch.linalg.svd(numbers - mean, full_matrices=False)
            parameter.copy_((left[:, :rank] * sizes[:rank]) @ right[:rank] + mean)
        else:
            parameter.copy_(torch.randn(numbers.shape, generator=generator) * numbers.std())


def load_auxiliary(
    folder: Path, *, device: torch.device, positions: Positions, digest: str | None = None
) -> AuxiliaryModel:
    """The auxiliary model in a folder, verified against the digest in its manifest and, if given,
    against `digest`.

    Raises:
        AuxiliaryError: the folder is incomplete or its weights do not have the digest.
    """
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        plan = _read_plan(manifest["plan"])
        shape = ModelShape(**manifest["prompt_shape"])
        if any(type(size) is not int for size in asdict(shape).values()):
            raise ValueError("a size of prompt_shape is not a whole number")
        weights, _ = read_tensors(folder / WEIGHTS)
        expected = [str(manifest["sha256"])] + ([digest] if digest else [])
        tokenizer_expected, kept = (
            str(manifest["tokenizer_sha256"]),
            cast(Embeddings, str(manifest.get("embeddings", "verbatim"))),
        )
        discloses, excess_text_loss = (
            None if manifest.get(key) is None else float(manifest[key])
            for key in ("discloses", "excess_text_loss")
        )
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = load_tokenizer(str(folder))
    except FileNotFoundError as error:
        raise AuxiliaryError(
            f"{folder} holds no auxiliary model: there is no {Path(str(error.filename)).name};"
            " `fedsp distill` writes one"
        ) from error
    except (StorageError, OSError, KeyError, TypeError, ValueError) as error:
        raise AuxiliaryError(f"the auxiliary model in {folder} cannot be used: {error}") from error
    found = tensors_digest(weights)
    if any(found != value for value in expected):
        raise AuxiliaryError(
            f"the auxiliary model in {folder} has the SHA-256 digest {found[:16]}..., expected"
            f" {next(v for v in expected if v != found)[:16]}...: get the folder again from the"
            " server"
        )
    if tokenizer_digest(tokenizer) != tokenizer_expected:
        raise AuxiliaryError(
            f"the tokenizer in {folder} is not the one that the auxiliary model was made with: get"
            " the folder again from the server"
        )
    _require_shapes(folder, config, plan, shapes_of(weights))
    model = empty_auxiliary(config, plan)
    model.load_state_dict(weights, strict=False)
    auxiliary = AuxiliaryModel(
        model.requires_grad_(False).to(device),
        plan,
        tokenizer,
        positions=positions,
        prompt_shape=shape,
        embeddings=kept,
    )
    auxiliary.discloses, auxiliary.excess_text_loss = discloses, excess_text_loss
    own, reads = replace(auxiliary.shape, layers=shape.layers), plan.prompt_layers
    if shape != own or not 0 <= min(reads) <= max(reads) < shape.layers <= MOST_LAYERS:
        raise AuxiliaryError(
            f"the auxiliary model in {folder} is made for prompts of another shape than its own:"
            " get the folder again from the server"
        )
    return auxiliary


def _stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a file of a model holds: its parameters by name, each once even where depths share it,
    and its persistent buffers."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict(keep_vars=True)
    return trainable(model) | {name: state[name] for name in state if name not in known}


def _require_shapes(
    folder: Path, config: Any, plan: LayerPlan, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Verify, on the meta device, that a configuration needs exactly the weights of these `shapes`
    and at most MOST_BUFFERS bytes of buffers.

    Raises:
        AuxiliaryError: it does not.
    """
    if getattr(config.get_text_config(), "num_hidden_layers", None) != plan.depth:
        raise AuxiliaryError(
            f"the auxiliary model in {folder} does not have the {plan.depth} layers of its plan:"
            " get the folder again from the server"
        )
    with torch.device("meta"):
        hollow = empty_auxiliary(config, plan)
    expected = shapes_of(_stored(hollow))
    odd = sorted({name for name, _ in set(expected.items()) ^ set(shapes.items())})
    if odd:
        raise AuxiliaryError(
            f"the auxiliary model in {folder} has other weights than its configuration: {odd[0]} is"
            f" {shapes.get(odd[0], 'missing')}, expected {expected.get(odd[0], 'none')}; get the"
            " folder again from the server"
        )
    if sum(buffer.numel() * buffer.element_size() for buffer in hollow.buffers()) > MOST_BUFFERS:
        raise AuxiliaryError(
            f"the auxiliary model in {folder} asks for more memory beside its weights than"
            f" {MOST_BUFFERS >> 20} MiB: get the folder again from the server"
        )


def planned_config(config: Any, plan: LayerPlan) -> Any:
    """The global model's configuration with the plan's depth, and at each depth what it says of the
    source: every list with an entry for each layer.

    Raises:
        AuxiliaryError: the family has no such form.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == layers and not OF_NO_LAYER.search(key):
            setattr(text, key, [value[source] for source in plan.sources])
    if getattr(text, "attention_types", None):  # GPT-Neo's other form of attention_layers
        text.attention_types = [[[kind], 1] for kind in text.attention_layers]
    if hasattr(text, "decoder_layers"):  # of families that have an encoder too
        text.decoder_layers = plan.depth
    text.num_hidden_layers = plan.depth
    try:
        known = known_keys(type(config))
        values = {
            key: value for key, value in json.loads(config.to_json_string()).items() if key in known
        }
        return type(config).from_dict(values)  # as whoever gets the package reads it
    except Exception as error:  # a configuration's own checks raise what they like
        raise AuxiliaryError(
            f"auxiliary.plan: a {config.model_type} model has no form with the layers"
            f" {list(plan.sources)}: {first_line(error)}"
        ) from error


def empty_auxiliary(config: Any, plan: LayerPlan) -> Any:
    """A model of the plan's depth, one block per depth with its own layer index, parameters shared
    as the plan says."""
    with torch.random.fork_rng(devices=[]):
        model = empty_model(config)
    blocks = find_blocks(model, plan.depth, "the auxiliary model")[1]
    for depth, group in enumerate(plan.groups):
        first = plan.groups.index(group)
        if first == depth:
            continue
        if other := difference(blocks[first], blocks[depth]):
            raise AuxiliaryError(
                f"auxiliary.plan: depths {first} and {depth} cannot share a layer: {other}; choose"
                " layers of one kind"
            )
        for name, parameter in blocks[first].named_parameters():
            path, _, leaf = name.rpartition(".")
            setattr(blocks[depth].get_submodule(path), leaf, parameter)
    return model


def disclosed_share(auxiliary: PromptedLM, model: PromptedLM, tolerance: float = 0.0) -> float:
    """The share of the global model's parameters that stand bit for bit in the auxiliary, each
    global tensor compared with each of its shape. With a `tolerance`, a tensor counts as a whole
    where one is within `tolerance` times its Euclidean norm."""
    held: dict[torch.Size, list[torch.Tensor]] = {}
    for parameter in trainable(auxiliary.model).values():
        held.setdefault(parameter.shape, []).append(parameter.detach())

    def count(tensor: torch.Tensor, other: torch.Tensor) -> int:
        near = tolerance and float((tensor - other).norm()) <= tolerance * float(tensor.norm())
        return tensor.numel() if near else int((tensor == other).sum())

    disclosed, parameters = 0, trainable(model.model).values()
    for tensor in parameters:
        most = 0
        for other in held.get(tensor.shape, []):
            most = max(most, count(tensor.detach(), other))
            if most == tensor.numel():
                break
        disclosed += most
    return disclosed / sum(tensor.numel() for tensor in parameters)
