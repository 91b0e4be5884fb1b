"""FedPrompt-single: FedPrompt with model privacy. Clients hold the embeddings and one layer, not distilled, and tune that layer's prompt.

C. Dong, Y. Xie, B. Ding, Y. Shen, Y. Li. *Tunable Soft Prompts are Messengers in Federated Learning*. Findings of EMNLP 2023.
https://arxiv.org/abs/2311.06805, baseline "FedPrompt-Single". The one layer's prompt is read by every layer of the global model, as the
authors' code does where depths differ; here that is part of the baseline's definition, not something that happens to shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedsp.federation.methods.base import Averaging
from fedsp.models.prompted_lm import PromptedLM


@dataclass(frozen=True)
class FedPromptSingle(Averaging):
    """Steps on one layer's prompt through one layer; the mean of the prompts."""


def reading_one_layer(model: PromptedLM) -> PromptedLM:
    """The same model, every layer of which reads layer 0 of a prompt that has one layer."""
    one = PromptedLM(
        model.model,
        model.name,
        positions=model.positions,
        prompt_layers=[0] * model.shape.layers,
        prompt_shape=replace(model.shape, layers=1),
    )
    one.recompute = model.recompute
    return one
