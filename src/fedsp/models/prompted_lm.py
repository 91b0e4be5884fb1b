"""A Hugging Face causal language model, read with or without a soft prompt.

Notation: B batch, T tokens, P prompt length, L layers, H key/value heads, K head size, D hidden
size, V vocabulary.

Nothing here is written for one family. What a family does before its blocks (positions, rotations,
masks) is taken from the model's own forward; where the blocks live is found by their number; and
what is assumed is tried out once when a model is loaded, so that a model that cannot carry a soft
prompt is refused by name, with the reason.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from fedsp.data.batching import PackedBatch, Padded, pack, pack_branches
from fedsp.errors import ModelError, first_line
from fedsp.models.blocks import (
    BlockCall,
    Captured,
    CapturingCache,
    FixedLayer,
    find_backbone,
    find_blocks,
    forwarding,
    fused,
    recorded,
    rotation_switch,
    runs_on,
)
from fedsp.models.frozen_front import Entry, FrozenFront, entered
from fedsp.models.trainable import trainable

LONGEST_TREE = 2048
LENGTH_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_target_positions",
    "max_sequence_length",
    "n_ctx",
)
"""The names under which families keep the longest sequence that they were made for; the first that
a configuration has counts."""
Positions = Literal["hugging_face", "from_zero"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a soft prompt must fit: L layers, H key/value heads of size K, hidden size D."""

    layers: int
    heads: int
    head_size: int
    hidden: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.heads} key/value heads of {self.head_size}, hidden size"
            f" {self.hidden}"
        )


NextToken = Callable[[Tensor], Tensor]
"""From all tokens of a text so far (T,) to scores (V,) of the next one; of texts that grow
together, from (B, T) to (B, V)."""


class PromptedLM(nn.Module):
    """A causal LM that reads a prefix of keys and values (P, L, 2, H, K) at every layer, or none.

    `prompt_layers`: the layer of the soft prompt that each depth reads (default: its own).
    `prompt_shape`: the shape of the model that the prompt is made for (default: this one). In an
    auxiliary model both refer to the global model's prompt.

    Raises:
        ModelError: the model has no key/value cache, caches anything else, is an encoder-decoder,
            has several key/value shapes, accepts no position ids, computes its logits from more
            than the last hidden states, or gives other hidden states after cached keys and values
            than for the whole text; or `positions` "from_zero" has no effect on it.
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
        """Whether a step keeps only the inputs of each block, and computes the rest of its
        activations again in the backward pass."""
        self.path_of_backbone, self.backbone = find_backbone(model)
        self.head = model.get_output_embeddings()
        self._first = (next(model.parameters()),)  # in a tuple, so that it is not this module's own
        self.together: int | None = None
        """Largest batch that is allowed under example-level privacy; None until
        `examples_together` has measured it."""
        self.largest_difference: float | None = None
        """The largest change of an example's gradient by its neighbours in a batch, relative to its
        norm, as measured there; None until then."""
        self._output: Any = None
        self._fronts: dict[int, FrozenFront] = {}
        self._block_calls: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._plain_calls: list[BlockCall] = []
        self.switch = rotation_switch(model.config)
        """The longest call, in positions, up to which rotations do not depend on how long it is;
        None where they never do."""
        layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        if layers is None:
            raise ModelError(
                f"{name} ({model.config.model_type}) does not say how many layers it has, so fedsp"
                " cannot tell them apart"
            )
        self.path_of_blocks, self.blocks = find_blocks(model, layers, name)
        # `positions` is checked on the global model, not on an auxiliary one
        self._reads_another_s_prompt = prompt_shape is not None
        self.shape = self._admitted()
        self.prompt_shape = prompt_shape or self.shape
        self.prompt_layers = tuple(
            prompt_layers if prompt_layers is not None else range(self.shape.layers)
        )

    def trained(self) -> dict[str, nn.Parameter]:
        """All parameters by name, each once even if several layers share it."""
        return trainable(self.model)

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
        """The longest sequence the model was made for, prompt included under the Hugging Face
        positions."""
        return most_positions(self.model.config)

    def front(self, depth: int) -> FrozenFront:
        """What the blocks before `depth` make of texts, kept from call to call."""
        return self._fronts.setdefault(depth, FrozenFront(self, depth))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prefix: Tensor | None = None,
        entry: Entry | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, D), after the final norm, of right-padded tokens (B, T) behind
        a prefix (P, L, 2, H, K) or one prefix per example (B, P, L, 2, H, K). With an `entry` only
        the blocks from its depth on are computed.

        Rows with a shared prefix are packed where that saves padding and `packs_branches` allows;
        the hidden states at padding are undefined.
        """
        if (
            attention_mask is not None
            and (prefix is None or prefix.dim() == 5)
            and not attention_mask.all()
        ):
            room = self.packs_branches - length_of(prefix)
            if room >= input_ids.shape[1]:
                packed, cells = pack(
                    Padded(input_ids, attention_mask), weight=6 * self.shape.hidden, room=room
                )
                if entry is not None:
                    entry = entry.arranged(cells, attention_mask, tuple(packed.ids.shape))
                with entered(self.blocks, entry):
                    return self.read_branches(packed, prefix).flatten(0, 1)[cells]
        with entered(self.blocks, entry):
            return self.read_padded(input_ids, attention_mask, prefix)

    def read_padded(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prefix: Tensor | None = None
    ) -> Tensor:
        """As `forward`, but never packs rows."""
        (hidden,) = self.read_apart(
            lambda *call: [self._read(*call)], input_ids, attention_mask, prefix
        )
        return hidden

    def read_apart(
        self,
        read: Callable[[Tensor, Tensor | None, Tensor | None], list[Tensor]],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prefix: Tensor | None,
    ) -> list[Tensor]:
        """Tensors (B, T, D) that `read` returns for tokens, mask and prefix: in one call, or, since
        a rotation that changes with the longest position of a call would let a long row change the
        short ones, in one for the rows on each side of the `switch`."""
        if self.switch is None or attention_mask is None:
            return read(input_ids, attention_mask, prefix)
        lengths, start = attention_mask.sum(dim=1), self.positions_taken(length_of(prefix))
        long = lengths + start > self.switch.positions
        if long.all() or start + attention_mask.shape[1] <= self.switch.positions:
            return read(input_ids, attention_mask, prefix)
        whole: list[Tensor] = []
        for rows in filter(len, ((~long).nonzero()[:, 0], long.nonzero()[:, 0])):
            width = int(lengths[rows].max())
            part = read(
                input_ids[rows, :width],
                attention_mask[rows, :width],
                prefix if prefix is None or prefix.dim() == 5 else prefix[rows],
            )
            whole = whole or [found.new_zeros(*input_ids.shape, found.shape[-1]) for found in part]
            for state, found in zip(whole, part, strict=True):
                state[rows.to(state.device), :width] = found
        return whole

    def room_behind(self, length: int) -> int:
        """The tokens that the model reads behind a prefix of this length."""
        return self.max_positions - self.positions_taken(length)

    def positions_taken(self, length: int) -> int:
        """The positions that a prefix of this length takes from a text behind it."""
        return length if self.positions == "hugging_face" else 0

    def rotated_alike(self, one: int, other: int) -> bool:
        """Whether calls of `one` and of `other` positions use the same rotary frequencies, so that
        the cache of one is valid in the other."""
        return self.switch is None or (one > self.switch.positions) == (
            other > self.switch.positions
        )

    def _read(
        self, input_ids: Tensor, attention_mask: Tensor | None, prefix: Tensor | None
    ) -> Tensor:
        batch, tokens = input_ids.shape
        length = length_of(prefix)
        if attention_mask is not None:
            attention_mask = pad(attention_mask, (length, 0), value=1)
        start = self.positions_taken(length)
        positions = torch.arange(start, start + tokens, device=input_ids.device)[None]
        cache = None if prefix is None else self.cache(prefix, batch, FixedLayer)
        return self.states(input_ids, attention_mask, positions, cache)

    def states(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache | None
    ) -> Tensor:
        """The backbone's last hidden states (B, T, D) of tokens behind, and then in, a cache."""
        blocks = self.blocks if self.recompute and torch.is_grad_enabled() else ()
        again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        with forwarding(blocks, lambda forward: partial(checkpoint, forward, **again)):
            output = self.backbone(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        hidden: Tensor = output.last_hidden_state.to(self.device)
        return hidden

    def continue_from(
        self, contexts: Tensor, tails: Padded, rows: Tensor, prefix: Tensor | None
    ) -> Tensor:
        """Last hidden states (N, T, D) of N right-padded tails, the n-th behind context `rows[n]`
        of contexts (C, W); each context is read once, with a cache.

        Contexts are of one length: padding between a context and its tail would count as distance
        in models that measure it by place in the row.
        """
        count, width = contexts.shape
        length = length_of(prefix)
        start = self.positions_taken(length)
        cache = self.cache(prefix, count)
        before = contexts.new_ones(count, length + width)
        end = start + width + tails.ids.shape[1]
        positions = torch.arange(start, end, device=self.device)[None]
        self.states(contexts, before, positions[:, :width], cache)
        cache.batch_select_indices(rows)
        mask = torch.cat([before[rows], tails.mask], dim=1)
        return self.states(tails.ids, mask, positions[:, width:], cache)

    def read_branches(self, packed: PackedBatch, prefix: Tensor | None) -> Tensor:
        """Last hidden states (B, T, D) of a packed batch: each token attends to the prefix and,
        causally, to its row's context and its own branch."""
        length = length_of(prefix)
        batch, width = packed.ids.shape
        among = packed.seen()  # (B, T, T)
        seen = torch.cat([among.new_ones(batch, width, length), among], dim=2)[:, None]
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill(~seen, torch.finfo(self.dtype).min)
        cache = None if prefix is None else self.cache(prefix, batch, FixedLayer)
        positions = packed.positions + self.positions_taken(length)
        return self.states(packed.ids, mask, positions, cache)

    @cached_property
    def packs_branches(self) -> int:
        """The most keys, prefix included, that a custom 4D mask for packed batches may cover: the
        model's attention window if its configuration has one, at most LONGEST_TREE, above which
        packing costs more than it saves; 0 if the model does not support such masks.

        Tested on a small packed row with one branch in two places: both must have the hidden
        states of the unpacked text, whatever another branch contains.
        """
        text = self.model.config.get_text_config().to_dict()
        windows = [
            value
            for name, value in text.items()
            if re.search(r"window|chunk", name)
            and not re.search("layers|pattern", name)
            and type(value) is int
            and value > 0
        ]
        context, branch = [1, 2, 3], [4, 5]
        shape = (2, self.shape.layers, 2, self.shape.heads, self.shape.head_size)
        prefix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

        def read(other: list[int]) -> Tensor:
            return self.read_branches(
                pack_branches([context], [[branch, other, branch]], self.device), prefix
            )[0].float()

        with torch.no_grad():
            alone = self.read_padded(
                torch.tensor([context + branch], device=self.device), None, prefix
            )[0].float()
            try:
                found, changed = read([6, 7]), read([8, 9])
            except (RuntimeError, ValueError, TypeError, IndexError):
                return 0
        rounding = max(1e-4, 4 * torch.finfo(self.dtype).eps)
        close = max(1e-3, rounding)
        first, second = slice(3, 5), slice(7, 9)
        # of the same sums, in another order
        same = partial(torch.allclose, rtol=rounding, atol=rounding * float(alone.abs().median()))
        right = torch.allclose(found[:5], alone, rtol=close, atol=close * float(alone.abs().max()))
        unmoved = same(found[first], changed[first]) and same(found[second], changed[second])
        switch = [self.switch.positions] if self.switch else []
        return (
            min([*windows, *switch, self.max_positions, LONGEST_TREE])
            if right and unmoved and same(found[first], found[second])
            else 0
        )

    def reader(self, prefix: Tensor | None) -> NextToken:
        """Reads a text that grows: from all its tokens so far (T,) to the logits (V,) of the next
        one; or several of one length, (B, T) to (B, V). What it has read before stays in its
        cache."""
        start = self.positions_taken(length_of(prefix))
        cache: Cache | None = None
        read = 0

        def logits(ids: Tensor) -> Tensor:
            nonlocal cache, read
            rows = ids if ids.dim() == 2 else ids[None]
            count, length = rows.shape
            if cache is None or not self.rotated_alike(start + read, start + length):
                cache, read = self.cache(prefix, count), 0
            positions = torch.arange(start + read, start + length, device=self.device)[None]
            mask = rows.new_ones(count, length_of(prefix) + length)
            states = self.states(rows[:, read:], mask, positions, cache)
            read = length
            return self.logits(states[:, -1]).view(*ids.shape[:-1], -1)

        return logits

    def generate(
        self, input_ids: Tensor, prefix: Tensor | None, *, most: int, stop: Collection[int] = ()
    ) -> list[int]:
        """Continuation of tokens (T,): at most `most` new ones, each the most likely one, ending
        before a token of `stop`."""
        room = self.room_behind(length_of(prefix))
        return continue_text(self.reader(prefix), input_ids, most=most, room=room, stop=stop)

    def cache(
        self, prefix: Tensor | None, batch: int, kind: type[DynamicLayer] = DynamicLayer
    ) -> Cache:
        """A fresh cache of L pairs (B, H, P, K), none without a prefix, which grows by what is
        read, unless its layers are of a fixed `kind`."""
        if prefix is None:
            return DynamicCache()
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
        """Logits (..., V), float32, of last hidden states (..., D), by the model's own forward,
        including any logit scaling and soft capping of its family."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        if not rows.shape[1]:
            return rows.new_zeros(
                *hidden.shape[:-1], self.head.weight.shape[0], dtype=torch.float32
            )
        output = copy.copy(self._output)
        output.last_hidden_state = rows
        with forwarding([self.backbone], lambda _: lambda *_, **__: output):
            logits: Tensor = self.model(
                input_ids=torch.zeros(1, rows.shape[1], dtype=torch.long, device=self.device),
                use_cache=False,
            ).logits
        return logits.to(self.device).float().view(*hidden.shape[:-1], -1)

    def keys_and_values(self, inputs: Tensor) -> Tensor:
        """Keys and values (P, L, 2, H, K), with gradients, that each block computes from residual
        inputs (P, L, D) at positions 0..P-1; (B, P, L, 2, H, K) for one prompt per example (B, P,
        L, D). Rotary frequencies are those of a call of P positions, so a prompt does not depend on
        the length of the text after it, even beyond the model's `switch`."""
        batch = inputs if inputs.dim() == 4 else inputs[None]
        length = batch.shape[1]
        if length not in self._block_calls:
            tokens = torch.zeros(1, length, dtype=torch.long, device=self.device)
            probe = CapturingCache()
            swap: Callable[[Any], Any] = lambda value: probe if isinstance(value, Cache) else value
            self._block_calls[length] = [
                (tuple(map(swap, arguments)), {key: swap(value) for key, value in named.items()})
                for _, arguments, named in self._calls(tokens, DynamicCache())
            ]
        layers = []
        for layer, (block, (arguments, named)) in enumerate(
            zip(self.blocks, self._block_calls[length], strict=True)
        ):
            try:
                block(batch[:, :, layer].to(self.dtype), *arguments, **named)
            except Captured as captured:
                layers.append(
                    torch.stack([captured.keys, captured.values])
                    .permute(1, 3, 0, 2, 4)
                    .to(self.device)
                )  # (B, P, 2, H, K)
            else:
                raise ModelError(
                    f"{self.name}: layer {layer} did not write its keys and values to the cache, so"
                    " it cannot read a residual prompt; use a key/value prompt"
                )
        pairs = torch.stack(layers, dim=2).float()
        return pairs if inputs.dim() == 4 else pairs[0]

    def read_embeddings(self, embeddings: Tensor) -> Tensor:
        """Keys and values (P, L, 2, H, K), with gradients, that embeddings (P, D) in the place of
        tokens leave at every layer; (B, P, L, 2, H, K) for one sequence per example (B, P, D)."""
        batch = embeddings if embeddings.dim() == 3 else embeddings[None]
        cache = DynamicCache()
        count, length = batch.shape[:2]
        self.backbone(
            inputs_embeds=batch.to(self.dtype),
            attention_mask=torch.ones(count, length, dtype=torch.long, device=batch.device),
            position_ids=torch.arange(length, device=batch.device)[None],
            past_key_values=cache,
            use_cache=True,
        )
        layers = [torch.stack([layer.keys, layer.values]).to(self.device) for layer in cache.layers]
        pairs = torch.stack(layers).permute(2, 4, 0, 1, 3, 5).float()  # (B, P, L, 2, H, K)
        return pairs if embeddings.dim() == 3 else pairs[0]

    @torch.no_grad()
    def activations(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens (P,) leave behind in the model: block inputs (P, L, D), and keys and values
        (P, L, 2, H, K)."""
        cache = DynamicCache()
        calls = self._calls(input_ids[None], cache)
        pairs = torch.stack(
            [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        )  # (L, 2, H, P, K)
        inputs = torch.stack([hidden[0] for hidden, _, _ in calls], dim=1)
        return inputs.float(), pairs.permute(3, 0, 1, 2, 4).float()

    @torch.no_grad()
    def block_output(self, depth: int, like: torch.dtype = torch.float32) -> Tensor:
        """What the block at a depth adds to hidden states (1, T, D), the same random ones for every
        model of a hidden size, when it is called as its model calls it, with rotations and the like
        rounded as a model of the data type `like` has them; float32, on the CPU."""
        tokens = self.some_tokens()
        hidden = torch.randn(
            *tokens.shape, self.shape.hidden, generator=torch.Generator().manual_seed(0)
        ).to(self.device)
        if not self._plain_calls:
            self._plain_calls = self._calls(torch.zeros_like(tokens), None)
        _, arguments, named = _map_tensors(
            self._plain_calls[depth],
            lambda tensor: tensor.to(like).float() if tensor.is_floating_point() else tensor,
        )
        block = (
            self.blocks[depth]
            if self.dtype == torch.float32
            else copy.deepcopy(self.blocks[depth]).float()
        )
        output = block(hidden, *arguments, **named)
        made: Tensor = output[0] if isinstance(output, tuple) else output
        return (made - hidden).cpu()

    def _calls(self, tokens: Tensor, cache: Cache | None) -> list[BlockCall]:
        """How the model calls its blocks when it reads tokens (1, T), into a cache or none."""
        with recorded(self.blocks) as calls:
            self.backbone(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return calls

    def _admitted(self) -> ModelShape:
        """The model's shape, once everything that fedsp does with it was tried on a few tokens.

        Raises:
            ModelError: something failed, or came out otherwise than when the model reads the text
                by itself.
        """
        kind = self.model.config.model_type
        if self.model.config.is_encoder_decoder:
            raise ModelError(
                f"{self.name} is an encoder-decoder ({kind}): fedsp tunes causal language models"
            )
        if self.head is None or self.backbone is self.model:
            raise ModelError(f"{self.name} ({kind}) has no output head that fedsp can find")
        attempt = "reading a text"
        try:
            with torch.no_grad():
                shape = self._shape_by_reading()
                attempt = "reading behind a soft prompt"
                self._try_prompts(shape)
        except ModelError:
            raise
        except Exception as error:  # whatever a family's own code raises
            raise ModelError(
                f"{self.name} ({kind}) cannot carry a soft prompt: {attempt} fails in its own code"
                f" ({type(error).__name__}: {first_line(error)})"
            ) from error
        return shape

    def _shape_by_reading(self) -> ModelShape:
        kind = self.model.config.model_type
        tokens = self.some_tokens()
        made: list[Any] = []
        handle = self.backbone.register_forward_hook(
            lambda _module, _arguments, output: made.append(output)
        )
        try:
            with recorded(self.blocks) as calls:
                output = self.model(
                    input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True
                )
        finally:
            handle.remove()
        if not made or len(calls) != len(self.blocks):
            raise ModelError(
                f"{self.name} ({kind}) does not compute its logits from the {len(self.blocks)}"
                " blocks that fedsp found: it cannot carry a soft prompt"
            )
        layers = getattr(getattr(output, "past_key_values", None), "layers", None)
        if (
            not layers
            or any(getattr(layer, "keys", None) is None for layer in layers)
            or len(layers) != len(self.blocks)
        ):
            raise ModelError(
                f"{self.name} ({kind}) has no key/value cache at every layer, so there is nowhere"
                " to put a soft prompt"
            )
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        other = sorted({type(layer).__name__ for layer in layers if type(layer) not in plain})
        if other:
            raise ModelError(
                f"{self.name} ({kind}) caches more than keys and values"
                f" ({', '.join(other)}), which a soft prompt cannot provide: use another model"
            )
        keys, values = (
            {(part.shape[1], part.shape[3]) for part in parts}
            for parts in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        if len(keys | values) > 1:
            shapes = f"keys {sorted(keys)}, values {sorted(values)}"
            raise ModelError(
                f"{self.name} ({kind}) has several key/value shapes, (heads, size): {shapes}; a"
                " soft prompt has one for all layers"
            )
        if layers[0].keys.shape[2] > tokens.shape[1]:
            raise ModelError(
                f"{self.name} ({kind}) caches {layers[0].keys.shape[2]} places for"
                f" {tokens.shape[1]} tokens: fedsp does not know what the others are"
            )
        self._output = copy.copy(made[0])
        if getattr(self._output, "past_key_values", None) is not None:
            self._output.past_key_values = None
        if not torch.isfinite(output.logits).all():
            raise ModelError(
                f"{self.name} ({kind}) computes logits that are not finite: its weights are damaged"
                " or do not suit this precision; download it again or change the precision"
            )
        read = self.read_padded(tokens, torch.ones_like(tokens))
        if not self._close(read, made[0].last_hidden_state.to(self.device)):
            raise ModelError(
                f"{self.name} ({kind}) computes other hidden states with position ids that start at"
                " 0 than with its own, which fedsp does not support: use another model"
            )
        if not self._close(self.logits(read), output.logits.float().to(self.device)):
            raise ModelError(
                f"{self.name} ({kind}) computes its logits from more than the last hidden states:"
                " fedsp does not know how"
            )
        heads, size = keys.pop()
        hidden = calls[0][0].shape[-1]
        return ModelShape(layers=len(self.blocks), heads=heads, head_size=size, hidden=hidden)

    def _try_prompts(self, shape: ModelShape) -> None:
        """A prompt made of what a text's first tokens leave in the model must act as that text; and
        positions counted from zero must make a difference."""
        kind, length = self.model.config.model_type, 3
        tokens = self.some_tokens()
        self.shape = shape
        inputs, pairs = self.activations(tokens[0, :length])
        positions, self.positions = self.positions, "hugging_face"
        whole = self.read_padded(tokens)[:, length:]
        try:
            behind = [
                self.read_padded(tokens[:, length:], None, prefix)
                for prefix in (pairs, self.keys_and_values(inputs))
            ]
        finally:
            self.positions = positions
        if not all(self._close(found, whole) for found in behind):
            raise ModelError(
                f"{self.name} ({kind}) computes other hidden states after cached keys and values"
                " than for the whole text, so it cannot carry a soft prompt: use another model"
            )
        self.generate(tokens[0], pairs, most=2)
        if (
            positions == "from_zero"
            and not self._reads_another_s_prompt
            and self._close(self.read_padded(tokens[:, length:], None, pairs), behind[0], 1e-5)
        ):
            raise ModelError(
                f"positions = 'from_zero' has no effect on {self.name} ({kind}): it ignores"
                " position ids and always counts the prompt (as with ALiBi); use 'hugging_face'"
            )

    def some_tokens(self) -> Tensor:
        """A text (1, T) to try the model out on."""
        vocabulary: int = self.model.config.get_text_config().vocab_size
        return torch.arange(3, 11, device=self.device)[None] % vocabulary

    def _close(self, found: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
        """Equal but for the rounding of the model's precision, measured by the largest number."""
        rounding = (
            0.1
            if getattr(self.model, "is_quantized", False)
            else max(1e-3, 16 * torch.finfo(self.dtype).eps)
        )
        return float((found.float() - expected.float()).abs().max()) <= (
            tolerance or rounding
        ) * float(expected.abs().max())


@torch.no_grad()
def continue_text(
    read: NextToken,
    input_ids: Tensor,
    *,
    most: int,
    room: int,
    stop: Collection[int] = (),
    choose: Callable[[Tensor], int] = lambda scores: int(scores.argmax()),
    ended: Callable[[list[int]], bool] = lambda new: False,
) -> list[int]:
    """Continuation of tokens (T,): at most `most` new ones, ending before a token of `stop`, or
    once they have `ended`, as long as what is read has `room`. `choose` takes each from its scores
    (V,)."""
    new: list[int] = []
    ids = input_ids
    while len(new) < most and len(ids) <= room and not ended(new):
        token = choose(read(ids))
        if token in stop:
            break
        new.append(token)
        ids = torch.cat([ids, ids.new_tensor([token])])
    return new


def most_positions(config: PretrainedConfig) -> int:
    """The longest sequence that a model of this configuration was made for."""
    text, switch = config.get_text_config(), rotation_switch(config)
    limits = [getattr(text, name, None) for name in LENGTH_LIMITS]
    longest = next((one for one in limits if isinstance(one, int) and one > 0), 1_000_000)
    return min(longest, switch.positions) if switch and switch.every_length else longest


def length_of(prefix: Tensor | None) -> int:
    """P of a prefix (P, L, 2, H, K), or of one per example (B, P, L, 2, H, K); 0 of none."""
    return 0 if prefix is None else prefix.shape[-5]


def hidden_at_depths(
    model: PromptedLM, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None = None
) -> list[Tensor]:
    """The input of every block and then the last hidden states, L + 1 tensors (B, T, D), with
    gradients."""

    def read(*call: Any) -> list[Tensor]:
        with recorded(model.blocks) as calls:
            last = model.read_padded(*call)
        return [*(hidden for hidden, _, _ in calls), last]

    return model.read_apart(read, input_ids, attention_mask, prefix)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value with every tensor in it changed, through tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(inner, change) for inner in value)
    return (
        {key: _map_tensors(inner, change) for key, inner in value.items()}
        if isinstance(value, dict)
        else value
    )
