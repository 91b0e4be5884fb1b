"""Examples as tokens, and batches padded to their own longest.

How a pair is cut (as lm-evaluation-harness does it; the space belongs to the choice):

    context:  Question: Who lives in Bexley?\\nAnswer:        ids[:start]
    choice:   " Toruva"                                       ids[start:]
    trained:  ids, with labels -100 before `start`
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedsp.data.batching import pad
from fedsp.data.chat import Conversation, question_ids, read_conversation
from fedsp.data.tasks import Example
from fedsp.errors import DataError

IGNORED = -100
Tokenizer: TypeAlias = PreTrainedTokenizerBase
Made = TypeVar("Made")


@dataclass(frozen=True)
class Encoded:
    """Token ids of a context, `ids[:start]`, and a continuation, `ids[start:]`; `dropped` tokens
    were removed from the beginning to fit. `silent` are the places behind `start` that are not
    asked for: what others say between two answers."""

    ids: tuple[int, ...]
    start: int
    dropped: int = 0
    silent: tuple[int, ...] = ()

    @property
    def asked(self) -> int:
        """How many tokens are asked for."""
        return len(self.ids) - self.start - len(self.silent)


@dataclass(frozen=True)
class Batch:
    """Right-padded tokens, mask and labels (B, T); labels are IGNORED except on continuations."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device)
        )


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the special tokens that the tokenizer prepends and without those
    that it appends, since a continuation follows.

    A text that already begins with the decoded `first_token` does not get it twice, as in
    lm-evaluation-harness.
    """
    first = first_token(tokenizer)
    written = "" if first is None else tokenizer.decode([first])
    whole = [text for text in dict.fromkeys(texts) if not (written and text.startswith(written))]
    ids = {}
    if whole:
        rows = tokenizer(whole, return_attention_mask=False)["input_ids"]
        if ending := _ending(tokenizer):
            size = len(ending)
            rows = [row[:-size] if row[-size:] == ending else row for row in rows]
        ids = dict(zip(whole, rows, strict=True))
    return [
        ids[text] if text in ids else tokenizer.encode(text, add_special_tokens=False)
        for text in texts
    ]


def _ending(tokenizer: Tokenizer) -> list[int]:
    """The tokens that a tokenizer puts behind every text."""
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[start + len(bare) :] if bare else []


def decode_behind(tokenizer: Tokenizer, ids: Sequence[int], new: Sequence[int]) -> str:
    """What new tokens add to the text of earlier ones, its space included, and no special token."""
    before, whole = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (ids, [*ids, *new])
    )
    return str(whole)[len(before) :]


def first_token(tokenizer: Tokenizer) -> int | None:
    """The id of the token that stands in for an empty context: BOS, else EOS; None if the tokenizer
    has neither."""
    token: int | None = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    return token


def encode_pairs(
    tokenizer: Tokenizer,
    pairs: Iterable[tuple[str, str]],
    max_tokens: int,
    names: Iterable[str] | None = None,
) -> list[Encoded]:
    """Encode pairs of a context and a continuation; one longer than `max_tokens` loses its first
    tokens.

    As in lm-evaluation-harness, the ids are those of the context alone, followed by those of the
    whole text after as many tokens. If none follow, since a token spans the boundary, they are
    those of the whole text, split at the first token that the continuation changes. At least one
    context token is kept, to predict the continuation's first token from, so a continuation keeps
    at most its last `max_tokens` - 1 tokens. `names` are the names of the pairs in error messages.

    Raises:
        DataError: a continuation neither adds nor changes a token, or a context is empty and the
            tokenizer has neither BOS nor EOS.
    """
    split = [_at_the_space(context, continuation) for context, continuation in pairs]
    texts = [
        text
        for context, continuation in split
        if context
        for text in (context, context + continuation)
    ]
    ids = dict(zip(texts, encode_texts(tokenizer, texts), strict=True))
    called = (
        list(names) if names is not None else [f"pair {number}" for number in range(len(split))]
    )
    encoded = []
    for name, (context, continuation) in zip(called, split, strict=True):
        if context:
            before, whole = ids[context], ids[context + continuation]
        else:
            before, whole = _behind_nothing(tokenizer, continuation, name)
        start = len(before)
        if len(whole) > start:
            whole = [*before, *whole[start:]]
        else:
            changed = (at for at, token in enumerate(whole) if token != before[at])
            start = next(changed, len(whole))
        if start >= len(whole):
            raise DataError(
                f"{name}: the tokenizer makes no token of an answer, so there is nothing to train"
                " on or to score: reword the answer"
            )
        if not start:  # the context has become part of the answer's first token
            before, whole = _behind_nothing(tokenizer, context + continuation, name)
            start = len(before)
        dropped = max(0, len(whole) - max_tokens)
        encoded.append(Encoded(tuple(whole[dropped:]), max(1, start - dropped), dropped))
    return encoded


def _behind_nothing(tokenizer: Tokenizer, text: str, name: str) -> tuple[list[int], list[int]]:
    """The ids [`first_token`], and the same followed by those of the text, unless it begins with
    that token."""
    first, ids = _stand_in(tokenizer, name), tokenizer.encode(text, add_special_tokens=False)
    return [first], ids if ids[:1] == [first] else [first, *ids]


def _stand_in(tokenizer: Tokenizer, name: str) -> int:
    """The `first_token`, which stands in for an empty context."""
    first = first_token(tokenizer)
    if first is None:
        raise DataError(
            f"{name}: no context token precedes the answer, and this tokenizer has neither BOS nor"
            " EOS to take its place: give the question a longer context"
        )
    return first


def _at_the_space(context: str, continuation: str) -> tuple[str, str]:
    """The same text, its parts divided before the space between them."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def encode_targets(
    tokenizer: Tokenizer, examples: Sequence[Example], max_tokens: int
) -> list[Encoded]:
    """The context and the right answer of each example, of a conversation every message of the
    assistant: what training reads."""
    end = tokenizer.eos_token_id

    def targets(some: Sequence[Example]) -> list[Encoded]:
        pairs = ((example.context, example.target) for example in some)
        names = (f"example {example.id}" for example in some)
        rows = encode_pairs(tokenizer, pairs, max_tokens, names)
        return [
            ended(row, end, max_tokens) if example.ends and end is not None else row
            for row, example in zip(rows, some, strict=True)
        ]

    return _in_order(
        examples,
        targets,
        lambda example: _conversation(read_conversation(tokenizer, example), max_tokens),
    )


def ended(row: Encoded, end: int, max_tokens: int) -> Encoded:
    """A row with the end token behind it, and one token less in front where it would be longer than
    `max_tokens`."""
    over = max(0, len(row.ids) + 1 - max_tokens)
    return Encoded((*row.ids[over:], end), max(1, row.start - over), row.dropped + over)


def encode_choices(
    tokenizer: Tokenizer, examples: Sequence[Example], max_tokens: int
) -> list[list[Encoded]]:
    """Every choice of every example, behind its context; of a conversation the last answer.

    Raises:
        DataError: the tokenizer makes no token of a choice.
    """

    def choices(some: Sequence[Example]) -> list[list[Encoded]]:
        asked = [(example.context, choice) for example in some for choice in example.choices]
        names = (f"example {example.id}" for example in some for _ in example.choices)
        encoded = iter(encode_pairs(tokenizer, asked, max_tokens, names))
        return [list(islice(encoded, len(example.choices))) for example in some]

    def last(example: Example) -> list[Encoded]:
        found = read_conversation(tokenizer, example)
        return [_conversation(found._replace(answers=found.answers[-1:]), max_tokens)]

    return _in_order(examples, choices, last)


def encode_contexts(tokenizer: Tokenizer, examples: Sequence[Example]) -> list[list[int]]:
    """The tokens of each example up to where the answer begins, `first_token` where they are none.

    Raises:
        DataError: a context is empty and the tokenizer has neither BOS nor EOS.
    """

    def contexts(some: Sequence[Example]) -> list[list[int]]:
        rows = encode_texts(tokenizer, [example.context for example in some])
        return [
            row or [_stand_in(tokenizer, f"example {example.id}")]
            for row, example in zip(rows, some, strict=True)
        ]

    return _in_order(
        examples,
        contexts,
        lambda example: question_ids(tokenizer, example.turns[:-1], example.where),
    )


def _in_order(
    examples: Sequence[Example],
    plain: Callable[[Sequence[Example]], list[Made]],
    conversation: Callable[[Example], Made],
) -> list[Made]:
    """What is made of plain examples, all at once, and of conversations, in their order."""
    made = iter(plain([example for example in examples if not example.turns]))
    return [conversation(example) if example.turns else next(made) for example in examples]


def _conversation(found: Conversation, max_tokens: int) -> Encoded:
    """A conversation, without its first tokens where it is longer than `max_tokens`."""
    dropped = max(0, len(found.ids) - max_tokens)
    asked = {
        place - dropped
        for first, behind in found.answers
        for place in range(first, behind)
        if place > dropped
    }
    ids, start = tuple(found.ids[dropped:]), min(asked)
    silent = tuple(place for place in range(start, len(ids)) if place not in asked)
    return Encoded(ids, start, dropped, silent)


def collate(rows: Sequence[Encoded]) -> Batch:
    """A batch padded on the right to its own longest row, labels on the continuations."""
    input_ids, attention_mask = pad([row.ids for row in rows], torch.device("cpu"))
    starts = torch.tensor([row.start for row in rows])[:, None]
    asked = attention_mask.bool() & (torch.arange(input_ids.shape[1]) >= starts)
    for number, row in enumerate(rows):
        if row.silent:
            asked[number, list(row.silent)] = False
    return Batch(input_ids, attention_mask, input_ids.where(asked, IGNORED))


def training_batches(
    rows: Sequence[Encoded], *, steps: int, batch_size: int, seed: int
) -> Iterator[Batch]:
    """The batches of `drawn_batches`, padded."""
    for group in drawn_batches(rows, steps=steps, batch_size=batch_size, seed=seed):
        yield collate([rows[index] for index in group])


def drawn_batches(
    rows: Sequence[Encoded], *, steps: int, batch_size: int, seed: int
) -> Iterator[list[int]]:
    """`steps` batches of row numbers, drawn without replacement until the rows run out, then
    afresh; within each pass rows of like length go together.

    Which rows are read depends on the seed alone; the order of the batches is drawn too, so short
    and long ones mix.
    """
    if not steps:
        return
    rng = random.Random(seed)
    drawn: list[int] = []
    while len(drawn) < steps * batch_size:
        drawn += rng.sample(range(len(rows)), len(rows))
    a_pass = max(1, len(rows) // batch_size) * batch_size
    for start in range(0, steps * batch_size, a_pass):
        pool = sorted(
            drawn[start : min(start + a_pass, steps * batch_size)],
            key=lambda index: len(rows[index].ids),
        )
        groups = [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
        yield from rng.sample(groups, len(groups))
