"""FedPrompt-single: FedPrompt with model privacy. Clients hold the embeddings and one layer, not
distilled, and tune that layer's prompt.

C. Dong, Y. Xie, B. Ding, Y. Shen, Y. Li. *Messenger Soft Prompts are Messengers in Federated
Learning*. Findings of EMNLP 2023. https://arxiv.org/abs/2311.06805, baseline "FedPrompt-Single".
The one layer's prompt is read by every layer of the global model, as the authors' code does where
depths differ; here that is part of the baseline's definition, not something that happens to shapes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedsp.federation.methods.registry import ClientSide, MethodEntry, Setup, register_method

if TYPE_CHECKING:
    from fedsp.models.prompted_lm import PromptedLM
    from fedsp.models.trainable import Messenger


def reading_one_layer(model: PromptedLM) -> PromptedLM:
    """The same model, every layer of which reads layer 0 of a prompt that has one layer."""
    from fedsp.models.prompted_lm import PromptedLM

    one = PromptedLM(
        model.model,
        model.name,
        positions=model.positions,
        prompt_layers=[0] * model.shape.layers,
        prompt_shape=replace(model.shape, layers=1),
    )
    one.recompute = model.recompute
    return one


def server_side(setup: Setup) -> tuple[PromptedLM, Messenger]:
    """The global model, all of whose layers read a prompt of one layer."""
    model = reading_one_layer(setup.model)
    whole = setup.initial_prompt()
    return model, whole.like(model, setup.seed, whole.values()[:, :1])


def client_side(setup: Setup, model: PromptedLM, messenger: Messenger) -> ClientSide:
    """Clients that hold the embeddings and the first layer."""
    from fedsp.models.auxiliary import build_auxiliary, parse_plan
    from fedsp.models.soft_prompt import SoftPrompt

    assert isinstance(messenger, SoftPrompt)
    auxiliary = build_auxiliary(
        setup.model, parse_plan([0], setup.model.shape.layers), setup.tokenizer
    )
    auxiliary.prompt_shape = model.prompt_shape
    return ClientSide(
        model=auxiliary, messenger=lambda: messenger.like(auxiliary, setup.seed), package=auxiliary
    )


register_method(
    MethodEntry(
        name="fedprompt_single",
        title="FedPrompt-single",
        paper="baseline of Dong et al., Findings of EMNLP 2023",
        clients_hold="embeddings and one layer",
        server_side=server_side,
        client_side=client_side,
        exact_weights=True,
    )
)
