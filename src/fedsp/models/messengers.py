"""What travels, by name: the values of `messenger.kind`. Both sides make their messenger here, each
in its own model, and may send exactly its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

from torch import Tensor, nn

from fedsp.data.seeding import derive_seed
from fedsp.errors import keeps_no_layer
from fedsp.models.adapter import Adapter, AdapterSettings, Blocks
from fedsp.models.auxiliary import AuxiliaryModel, LayerPlan
from fedsp.models.payload import PROMPT, Payload, check, shapes_of
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.models.trainable import Messenger, Tensors
from fedsp.models.weights import Weights

Which = Literal["verbatim", "all"]
"""The layers of an auxiliary model that a messenger lives in: those that are the global model's
own, or the distilled ones too."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a messenger is made: the model that reads it, the blocks that it lives in, how its soft
    prompt is made, and the run's seed."""

    model: PromptedLM
    blocks: Blocks
    prompt: Callable[[], SoftPrompt]
    settings: Mapping[str, Any]
    seed: int


class PromptAndAdapter:
    """A soft prompt and an adapter as one messenger; its tensors are those of both."""

    first_depth = 0

    def __init__(self, prompt: SoftPrompt, adapter: Adapter) -> None:
        self.prompt, self.adapter = prompt, adapter

    def trained(self) -> dict[str, nn.Parameter]:
        own = {f"prompt.{name}": parameter for name, parameter in self.prompt.trained().items()}
        return self.adapter.trained() | own

    def payload(self) -> Payload:
        return dict(sorted((self.prompt.payload() | self.adapter.payload()).items()))

    def load(self, payload: Payload) -> None:
        check(payload, shapes_of(self.payload()))
        self.prompt.load({PROMPT: payload[PROMPT]})
        self.adapter.load({name: payload[name] for name in payload if name != PROMPT})

    def own_state(self) -> Tensors:
        return self.prompt.own_state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.prompt.restore(state)

    def distance(self, payload: Payload) -> Tensor:
        rest = {name: payload[name] for name in payload if name != PROMPT}
        far = self.adapter.distance(rest)
        return self.prompt.distance({PROMPT: payload[PROMPT]}).to(far.device) + far

    def prefix(self, model: PromptedLM) -> Tensor:
        return self.prompt.prefix(model)

    @contextmanager
    def apart(self, count: int) -> Iterator[Mapping[str, Tensor]]:
        with self.prompt.apart(count) as prompts, self.adapter.apart(count) as others:
            yield dict(sorted({**prompts, **others}.items()))

    def prefix_of(self, copies: Mapping[str, Tensor], model: PromptedLM) -> Tensor:
        return self.prompt.prefix_of(copies, model)


def _adapter(place: Place) -> Adapter:
    settings = AdapterSettings(
        **{key: value for key, value in place.settings.items() if key not in ("kind", "layers")}
    )
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


MESSENGERS: dict[str, Callable[[Place], Messenger]] = {
    "prompt": lambda place: place.prompt(),
    "adapter": _adapter,
    "layers": lambda place: layer_weights(place.model, place.blocks),
    "prompt+adapter": lambda place: PromptAndAdapter(place.prompt(), _adapter(place)),
}
"""How a messenger of each kind is made."""


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
        ConfigurationError: it lives in layers that the plan keeps verbatim, and it keeps none.
    """
    kind = place.settings["kind"]
    if kind != "prompt" and not place.blocks:
        raise keeps_no_layer(kind)
    return MESSENGERS[kind](place)


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
    return make if settings["kind"] == "prompt" else cache(make)


def client_shapes(
    auxiliary: AuxiliaryModel, prompt: PromptSpec, messenger: Callable[[], Messenger], kind: str
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of what a client's messenger holds; a prompt, whose size the package
    says, is not made for it."""
    if kind == "prompt":
        return {PROMPT: replace(prompt, model=auxiliary.prompt_shape).shape}
    return shapes_of(messenger().payload())
