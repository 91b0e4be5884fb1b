"""Offsite-Tuning: the owner of text gets the first and last layers and a frozen, compressed middle; it tunes the layers, which are plugged back.

G. Xiao, J. Lin, S. Han. *Offsite-Tuning: Transfer Learning without Full Model*. 2023. https://arxiv.org/abs/2302.04870; federated by averaging the
tuned layers, as in T. Fan et al. *FATE-LLM* (https://arxiv.org/abs/2310.10049) and W. Kuang et al. *FederatedScope-LLM*
(https://arxiv.org/abs/2309.00363). With one client it is the paper, with several its federated form. The middle is made by dropping layers and
may be distilled. Clients hold the outer layers and the embeddings bit for bit: model privacy is that of the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsp.federation.methods.base import Averaging
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.weights import Weights


@dataclass(frozen=True)
class OffsiteTuning(Averaging):
    """Steps on the outer layers through the emulator; the mean of them."""


def outer_layers(model: PromptedLM, depths: Sequence[int], sources: Sequence[int]) -> Weights:
    """The parameters of the blocks at these depths, named by the global layers that they are, so that both sides name them alike."""
    return Weights(
        {
            f"layers.{source:03d}.{name}": parameter
            for depth, source in zip(depths, sources, strict=True)
            for name, parameter in model.blocks[depth].named_parameters()
        }
    )
