"""Zero-shot: the global model as it is, nothing tuned, nothing sent.

T. B. Brown et al. *Language Models are Few-Shot Learners*. NeurIPS 2020.
https://arxiv.org/abs/2005.14165 (section 2, zero-shot).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedsp.federation.methods.registry import MethodEntry, Setup, Stages, averaging, register_method

if TYPE_CHECKING:
    from fedsp.federation.methods.base import Method
    from fedsp.models.prompted_lm import PromptedLM
    from fedsp.models.trainable import Messenger, Tensors


def algorithm(stages: Stages, start: Tensors) -> Method:
    """A method that takes no step."""
    none = replace(
        stages, messenger=replace(stages.messenger, steps=0), server=replace(stages.server, steps=0)
    )
    return averaging(none, start)


def server_side(setup: Setup) -> tuple[PromptedLM, Messenger]:
    """The global model, with nothing to tune."""
    from fedsp.models.weights import Weights

    return setup.model, Weights({})


register_method(
    MethodEntry(
        name="zero_shot",
        title="zero-shot",
        paper="Brown et al., NeurIPS 2020",
        clients_hold="nothing",
        algorithm=algorithm,
        server_side=server_side,
        federated=False,
        rounds=False,
    )
)
