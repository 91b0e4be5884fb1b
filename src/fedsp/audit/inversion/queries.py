"""The queries of a model's first layer: what the gradient of a prompt's first keys is made of. They
depend on a token and its position alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from fedsp.errors import ModelError
from fedsp.models.prompted_lm import PromptedLM

_NAME = "fedsp_first_queries"


class _CapturedQueries(Exception):
    """Carries the queries out of the first layer before it does the work that nobody needs."""

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries


def _capture(module: Any, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    raise _CapturedQueries(query)


AttentionInterface.register(_NAME, _capture)


@torch.no_grad()
def first_queries(model: PromptedLM, input_ids: Tensor, prefix: Tensor) -> Tensor:
    """The first layer's queries (B, T, H, G, K) of tokens (B, T) behind a prefix: G query heads for
    each of H key/value heads.

    Raises:
        ModelError: the model's attention does not go through transformers' interface.
    """
    config = model.model.config
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        model(input_ids, torch.ones_like(input_ids), prefix)
    except _CapturedQueries as asked:
        batch, heads, tokens, size = asked.queries.shape
        return (
            asked.queries.view(batch, model.shape.heads, heads // model.shape.heads, tokens, size)
            .permute(0, 3, 1, 2, 4)
            .float()
        )
    finally:
        config._attn_implementation = before
    raise ModelError(
        f"{model.name} does not compute its attention through transformers' interface, which the"
        " inversion audit needs: choose other audits with --only"
    )
