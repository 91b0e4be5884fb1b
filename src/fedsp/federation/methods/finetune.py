"""Finetune: all weights are tuned, in one place or by federated averaging.

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas. *Communication-Efficient Learning of Deep Networks from Decentralized
Data*. AISTATS 2017. https://arxiv.org/abs/1602.05629. Every client holds the whole model: no model privacy. In one place it is the
ordinary fine-tuning of FedSP's table (https://arxiv.org/abs/2311.06805): no data privacy either.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsp.federation.methods.base import Averaging
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.trainable import trainable
from fedsp.models.weights import Weights


@dataclass(frozen=True)
class Finetune(Averaging):
    """Steps on all weights; the mean of them."""


def all_weights(model: PromptedLM) -> Weights:
    """Every parameter, those that depths or ends share once."""
    return Weights(trainable(model.model))
