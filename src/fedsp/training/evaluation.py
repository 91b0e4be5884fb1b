"""Zero-shot scores of a prompt through a model: the figures of lm-evaluation-harness, with each
context encoded once.

- accuracy: the choice with the highest log-likelihood is right.
- accuracy_norm: the same with log-likelihoods divided by the choice's length in characters, its
  leading space not counted.
- answer_loss: mean negative log-likelihood of the right answer, nats per token over all answer
  tokens; answer_perplexity is its exponential.
- exact_match: greedy decoding would give an accepted answer token by token, and end there, where
  its end is trained; of labels, go on to no longer one. Elsewhere what it would write behind the
  answer does not count.

A label that begins another one, such as "card" before "card lost", counts with the probability that
none of the longer ones follows; else it would always be the likelier of the two.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from fedsp.data.batching import pack_trees, pad, tree_size
from fedsp.data.encoding import Encoded, Tokenizer, encode_choices, ended
from fedsp.data.tasks import LABELLED, Example, Metric
from fedsp.models.prompted_lm import PromptedLM, length_of

Parts = dict[str, dict[str, dict[str, float]]]
Tokens = tuple[Tensor, Tensor]
"""Of an answer's tokens (T), log-likelihoods (nats), and whether each is the likeliest."""
LEAST = 1e-12
"""The least probability that a label ends where it does."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One example: log-likelihood (nats), greediness and token count of each choice, and which are
    right. `question` is a digest of context, choices and right ones, by which the same question is
    known again; `ends`, of labels, the log-probability (nats) that none of the longer ones follows.
    """

    id: str
    log_likelihoods: list[float]
    greedy: list[bool]
    tokens: list[int]
    characters: list[int]
    gold: tuple[int, ...]
    question: str = ""
    task: str = ""
    metric: Metric = "accuracy"
    ends: list[float] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Whether it counts, by what is measured in its task."""
        return (
            any(self.greedy[index] for index in self.gold)
            if self.metric == "exact_match"
            else self.choice in self.gold
        )

    @property
    def choice(self) -> int:
        return _highest(self._whole)

    @property
    def choice_norm(self) -> int:
        return _highest(
            [one / count for one, count in zip(self._whole, self.characters, strict=True)]
        )

    @property
    def _whole(self) -> list[float]:
        ends = self.ends or [0.0] * len(self.log_likelihoods)
        return [one + end for one, end in zip(self.log_likelihoods, ends, strict=True)]


def _highest(figures: Sequence[float]) -> int:
    return max(range(len(figures)), key=figures.__getitem__)


@torch.no_grad()
def score(
    model: PromptedLM,
    prefix: Tensor | None,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    tokens_per_batch: int | None = None,
    answers: LogProbabilities | None = None,
) -> tuple[list[Scored], int]:
    """Score every choice of every example; also how many examples lost old context.

    The context (without its last token) is encoded once per example, in one call with all choices
    as branches of a tree, in which what choices begin with alike is read once too (tree attention
    mask); for models that do not accept a custom mask, the
    choices continue from the context's KV cache. Examples of similar length share a batch of
    `tokens_per_batch` tokens: by default 512 on a CPU, for its cache, and 4096 elsewhere. Results
    are in the order of `examples`. `answers` gives the probabilities instead of the model's own.
    """
    tokens_per_batch = tokens_per_batch or (512 if model.device.type == "cpu" else 4096)
    pairs = encode_choices(tokenizer, examples, max_tokens)
    whole = [
        example.ends and example.metric == "exact_match" and tokenizer.eos_token_id is not None
        for example in examples
    ]
    end = tokenizer.eos_token_id
    pairs = [
        [ended(pair, end, max_tokens) for pair in row] if to_its_end else row
        for row, to_its_end in zip(pairs, whole, strict=True)
    ]
    shared = [_shared(row) for row in pairs]
    lengths = [
        length + tree_size([pair.ids[length:-1] for pair in row])
        for row, length in zip(pairs, shared, strict=True)
    ]
    order = sorted(range(len(examples)), key=lambda index: -lengths[index])
    scored: list[Scored | None] = [None] * len(examples)
    start = 0
    while start < len(order):
        group = order[start : start + max(1, tokens_per_batch // lengths[order[start]])]
        start += len(group)
        likelihoods = _score_group(
            answers or log_probabilities(model, prefix),
            [pairs[index] for index in group],
            [shared[index] for index in group],
        )
        for index, rows in zip(group, likelihoods, strict=True):
            example, behind = examples[index], int(whole[index])
            ends: list[float] = []
            stops = [True] * len(rows)
            if example.task == LABELLED:
                ends, stops = _ends([pair.ids[pair.start :] for pair in pairs[index]], rows)
            counts = [len(pair.ids) - pair.start - behind for pair in pairs[index]]
            scored[index] = Scored(
                id=example.id,
                log_likelihoods=[
                    float(row[0][:count].sum()) for row, count in zip(rows, counts, strict=True)
                ],
                greedy=[bool(row[1].all()) and stop for row, stop in zip(rows, stops, strict=True)],
                ends=ends,
                tokens=counts,
                characters=[max(1, len(choice) - 1) for choice in example.choices],
                gold=example.gold,
                question=hashlib.sha256(
                    "\0".join([example.context, *example.choices, str(example.gold)]).encode()
                ).hexdigest()[:16],
                task=example.task,
                metric=example.metric,
            )
    return [row for row in scored if row is not None], sum(
        any(pair.dropped for pair in row) for row in pairs
    )


LogProbabilities = Callable[
    [list[tuple[int, ...]], list[list[tuple[int, ...]]], list[list[int]]], Tensor
]
"""From contexts, the tails behind each of them, and how many of each tail's first tokens to skip,
to log-probabilities (N, V) of the tokens that follow all others, in order."""


def log_probabilities(model: PromptedLM, prefix: Tensor | None) -> LogProbabilities:
    """Those of a model behind a prefix."""

    def found(
        contexts: list[tuple[int, ...]], tails: list[list[tuple[int, ...]]], skip: list[list[int]]
    ) -> Tensor:
        states, which = _states(model, prefix, contexts, tails, skip)
        return torch.log_softmax(model.logits(states), dim=-1)[which]

    return found


def _score_group(
    answers: LogProbabilities, group: list[list[Encoded]], shared: list[int]
) -> list[list[Tokens]]:
    """(log-likelihoods, are greedy) of the tokens of each choice of each example; `shared` is the
    number of leading tokens that an example's choices have in common."""
    tails = [
        [pair.ids[length:-1] for pair in pairs] for pairs, length in zip(group, shared, strict=True)
    ]
    contexts = [pairs[0].ids[:length] for pairs, length in zip(group, shared, strict=True)]
    targets = [token for pairs in group for pair in pairs for token in pair.ids[pair.start :]]
    skipped = [
        [pair.start - 1 - length for pair in pairs]
        for pairs, length in zip(group, shared, strict=True)
    ]
    found = answers(contexts, tails, skipped)  # (answer tokens, V)
    wanted = torch.tensor(targets, device=found.device)
    likelihoods = found.gather(1, wanted[:, None])[:, 0]
    greedy = found.argmax(dim=-1) == wanted
    counts = [len(pair.ids) - pair.start for pairs in group for pair in pairs]
    parts = zip(torch.split(likelihoods, counts), torch.split(greedy, counts), strict=True)
    return [list(islice(parts, len(pairs))) for pairs in group]


def _ends(
    labels: Sequence[tuple[int, ...]], found: Sequence[Tokens]
) -> tuple[list[float], list[bool]]:
    """Of each label, the log-probability that none of those that begin with it follows, and whether
    greedy decoding would not write one of them either."""
    places = {label: place for place, label in enumerate(labels)}
    follows: list[dict[int, float]] = [{} for _ in labels]
    stops = [True] * len(labels)
    for label, (likelihoods, greedy) in zip(labels, found, strict=True):
        for length in range(1, len(label)):
            if (shorter := places.get(label[:length])) is not None:
                follows[shorter][label[length]] = float(likelihoods[length])
                stops[shorter] = stops[shorter] and not bool(greedy[length])
    others = (math.fsum(map(math.exp, one.values())) for one in follows)
    return [math.log(max(1.0 - other, LEAST)) for other in others], stops


def _states(
    model: PromptedLM,
    prefix: Tensor | None,
    contexts: list[tuple[int, ...]],
    tails: list[list[tuple[int, ...]]],
    skipped: list[list[int]],
) -> tuple[Tensor, Tensor]:
    """Last hidden states (S, D), and which of them (N) belong to every tail but its first `skipped`
    tokens, in order: what tails begin with alike has one state."""
    packed, places = pack_trees(contexts, tails, model.device)
    length, width = length_of(prefix), packed.ids.shape[1]
    if length + width <= model.packs_branches:
        cells = [
            row * width + place
            for row, (found_at, firsts) in enumerate(zip(places, skipped, strict=True))
            for tail, first in zip(found_at, firsts, strict=True)
            for place in tail[first:]
        ]
        asked = {cell: state for state, cell in enumerate(dict.fromkeys(cells))}
        which = torch.tensor([asked[cell] for cell in cells], device=model.device)
        return model.read_branches(packed, prefix).flatten(0, 1)[list(asked)], which
    # some models count padding between context and tail as distance: one context length per call
    groups: dict[int, list[int]] = {}
    for row, (context, some) in enumerate(zip(contexts, tails, strict=True)):
        reach = model.positions_taken(length) + len(context)
        cached = context and all(model.rotated_alike(reach, reach + len(tail)) for tail in some)
        groups.setdefault(len(context) if cached else 0, []).append(row)
    found: list[list[Tensor]] = [[] for _ in contexts]
    for width, rows in groups.items():
        fronts = [() if width else contexts[row] for row in rows]
        flat = [
            (*front, *tail) for front, row in zip(fronts, rows, strict=True) for tail in tails[row]
        ]
        inputs = pad(flat, model.device)
        if width:
            owners = torch.tensor(
                [place for place, row in enumerate(rows) for _ in tails[row]], device=model.device
            )
            hidden = model.continue_from(
                torch.tensor([contexts[row] for row in rows], device=model.device),
                inputs,
                owners,
                prefix,
            )
        else:
            hidden = model(inputs.ids, inputs.mask, prefix)
        read = iter(zip(hidden, flat, strict=True))
        for front, row in zip(fronts, rows, strict=True):
            found[row] = [
                state[len(front) + first : len(tail)]
                for first, (state, tail) in zip(skipped[row], read, strict=False)
            ]
    states = torch.cat([state for states in found for state in states])
    return states, torch.arange(len(states), device=states.device)


def _shared(pairs: list[Encoded]) -> int:
    """The number of leading tokens that all choices share and that predict no answer token; fewer
    if a choice's tokenization merges with the end of the context."""
    most = min(pair.start for pair in pairs) - 1
    columns = zip(*(pair.ids[:most] for pair in pairs), strict=True)
    return next((place for place, ids in enumerate(columns) if len(set(ids)) > 1), most)


def summarise(scored: Sequence[Scored]) -> dict[str, float]:
    """The figures of a set of scored examples, and their number. Of several tasks, `accuracy` is
    the mean over tasks of the share of examples that count by what each task measures."""
    count = len(scored)
    right_tokens = sum(row.tokens[row.gold[0]] for row in scored)
    loss = -sum(row.log_likelihoods[row.gold[0]] for row in scored) / right_tokens
    figures = {
        "examples": float(count),
        "answer_loss": loss,
        "answer_perplexity": math.exp(min(loss, 700.0)),
    }
    if len(tasks := by_task(scored)) > 1:
        return figures | {"accuracy": statistics.fmean(map(share_right, tasks.values()))}
    if scored[0].metric == "exact_match":
        return figures | {"exact_match": share_right(scored)}
    return figures | {
        "accuracy": share_right(scored),
        "accuracy_norm": sum(row.choice_norm in row.gold for row in scored) / count,
    }


def share_right(scored: Sequence[Scored]) -> float:
    """The share of examples that count, by what is measured in their tasks."""
    return sum(row.right for row in scored) / len(scored)


def by_task(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Scored examples by their tasks, in the order of names."""
    found: dict[str, list[Scored]] = {}
    for row in scored:
        found.setdefault(row.task, []).append(row)
    return dict(sorted(found.items()))


def by_label(
    scored: Sequence[Scored], examples: Sequence[Example]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Of examples that have the same labels to choose from: the unweighted mean of F1 over labels
    and the share that greedy decoding gets right; and, for each label that an example has or is
    given, precision, recall and F1 (0 where none is given or had), and its examples."""
    pairs = list(zip(scored, examples, strict=True))
    given = Counter(example.choices[row.choice] for row, example in pairs)
    had = Counter(example.target for _, example in pairs)
    hits = Counter(example.target for row, example in pairs if row.right)
    found = {}
    for label in sorted(had | given):
        precision = hits[label] / given[label] if given[label] else 0.0
        recall = hits[label] / had[label] if had[label] else 0.0
        both = precision + recall
        found[label.strip()] = {
            "examples": float(had[label]),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / both if both else 0.0,
        }
    greedy = sum(any(row.greedy[index] for index in row.gold) for row in scored)
    return {
        "macro_f1": statistics.fmean(one["f1"] for one in found.values()),
        "exact_match": greedy / len(scored),
    }, found


def in_parts(scored: Sequence[Scored], examples: Sequence[Example]) -> Parts:
    """Figures of parts of the examples: by `tasks`, if there are several, and by `labels`, if there
    are some to choose from."""
    parts: Parts = {}
    if len(tasks := by_task(scored)) > 1:
        parts["tasks"] = {name: summarise(rows) for name, rows in tasks.items()}
    labelled = [pair for pair in zip(scored, examples, strict=True) if pair[1].task == LABELLED]
    if labelled:
        rows, own = zip(*labelled, strict=True)
        figures, parts["labels"] = by_label(rows, own)
        if "tasks" in parts:
            parts["tasks"][LABELLED] |= figures
    return parts


def by_client(
    scored: Sequence[Scored], kinds: Sequence[str], held: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Scores by client on the client's own mix of question kinds: accuracy (or exact match) and
    answer loss per kind of test question, weighted by the kinds of its training questions (`held`).
    Kinds without test questions are ignored, and so are clients that have no other kinds.
    """
    groups: dict[str, list[Scored]] = {}
    for row, kind in zip(scored, kinds, strict=True):
        groups.setdefault(kind, []).append(row)
    right, loss = {}, {}
    for kind, rows in groups.items():
        right[kind] = share_right(rows)
        losses = (row.log_likelihoods[row.gold[0]] / row.tokens[row.gold[0]] for row in rows)
        loss[kind] = -sum(losses) / len(rows)
    figures = {}
    for client, own in held.items():
        counts = {kind: count for kind, count in Counter(own).items() if kind in groups}
        total = sum(counts.values())
        if total:
            figures[client] = {
                "examples": float(len(own)),
                "accuracy": sum(count * right[kind] for kind, count in counts.items()) / total,
                "answer_loss": sum(count * loss[kind] for kind, count in counts.items()) / total,
            }
    return figures
