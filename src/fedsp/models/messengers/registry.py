"""The register of messengers: one entry for each value of `messenger.kind`. Nothing here imports
torch, so that a configuration is checked at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from fedsp.data.installed import MESSENGERS, Register, installed_names
from fedsp.errors import ConfigurationError, FedspError, first_line, keeps_no_layer

if TYPE_CHECKING:
    from fedsp.models.adapter import Blocks
    from fedsp.models.prompted_lm import PromptedLM
    from fedsp.models.soft_prompt import SoftPrompt
    from fedsp.models.trainable import Messenger

Shapes = dict[str, list[int]]
"""Shapes of tensors by name."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a messenger is made: the global model at the server, the auxiliary model at a client.

    model: the model that reads it; `model.blocks` are its blocks, `model.shape.hidden` the width of
        its hidden states.
    blocks: the layers of the global model that it lives in, by number, and the depths of `model`
        that stand for each.
    prompt: makes the soft prompt of `[prompt]`.
    settings: the section `[messenger]`, with its `options` as the entry's class checked them.
    seed: the run's seed, equal on both sides.
    """

    model: PromptedLM
    blocks: Blocks
    prompt: Callable[[], SoftPrompt]
    settings: Mapping[str, Any]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the shapes of a messenger follow from, before any model is loaded.

    layers: of each layer that it lives in, by name such as `layers.003`: `parameters`, the shape of
    each by name, and `linears`, (inputs, outputs) of each linear module by its path.
    hidden: width of the hidden states. prompt: the shape of the soft prompt of `[prompt]`.
    settings: the section `[messenger]`, as in `Place`.
    """

    layers: Mapping[str, Mapping[str, Any]]
    hidden: int
    prompt: list[int]
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class MessengerEntry:
    """A kind of messenger.

    name: value of the key `messenger.kind`.
    make: makes one (`fedsp.models.trainable.Messenger`) in a model. It is called at the server and
        at each client, and must give tensors of the same names and shapes there: name them after
        the numbers of the global model's layers. One that lives in layers begins as if it were not
        there, and adds no parameters or buffers to the model: its modules' hooks read it.
    shapes: those names and shapes, counted without weights, for `fedsp plan`.
    in_layers: whether it lives in layers of the model, which both sides must hold.
    distilled_layers: whether these may be distilled ones, `messenger.layers = "all"`.
    has_prompt: whether the soft prompt of `[prompt]` is in it.
    per_example: whether it has a gradient for each example (`Messenger.apart`), which
        `privacy.unit = "example"` needs.
    trains_weights: whether it trains weights of the model itself, which must then be float32.
    options: the keys that `messenger.options` may have, as a subclass of `fedsp.config.Section`, a
        pydantic model with a default for each field. What it refuses is said under their names, by
        the server before it starts and by a client before it takes part. None: there are no keys.
    learning_rate: what `[client]` and `[server]` have under the preset `messenger`, unless they say
        otherwise.
    """

    name: str
    make: Callable[[Place], Messenger]
    shapes: Callable[[Sizes], Shapes]
    in_layers: bool = True
    distilled_layers: bool = False
    has_prompt: bool = False
    per_example: bool = False
    trains_weights: bool = False
    options: type[Any] | None = None
    learning_rate: float = 1e-3


_ENTRIES = Register(MESSENGERS, "messenger", MessengerEntry)


def register_messenger(entry: MessengerEntry) -> MessengerEntry:
    """Make a messenger known under its name; returns the entry.

    Raises:
        ConfigurationError: another messenger has that name.
    """
    return _ENTRIES.add(entry)


def find_messenger(name: str) -> MessengerEntry:
    """The entry of a messenger, registered or brought by an installed package.

    Raises:
        ConfigurationError: there is none of that name, or two; or as `load_installed`.
    """
    return _ENTRIES.find(name)


def require_messenger(kind: str, *, layers: str, private: bool) -> MessengerEntry:
    """The entry of the messenger that `[messenger]` names, if it can live in these `layers`, and
    has a gradient for each example where steps are `private`.

    Raises:
        ConfigurationError: it cannot, or as `find_messenger`.
    """
    entry = find_messenger(kind)
    if layers == "all" and not entry.distilled_layers:
        able = _those_with("distilled_layers")
        raise ConfigurationError(
            f"messenger.layers: 'all' is for {able}, and messenger.kind is {kind!r}; set it to"
            " 'verbatim'"
        )
    if private and not entry.per_example:
        raise ConfigurationError(
            "messenger.kind: privacy.unit = 'example' needs a gradient for each example, which"
            f" {kind!r} does not give; take {_those_with('per_example')}"
        )
    return entry


def require_everywhere(kind: str) -> None:
    """Raises ConfigurationError for a messenger that other processes, which import fedsp anew, do
    not know."""
    if kind not in (*OURS, *installed_names(MESSENGERS)):
        raise ConfigurationError(
            f"messenger.kind: {kind!r} is registered in this process alone, and Flower's simulation"
            " has others: bring it by an installed package's entry point, or use engine local"
        )


def _those_with(property: str) -> str:
    *others, last = [repr(one.name) for one in _ENTRIES.values() if getattr(one, property)]
    return f"{', '.join(others)} or {last}"


def counted(kind: str, sizes: Sizes) -> Shapes:
    """The names and shapes of the tensors of a messenger, before any model is loaded.

    Raises:
        ConfigurationError: it lives in layers that both sides hold, and there are none; it has no
            tensor there; its entry cannot count them; or as `find_messenger`.
    """
    entry = find_messenger(kind)
    if entry.in_layers and not sizes.layers:
        raise keeps_no_layer(kind, distilled=entry.distilled_layers)
    with told_of(kind):
        shapes = entry.shapes(sizes)
    if not shapes:
        raise finds_nothing(kind, "this model")
    return shapes


def finds_nothing(kind: str, where: str) -> ConfigurationError:
    """What is said where a messenger has no tensor in a model."""
    return ConfigurationError(
        f"messenger.kind: {kind!r} finds nothing to tune in {where}: choose another messenger, or"
        " other settings of it"
    )


@contextmanager
def told_of(kind: str) -> Iterator[None]:
    """Raises ConfigurationError for whatever the code of a messenger raises."""
    try:
        yield
    except FedspError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"messenger.kind: the code of {kind!r} fails with {type(error).__name__}:"
            f" {first_line(error)}"
        ) from error


def _prompt_shapes(sizes: Sizes) -> Shapes:
    return {"prompt.values": sizes.prompt}


def _adapter_shapes(sizes: Sizes) -> Shapes:
    shapes, settings = {}, sizes.settings
    for layer, about in sizes.layers.items():
        for path, (inputs, outputs) in about["linears"].items():
            if settings["targets"] and path.rpartition(".")[2] not in settings["targets"]:
                continue
            shapes[f"{layer}.{path}.B"] = [outputs, settings["rank"]]
            if settings["train_first"]:
                shapes[f"{layer}.{path}.A"] = [settings["rank"], inputs]
    return shapes


def _layer_shapes(sizes: Sizes) -> Shapes:
    return {
        f"{layer}.{name}": shape
        for layer, about in sizes.layers.items()
        for name, shape in about["parameters"].items()
    }


def _adapter(place: Place) -> Messenger:
    from fedsp.models.messengers.making import make_adapter

    return make_adapter(place)


def _layers(place: Place) -> Messenger:
    from fedsp.models.messengers.making import layer_weights

    return layer_weights(place.model, place.blocks)


def _prompt_and_adapter(place: Place) -> Messenger:
    from fedsp.models.messengers.making import make_adapter
    from fedsp.models.messengers.prompt_and_adapter import PromptAndAdapter

    return PromptAndAdapter(place.prompt(), make_adapter(place))


for _entry in (
    MessengerEntry(
        name="prompt",
        make=methodcaller("prompt"),
        shapes=_prompt_shapes,
        in_layers=False,
        has_prompt=True,
        per_example=True,
        learning_rate=3e-2,
    ),
    MessengerEntry(
        name="adapter",
        make=_adapter,
        shapes=_adapter_shapes,
        distilled_layers=True,
        per_example=True,
        learning_rate=5e-3,
    ),
    MessengerEntry(name="layers", make=_layers, shapes=_layer_shapes, trains_weights=True),
    MessengerEntry(
        name="prompt+adapter",
        make=_prompt_and_adapter,
        shapes=lambda sizes: _prompt_shapes(sizes) | _adapter_shapes(sizes),
        distilled_layers=True,
        has_prompt=True,
        per_example=True,
        learning_rate=5e-3,
    ),
):
    register_messenger(_entry)
OURS = tuple(_ENTRIES)
