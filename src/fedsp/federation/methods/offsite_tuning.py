"""Offsite-Tuning: the owner of text gets the first and last layers and a frozen, compressed middle;
it tunes the layers, which are plugged back.

G. Xiao, J. Lin, S. Han. *Offsite-Tuning: Transfer Learning without Full Model*. 2023.
https://arxiv.org/abs/2302.04870; federated by averaging the tuned layers, as in T. Fan et al.
*FATE-LLM* (https://arxiv.org/abs/2310.10049) and W. Kuang et al. *FederatedScope-LLM*
(https://arxiv.org/abs/2309.00363). With one client it is the paper, with several its federated
form. The middle is made by dropping layers and may be distilled. Clients hold the outer layers and
the embeddings bit for bit: model privacy is that of the middle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsp.federation.methods.registry import ClientSide, MethodEntry, Setup, register_method

if TYPE_CHECKING:
    from fedsp.models.prompted_lm import PromptedLM
    from fedsp.models.trainable import Messenger


def server_side(setup: Setup) -> tuple[PromptedLM, Messenger]:
    """The global model, and the parameters of its first and last layers, which are trained."""
    from fedsp.models.adapter import global_blocks
    from fedsp.models.messengers.making import blocks_of, layer_weights

    outer = global_blocks(blocks_of(setup.plan(), "verbatim"))
    return setup.model, layer_weights(setup.model, outer)


def client_side(setup: Setup, model: PromptedLM, messenger: Messenger) -> ClientSide:
    """Clients that hold the auxiliary model, whose outer layers are the global model's."""
    from fedsp.models.messengers.making import blocks_of, layer_weights

    auxiliary = setup.package()
    outer = layer_weights(auxiliary, blocks_of(auxiliary.plan, "verbatim"))
    return ClientSide(model=auxiliary, messenger=lambda: outer, package=auxiliary)


register_method(
    MethodEntry(
        name="offsite_tuning",
        title="offsite-tuning",
        paper="Xiao, Lin and Han, 2023; FATE-LLM, 2023",
        clients_hold="first and last layers, a compressed middle",
        server_side=server_side,
        client_side=client_side,
        trains_weights=True,
        exact_weights=True,
        package=True,
    )
)
