"""Gradient matching: search for text whose simulated local steps change the prompt, or whose
gradient changes the adapter, as the observed update did.

L. Zhu, Z. Liu, S. Han. *Deep Leakage from Gradients*. NeurIPS 2019.
https://arxiv.org/abs/1906.08935; for text, as in LAMP (M. Balunović et al., NeurIPS 2022,
https://arxiv.org/abs/2202.08827): optimise embeddings, then exchange tokens one at a time. Changes
are compared layer by layer: in one cosine the deep layers would outweigh the first ones, which
identify tokens best. The attacker is given the lengths and the answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from fedsp.models.adapter import Adapter
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import SoftPrompt

SMOOTH = 0.3
"""Damping in AdamW's denominator when a step is differentiated, relative to the gradient's RMS: the
first step is nearly the sign of the gradient, whose derivative is zero."""
BETAS, EPS = (0.9, 0.999), 1e-8
EXCHANGED = 48
"""Tokens tried at a position: this many with the nearest embeddings, and this many with the
steepest descent of the mismatch."""


@dataclass(frozen=True)
class LocalSteps:
    """The client's training as the attacker knows it: AdamW steps at these learning rates on the
    same texts. Without rates the attacker sees the gradient itself."""

    rates: tuple[float, ...] = ()
    weight_decay: float = 0.0


class Target(Protocol):
    """What is seen of a client's texts, and what is known of them: the answer of each (N,), and how
    many tokens are before it."""

    @property
    def model(self) -> PromptedLM: ...

    @property
    def answers(self) -> Tensor: ...

    @property
    def tokens(self) -> int: ...

    def how_far(self, embedded: Tensor, *, differentiable: bool = False) -> Tensor:
        """One minus the cosine with what is seen (R,), from 0 to 2, of what the client would send
        with embedded texts (R, N, T, D): R separate guesses, N texts, T tokens, hidden size D."""


@dataclass(frozen=True, kw_only=True)
class PromptTarget:
    """What is seen is a change (P, L, ...) of a prompt, made by local steps."""

    model: PromptedLM
    prompt: SoftPrompt
    change: Tensor
    answers: Tensor
    tokens: int
    steps: LocalSteps

    def how_far(self, embedded: Tensor, *, differentiable: bool = False) -> Tensor:
        change = local_change(
            self.model,
            self.prompt,
            embedded,
            self.answers,
            self.steps,
            differentiable=differentiable,
        )
        return mismatch(change, self.change)


@dataclass(frozen=True, kw_only=True)
class AdapterTarget:
    """What is seen is the gradient of one text's loss with respect to some tensors of an adapter,
    each of its own shape, by name."""

    model: PromptedLM
    adapter: Adapter
    gradient: Mapping[str, Tensor]
    answers: Tensor
    tokens: int

    def how_far(self, embedded: Tensor, *, differentiable: bool = False) -> Tensor:
        with self.adapter.apart(len(embedded)) as copies:
            sought = [copies[name] for name in self.gradient]
            losses = _embedded_losses(self.model, None, embedded[:, 0], self.answers)
            found = torch.autograd.grad(losses.sum(), sought, create_graph=differentiable)
        seen = (tensor.to(self.model.device).flatten() for tensor in self.gradient.values())
        apart = [
            1 - cosine_similarity(part.flatten(start_dim=1), whole[None], dim=-1)
            for part, whole in zip(found, seen, strict=True)
        ]
        return torch.stack(apart).mean(dim=0)


def local_change(
    model: PromptedLM,
    prompt: SoftPrompt,
    embedded: Tensor,
    answers: Tensor,
    steps: LocalSteps,
    *,
    differentiable: bool = False,
) -> Tensor:
    """The change (R, *shape) of the prompt by local steps on embedded texts (R, N, T, D) with
    answer tokens (N,): R separate guesses, N texts, T tokens, hidden size D."""
    smooth = SMOOTH if differentiable else 0.0
    start = prompt.values().detach()
    start = start[None].expand(len(embedded), *start.shape).clone().requires_grad_(True)
    own, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
    for number, rate in enumerate(steps.rates or (0.0,), start=1):
        (gradient,) = torch.autograd.grad(
            _losses(model, prompt, own, embedded, answers).sum(), own, create_graph=differentiable
        )
        if not steps.rates:
            return -gradient
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
        size = gradient.detach().flatten(start_dim=1).square().mean(dim=1)
        size = size.view(-1, *[1] * (gradient.dim() - 1))
        spread = (second / (1 - BETAS[1] ** number) + smooth**2 * size).sqrt() + EPS
        own = (
            own * (1 - rate * steps.weight_decay) - rate * first / (1 - BETAS[0] ** number) / spread
        )
    return own - start


def mismatch(change: Tensor, seen: Tensor) -> Tensor:
    """One minus the cosine of changes (R, P, L, ...) with the seen one (P, L, ...), mean over
    depths: (R,), from 0 to 2."""
    return 1 - cosine_similarity(
        change.transpose(1, 2).flatten(start_dim=2),
        seen.transpose(0, 1).flatten(start_dim=1)[None],
        dim=-1,
    ).mean(dim=1)


def match_embeddings(target: Target, *, iterations: int, restarts: int, seed: int) -> Tensor:
    """The embedded texts (N, T, D) whose gradient comes nearest to the target's: the best of
    `restarts` searches from random tokens, each of so many `iterations`."""
    table = _table(target.model)
    generator = torch.Generator().manual_seed(seed)
    shape = (restarts, len(target.answers), target.tokens)
    drawn = torch.randint(len(table), shape, generator=generator)
    embedded = table[drawn.to(table.device)].clone().requires_grad_(True)
    rate = 0.2 * float(table.std())
    optimizer = torch.optim.Adam([embedded], lr=rate)
    found = torch.zeros(restarts)
    for number in range(iterations):
        optimizer.param_groups[0]["lr"] = rate * (1 - number / iterations)
        found, slope = _sloping(target, embedded)
        embedded.grad = normalize(slope.flatten(start_dim=1), eps=1e-30).view_as(slope)
        optimizer.step()
    return embedded.detach()[int(found.argmin())]


def match_text(target: Target, *, iterations: int) -> list[int]:
    """The tokens (T,) of one text: embeddings are matched, then tokens exchanged, one at a time or
    two with each other, for as long as the match gets better."""
    table = _table(target.model)
    matched = match_embeddings(target, iterations=iterations, restarts=2, seed=0)
    near = token_closeness(target.model, matched[0])

    def how_far(texts: Tensor) -> Tensor:
        return torch.cat(
            [target.how_far(table[some][:, None]).detach() for some in torch.split(texts, 32)]
        )

    tokens = near.argmax(dim=1)
    best, improved = float(how_far(tokens[None])), True
    while improved:
        improved = False
        for position in range(target.tokens + 1):
            if position == target.tokens:
                candidates = _swapped(tokens)
            else:
                embedded = table[tokens][None, None].requires_grad_(True)
                slope = _sloping(target, embedded)[1][0, 0]
                candidates = _exchanged(tokens, position, near, slope @ table.T)
            distances = how_far(candidates)
            if float(distances.min()) < best - 1e-6:
                best, improved = float(distances.min()), True
                tokens = candidates[int(distances.argmin())]
    return [int(token) for token in tokens]


def _sloping(target: Target, embedded: Tensor) -> tuple[Tensor, Tensor]:
    """The mismatch of each guess (R,), and how it rises with the embedded texts (R, N, T, D)."""
    found = target.how_far(embedded, differentiable=True)
    return found, torch.autograd.grad(found.sum(), embedded)[0]


def _exchanged(tokens: Tensor, position: int, near: Tensor, rising: Tensor) -> Tensor:
    """The text with other tokens at a position: those nearest to the matched embedding, and those
    that the slope asks for."""
    count = min(EXCHANGED, near.shape[1])
    candidates = torch.cat(
        [near[position].topk(count).indices, rising[position].topk(count, largest=False).indices]
    )
    texts = tokens[None].repeat(len(candidates), 1)
    texts[:, position] = candidates
    return texts


def _swapped(tokens: Tensor) -> Tensor:
    """The text, and the text with each two of its tokens in each other's place."""
    pairs = torch.combinations(torch.arange(len(tokens), device=tokens.device))
    texts = tokens[None].repeat(len(pairs) + 1, 1)
    for text, (one, other) in zip(texts[1:], pairs.tolist(), strict=True):
        text[one], text[other] = tokens[other], tokens[one]
    return texts


def token_closeness(model: PromptedLM, embedded: Tensor) -> Tensor:
    """The cosine (..., V) of embedded tokens (..., D) with every token of the vocabulary."""
    return normalize(embedded, dim=-1) @ normalize(_table(model), dim=-1).T


def _table(model: PromptedLM) -> Tensor:
    table: Tensor = model.model.get_input_embeddings().weight.detach().float()
    return table


def _losses(
    model: PromptedLM, prompt: SoftPrompt, own: Tensor, embedded: Tensor, answers: Tensor
) -> Tensor:
    """The mean loss of each guess's texts (R,), nats per answer token."""
    guesses, texts, _, _ = embedded.shape
    prefix = prompt.read(own, model).repeat_interleave(texts, dim=0)
    losses = _embedded_losses(model, prefix, embedded.flatten(end_dim=1), answers)
    return losses.view(guesses, texts).mean(dim=1)


def _embedded_losses(
    model: PromptedLM, prefix: Tensor | None, embedded: Tensor, answers: Tensor
) -> Tensor:
    """The loss of each embedded text (B, T, D), nats per answer token (B,), whose answers (N,) come
    again and again."""
    ids = torch.zeros(embedded.shape[:2], dtype=torch.long, device=model.device)
    handle = model.model.get_input_embeddings().register_forward_hook(
        lambda _module, _arguments, _output: embedded.to(model.dtype)
    )
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the one kernel whose backward pass has a backward pass
            hidden = model(ids, torch.ones_like(ids), prefix)
    finally:
        handle.remove()
    again = answers.repeat(len(embedded) // len(answers))
    return cross_entropy(model.logits(hidden[:, -1]), again, reduction="none")


def best_distances(model: PromptedLM, embedded: Tensor) -> Tensor:
    """How far each token is from any of the texts at a position (T, V), from embedded texts (N, T,
    D)."""
    return 1 - torch.stack([token_closeness(model, text) for text in embedded]).amax(dim=0)
