"""Conversations in a model's own chat template: their tokens, and which of them the assistant
writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedsp.data.tasks import Example, Turn
from fedsp.errors import DataError, first_line

if TYPE_CHECKING:
    from fedsp.data.encoding import Tokenizer


class Conversation(NamedTuple):
    """Token ids, and the ranges (first, behind the last) of the assistant's turns that are trained,
    each with the token that ends it; nothing stands behind the last turn."""

    ids: list[int]
    answers: list[tuple[int, int]]


def render(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, asks: bool = False, where: str = "the chat"
) -> str:
    """Messages as text; with `asks`, up to where the assistant is to write.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the model's tokenizer has no chat template: take a model that was made for chat, or"
            " the task completion"
        )
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # a template raises what it likes
        raise DataError(
            f"{where}: the model's chat template refuses the messages ({first_line(error)}); their"
            f" roles are {', '.join(role for role, _ in turns)}"
        ) from error
    return str(text)


def read_conversation(tokenizer: Tokenizer, example: Example) -> Conversation:
    """The tokens of an example's messages.

    An answer's tokens are those that share a character with what the template adds to the text
    that asks for it; what it adds behind its last special token, such as a line end, is none of
    them.

    Raises:
        DataError: as `render`, or the template asks for a message otherwise than it writes it, or
            writes an earlier one otherwise once others follow, so that what the model would be
            asked to write is not what it reads.
    """
    turns, where = example.turns, example.where or f"example {example.id}"
    whole = render(tokenizer, turns, where=where)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    answers = []
    for number, (role, _) in enumerate(turns):
        if role != "assistant" or number < example.given:
            continue
        asked = render(tokenizer, turns[:number], asks=True, where=where)
        answered = render(tokenizer, turns[: number + 1], where=where)
        if not answered.startswith(asked):
            raise DataError(
                f"{where}: the model's chat template asks for message {number + 1} otherwise than"
                " it writes it, as where a model is to think first, which fedsp does not support:"
                " write what the template asks with into the message, or take the task completion"
            )
        if not whole.startswith(answered):
            raise DataError(
                f"{where}: the model's chat template writes message {number + 1} otherwise once"
                " others follow: give each answer a row of its own, with the messages before it in"
                " prompt and the answer in completion, both lists of messages"
            )
        end = len(_ended(tokenizer, answered))
        inside = [
            place
            for place, (first, last) in enumerate(places)
            if first < end and (first >= len(asked) or last > len(asked))
        ]
        if inside:
            answers.append((inside[0], inside[-1] + 1))
    if not answers or answers[-1][0] == 0:
        raise DataError(f"{where}: the tokenizer makes no token of the assistant's messages")
    return Conversation(ids[: answers[-1][1]], answers)


def _ended(tokenizer: Tokenizer, text: str) -> str:
    """The text without the white space behind the special token that ends it, if one does."""
    bare = text.rstrip()
    return bare if any(bare.endswith(token) for token in tokenizer.all_special_tokens) else text


def question_ids(tokenizer: Tokenizer, turns: Sequence[Turn], where: str = "the chat") -> list[int]:
    """The tokens of messages up to where the assistant is to write.

    Raises:
        DataError: as `render`.
    """
    text = render(tokenizer, turns, asks=True, where=where)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def end_of_turn(tokenizer: Tokenizer) -> set[int]:
    """The tokens at which an answer ends: the tokenizer's end token, and the special token with
    which its chat template ends a message."""
    ends = {tokenizer.eos_token_id} - {None}
    try:
        answered = render(tokenizer, [("user", "a"), ("assistant", "b")])
    except DataError:  # there is no template, or it wants other messages
        return ends
    last = tokenizer(_ended(tokenizer, answered), add_special_tokens=False)["input_ids"][-1]
    return ends | ({last} & set(tokenizer.all_special_ids))
