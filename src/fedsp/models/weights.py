"""Weights of a model as what is tuned and sent: all of them, some layers, or low-rank adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsp.errors import ModelError
from fedsp.models.payload import Payload, check
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.trainable import Messenger


class Weights(Messenger):
    """A messenger of model parameters, keyed by the names in the payload; they are tuned in place,
    without a copy.

    Parties that share one model in one process must each load their payload before any other call.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, first_depth: int = 0) -> None:
        self.first_depth = first_depth
        self._parameters = dict(sorted(parameters.items()))

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters."""
        return self._parameters

    def payload(self) -> Payload:
        """Their numbers, on the CPU, float32."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def load(self, payload: Payload) -> None:
        """Copy a received payload into the parameters.

        Raises:
            PayloadError: its names, shapes or dtypes differ, or a value is not finite.
        """
        check(
            payload, {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        )
        for name, parameter in self._parameters.items():
            parameter.copy_(payload[name])

    def distance(self, payload: Payload) -> Tensor:
        """The squared distance from a payload's numbers, with gradients."""
        return torch.stack(
            [
                (parameter - payload[name].to(parameter.device)).square().sum()
                for name, parameter in self._parameters.items()
            ]
        ).sum()

    def export(self, model: PromptedLM, folder: Path) -> dict[str, Any]:
        """Raises ModelError: weights are no adapter."""
        raise ModelError(
            "PEFT has no form for weights that were tuned: export the whole model, merged, if they"
            " are its own"
        )

    def merge(self, model: PromptedLM) -> dict[str, Any]:
        """Nothing is to be added: the model's own parameters are what was tuned.

        Raises:
            ModelError: some of these parameters are not the model's own.
        """
        own = {id(parameter) for parameter in model.model.parameters()}
        if any(id(parameter) not in own for parameter in self._parameters.values()):
            return super().merge(model)
        return {"kind": f"model with {len(self._parameters)} tuned weight tensors"}
