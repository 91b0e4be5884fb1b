"""What a party's work in a round costs, measured on its own first batches: operations, tokens, seconds, memory, numbers held, trained and sent.

Floating-point operations are those that torch's counter sees in a forward and a backward pass (products of matrices and attention), not
estimated. Memory is what a step needs at its peak besides the text: weights, gradients, AdamW's moments, and the activations that autograd
keeps for the backward pass, each storage once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedsp.data.encoding import Batch, training_batches
from fedsp.fitting import answer_loss, learning, trainable
from fedsp.methods.base import Method, Side, Work
from fedsp.parties import Party
from fedsp.rounds import derive_seed

Figures = dict[str, float]


def measure(method: Method, party: Party, side: Side, seed: int) -> Figures:
    """The figures of one round of one party: `operations`, `tokens`, `seconds` of its steps, `tokens_per_second`, `memory_bytes`, and the counts
    of `parameters_held`, `parameters_trained`, `parameters_sent`. What is in place is used and not changed."""
    works = method.work(party, side)
    held = {id(parameter): parameter for parameter in [*trainable(party.model.model).values(), *party.tuned.trained().values()]}
    weights = sum(parameter.numel() * parameter.element_size() for parameter in held.values())
    figures: Figures = {"operations": 0.0, "tokens": 0.0, "seconds": 0.0, "memory_bytes": float(weights)}
    for work in works:
        batches = list(training_batches(party.examples, steps=work.stage.steps, batch_size=work.stage.batch_size, seed=derive_seed(seed, work.name)))
        figures["tokens"] += sum(int(batch.attention_mask.sum()) for batch in batches)
        figures["operations"] += _operations(party, work, batches)
        activations, seconds = _activations_and_seconds(party, work, batches)
        figures["seconds"] += seconds
        trained = sum(4 * parameter.numel() for parameter in work.train.values())
        figures["memory_bytes"] = max(figures["memory_bytes"], float(weights + 3 * trained + activations))
    return figures | {
        "tokens_per_second": figures["tokens"] / figures["seconds"] if figures["seconds"] else 0.0,
        "parameters_held": float(sum(parameter.numel() for parameter in held.values())),
        "parameters_trained": float(sum({id(p): p.numel() for work in works for p in work.train.values()}.values())),
        "parameters_sent": float(sum(tensor.numel() for tensor in party.tuned.payload().values())),
    }


def _operations(party: Party, work: Work, batches: Iterable[Batch]) -> float:
    with _counter() as counter:
        _pass(party, work, batches)
    return float(counter.get_total_flops())


def _activations_and_seconds(party: Party, work: Work, batches: list[Batch]) -> tuple[int, float]:
    """Bytes that autograd keeps for the backward pass of the largest step, and the seconds of all steps."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in party.model.parameters()}
    most, started = 0, time.perf_counter()
    for batch in batches:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            _pass(party, work, [batch])
        most = max(most, sum(kept.values()))
    return most, time.perf_counter() - started


def _pass(party: Party, work: Work, batches: Iterable[Batch]) -> None:
    """A forward and a backward pass over batches, without a step."""
    with learning(work.train.values()):
        for batch in batches:
            value = answer_loss(party.model, party.tuned.prefix(party.model), batch.to(party.model.device))
            value.backward()  # type: ignore[no-untyped-call]


def _counter() -> AbstractContextManager[Any]:
    """Torch's counter, which is told of attention on a CPU: it knows the formula, and not the name of that kernel."""
    operations: Any = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]

    kernels = {
        operations._scaled_dot_product_flash_attention_for_cpu: forward,
        operations._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)
