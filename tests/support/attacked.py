"""What the attacks of the audits are tried on."""

from __future__ import annotations

from typing import Any

import torch

from fedsp.models.soft_prompt import PromptSpec, SoftPrompt


def prompt_for(model: Any, space: Any, length: int) -> SoftPrompt:
    spec = PromptSpec(space=space, length=length, model=model.prompt_shape)
    return SoftPrompt(
        spec, torch.randn(spec.shape, generator=torch.Generator().manual_seed(0)) * 0.3
    )


TEXT = (11, 57, 3, 88, 23, 42, 61, 9, 77, 30, 5, 94, 18)
