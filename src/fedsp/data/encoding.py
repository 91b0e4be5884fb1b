"""Examples as tokens, and batches padded to their own longest.

How a pair is cut (as lm-evaluation-harness does it; the space belongs to the choice):

    context:  Question: Who lives in Bexley?\\nAnswer:        ids[:start]
    choice:   " Toruva"                                       ids[start:]
    trained:  ids, with labels -100 before `start`
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsp.data.tasks import Example
from fedsp.models import Tokenizer
from fedsp.rows import pad

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of a context and a continuation, which begins at `start`; `dropped` tokens of old context did not fit."""

    ids: tuple[int, ...]
    start: int
    dropped: int = 0


@dataclass(frozen=True)
class Batch:
    """Right-padded tokens, mask and labels (B, T); labels are IGNORED wherever nothing is asked."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def encode_pairs(tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]], max_tokens: int) -> list[Encoded]:
    """Encode pairs of a context and a continuation; when one is longer than `max_tokens`, the oldest context goes, never the continuation.

    The whole text is encoded at once and cut where the context alone would end. At least one token of context stays, since the first token
    of a continuation needs something to be predicted from; so a continuation keeps at most its last `max_tokens` - 1 tokens.
    """
    split = [_at_the_space(context, continuation) for context, continuation in pairs]
    texts = list(dict.fromkeys(text for context, continuation in split if context for text in (context, context + continuation)))
    ids = dict(zip(texts, tokenizer(texts, return_attention_mask=False)["input_ids"], strict=True)) if texts else {}
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    encoded = []
    for context, continuation in split:
        before = ids[context] if context else [first if first is not None else 0]
        whole = ids[context + continuation] if context else before + tokenizer.encode(continuation, add_special_tokens=False)
        dropped = max(0, len(whole) - max_tokens)
        encoded.append(Encoded(tuple(whole[dropped:]), max(1, len(before) - dropped), dropped))
    return encoded


def _at_the_space(context: str, continuation: str) -> tuple[str, str]:
    """The same text, its parts divided before the space between them."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def encode_targets(tokenizer: Tokenizer, examples: Sequence[Example], max_tokens: int) -> list[Encoded]:
    """The context and the right answer of each example: what training reads."""
    return encode_pairs(tokenizer, ((example.context, example.target) for example in examples), max_tokens)


def collate(rows: Sequence[Encoded]) -> Batch:
    """A batch padded on the right to its own longest row, labels on the continuations."""
    input_ids, attention_mask = pad([row.ids for row in rows], torch.device("cpu"))
    starts = torch.tensor([row.start for row in rows])[:, None]
    asked = attention_mask.bool() & (torch.arange(input_ids.shape[1]) >= starts)
    return Batch(input_ids, attention_mask, input_ids.where(asked, IGNORED))


def training_batches(rows: Sequence[Encoded], *, steps: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """`steps` batches drawn without replacement until the rows run out, then afresh; within each pass rows of like length go together.

    Which rows are read depends on the seed alone; the order of the batches is drawn too, so short and long ones mix.
    """
    if not steps:
        return
    rng = random.Random(seed)
    drawn: list[int] = []
    while len(drawn) < steps * batch_size:
        drawn += rng.sample(range(len(rows)), len(rows))
    a_pass = max(1, len(rows) // batch_size) * batch_size
    for start in range(0, steps * batch_size, a_pass):
        pool = sorted(drawn[start : min(start + a_pass, steps * batch_size)], key=lambda index: len(rows[index].ids))
        groups = [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
        for group in rng.sample(groups, len(groups)):
            yield collate([rows[index] for index in group])
