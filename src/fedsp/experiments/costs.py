"""What a party's work in a round costs, measured on its own first batches: operations, tokens,
seconds, memory, numbers held, trained and sent.

Floating-point operations are those that torch's counter sees in a forward and a backward pass
(products of matrices and attention), not estimated. Memory is what a step needs at its peak besides
the text: weights, gradients, AdamW's moments, and the activations that autograd keeps for the
backward pass, each storage once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fedsp.data.encoding import Batch, training_batches
from fedsp.data.seeding import derive_seed
from fedsp.federation.methods.base import Method, Side, Work
from fedsp.federation.party import Party
from fedsp.models.trainable import trainable
from fedsp.training.loop import answer_loss, gradients_set
from fedsp.training.per_example_gradients import example_gradients

Figures = dict[str, float]


def measure(method: Method, party: Party, side: Side, seed: int) -> Figures:
    """The figures of one round of one party: `operations`, `tokens`, `seconds` of its forward and
    backward passes, `tokens_per_second`, `memory_bytes`, and the counts of `model_parameters`,
    `parameters_held`, `parameters_trained`, `parameters_sent`.

    What is in place is used and not changed.
    """
    works = method.work(party, side)
    tuned, own = party.messenger.trained(), trainable(party.model.model)
    of_the_model = {id(parameter) for parameter in party.model.parameters()}
    held = {id(parameter): parameter for parameter in [*own.values(), *tuned.values()]}
    added = sum(
        parameter.numel()
        for name, parameter in tuned.items()
        if id(parameter) not in of_the_model or ".lora_" in name
    )
    weights = sum(parameter.numel() * parameter.element_size() for parameter in held.values())
    _ = party.model.packs_branches  # tried out before anything is counted
    trained: dict[int, int] = {}
    operations = tokens = seconds = 0.0
    memory = weights
    for work in works:
        batches = list(
            training_batches(
                party.examples,
                steps=work.stage.steps,
                batch_size=work.stage.batch_size,
                seed=derive_seed(seed, work.stage.seed_label),
            )
        )
        sizes = {id(parameter): parameter.numel() for parameter in work.target.trained().values()}
        trained |= sizes
        # as in a round: what the messenger trains but this stage does not is frozen
        with gradients_set([one for one in tuned.values() if id(one) not in sizes], False):
            tokens += sum(int(batch.attention_mask.sum()) for batch in batches)
            with _counter() as counter:
                _pass(party, work, batches)
            operations += counter.get_total_flops()
            started = time.perf_counter()
            _pass(party, work, batches)
            if party.model.device.type == "cuda":
                torch.cuda.synchronize(party.model.device)
            seconds += time.perf_counter() - started
            kept = _activations(party, work, batches)
            memory = max(memory, weights + 3 * 4 * sum(sizes.values()) + kept)
    total = sum(parameter.numel() for parameter in held.values())
    return {
        "operations": operations,
        "tokens": tokens,
        "seconds": seconds,
        "memory_bytes": float(memory),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "model_parameters": float(total - added),
        "parameters_held": float(total),
        "parameters_trained": float(sum(trained.values())),
        "parameters_sent": float(
            sum(tensor.numel() for tensor in party.messenger.payload().values())
        ),
    }


def _activations(party: Party, work: Work, batches: list[Batch]) -> int:
    """Bytes that autograd keeps for the backward pass of the largest step."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in party.model.parameters()}
    most = 0
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
    return most


def _pass(party: Party, work: Work, batches: Iterable[Batch]) -> None:
    """A forward and a backward pass over batches, without a step; of private work, with a gradient
    for each example."""
    with gradients_set(work.target.trained().values(), True):
        for batch in batches:
            if work.stage.privacy:
                example_gradients(party.model, party.messenger, batch)
                continue
            value = answer_loss(
                party.model, party.messenger.prefix(party.model), batch.to(party.model.device)
            )
            value.backward()  # type: ignore[no-untyped-call]


def _counter() -> FlopCounterMode:
    """Torch's FLOP counter, extended by the CPU attention kernel, which it does not count by
    itself."""
    counter = FlopCounterMode(display=False)
    for way in ("", "_backward"):
        counted = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{way}")
        kernel = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{way}")
        counter.flop_registry[kernel] = counter.flop_registry[counted]
    return counter
