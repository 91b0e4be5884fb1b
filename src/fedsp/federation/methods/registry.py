"""The register of methods: one entry each, made where the method is. Nothing here imports torch, so
that a configuration is checked at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedsp.data.installed import METHODS, Register
from fedsp.errors import ConfigurationError

if TYPE_CHECKING:
    from fedsp.data.encoding import Tokenizer
    from fedsp.federation.methods.base import Method
    from fedsp.models.auxiliary import AuxiliaryModel, LayerPlan
    from fedsp.models.prompted_lm import PromptedLM
    from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
    from fedsp.models.trainable import Messenger, Tensors
    from fedsp.training.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The three stages with a run's settings: clients' steps on the auxiliary model, clients' steps
    on the messenger, the server's steps on it."""

    auxiliary: Stage
    messenger: Stage
    server: Stage


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The parts of a run from which a method builds its server's and its clients' side.

    model, tokenizer: the global model and its tokenizer.
    seed: the run's seed.
    lora: the section `[lora]`: rank, alpha, targets. messenger: the section `[messenger]`.
    plan: makes the layer plan of the auxiliary model.
    prompt: the shape of the soft prompt that `[prompt]` describes.
    initial_prompt: makes the soft prompt that `[prompt]` describes, in front of the global model.
    package: the auxiliary model that `[auxiliary]` and `[distill]` describe, read if it was made,
        else made and written.
    """

    model: PromptedLM
    tokenizer: Tokenizer
    seed: int
    lora: dict[str, Any]
    messenger: dict[str, Any]
    prompt: PromptSpec
    plan: Callable[[], LayerPlan]
    initial_prompt: Callable[[], SoftPrompt]
    package: Callable[[], AuxiliaryModel]


@dataclass(frozen=True, kw_only=True)
class ClientSide:
    """What every client holds: a model, and a messenger to load what it receives into. `package` is
    the model if it is an auxiliary one."""

    model: PromptedLM
    messenger: Callable[[], Messenger]
    package: AuxiliaryModel | None = None


def averaging(stages: Stages, start: Tensors) -> Method:
    """Federated averaging of the messenger."""
    from fedsp.federation.methods.base import Averaging

    return Averaging(
        client_stage=replace(stages.messenger, name="client", seed_label="client"),
        server_stage=stages.server,
    )


def prompt_in_front(setup: Setup) -> tuple[PromptedLM, Messenger]:
    """The global model, with a soft prompt in front of it."""
    return setup.model, setup.initial_prompt()


def whole_model(setup: Setup, model: PromptedLM, messenger: Messenger) -> ClientSide:
    """Clients that hold the whole model, and tune what the server tunes."""
    from fedsp.models.soft_prompt import SoftPrompt

    own = (
        (lambda: messenger.like(model, setup.seed))
        if isinstance(messenger, SoftPrompt)
        else lambda: messenger
    )
    return ClientSide(model=model, messenger=own)


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """A method of federated tuning.

    name: value of the key `method`. title, paper: name and citation in reports.
    clients_hold: what clients have of the global model, in words.
    algorithm: builds the method from its stages and the auxiliary weights from which clients start
        (empty if they do not train them).
    server_side: builds the server's model and messenger. client_side: builds the clients' side.
    trains_weights: whether model weights are trained, which must then be float32.
    exact_weights: whether unquantized weights are needed: 8bit, 4bit and split models are refused.
    package: whether clients hold an auxiliary model made by `fedsp distill`.
    deployable: whether clients need only the package, so that they may run on their own machines,
        train the auxiliary model, and have example-level privacy.
    federated: whether there are clients at all. rounds: whether anything is trained.
    """

    name: str
    title: str
    paper: str
    clients_hold: str
    algorithm: Callable[[Stages, Tensors], Method] = averaging
    server_side: Callable[[Setup], tuple[PromptedLM, Messenger]] = prompt_in_front
    client_side: Callable[[Setup, PromptedLM, Messenger], ClientSide] = whole_model
    trains_weights: bool = False
    exact_weights: bool = False
    package: bool = False
    deployable: bool = False
    federated: bool = True
    rounds: bool = True


_ENTRIES = Register(METHODS, "method", MethodEntry)


def register_method(entry: MethodEntry) -> MethodEntry:
    """Make a method known under its name; returns the entry.

    Raises:
        ConfigurationError: another method has that name.
    """
    return _ENTRIES.add(entry)


def find_method(name: str) -> MethodEntry:
    """The entry of a method, registered or brought by an installed package.

    Raises:
        ConfigurationError: there is none of that name, or two; or as `load_installed`.
    """
    return _ENTRIES.find(name)


def shown_method(name: str) -> MethodEntry:
    """The entry of a method of a run that is only shown; where no package brings it any more, one
    of its name alone."""
    with suppress(ConfigurationError):
        return find_method(name)
    return MethodEntry(name=name, title=name, paper="", clients_hold="")


def methods() -> Iterable[MethodEntry]:
    """All registered methods, in the order of their registration."""
    return tuple(_ENTRIES.values())
