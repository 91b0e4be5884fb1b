"""Knowledge distillation: the auxiliary model (student) is trained to reproduce the last hidden
states of the global model (teacher), before the first round (FedSP, section 3, KD).

The loss is the mean squared error between last hidden states, after the final norm, over all
tokens but padding; where only the last layers are verbatim, between the states that enter them. The
teacher runs once per text; its states are cached in memory or, if they are large, in a temporary
file.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from fedsp.data.batching import pad
from fedsp.data.encoding import Tokenizer
from fedsp.data.seeding import derive_seed
from fedsp.models.auxiliary import AuxiliaryModel
from fedsp.models.prompted_lm import PromptedLM, hidden_at_depths
from fedsp.storage import tensor_on_disk
from fedsp.training.loop import Optimisation, fit, text_loss

Sequences = Sequence[Sequence[int]]
Progress = Callable[[int, float], None]
"""Called after each step with its number, from 1, and its loss."""

IN_MEMORY = 1 << 30
"""Largest size, in bytes, of teacher states that are cached in memory instead of on disk."""
CHECKS, PATIENCE = 20, 10
"""How often the loss on held-out text is measured in a whole distillation, and after how many
measurements that are no lower than one before them it ends: half of it, since much of what it
gains comes as the learning rate falls."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Settings of distillation. Weights of losses that are added (0: off): `match_depths`, the mean
    squared error of states at all depths; `match_logits`, the KL divergence of next-token
    distributions.
    """

    steps: int
    batch_size: int
    optimisation: Optimisation
    match_depths: float = 0.0
    match_logits: float = 0.0


def masked_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of states (batch, tokens, hidden) where the mask (batch, tokens) is 1."""
    squared = (student - teacher).float().square().mean(dim=-1)  # (B, T)
    return (squared * mask).sum() / mask.sum()


def distill(
    auxiliary: AuxiliaryModel,
    teacher: PromptedLM,
    texts: Sequences,
    how: Distillation,
    *,
    seed: int,
    progress: Progress = lambda step, loss: None,
    held_out: Sequences = (),
) -> list[float]:
    """Train the auxiliary model's distillable weights in place; returns the loss of each step.
    Texts of `held_out` tell when to stop.

    Raises:
        TrainingDiverged: a loss is not finite.
    """
    if not how.steps:
        return []
    order = _order(len(texts), how, seed)
    drawn = Counter(index for indices in order for index in indices)
    cached = (
        TeacherStates(drawn, max(len(texts[index]) for index in drawn))
        if max(drawn.values()) > 1
        else None
    )
    steps, cut = 0, auxiliary.plan.cut

    @torch.no_grad()
    def read(indices: list[int]) -> list[Tensor]:
        """The teacher's states (batch, tokens, hidden): at matched depths, at the cut, the last."""
        batch = pad([texts[index] for index in indices], teacher.device)
        states = hidden_at_depths(teacher, batch.ids, batch.mask, None)
        depths = list(auxiliary.prompt_layers) if how.match_depths else []
        if cut is not None:
            depths.append(auxiliary.plan.sources[cut])
        if cut is None or how.match_logits:
            depths.append(-1)
        return [states[depth].float() for depth in depths]

    def loss(indices: list[int]) -> Tensor:
        nonlocal steps
        steps += 1
        batch = pad([texts[index] for index in indices], auxiliary.device)
        states = cached.get(indices, read) if cached else read(indices)
        states = [state[:, : batch.ids.shape[1]].to(auxiliary.device) for state in states]
        hidden = hidden_at_depths(auxiliary, batch.ids, batch.mask, None)
        matched = len(hidden) - 1 if how.match_depths else 0
        value = masked_mse(hidden[-1 if cut is None else cut], states[matched], batch.mask)
        if how.match_depths:
            pairs = zip(hidden[:-1], states[:matched], strict=True)
            each = [masked_mse(*pair, batch.mask) for pair in pairs]
            value = value + how.match_depths * torch.stack(each).mean()
        if how.match_logits:
            real = batch.mask.bool()
            wanted = torch.log_softmax(teacher.logits(states[-1][real]), dim=-1)
            found = torch.log_softmax(auxiliary.logits(hidden[-1][real]), dim=-1)
            value = value + how.match_logits * kl_div(
                found, wanted, log_target=True, reduction="batchmean"
            )
        progress(steps, float(value.detach()))
        return value

    every = max(1, how.steps // CHECKS)

    def batches() -> Iterator[list[int]]:
        least, since = math.inf, 0
        for step, indices in enumerate(order):
            if held_out and step and step % every == 0:
                found = text_loss(auxiliary, held_out)
                least, since = (found, 0) if found < least else (least, since + 1)
                if since == PATIENCE:
                    return
            yield indices

    return fit(auxiliary.distillable(), loss, batches(), how.optimisation).losses


class TeacherStates:
    """A float32 cache of the teacher's hidden states, computed once per text. If it is larger than
    `IN_MEMORY` bytes, it is mapped to unlinked files, which end with the process.

    Raises (from `get`):
        StorageError: the disk is full.
    """

    def __init__(self, drawn: Iterable[int], longest: int) -> None:
        self._rows = {index: row for row, index in enumerate(sorted(drawn))}
        self._longest = longest
        self._states: list[Tensor] = []
        self._known: set[int] = set()

    def get(self, indices: list[int], read: Callable[[list[int]], list[Tensor]]) -> list[Tensor]:
        """The states of these texts, one tensor (batch, longest text, hidden) per depth; `read`
        computes those that are not cached yet."""
        new = [index for index in dict.fromkeys(indices) if index not in self._known]
        if new:
            states = read(new)
            if not self._states:
                shapes = [(len(self._rows), self._longest, state.shape[-1]) for state in states]
                large = 4 * sum(math.prod(shape) for shape in shapes) > IN_MEMORY
                self._states = [
                    tensor_on_disk(
                        math.prod(shape),
                        torch.float32,
                        what="the teacher's states",
                        instead="make distill.sequences smaller",
                    ).view(shape)
                    if large
                    else torch.zeros(shape)
                    for shape in shapes
                ]
            for cached, state in zip(self._states, states, strict=True):
                cached[self._at(new), : state.shape[1]] = state.cpu()
            self._known |= set(new)
        return [cached[self._at(indices)] for cached in self._states]

    def _at(self, indices: list[int]) -> Tensor:
        return torch.tensor([self._rows[index] for index in indices])


def _order(count: int, how: Distillation, seed: int) -> list[list[int]]:
    """Which texts each step reads: all of them before any again."""
    rng = random.Random(derive_seed(seed, "distill"))
    drawn: list[int] = []
    while len(drawn) < how.steps * how.batch_size:
        drawn += rng.sample(range(count), count)
    return [
        drawn[start : start + how.batch_size]
        for start in range(0, how.steps * how.batch_size, how.batch_size)
    ]


def packed(
    tokenizer: Tokenizer, passages: Sequence[str], *, length: int, count: int, seed: int
) -> list[list[int]]:
    """Passages in a seeded order, one behind the other with an end token between, cut into at most
    `count` sequences of `length` tokens."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    order = random.Random(derive_seed(seed, "passages")).sample(range(len(passages)), len(passages))
    tokens: list[int] = []
    for index in order:
        tokens += [*tokenizer.encode(passages[index], add_special_tokens=False), *end]
        if len(tokens) >= length * count:
            break
    sequences = [
        tokens[start : start + length]
        for start in range(0, min(len(tokens), length * count), length)
    ]
    return [sequence for sequence in sequences if len(sequence) > 1]
