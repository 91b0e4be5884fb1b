"""PEFT's own low-rank adapters as what is tuned and sent, of a model that a party holds whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from fedsp.errors import ModelError
from fedsp.models.adapter import lora_figures
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.weights import Weights
from fedsp.storage import write_tensors


class PeftAdapters(Weights):
    """Adapters (E. J. Hu et al. *LoRA*. ICLR 2022. https://arxiv.org/abs/2106.09685) that PEFT puts
    into a model's layers in place. The second factors start at zero, so at first nothing changes.

    Without `targets`, the modules are those that PEFT names for the family.

    Raises:
        ModelError: PEFT knows no modules for this family, or none of these names.
    """

    def __init__(
        self, model: PromptedLM, *, rank: int, alpha: float, targets: list[str], seed: int
    ) -> None:
        self._settings = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=targets or None,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            try:
                # that Conv1D has its axes the other way, which PEFT then minds
                warnings.simplefilter("ignore", UserWarning)
                inject_adapter_in_model(self._settings, model.model)
            except ValueError as error:
                raise ModelError(
                    f"PEFT cannot put adapters into {model.name} ({str(error).splitlines()[0]}):"
                    " name its linear modules in lora.targets"
                ) from error
        model.model.requires_grad_(False)
        named = model.model.named_parameters()
        super().__init__({name: one for name, one in named if ".lora_" in name})

    def export(self, model: PromptedLM, folder: Path) -> dict[str, Any]:
        """Write the adapters as PEFT does.

        Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
        """
        tensors = {
            f"base_model.model.{name}": tensor.detach().cpu().contiguous()
            for name, tensor in get_peft_model_state_dict(model.model).items()
        }
        write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
        self._settings.base_model_name_or_path = model.name
        self._settings.inference_mode = True
        self._settings.save_pretrained(str(folder))
        return lora_figures(self._settings.r, merged=False)

    def merge(self, model: PromptedLM) -> dict[str, Any]:
        """Add the adapters to the weights of the model, which has none any more from then on."""
        for name, module in list(model.model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                model.model.set_submodule(name, module.get_base_layer())
        del model.model.peft_config
        return lora_figures(self._settings.r, merged=True)
