"""The inversion audit of adapters: what the gradient of a low-rank update tells of a text.

The gradient of B is a sum over tokens of an outer product with A x, where x is what the linear
module reads. In the first layer x depends on a token and its position alone: so a token whose A x
lies in the span of the gradient's rows was in the text, as long as there are fewer tokens than
ranks (the span test of Petrov et al., *DAGER*, NeurIPS 2024, https://arxiv.org/abs/2405.15586, for
adapters). Where only later layers are tuned there is no such test, and gradient matching is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsp.audit.inversion.gradient_matching import AdapterTarget, match_text
from fedsp.audit.inversion.scenarios import (
    Recovery,
    cut,
    guess,
    guess_without_places,
    level,
    noised,
    recovery_of,
)
from fedsp.audit.inversion.span_test import recall, span_test
from fedsp.audit.shadows import Opened, Shadow, changes_of
from fedsp.data.encoding import Encoded, collate
from fedsp.models.adapter import SECOND, Adapter
from fedsp.models.payload import as_row, shapes_of
from fedsp.models.prompted_lm import PromptedLM
from fedsp.training.per_example_gradients import example_gradients

Row = dict[str, Any]
LONGEST = 32
"""Maximum tokens of a text that the span test reads."""


class _ReadOn(Exception):
    """Ends a forward pass where the modules that read the first block's input are behind it."""


@torch.no_grad()
def first_inputs(model: PromptedLM, adapter: Adapter, ids: Tensor) -> tuple[list[str], Tensor]:
    """The adapted modules that read the same as the first of them, such as queries, keys and
    values, and what they read (B, T, in) of tokens (B, T)."""
    names: list[str] = []
    read: list[Tensor] = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            read.append(arguments[0])
            if arguments[0].data_ptr() != read[0].data_ptr() or arguments[0].shape != read[0].shape:
                raise _ReadOn
            names.append(name)

        return hook

    handles = [
        model.model.get_submodule(path).register_forward_pre_hook(note(name))
        for name, path in adapter.paths.items()
    ]
    try:
        with contextlib.suppress(_ReadOn):
            model(ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    return names, read[0].view(*ids.shape, -1).float()


def reads_tokens_alone(model: PromptedLM, adapter: Adapter) -> bool:
    """Whether what the first adapted module reads depends on a token and its position alone: not
    where it stands behind an attention, or in a later layer."""
    tokens = model.model.get_input_embeddings().num_embeddings
    ids = torch.tensor([[1, 2, 3], [4, 5, 3]], device=model.device) % tokens
    _, inputs = first_inputs(model, adapter, ids)
    return torch.allclose(inputs[0, -1], inputs[1, -1], rtol=1e-3, atol=1e-4)


@dataclass(frozen=True)
class InputDictionary:
    """What each token of the vocabulary is behind A, in the modules that read the first layer's
    input: by the name of their B, unit vectors (T, V, 1, 1, R) of T positions, V tokens, rank R.
    `readings`: in how many blocks those modules stand, each of which adds its own vectors to a
    gradient of B. `placed`: whether a vector depends on the position; with rotary embeddings it
    does not, and a token is found without its place."""

    vectors: dict[str, Tensor]
    readings: int
    placed: bool

    def distances(self, gradient: Mapping[str, Tensor], tokens: int) -> Tensor:
        """How far each token is at each position (T, V) from the span of a gradient of B, 0 to 1:
        the least over modules, since a text's first token, which attends to itself alone, is in no
        gradient of queries and keys."""
        return torch.stack(
            [
                span_test(gradient[name][None].float(), some, tokens * self.readings)
                for name, some in self.vectors.items()
            ]
        ).amin(dim=0)

    @property
    def seen(self) -> str:
        """What the attack finds of a token, in words."""
        return "" if self.placed else ", tokens without their places"

    def guess(self, lots: list[list[Encoded]], like: list[Encoded]) -> float:
        """What a guess would find of the same."""
        return guess(lots, like) if self.placed else guess_without_places(lots, like)

    def recovery(self, gradient: Mapping[str, Tensor], row: Encoded) -> Recovery:
        """What it reads of one text, whose last token is the answer."""
        count = len(row.ids) - 1
        distances = self.distances(gradient, count)[:count]
        if self.placed:
            return recovery_of(distances.argmin(dim=1).tolist(), row)
        return Recovery(self.recall(distances, [row]))

    def recall(self, distances: Tensor, texts: Sequence[Encoded]) -> float:
        """The share of the tokens of texts that are among as many nearest ones, position by
        position where that shows."""
        if self.placed:
            return recall(distances, texts)
        there = {token for row in texts for token in row.ids[:-1]}
        nearest = distances[0].topk(len(there), largest=False).indices.tolist()
        return len(there & set(nearest)) / len(there)


def input_dictionary(
    model: PromptedLM, adapter: Adapter, positions: int, *, at_once: int = 1024
) -> InputDictionary:
    """The dictionary of an adapter that begins in the model's first layer."""
    vocabulary = torch.arange(model.model.get_input_embeddings().num_embeddings)
    parts: dict[str, list[Tensor]] = {}
    for some in torch.split(vocabulary, at_once):
        ids = some.to(model.device)[:, None].expand(-1, positions)
        names, inputs = first_inputs(model, adapter, ids)
        for name in names:
            low = inputs @ adapter.updates[name].first.T.float()
            parts.setdefault(f"{name}.{SECOND}", []).append(low.cpu())
    vectors = {
        name: normalize(torch.cat(low).transpose(0, 1)[:, :, None, None], dim=-1, eps=1e-30)
        for name, low in parts.items()
    }
    first = next(iter(vectors.values()))
    placed = not torch.allclose(first[0], first[-1], atol=1e-4)
    return InputDictionary(vectors, adapter.readings, placed)


def tensors_of(adapter: Adapter, row: Tensor) -> dict[str, Tensor]:
    """The tensors of an adapter's payload from all of its numbers in one row (N,)."""
    shapes = shapes_of(adapter.payload())
    sizes = [torch.Size(shapes[name]).numel() for name in sorted(shapes)]
    parts = torch.split(row.flatten(), sizes)
    return {name: part.view(shapes[name]) for name, part in zip(sorted(shapes), parts, strict=True)}


def adapter_gradient(model: PromptedLM, adapter: Adapter, lot: list[Encoded]) -> dict[str, Tensor]:
    """The mean gradient of some examples, by tensor."""
    return tensors_of(adapter, example_gradients(model, adapter, collate(lot))[1].mean(dim=0).cpu())


def by_spans(
    opened: Opened,
    adapter: Adapter,
    drawn: list[Encoded],
    like: list[Encoded],
    epsilons: tuple[float, ...],
) -> Iterator[Row]:
    """One example and one step of SGD, read by the span test from the first layer's B."""
    most = adapter.settings.rank // (2 * adapter.readings)
    model, count = opened.auxiliary, min(LONGEST, max(1, most))
    dictionary = input_dictionary(model, adapter, count)
    texts = [cut(row, count + 1) for row in drawn]
    seen = f"one example of at most {count} tokens, one step of SGD, B of the first layer"
    seen += dictionary.seen
    guessed = dictionary.guess([[row] for row in texts], like)

    def read(row: Encoded, bits: torch.dtype, epsilon: float | None) -> Recovery:
        gradient = noised(as_row(adapter_gradient(model, adapter, [row])), epsilon)
        return dictionary.recovery(tensors_of(adapter, gradient.to(bits)), row)

    for how, bits, epsilon in (
        ("", torch.float32, None),
        (", sent in float16", torch.float16, None),
        *((f", with the noise of epsilon = {one:g}", torch.float32, one) for one in epsilons),
    ):
        found = [read(row, bits, epsilon) for row in texts]
        yield level(f"{seen}{how}", "span test", found, guessed)


def by_matching(
    opened: Opened,
    adapter: Adapter,
    drawn: list[Encoded],
    like: list[Encoded],
    *,
    tokens: int,
    iterations: int,
    epsilons: tuple[float, ...],
) -> Iterator[Row]:
    """One example and one step of SGD, read by gradient matching: from B in each layer alone, and
    from all."""
    model = opened.auxiliary
    texts = [cut(row, tokens + 1) for row in drawn]
    layers = sorted({name.split(".")[1] for name in adapter.updates})
    seen = f"one example of {tokens} tokens, one step of SGD, B of"

    def read(row: Encoded, layer: str | None, epsilon: float | None) -> Recovery:
        gradient = adapter_gradient(model, adapter, [row])
        gradient = tensors_of(adapter, noised(as_row(gradient), epsilon))
        wanted = {
            name: tensor
            for name, tensor in gradient.items()
            if name.endswith(f".{SECOND}") and layer in (None, name.split(".")[1])
        }
        target = AdapterTarget(
            model=model,
            adapter=adapter,
            gradient=wanted,
            answers=torch.tensor(row.ids[-1:], device=model.device),
            tokens=tokens,
        )
        return recovery_of(match_text(target, iterations=iterations), row)

    ways: list[tuple[str | None, float | None]] = [(layer, None) for layer in layers]
    for layer, epsilon in (*ways, (None, None), *((None, one) for one in epsilons)):
        where = "all layers" if layer is None else f"global layer {int(layer)} alone"
        promise = "" if epsilon is None else f", with the noise of epsilon = {epsilon:g}"
        found = [read(row, layer, epsilon) for row in texts]
        yield level(
            f"{seen} {where}{promise}",
            "gradient matching",
            found,
            guess([[row] for row in texts], like),
        )


def as_deployed(opened: Opened, adapter: Adapter, shadow: Shadow, kind: str) -> Iterator[Row]:
    """What the run's server sees: each client's update of the first round, and their sum, by the
    span test; and the same in one step of SGD on a whole lot."""
    model, size = opened.auxiliary, opened.run.config.client.batch_size
    dictionary = input_dictionary(model, adapter, LONGEST)
    rows = [row if len(row.ids) <= LONGEST else cut(row, LONGEST) for row in opened.encoded]

    def spanned(
        seen: str, changes: list[Mapping[str, Tensor]], lots: list[list[Encoded]], observed: bool
    ) -> Row:
        read = [
            Recovery(dictionary.recall(dictionary.distances(change, 10_000), lot))
            for change, lot in zip(changes, lots, strict=True)
        ]
        guessed = dictionary.guess(lots, opened.encoded)
        return level(f"{seen}{dictionary.seen}", "span test", read, guessed, observed)

    lots = [lot[:size] for lot in opened.by_client(rows).values()]
    gradients: list[Mapping[str, Tensor]] = [adapter_gradient(model, adapter, lot) for lot in lots]
    yield spanned(f"a lot of {size} examples, one step of SGD", gradients, lots, observed=False)
    mine = {
        client: lot
        for client, lot in opened.by_client(rows, shadow.included.tolist()).items()
        if client in shadow.updates[0]
    }
    changes = changes_of(shadow, 0, list(mine))
    parts: list[Mapping[str, Tensor]] = [tensors_of(adapter, change) for change in changes]
    yield spanned(f"{kind}, one client", parts, list(mine.values()), observed=True)
    total = as_row(shadow.broadcasts[1]) - as_row(shadow.broadcasts[0])
    everyone = [row for lot in mine.values() for row in lot]
    yield spanned(
        f"{kind}, the sum of all clients", [tensors_of(adapter, total)], [everyone], observed=True
    )
