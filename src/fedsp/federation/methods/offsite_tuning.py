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

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsp.federation.methods.registry import ClientSide, MethodEntry, Setup, register_method

if TYPE_CHECKING:
    from fedsp.models.auxiliary import LayerPlan
    from fedsp.models.prompted_lm import PromptedLM
    from fedsp.models.trainable import Messenger
    from fedsp.models.weights import Weights


def outer_layers(model: PromptedLM, depths: Sequence[int], sources: Sequence[int]) -> Weights:
    """The parameters of the blocks at these depths, named by the global layers that they are, so
    that both sides name them alike."""
    from fedsp.models.weights import Weights

    return Weights(
        {
            f"layers.{source:03d}.{name}": parameter
            for depth, source in zip(depths, sources, strict=True)
            for name, parameter in model.blocks[depth].named_parameters()
        }
    )


def _outer(plan: LayerPlan) -> tuple[list[int], list[int]]:
    """The depths of the auxiliary model that are kept verbatim, and the global layers that stand
    there."""
    depths = [depth for depth, frozen in enumerate(plan.frozen) if frozen]
    return depths, [plan.sources[depth] for depth in depths]


def server_side(setup: Setup) -> tuple[PromptedLM, Weights]:
    """The global model, and the parameters of its first and last layers, which are trained."""
    _, sources = _outer(setup.plan())
    return setup.model, outer_layers(setup.model, sources, sources)


def client_side(setup: Setup, model: PromptedLM, messenger: Messenger) -> ClientSide:
    """Clients that hold the auxiliary model, whose outer layers are the global model's."""
    auxiliary = setup.package()
    outer = outer_layers(auxiliary, *_outer(auxiliary.plan))
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
