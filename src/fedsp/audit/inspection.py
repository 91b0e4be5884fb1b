"""Inspection of a package by its recipient: does it process text as a language model does, or was
it built by hand for something else?

A malicious model owner can build a package whose updates reveal which words occur in a client's
text (`fedsp.audit.trap`). A crude one shows in its weights, its attention and its outputs. A clean
inspection proves nothing: a trap can be hidden in a model that works well on text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsp.data.encoding import Encoded, collate, encode_texts
from fedsp.errors import DataError
from fedsp.models.auxiliary import AuxiliaryModel, embedding_parameters, empty_auxiliary
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.models.trainable import trainable
from fedsp.training.per_example_gradients import example_gradients

SEQUENCE, SEQUENCES, VIRTUAL = 64, 16, 16
"""Tokens of a sequence that is read, sequences, and virtual tokens of the prompt that gradients are
taken of."""
SMALLEST = 16
"""Rows and columns that a matrix must have for its numbers to have a distribution."""
SHAPE, SCALE = ("largest", "rank_share"), ("deviation",)
"""What a matrix shares with one of its family that was never trained, and what only with one of a
trained model."""
LIMITS: dict[str, tuple[float, str]] = {
    "tensor_distance": (3.0, "a weight matrix is unlike what its family makes"),
    "zero_share": (0.1, "numbers of a weight matrix are exactly zero"),
    "excess_loss": (
        3.0,
        "it reads text far worse than a guess that takes all tokens for equally likely",
    ),
    "dead_head_share": (0.25, "attention heads look at all text alike"),
    "saturated_head_share": (0.5, "attention heads look at one token alone"),
    "silent_gradient_share": (0.1, "numbers of a prompt have no influence on any text"),
    "alike_gradients": (0.95, "all texts pull a prompt the same way"),
}
"""How large each figure may be, and what is said of one that is larger. Above those of every honest
package that was measured (docs/results/privacy.md), with room."""


def inspect_auxiliary(
    auxiliary: AuxiliaryModel, text: str, reference: PromptedLM | None = None
) -> dict[str, Any]:
    """Figures of a package on some text, nobody's or one's own: nothing leaves this process.

    `tensors` has a row for each weight matrix, the unlikeliest first; `attention` one for each
    depth; `figures` those of LIMITS with `perplexity` and `unigram_perplexity`, what somebody has
    who knows how frequent each token of this very text is; `unusual` a sentence for each figure
    beyond its limit. With a `reference`, a model that is trusted, matrices are held against those
    of its layers as well. Where the family's code returns no attention weights, `attention` is
    empty and `figures` has no head shares, since nothing was measured.

    Raises:
        DataError: the text has too few tokens.
    """
    texts = _sequences(auxiliary, text)
    tensors = _tensors(auxiliary, reference)
    attention = _attention(auxiliary, texts)
    loss, unigram, uniform = _losses(auxiliary, texts)
    silent, alike = _gradients(auxiliary, texts)
    count = sum(row["heads"] for row in attention)
    heads = {
        f"{what}_head_share": sum(row[what] for row in attention) / count
        for what in ("dead", "saturated")
        if count
    }
    figures = {
        "tensor_distance": max(map(_farthest, tensors), default=0.0),
        "zero_share": max((row["zero_share"] for row in tensors), default=0.0),
        "excess_loss": loss - uniform,
        **heads,
        "silent_gradient_share": silent,
        "alike_gradients": alike,
        "perplexity": math.exp(min(loss, 700.0)),
        "unigram_perplexity": math.exp(unigram),
    }
    unusual = [
        f"{sentence} ({name} {figures[name]:.3g}, usual is at most {limit:g})"
        for name, (limit, sentence) in LIMITS.items()
        if name in figures and not figures[name] <= limit
    ]
    return {"figures": figures, "unusual": unusual, "tensors": tensors, "attention": attention}


def _sequences(auxiliary: AuxiliaryModel, text: str) -> Tensor:
    """The first tokens of a text, (SEQUENCES, SEQUENCE)."""
    length = min(SEQUENCE, auxiliary.max_positions - VIRTUAL)
    (ids,) = encode_texts(auxiliary.tokenizer, [text[: 40 * SEQUENCES * SEQUENCE]])
    if len(ids) < SEQUENCES * length:
        raise DataError(
            f"the text to inspect with has {len(ids)} tokens, expected at least"
            f" {SEQUENCES * length}: give a longer one with --text"
        )
    return torch.tensor(ids[: SEQUENCES * length], device=auxiliary.device).view(SEQUENCES, length)


def _tensors(auxiliary: AuxiliaryModel, reference: PromptedLM | None) -> list[dict[str, Any]]:
    family = _looks(empty_auxiliary(auxiliary.model.config, auxiliary.plan))
    trusted = _looks(reference.model) if reference else {}
    # of a low rank on purpose, as the package says
    reduced = (
        set(embedding_parameters(auxiliary.model)) if auxiliary.embeddings == "low_rank" else set()
    )
    rows = []
    for name, look in _looks(auxiliary.model).items():
        shape = [key for key in SHAPE if not (name in reduced and key == "rank_share")]
        others = [
            _distance(look, other, [*shape, *SCALE])
            for other_name, other in trusted.items()
            if _kind(other_name) == _kind(name)
        ]
        rows.append(
            {
                "tensor": name,
                **look,
                "from_family": _distance(look, family[name], shape),
                "from_reference": min(others, default=None),
            }
        )
    return sorted(rows, key=_farthest, reverse=True)


def _farthest(row: Mapping[str, Any]) -> float:
    """How far a matrix is from its family, or from what is trusted, whichever is more."""
    return float(max(row["from_family"], row["from_reference"] or 0.0))


def _kind(name: str) -> str:
    """A parameter's name without the number of its layer."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


@torch.no_grad()
def _looks(model: nn.Module) -> dict[str, dict[str, float]]:
    """Of each weight matrix (N, D): the standard deviation of its numbers, the largest of them in
    standard deviations, the share of exact zeros, and the effective rank (Roy and Vetterli, EUSIPCO
    2007) as a share of the largest possible."""
    found = {}
    for name, parameter in trainable(model).items():
        if parameter.dim() < 2 or min(parameter.shape) < SMALLEST:
            continue
        matrix = parameter.detach().double().flatten(1)
        matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        sizes = torch.linalg.eigvalsh(matrix.T @ matrix).clamp_min(0).sqrt()
        deviation = float(matrix.std())
        found[name] = {
            "deviation": deviation,
            "largest": float(matrix.abs().max()) / max(deviation, 1e-300),
            "zero_share": float((matrix == 0).double().mean()),
            "rank_share": _effective_number(sizes / sizes.sum().clamp_min(1e-300)) / len(sizes),
        }
    return found


def _effective_number(shares: Tensor) -> float:
    """How many of some shares (N,) there are in effect: the exponential of their entropy."""
    return math.exp(-float((shares * shares.clamp_min(1e-300).log()).sum()))


def _distance(one: Mapping[str, float], other: Mapping[str, float], keys: Sequence[str]) -> float:
    """The largest difference in the logarithms of these."""
    return max(abs(math.log(max(one[key], 1e-12) / max(other[key], 1e-12))) for key in keys)


@torch.no_grad()
def _attention(auxiliary: AuxiliaryModel, texts: Tensor) -> list[dict[str, Any]]:
    """For each depth, how many heads spread alike over all they may look at whatever stands there
    (dead), and how many put nearly all of it on one token."""
    usual = auxiliary.model.config._attn_implementation
    try:
        auxiliary.model.set_attn_implementation("eager")
        output = auxiliary.backbone(
            input_ids=texts,
            attention_mask=torch.ones_like(texts),
            output_attentions=True,
            use_cache=False,
        )
    except (ValueError, TypeError, NotImplementedError):
        return []
    finally:
        auxiliary.model.set_attn_implementation(usual)
    shown = getattr(output, "attentions", None)
    length, rows = texts.shape[1], []
    places = torch.arange(length, device=texts.device)
    seen = places[length // 4 :, None] + 1
    even = (places < seen) / seen
    for depth, weights in enumerate(
        shown if shown and all(part is not None for part in shown) else ()
    ):
        # (B, H, Q, T): the first tokens have little to look at
        late = weights.float()[:, :, length // 4 :]
        moved = 0.5 * (late - even).abs().sum(dim=-1).mean(dim=(0, 2))  # (H,)
        top = late.amax(dim=-1).mean(dim=(0, 2))
        rows.append(
            {
                "depth": depth,
                "heads": len(top),
                "dead": int((moved < 0.01).sum()),
                "saturated": int((top > 0.99).sum()),
                "largest_share": float(top.max()),
            }
        )
    return rows


@torch.no_grad()
def _losses(auxiliary: AuxiliaryModel, texts: Tensor) -> tuple[float, float, float]:
    """Nats per token: the package's, those of the tokens' own frequencies, and of a guess that
    takes all for equally likely."""
    logits = auxiliary.logits(auxiliary(texts)[:, :-1])
    counts = torch.bincount(texts.flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    return (
        float(cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten())),
        float(-(shares * shares.log()).sum()),
        math.log(logits.shape[-1]),
    )


def _gradients(auxiliary: AuxiliaryModel, texts: Tensor) -> tuple[float, float]:
    """With a prompt of a text's own activations: the share of its numbers that no text's loss
    depends on, and how far the texts' gradients are alike, 0 where they are at right angles to each
    other and 1 where they are one."""
    spec = PromptSpec(space="residual", length=VIRTUAL, model=auxiliary.prompt_shape)
    layers = list(auxiliary.prompt_layers)
    values = torch.zeros(spec.shape)
    values[:, layers] = auxiliary.activations(texts[0, :VIRTUAL])[0].cpu()
    prompt = SoftPrompt(spec, values).to(auxiliary.device)
    examples = [collate([Encoded(tuple(row), len(row) - 8)]) for row in texts.tolist()]
    each = [example_gradients(auxiliary, prompt, example)[1] for example in examples]
    gradients = torch.cat(each)[:, :, sorted(set(layers))].flatten(1).double()
    largest = gradients.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    silent = float((gradients.abs() <= 1e-9 * largest).all(dim=0).double().mean())
    unit = gradients / gradients.norm(dim=1, keepdim=True).clamp_min(1e-300)
    directions = _effective_number(torch.linalg.eigvalsh(unit @ unit.T).clamp_min(0) / len(texts))
    return silent, 1 - (directions - 1) / (len(texts) - 1)
