"""Federated LoRA: every client holds the whole frozen model and tunes low-rank adapters of it; both
factors are averaged.

E. J. Hu et al. *LoRA: Low-Rank Adaptation of Large Language Models*. ICLR 2022.
https://arxiv.org/abs/2106.09685; federated as in J. Zhang et al. *Towards Building the Federated
GPT: Federated Instruction Tuning*. ICASSP 2024. https://arxiv.org/abs/2305.05644. No model privacy.
The mean of products is not the product of means: the averaged adapter is an approximation, as in
the paper.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from fedsp.errors import ModelError, require_installed
from fedsp.federation.methods.registry import MethodEntry, Setup, register_method

if TYPE_CHECKING:
    from fedsp.models.prompted_lm import PromptedLM
    from fedsp.models.weights import Weights


def low_rank_adapters(
    model: PromptedLM, *, rank: int, alpha: float, targets: list[str], seed: int
) -> Weights:
    """PEFT's adapters, put into the model's layers in place. The second factors start at zero, so
    at first nothing changes.

    Without `targets`, the modules are those that PEFT names for the family.

    Raises:
        ConfigurationError: PEFT is not installed.
        ModelError: PEFT knows no modules for this family, or none of these names.
    """
    require_installed("study", "method = 'lora' needs", "peft")
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from fedsp.models.weights import Weights

    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets or None
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        try:
            # that Conv1D has its axes the other way, which PEFT then minds
            warnings.simplefilter("ignore", UserWarning)
            inject_adapter_in_model(settings, model.model)
        except ValueError as error:
            raise ModelError(
                f"PEFT cannot put adapters into {model.name} ({str(error).splitlines()[0]}): name"
                " its linear modules in lora.targets"
            ) from error
    model.model.requires_grad_(False)
    return Weights(
        {name: parameter for name, parameter in model.model.named_parameters() if ".lora_" in name}
    )


def server_side(setup: Setup) -> tuple[PromptedLM, Weights]:
    """The global model with adapters, and the adapters."""
    from fedsp.data.seeding import derive_seed

    seed = derive_seed(setup.seed, "lora")
    return setup.model, low_rank_adapters(setup.model, **setup.lora, seed=seed)


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
