"""Inversion: which tokens can be reconstructed from the change of a prompt?

The gradient of a prompt's first-layer keys is a sum over tokens of scaled queries, head by head,
and a query depends only on its token and position. So a token whose queries lie in the span of the
gradient's rows was in the text (the span test of Petrov et al., *DAGER*, NeurIPS 2024,
https://arxiv.org/abs/2405.15586, for prompts). Beyond the gradient's rank, tokens are selected
greedily (orthogonal matching pursuit). The gradient of a residual prompt is the sum of a part from
the keys and one from the values, whose directions are unknown: the same tests are applied to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedsp.audit.inversion.queries import first_queries
from fedsp.data.encoding import Encoded
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import SoftPrompt


def key_dictionary(
    model: PromptedLM, prompt: SoftPrompt, positions: int, *, at_once: int = 1024
) -> Tensor:
    """The queries of every token of the vocabulary at each of the first positions, which the
    gradient of a key/value prompt's first keys combines: unit vectors (T, V, H, G, N) of T
    positions, V tokens, H gradient heads, G queries per gradient head, row size N."""
    with torch.no_grad():
        prefix = prompt.prefix(model)
    vocabulary = torch.arange(model.model.get_input_embeddings().num_embeddings)
    parts = [
        first_queries(model, ids.to(model.device)[:, None].expand(-1, positions), prefix).cpu()
        for ids in torch.split(vocabulary, at_once)
    ]
    return normalize(torch.cat(parts).transpose(0, 1), dim=-1, eps=1e-30)


def residual_dictionary(model: PromptedLM, prompt: SoftPrompt, positions: int) -> Tensor:
    """The same for a residual prompt: each query times the Jacobian (by autograd) of the first
    block's keys with respect to the block's input, head by head."""
    keys = key_dictionary(model, prompt, positions, at_once=256)  # (T, V, H, G, K)
    values = prompt.values().detach()[:1].clone().requires_grad_(True)
    # (H, K): keys of the first virtual token in the first layer
    first = prompt.read(values, model)[0, 0, 0]
    rows = [
        torch.autograd.grad(key, values, retain_graph=True)[0][0, model.prompt_layers[0]]
        for key in first.flatten()
    ]
    jacobian = torch.stack(rows).view(*first.shape, -1)  # (H, K, D)
    pulled = torch.einsum("tvhgk,hkd->tvhgd", keys, jacobian.cpu())
    # one gradient for all heads: (T, V, 1, H G, D)
    return normalize(pulled.flatten(start_dim=2, end_dim=3).unsqueeze(2), dim=-1, eps=1e-30)


def gradient_rows(prompt: SoftPrompt, model: PromptedLM, change: Tensor) -> Tensor:
    """The first layer's slice of a prompt's change (P, L, ...), P virtual tokens and L layers, as
    rows for the span test: keys (H, P, K) of H heads of size K, or residual inputs (1, P, D)."""
    layer = model.prompt_layers[0]
    if prompt.spec.space == "key_value":
        return change[:, layer, 0].permute(1, 0, 2)
    return change[:, layer][None]


def span_test(rows: Tensor, dictionary: Tensor, tokens: int) -> Tensor:
    """Distances (T, V) of the tokens at each position from the span of rows (H, P, N), P virtual
    tokens: 0 (inside) to 1, mean over heads. The span keeps the largest `tokens` * G
    singular vectors, for G queries per gradient head."""
    rank = tokens * dictionary.shape[3]
    distances = torch.zeros(dictionary.shape[:2])
    heads = rows.shape[0]
    for head in range(heads):
        _, sizes, basis = torch.linalg.svd(rows[head].double(), full_matrices=False)
        kept = int((sizes > 1e-6 * sizes[0]).sum()) if float(sizes[0]) > 0 else 0
        basis = basis[: min(kept, rank)].float()  # (R, N)
        inside = (dictionary[:, :, head] @ basis.T).square().sum(dim=-1)  # (T, V, G)
        distances += (1 - inside).clamp_min(0).mean(dim=-1) / heads
    return distances


def matching_pursuit(rows: Tensor, dictionary: Tensor, count: int) -> list[tuple[int, int]]:
    """The first `count` pairs (position, token) of rank-aware pursuit (Davies and Eldar 2012,
    https://arxiv.org/abs/1004.4529): each step takes the token whose residual lies most within the
    span of the rows' residual, over all heads together."""
    found: list[tuple[int, int]] = []
    left = rows.clone()
    vectors = dictionary.clone()
    for _ in range(count):
        inside, lengths = torch.zeros(2, *vectors.shape[:2]).unbind()
        for head, part in enumerate(left):
            _, sizes, basis = torch.linalg.svd(part, full_matrices=False)
            basis = basis[sizes > 1e-5 * sizes[0].clamp_min(1e-30)]
            inside += (vectors[:, :, head] @ basis.T).square().sum(dim=(-1, -2))
            lengths += vectors[:, :, head].square().sum(dim=(-1, -2))
        share = torch.where(
            lengths > 1e-2 * vectors.shape[2] * vectors.shape[3],
            inside / lengths.clamp_min(1e-30),
            -1.0,
        )
        for position, token in found:
            share[position, token] = -1.0
        position, token = divmod(int(share.argmax()), dictionary.shape[1])
        found.append((position, token))
        for head in range(len(left)):
            taken = torch.linalg.qr(vectors[position, token, head].T)[0]  # (N, G)
            left[head] -= left[head] @ taken @ taken.T
            vectors[:, :, head] -= vectors[:, :, head] @ taken @ taken.T
    return found


def recall(distances: Tensor, texts: Sequence[Encoded]) -> float:
    """The share of tokens that are found, position by position: as many of the nearest tokens are
    taken as there are texts that reach the position."""
    right = total = 0
    for position in range(min(distances.shape[0], max(len(row.ids) for row in texts) - 1)):
        there = {row.ids[position] for row in texts if position < len(row.ids) - 1}
        nearest = set(distances[position].topk(len(there), largest=False).indices.tolist())
        right, total = right + len(there & nearest), total + len(there)
    return right / max(1, total)


def recall_of(found: Sequence[tuple[int, int]], texts: Sequence[Encoded]) -> float:
    """The same for tokens that were taken one by one."""
    there = {(position, token) for row in texts for position, token in enumerate(row.ids[:-1])}
    return len(there & set(found)) / max(1, len(there))
