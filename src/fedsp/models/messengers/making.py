"""How both sides make the messenger that `[messenger]` names, each in its own model; they may send
exactly its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any, Literal

from fedsp.data.seeding import derive_seed
from fedsp.errors import keeps_no_layer
from fedsp.models.adapter import Adapter, AdapterSettings, Blocks
from fedsp.models.auxiliary import AuxiliaryModel, LayerPlan
from fedsp.models.messengers.registry import Place, find_messenger, finds_nothing, told_of
from fedsp.models.payload import PROMPT, shapes_of
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.models.trainable import Messenger
from fedsp.models.weights import Weights

Which = Literal["verbatim", "all"]
"""The layers of an auxiliary model that a messenger lives in: those that are the global model's
own, or the distilled ones too."""


def make_adapter(place: Place) -> Adapter:
    """The adapter that `[messenger]` describes."""
    keys = [field.name for field in fields(AdapterSettings)]
    settings = AdapterSettings(**{key: place.settings[key] for key in keys})
    return Adapter(place.model, place.blocks, settings, seed=place.seed)


def layer_weights(model: PromptedLM, blocks: Blocks) -> Weights:
    """All weights of blocks, each the only one of its layer, named by the global layers that they
    are, so that both sides name them alike."""
    return Weights(
        {
            f"layers.{number:03d}.{name}": parameter
            for number, (depth,) in blocks.items()
            for name, parameter in model.blocks[depth].named_parameters()
        },
        first_depth=min(depth for (depth,) in blocks.values()),
    )


def blocks_of(plan: LayerPlan, which: Which) -> dict[int, list[int]]:
    """The layers that a messenger lives in, and the depths of an auxiliary model that stand for
    them: those that its plan keeps verbatim, or all."""
    found: dict[int, list[int]] = {}
    for depth, (source, verbatim) in enumerate(zip(plan.sources, plan.frozen, strict=True)):
        if verbatim or which == "all":
            found.setdefault(source, []).append(depth)
    return found


def make_messenger(place: Place) -> Messenger:
    """The messenger of a kind.

    Raises:
        ConfigurationError: it lives in layers that the plan keeps verbatim, and it keeps none; it
            finds nothing to tune, or its code fails; or as `find_messenger`.
    """
    entry = find_messenger(place.settings["kind"])
    if entry.in_layers and not place.blocks:
        raise keeps_no_layer(entry.name, distilled=entry.distilled_layers)
    with told_of(entry.name):
        messenger = entry.make(place)
        if messenger.trained():
            return messenger
    raise finds_nothing(entry.name, place.model.name)


def client_messenger(
    auxiliary: AuxiliaryModel, prompt: PromptSpec, settings: Mapping[str, Any], seed: int
) -> Callable[[], Messenger]:
    """Makes the messenger into which a client loads what it receives: a soft prompt of its own for
    each, or the one that lives in the auxiliary model, made at the first call."""
    spec = replace(prompt, model=auxiliary.prompt_shape)

    def own() -> SoftPrompt:
        return SoftPrompt(spec, seed=derive_seed(seed, "prompt")).to(auxiliary.device)

    place = Place(
        model=auxiliary,
        blocks=blocks_of(auxiliary.plan, settings["layers"]),
        prompt=own,
        settings=settings,
        seed=seed,
    )
    make = partial(make_messenger, place)
    return cache(make) if find_messenger(settings["kind"]).in_layers else make


def client_shapes(
    auxiliary: AuxiliaryModel, prompt: PromptSpec, messenger: Callable[[], Messenger], kind: str
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of what a client's messenger holds; a prompt, whose size the package
    says, is not made for it."""
    if kind == "prompt":
        return {PROMPT: replace(prompt, model=auxiliary.prompt_shape).shape}
    return shapes_of(messenger().payload())
