"""Finetune: all weights are tuned, in one place or by federated averaging.

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas. *Communication-Efficient Learning
of Deep Networks from Decentralized Data*. AISTATS 2017. https://arxiv.org/abs/1602.05629. Every
client holds the whole model: no model privacy. In one place it is the ordinary fine-tuning of
FedSP's table (https://arxiv.org/abs/2311.06805): no data privacy either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsp.federation.methods.registry import MethodEntry, Setup, register_method

if TYPE_CHECKING:
    from fedsp.models.prompted_lm import PromptedLM
    from fedsp.models.weights import Weights


def server_side(setup: Setup) -> tuple[PromptedLM, Weights]:
    """The global model, and every parameter of it, each once even if several layers share it."""
    from fedsp.models.weights import Weights

    return setup.model, Weights(setup.model.trained())


register_method(
    MethodEntry(
        name="finetune",
        title="finetune",
        paper="McMahan et al., AISTATS 2017 (federated averaging)",
        clients_hold="the whole model",
        server_side=server_side,
        trains_weights=True,
        exact_weights=True,
    )
)
