"""Tokenizers with a few tokens, made for what they do: merges over a word's edge, or a template of
first and last tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

LETTERS_AND_MARKS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .:?,<>/"


def bpe(
    merges: Sequence[tuple[str, str]] = (),
    *,
    begins: bool = False,
    ends: bool = False,
    tokens: bool = True,
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of single characters and these merges, over any edge of words. `begins` and
    `ends`: its template puts `<s>` before and `</s>` behind a text. Without `tokens` it knows
    neither of the two."""
    words = ["<s>", "</s>", *LETTERS_AND_MARKS, *("".join(merge) for merge in merges)]
    backend = Tokenizer(
        BPE(vocab={word: number for number, word in enumerate(words)}, merges=list(merges))
    )
    backend.decoder = decoders.Fuse()
    backend.post_processor = TemplateProcessing(
        single=f"{'<s> ' if begins else ''}$A{' </s>' if ends else ''}",
        special_tokens=[("<s>", 0), ("</s>", 1)] if begins or ends else [],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **({"bos_token": "<s>", "eos_token": "</s>"} if tokens else {})
    )
