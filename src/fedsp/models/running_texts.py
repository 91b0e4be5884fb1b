"""Texts that one model continues together, each joining and leaving at its own time (continuous
batching, G.-I. Yu et al. *Orca: A Distributed Serving System for Transformer-Based Generative
Models*. OSDI 2022. https://www.usenix.org/conference/osdi22/presentation/yu).

A text is read alone behind the prefix when it joins; from then on each step adds one token to all.
Keys and values are kept aligned at their right end, and what the shorter texts lack stands before
the prefix, masked: so every text has its prefix and nothing else in front of it, as alone, whether
a model counts positions or places in the row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from fedsp.models.prompted_lm import PromptedLM, length_of


class RunningTexts:
    """Texts behind one prefix (P, L, 2, H, K), or none; a row for each, in the order in which they
    joined."""

    def __init__(self, model: PromptedLM, prefix: Tensor | None) -> None:
        self._model, self._prefix = model, prefix
        self._before = length_of(prefix)
        self._start = model.positions_taken(self._before)
        self._read: list[int] = []
        self._cache: Cache | None = None

    @torch.no_grad()
    def join(self, ids: Tensor) -> Tensor:
        """Read a text (T,), whose row is the last from now on, to the logits (V,) of its next
        token."""
        model, prefix, count = self._model, self._prefix, len(ids)
        cache = model.cache(prefix, 1)
        positions = torch.arange(self._start, self._start + count, device=ids.device)[None]
        mask = ids.new_ones(1, self._before + count)
        states = model.states(ids[None], mask, positions, cache)
        self._cache = _beside(self._cache, cache) if self._cache else cache
        self._read.append(count)
        return model.logits(states[0, -1])

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to each text (B,), to the logits (B, V) of the next ones."""
        read = torch.tensor(self._read, device=tokens.device)
        own = self._before + read + 1
        width = int(own.max())
        mask = torch.arange(width, device=tokens.device)[None] >= (width - own)[:, None]
        positions = (self._start + read)[:, None]
        states = self._model.states(tokens[:, None], mask.long(), positions, self._cache)
        self._read = [count + 1 for count in self._read]
        return self._model.logits(states[:, -1])

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other texts leave."""
        self._read = [self._read[row] for row in rows]
        if not rows or self._cache is None:
            self._cache = None
            return
        self._cache.batch_select_indices(torch.tensor(rows, device=self._model.device))
        width = self._before + max(self._read)
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[:, :, -width:], layer.values[:, :, -width:]


def _beside(ours: Cache, other: Cache) -> Cache:
    """The rows of two caches in one, aligned at their right end."""
    for layer, more in zip(ours.layers, other.layers, strict=True):
        width = max(layer.keys.shape[2], more.keys.shape[2])
        layer.keys, layer.values = (
            torch.cat([pad(rows, (0, 0, width - rows.shape[2], 0)) for rows in pair])
            for pair in ((layer.keys, more.keys), (layer.values, more.values))
        )
    return ours


@torch.no_grad()
def runs_together(model: PromptedLM) -> bool:
    """Whether texts of different lengths that run together read as each does alone, tried out on
    two. Models whose rotations depend on how long a call is are not asked."""
    if model.switch is not None:
        return False
    shape = (2, model.shape.layers, 2, model.shape.heads, model.shape.head_size)
    prefix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    whole = model.some_tokens()[0]
    texts = [whole[:6], whole[6:8]]
    more = whole[:2]
    alone = []
    for text, token in zip(texts, more, strict=True):
        read = model.reader(prefix)
        read(text)
        alone.append(read(torch.cat([text, token[None]])))
    expected = torch.stack(alone)
    running = RunningTexts(model, prefix)
    for text in texts:
        running.join(text)
    close = 1e-3 * float(expected.abs().max())
    return bool(torch.allclose(running.step(more), expected, rtol=0.0, atol=close))
