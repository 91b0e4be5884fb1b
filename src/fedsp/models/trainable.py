"""The parameters of a module, by name."""

from __future__ import annotations

from torch import Tensor, nn

Tensors = dict[str, Tensor]
"""Tensors by name."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module by name, each once even where depths share it."""
    return dict(module.named_parameters(remove_duplicate=True))
