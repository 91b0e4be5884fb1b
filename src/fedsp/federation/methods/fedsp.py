"""FedSP: clients hold an auxiliary model and tune the soft prompt through it. The algorithm itself
is `fedsp.algorithm`.

C. Dong, Y. Xie, B. Ding, Y. Shen, Y. Li. *Tunable Soft Prompts are Messengers in Federated
Learning*. Findings of EMNLP 2023. https://arxiv.org/abs/2311.06805.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsp.federation.methods.registry import (
    ClientSide,
    MethodEntry,
    Setup,
    Stages,
    register_method,
)

if TYPE_CHECKING:
    from fedsp.federation.methods.base import Method
    from fedsp.models.prompted_lm import PromptedLM
    from fedsp.models.trainable import Messenger, Tensors


def algorithm(stages: Stages, start: Tensors) -> Method:
    """FedSP with these stages; `start` are the auxiliary weights as handed out, if clients train
    them."""
    from fedsp.algorithm import FedSP

    return FedSP(
        auxiliary_stage=stages.auxiliary,
        prompt_stage=stages.messenger,
        server_stage=stages.server,
        package=start,
    )


def server_side(setup: Setup) -> tuple[PromptedLM, Messenger]:
    """The global model, and the messenger of `[messenger]` in it."""
    from fedsp.models.adapter import global_blocks
    from fedsp.models.messengers.making import blocks_of, make_messenger
    from fedsp.models.messengers.registry import Place, find_messenger

    entry = find_messenger(setup.messenger["kind"])
    layers = blocks_of(setup.plan(), setup.messenger["layers"]) if entry.in_layers else []
    place = Place(
        model=setup.model,
        blocks=global_blocks(layers),
        prompt=setup.initial_prompt,
        settings=setup.messenger,
        seed=setup.seed,
    )
    return setup.model, make_messenger(place)


def client_side(setup: Setup, model: PromptedLM, messenger: Messenger) -> ClientSide:
    """Clients that hold the auxiliary model, and the same messenger in it."""
    from fedsp.models.messengers.making import client_messenger

    auxiliary = setup.package()
    own = client_messenger(auxiliary, setup.prompt, setup.messenger, setup.seed)
    return ClientSide(model=auxiliary, messenger=own, package=auxiliary)


register_method(
    MethodEntry(
        name="fedsp",
        title="FedSP",
        paper="Dong et al., Findings of EMNLP 2023",
        clients_hold="the auxiliary model",
        algorithm=algorithm,
        server_side=server_side,
        client_side=client_side,
        package=True,
        deployable=True,
    )
)
