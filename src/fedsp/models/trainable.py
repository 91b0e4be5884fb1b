"""What can be trained, and what can travel: the interfaces that every messenger has."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from fedsp.errors import ModelError, PrivacyError
from fedsp.models.payload import Payload

if TYPE_CHECKING:
    from fedsp.models.prompted_lm import PromptedLM

Tensors = dict[str, Tensor]
"""Tensors by name."""


class Trainable(Protocol):
    """Something with parameters that an optimizer can train."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that an optimizer trains, by name."""


class Messenger(Trainable, Protocol):
    """What a method tunes and sends: a soft prompt (`fedsp.models.soft_prompt`), adapters
    (`fedsp.models.adapter`) or weights (`fedsp.models.weights`) of the model, or two together
    (`fedsp.models.messengers`).

    Its parameters have the names of the tensors that travel. Of several in one process, each loads
    its payload before any other call."""

    first_depth: int = 0
    """The first block of its model whose output depends on it: what stands before may be read once
    for many steps, and nothing before it is trained."""

    def payload(self) -> Payload:
        """The tensors that travel: float32, on the CPU."""

    def load(self, payload: Payload) -> None:
        """Copy a received payload into the parameters. Raises PayloadError for any other names,
        shapes or types than its own, and numbers that are not finite."""

    def own_state(self) -> Tensors:
        """State that never travels and that the party keeps between rounds, such as a projection;
        none unless a messenger says otherwise."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set the state that `own_state` returned in an earlier round; nothing happens if it is
        empty."""
        return

    def distance(self, payload: Payload) -> Tensor:
        """The squared Euclidean distance from a payload, a scalar with gradients."""

    def prefix(self, model: PromptedLM) -> Tensor | None:
        """The keys and values (P, depths, 2, H, K) that the model reads in front of every text;
        None if the messenger is no prompt."""
        return None

    def apart(self, count: int) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Copies (count, *shape) of each tensor that travels, by name, sorted, with gradients;
        within the context each row of a batch reads its own. Raises PrivacyError where that cannot
        be."""
        raise PrivacyError(
            "this messenger has no gradient for each example, which privacy.unit = 'example' needs:"
            " tune a prompt or an adapter"
        )

    def prefix_of(self, copies: Mapping[str, Tensor], model: PromptedLM) -> Tensor | None:
        """`prefix` of such copies, one per row (count, P, depths, 2, H, K)."""
        return None

    def export(self, model: PromptedLM, folder: Path) -> dict[str, Any]:
        """Write it into `folder` as a PEFT adapter of the global model, which it lives in or is
        read by. Returns `kind`, what was written in a few words, and its figures: `peft_type`, and
        `rank` or `virtual_tokens`. Raises ModelError where PEFT has no form for it."""
        raise ModelError(
            "PEFT has no form for what this run tuned: it has one for a prompt, and for adapters"
        )

    def merge(self, model: PromptedLM) -> dict[str, Any]:
        """Add it to the weights of the global model, which answers alone from then on as it did
        with it. Returns what `export` does. Raises ModelError where that cannot be."""
        raise ModelError(
            "only adapters and weights can be merged into a model, and this run tuned something"
            " else"
        )


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module by name, each once even if several layers share it."""
    return dict(module.named_parameters(remove_duplicate=True))


def entries_below(tensors: Mapping[str, Tensor], name: str) -> Tensors:
    """The tensors whose names start with `name/`, without that prefix."""
    return {
        key.removeprefix(f"{name}/"): tensor
        for key, tensor in tensors.items()
        if key.startswith(f"{name}/")
    }
