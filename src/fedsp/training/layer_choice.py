"""Which layers of the global model a package should be made of: those whose loss hurts most.

Layers are dropped one after another, each time the one without which the model reads public text
best (J. Song et al. *SLEB*. ICML 2024. https://arxiv.org/abs/2402.09025). What is computed below a
layer does not depend on it, so a trial computes only what stands above.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsp.models.blocks import forwarding, recorded
from fedsp.models.prompted_lm import PromptedLM


class Dropped(NamedTuple):
    """A layer, and the model's loss without it and those that were dropped before, nats per
    token."""

    layer: int
    loss: float


@torch.no_grad()
def drop_layers(
    model: PromptedLM, texts: Sequence[Sequence[int]], count: int, *, keep: Collection[int] = ()
) -> list[Dropped]:
    """So many layers, in the order in which they are dropped; those of `keep` stay. Texts are token
    sequences of one length."""
    ids = torch.tensor(texts, device=model.device)
    rest = _rest_of_outputs(model, ids)
    dropped: list[Dropped] = []
    while len(dropped) < count:
        gone = {one.layer for one in dropped}
        with recorded(model.blocks) as calls:
            _loss(model, ids, rest, gone)
        trials = {
            layer: _loss(model, ids, rest, {*range(layer), *gone, layer}, calls[layer][0])
            for layer in range(len(model.blocks))
            if layer not in gone and layer not in keep
        }
        best = min(trials, key=lambda layer: trials[layer])
        dropped.append(Dropped(best, trials[best]))
    return dropped


def _loss(
    model: PromptedLM,
    ids: Tensor,
    rest: Sequence[tuple[Any, ...] | None],
    skipped: Collection[int],
    state: Tensor | None = None,
) -> float:
    """The loss of tokens (B, T), nats per token, where blocks are skipped; the first block gives
    `state` (B, T, D), if any, instead of what enters it."""

    def passed(number: int, *arguments: Any, **named: Any) -> Any:
        hidden = arguments[0] if arguments else named["hidden_states"]
        if number == 0 and state is not None:
            hidden = state
        after = rest[number]
        return hidden if after is None else (hidden, *after)

    def passing(number: int) -> Callable[[Any], Any]:
        return lambda _forward: partial(passed, number)

    with ExitStack() as stack:
        for number in skipped:
            stack.enter_context(forwarding([model.blocks[number]], passing(number)))
        hidden = model.read_padded(ids)[:, :-1]
    each = [
        float(cross_entropy(model.logits(row), wanted))
        for row, wanted in zip(hidden, ids[:, 1:], strict=True)
    ]
    return sum(each) / len(each)


def _rest_of_outputs(model: PromptedLM, ids: Tensor) -> list[tuple[Any, ...] | None]:
    """What each block gives behind its hidden states; None where it gives them alone."""
    found: list[tuple[Any, ...] | None] = []

    def look(_block: nn.Module, _arguments: Any, output: Any) -> None:
        found.append(tuple(output[1:]) if isinstance(output, tuple) else None)

    handles = [block.register_forward_hook(look) for block in model.blocks]
    try:
        model.read_padded(ids)
    finally:
        for handle in handles:
            handle.remove()
    return found
