"""What a model writes: how its next token is chosen, how answers are measured against what was
expected, and texts of its own."""

from __future__ import annotations

import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from fedsp.data.encoding import Encoded
from fedsp.models.prompted_lm import PromptedLM
from fedsp.training.answers import Answers

AT_ONCE = 32
"""Texts that are continued together."""


def sampler(temperature: float, top_p: float, seed: int) -> Callable[[Tensor], int]:
    """Chooses a token from scores (V,): the likeliest at temperature 0; else one drawn from the
    distribution at that temperature, of which only the likeliest tokens that add up to `top_p` are
    kept (A. Holtzman et al. *The Curious Case of Neural Text Degeneration*. ICLR 2020.
    https://arxiv.org/abs/1904.09751). The same seed draws the same tokens from the same scores."""
    if temperature < 1e-6:  # below, scores divided by it are no numbers any more
        return lambda scores: int(scores.argmax())
    generator = torch.Generator().manual_seed(seed)

    def draw(scores: Tensor) -> int:
        likely, tokens = (scores.float().cpu() / temperature).softmax(dim=-1).sort(descending=True)
        kept = likely * (likely.cumsum(dim=0) - likely < top_p)
        return int(tokens[torch.multinomial(kept, 1, generator=generator)])

    return draw


@torch.no_grad()
def write(
    writer: Answers, texts: Sequence[tuple[int, ...]], most: int, stop: Collection[int]
) -> list[Encoded]:
    """Texts, each of one token at least, with what is written behind them: the likeliest token each
    time, at most so many, ending before a token of `stop`."""
    read = writer.scorer()
    whole, open_ones = list(texts), list(range(len(texts)))
    for _ in range(most):
        going: list[int] = []
        for start in range(0, len(open_ones), AT_ONCE):
            some = open_ones[start : start + AT_ONCE]
            contexts = [whole[one][:-1] for one in some]
            tails = [[whole[one][-1:]] for one in some]
            found = read(contexts, tails, [[0] for _ in some]).argmax(dim=-1).tolist()
            for one, token in zip(some, found, strict=True):
                if token not in stop:
                    whole[one] = (*whole[one], token)
                    going.append(one)
        open_ones = going
    return [Encoded(ids, len(text)) for ids, text in zip(whole, texts, strict=True)]


@torch.no_grad()
def own_texts(
    model: PromptedLM, *, first: int, length: int, count: int, seed: int
) -> list[list[int]]:
    """So many texts of `length` tokens that a model writes by itself behind the token `first`, each
    next token drawn from its whole distribution: what a model is distilled on where there is no
    other text (Z. Liu et al. *LLM-QAT: Data-Free Quantization Aware Training for Large Language
    Models*. Findings of ACL 2024. https://arxiv.org/abs/2305.17888)."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[list[int]] = []
    while len(texts) < count:
        ids = torch.full((min(AT_ONCE, count - len(texts)), 1), first)
        read = model.reader(None)
        while ids.shape[1] < length:
            likely = read(ids.to(model.device)).cpu().softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], dim=1)
        texts += ids.tolist()
    return texts


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and repeated white space, as answers to SQuAD are
    compared (P. Rajpurkar et al. EMNLP 2016. https://arxiv.org/abs/1606.05250); a text of nothing
    else, such as "A" or "+", keeps them."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    words = re.sub(r"\b(a|an|the)\b", " ", bare).split() or text.lower().split()
    return " ".join(words)


class Words:
    """ROUGE's words: letters and digits as rouge-score takes them, but of every alphabet."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def token_f1(written: str, expected: str) -> float:
    """The harmonic mean of precision and recall of normalised words, as in SQuAD; of texts of which
    one has no word, whether the other has none either."""
    ours, theirs = normalised(written).split(), normalised(expected).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def written_figures(written: Sequence[str], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of what was written and the answers that are accepted for each: the share that is one of them
    after normalisation, and the means of the best token F1 and of the best ROUGE-L (C.-Y. Lin 2004,
    https://aclanthology.org/W04-1013), by rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], tokenizer=Words())
    pairs = list(zip(written, expected, strict=True))
    same = [normalised(text) in map(normalised, accepted) for text, accepted in pairs]
    f1 = [max(token_f1(text, one) for one in accepted) for text, accepted in pairs]
    longest = [
        max(rouge.score(one, text)["rougeL"].fmeasure for one in accepted)
        for text, accepted in pairs
    ]
    return {
        "written_exact_match": statistics.fmean(same),
        "written_token_f1": statistics.fmean(f1),
        "written_rouge_l": statistics.fmean(longest),
    }
