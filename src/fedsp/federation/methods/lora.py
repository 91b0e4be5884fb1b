"""Federated LoRA: every client holds the whole frozen model and tunes low-rank adapters of it; both
factors are averaged.

E. J. Hu et al. *LoRA: Low-Rank Adaptation of Large Language Models*. ICLR 2022.
https://arxiv.org/abs/2106.09685; federated as in J. Zhang et al. *Towards Building the Federated
GPT: Federated Instruction Tuning*. ICASSP 2024. https://arxiv.org/abs/2305.05644. No model privacy.
The mean of products is not the product of means: the averaged adapter is an approximation, as in
the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsp.errors import require_installed
from fedsp.federation.methods.registry import MethodEntry, Setup, register_method

if TYPE_CHECKING:
    from fedsp.models.messengers.peft_adapters import PeftAdapters
    from fedsp.models.prompted_lm import PromptedLM


def server_side(setup: Setup) -> tuple[PromptedLM, PeftAdapters]:
    """The global model with adapters, and the adapters.

    Raises:
        ConfigurationError: PEFT is not installed.
        ModelError: as `PeftAdapters`.
    """
    from fedsp.data.seeding import derive_seed

    require_installed("study", "method = 'lora' needs", "peft")
    from fedsp.models.messengers.peft_adapters import PeftAdapters

    seed = derive_seed(setup.seed, "lora")
    return setup.model, PeftAdapters(setup.model, **setup.lora, seed=seed)


register_method(
    MethodEntry(
        name="lora",
        title="federated LoRA",
        paper="Hu et al., ICLR 2022; Zhang et al., ICASSP 2024",
        clients_hold="the whole model",
        server_side=server_side,
        trains_weights=True,
        exact_weights=True,
    )
)
