"""A Hugging Face causal language model, read with or without a soft prompt.

Notation: B batch, T tokens, P prompt length, L layers, H key/value heads, K head size, D hidden size, V vocabulary.

Nothing here is written for one family. What a family does before its blocks (positions, rotations, masks) is taken from the model's own
forward; where the blocks live is found by their number; and what is assumed is tried out once when a model is loaded, so that a model
that cannot carry a soft prompt is refused by name, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from fedsp.blocks import Captured, CapturingCache, FixedLayer, find_blocks, fused, hidden_of, hooked, runs_on
from fedsp.errors import ModelError
from fedsp.rows import Padded, Trees, grow, pack

LONGEST_TREE = 2048
Positions = Literal["hugging_face", "from_zero"]
Tokenizer = PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelShape:
    """What a soft prompt must fit: L layers, H key/value heads of size K, hidden size D."""

    layers: int
    heads: int
    head_size: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.heads} key/value heads of {self.head_size}, hidden size {self.hidden}"


class PromptedLM(nn.Module):
    """A causal LM that reads a prefix of keys and values (P, L, 2, H, K) at every layer, or none.

    `prompt_layers` says, for each depth of this model, which layer of the soft prompt it reads, and `prompt_shape` what model the prompt is
    made for: the identity and this very model, unless it is an auxiliary one.

    Raises:
        ModelError: the model has no key/value cache, is an encoder-decoder, has several key/value shapes, or computes its logits from
            something else than the last hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        *,
        positions: Positions = "hugging_face",
        prompt_layers: Sequence[int] | None = None,
        prompt_shape: ModelShape | None = None,
    ) -> None:
        super().__init__()
        self.model = fused(model.eval())
        self.name = name
        self.positions: Positions = positions
        self.recompute = False
        """Whether a step keeps only the inputs of each block, and computes the rest of its activations again in the backward pass."""
        self.backbone: nn.Module = getattr(model, model.base_model_prefix, model)
        self.head = model.get_output_embeddings()
        self._first = (next(model.parameters()),)  # in a tuple, so that it is not this module's own
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self._block_calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self.path_of_blocks, self.blocks = find_blocks(self.backbone, model.config.get_text_config().num_hidden_layers, name)
        self.shape = self._try_out()
        self.prompt_shape = prompt_shape or self.shape
        self.prompt_layers = tuple(prompt_layers if prompt_layers is not None else range(self.shape.layers))

    @property
    def device(self) -> torch.device:
        """Where tokens are read and last hidden states come back; layers may be elsewhere."""
        return runs_on(self.model, self._first[0])

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._first[0].dtype
        return dtype

    @property
    def max_positions(self) -> int:
        """The longest sequence the model was made for, prompt included under the Hugging Face positions."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1_000_000)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """Last hidden states (B, T, D), after the final norm, of right-padded tokens (B, T) behind a prefix (P, L, 2, H, K) or
        one prefix per example (B, P, L, 2, H, K).

        Rows behind one prefix are read side by side where that saves padding and the model has `room_for_trees`; what stands at padding means nothing.
        """
        if attention_mask is not None and (prefix is None or prefix.dim() == 5) and not attention_mask.all():
            room = self.room_for_trees - length_of(prefix)
            if room >= input_ids.shape[1]:
                trees, cells = pack(Padded(input_ids, attention_mask), weight=6 * self.shape.hidden, room=room)
                return self.read_branches(trees, prefix).flatten(0, 1)[cells]
        return self.read_padded(input_ids, attention_mask, prefix)

    def read_padded(self, input_ids: Tensor, attention_mask: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """The same, each row by itself."""
        batch, tokens = input_ids.shape
        length = length_of(prefix)
        if length and attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(batch, length), attention_mask], dim=1)
        start = length if self.positions == "hugging_face" else 0
        position_ids = torch.arange(start, start + tokens, device=input_ids.device)[None]
        with self._recomputing():
            output = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=None if prefix is None else self.cache(prefix, batch, FixedLayer),
                use_cache=prefix is not None,
            )
        hidden: Tensor = output.last_hidden_state.to(self.device)
        return hidden

    def continue_from(self, contexts: Padded, tails: Padded, rows: Tensor, prefix: Tensor | None) -> Tensor:
        """Last hidden states (N, T, D) of N tails, the n-th behind context `rows[n]`; each context is read once, with a cache.

        Where every context is empty the tails are read by themselves.
        """
        count, width = contexts.ids.shape
        hidden: Tensor
        if not width:
            hidden = self(tails.ids, tails.mask, prefix)
            return hidden
        length = length_of(prefix)
        cache = DynamicCache() if prefix is None else self.cache(prefix, count)
        start = length if self.positions == "hugging_face" else 0
        before = torch.cat([contexts.mask.new_ones(count, length), contexts.mask], dim=1)
        positions = torch.arange(start, start + width, device=self.device)[None]
        self.backbone(input_ids=contexts.ids, attention_mask=before, position_ids=positions, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(rows)
        positions = start + contexts.mask.sum(dim=1)[rows][:, None] + torch.arange(tails.ids.shape[1], device=self.device)[None]
        mask = torch.cat([before[rows], tails.mask], dim=1)
        output = self.backbone(input_ids=tails.ids, attention_mask=mask, position_ids=positions * tails.mask, past_key_values=cache, use_cache=True)
        hidden = output.last_hidden_state.to(self.device)
        return hidden

    def read_branches(self, trees: Trees, prefix: Tensor | None) -> Tensor:
        """Last hidden states (B, T, D) of trees: each token sees the prefix, its row's context, and of its own branch what stands before it."""
        length = length_of(prefix)
        batch, width = trees.ids.shape
        before = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        own = (trees.branches[:, None, :] == 0) | (trees.branches[:, None, :] == trees.branches[:, :, None])  # (B, T, T)
        seen = torch.cat([before.new_ones(batch, width, length), before & own], dim=2)[:, None]
        with self._recomputing():
            output = self.backbone(
                input_ids=trees.ids,
                attention_mask=torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill(~seen, torch.finfo(self.dtype).min),
                position_ids=trees.positions + (length if self.positions == "hugging_face" else 0),
                past_key_values=None if prefix is None else self.cache(prefix, batch, FixedLayer),
                use_cache=prefix is not None,
            )
        hidden: Tensor = output.last_hidden_state.to(self.device)
        return hidden

    @cached_property
    def room_for_trees(self) -> int:
        """Keys, the prefix among them, up to which a mask of one's own does what the model's own masks do: any window that its configuration names; 0 where it
        takes none at all. Longer ones than LONGEST_TREE cost more than they save.

        Tried out on a small tree, which one of the branches stands in twice: it must be read as by itself, in both places alike, whatever another branch says.
        """
        text = self.model.config.get_text_config().to_dict()
        windows = [
            value
            for name, value in text.items()
            if re.search(r"window|chunk", name) and not re.search("layers|pattern", name) and type(value) is int and value > 0
        ]
        context, branch = [1, 2, 3], [4, 5]
        prefix = torch.randn(2, self.shape.layers, 2, self.shape.heads, self.shape.head_size, generator=torch.Generator().manual_seed(0)).to(self.device)

        def read(other: list[int]) -> Tensor:
            return self.read_branches(grow([context], [[branch, other, branch]], self.device), prefix)[0].float()

        with torch.no_grad():
            alone = self.read_padded(torch.tensor([context + branch], device=self.device), None, prefix)[0].float()
            try:
                found, changed = read([6, 7]), read([8, 9])
            except (RuntimeError, ValueError, TypeError, IndexError):
                return 0
        rounding = max(1e-4, 4 * torch.finfo(self.dtype).eps)
        close = max(1e-3, rounding)
        first, second = slice(3, 5), slice(7, 9)
        same = partial(torch.allclose, rtol=rounding, atol=rounding * float(alone.abs().median()))  # of the same sums, in another order
        right = torch.allclose(found[:5], alone, rtol=close, atol=close * float(alone.abs().max()))
        unmoved = same(found[first], changed[first]) and same(found[second], changed[second])
        return min([*windows, self.max_positions, LONGEST_TREE]) if right and unmoved and same(found[first], found[second]) else 0

    @torch.no_grad()
    def generate(self, input_ids: Tensor, prefix: Tensor | None, *, most: int, stop: int | None) -> list[int]:
        """Greedy continuation of tokens (T,): at most `most` new ones, ending before `stop`."""
        cache = DynamicCache() if prefix is None else self.cache(prefix, 1)
        start = 0 if self.positions == "from_zero" else length_of(prefix)
        new: list[int] = []
        ids, read = input_ids[None], 0
        while len(new) < most and read + ids.shape[1] + start <= self.max_positions:
            length = cache.get_seq_length() + ids.shape[1]
            positions = torch.arange(start + read, start + read + ids.shape[1], device=self.device)[None]
            mask = torch.ones(1, length, dtype=torch.long, device=self.device)
            hidden = self.backbone(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state
            token = int(self.logits(hidden[0, -1]).argmax())
            if token == stop:
                break
            new.append(token)
            read += ids.shape[1]
            ids = torch.tensor([[token]], device=self.device)
        return new

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        if not (self.recompute and torch.is_grad_enabled()):
            yield
            return
        before = [block.__dict__.get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                if forward is None:
                    del block.forward
                else:  # accelerate's
                    block.forward = forward

    def cache(self, prefix: Tensor, batch: int, kind: type[DynamicLayer] = DynamicLayer) -> Cache:
        """A fresh cache of L pairs (B, H, P, K), which grows by what is read, unless its layers are of a fixed `kind`."""
        if prefix.dim() == 5:
            prefix = prefix[None].expand(batch, *prefix.shape)
        per_layer = prefix.to(self.dtype).permute(2, 3, 0, 4, 1, 5)  # (L, 2, B, H, P, K)
        layers = [kind() for _ in self.blocks]
        for layer, block, (keys, values) in zip(layers, self.blocks, per_layer, strict=True):
            where = runs_on(block, next(block.parameters()))
            layer.lazy_initialization(keys.to(where), values.to(where))
            layer.keys, layer.values = keys.to(where), values.to(where)
        return Cache(layers=layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V), float32, of last hidden states (..., D)."""
        logits = self.head(hidden).to(self.device).float()
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def keys_and_values(self, inputs: Tensor) -> Tensor:
        """What each block makes of its residual inputs (P, L, D) as tokens 0..P-1: keys and values (P, L, 2, H, K), with gradients; or of one prompt per
        example, (B, P, L, D), and then (B, P, L, 2, H, K)."""
        batch = inputs if inputs.dim() == 4 else inputs[None]
        length = batch.shape[1]
        if length not in self._block_calls:
            self._block_calls[length] = self._record_block_calls(length)
        layers = []
        for layer, (block, (arguments, named)) in enumerate(zip(self.blocks, self._block_calls[length], strict=True)):
            probe = CapturingCache()
            hidden = batch[:, :, layer].to(self.dtype)
            try:
                block(hidden, *(_swap(value, probe) for value in arguments), **{key: _swap(value, probe) for key, value in named.items()})
            except Captured as captured:
                layers.append(torch.stack([captured.keys, captured.values]).permute(1, 3, 0, 2, 4).to(self.device))  # (B, P, 2, H, K)
            else:
                raise ModelError(
                    f"{self.name}: layer {layer} did not write its keys and values to the cache, so it cannot read a residual prompt; use a key/value prompt"
                )
        pairs = torch.stack(layers, dim=2).float()
        return pairs if inputs.dim() == 4 else pairs[0]

    @torch.no_grad()
    def activations(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens (P,) leave behind in the model: block inputs (P, L, D), and keys and values (P, L, 2, H, K)."""
        cache, inputs = DynamicCache(), []
        record: Callable[..., None] = lambda _module, arguments, named: inputs.append(hidden_of(arguments, named)[0])
        with hooked(self.blocks, record):
            self.backbone(input_ids=input_ids[None], attention_mask=torch.ones_like(input_ids)[None], past_key_values=cache, use_cache=True)
        pairs = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])  # (L, 2, H, P, K)
        return torch.stack(inputs, dim=1).float(), pairs.permute(3, 0, 1, 2, 4).float()

    @torch.no_grad()
    def _record_block_calls(self, length: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments, hidden states apart, with which the model calls each block on tokens 0..length-1."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        record: Callable[..., None] = lambda _module, arguments, named: calls.append((arguments[1:], {k: v for k, v in named.items() if k != "hidden_states"}))
        tokens = torch.zeros(1, length, dtype=torch.long, device=self.device)
        with hooked(self.blocks, record):
            self.backbone(input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=DynamicCache(), use_cache=True)
        return calls

    @torch.no_grad()
    def _try_out(self) -> ModelShape:
        """Read four tokens and hold what comes back against every assumption made here."""
        config = self.model.config
        if config.is_encoder_decoder:
            raise ModelError(f"{self.name} is an encoder-decoder ({config.model_type}): fedsp tunes causal language models")
        if config.get_text_config().num_hidden_layers != len(self.blocks) or self.head is None:
            raise ModelError(f"{self.name} ({config.model_type}) has no output head that fedsp can find")
        tokens = torch.arange(4, device=self.device)[None]
        width: list[int] = []
        with hooked(self.blocks, lambda _module, arguments, named: width.append(hidden_of(arguments, named).shape[-1])):
            output = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True)
        cache = getattr(output, "past_key_values", None)
        layers = getattr(cache, "layers", None)
        if not layers or any(getattr(layer, "keys", None) is None for layer in layers) or len(layers) != len(self.blocks):
            raise ModelError(f"{self.name} ({config.model_type}) has no key/value cache at every layer, so there is nowhere to put a soft prompt")
        shapes = sorted({(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers} | {(layer.values.shape[1], layer.values.shape[3]) for layer in layers})
        if len(shapes) > 1:
            raise ModelError(f"{self.name} ({config.model_type}) has several key/value shapes, (heads, size) {shapes}: a soft prompt has one")
        logits = self.logits(self(tokens, torch.ones_like(tokens)))
        if not torch.allclose(logits, output.logits.float(), rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
            raise ModelError(f"{self.name} ({config.model_type}) computes its logits from more than the last hidden states: fedsp does not know how")
        return ModelShape(len(self.blocks), *shapes[0], width[0])


def length_of(prefix: Tensor | None) -> int:
    """P of a prefix (P, L, 2, H, K), or of one per example (B, P, L, 2, H, K); 0 of none."""
    return 0 if prefix is None else prefix.shape[-5]


def hidden_at_depths(model: PromptedLM, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None = None) -> list[Tensor]:
    """The input of every block and then the last hidden states, L + 1 tensors (B, T, D), with gradients."""
    inputs: list[Tensor] = []
    with hooked(model.blocks, lambda _module, arguments, named: inputs.append(hidden_of(arguments, named))):
        last = model.read_padded(input_ids, attention_mask, prefix)
    return [*inputs, last]


def _swap(value: Any, probe: CapturingCache) -> Any:
    return probe if isinstance(value, Cache) else value
