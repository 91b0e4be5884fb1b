"""What the server can do without a label so that a prompt means to the global model what it means to the auxiliary one.

`adapt_prompt` takes steps on the prompt through the global model, on public text: the KL divergence from what the auxiliary model says of the
next token, under the prompt as it was aggregated. `TranslatedPrompt` maps keys and values, layer by layer, from the auxiliary model's space to
the global one's; the maps are fitted by ridge regression on what both make of the same public text, and disclose no weight. (The idea of a
map between the spaces of two models: Z. Wu, Y. Wu, L. Mou. *Zero-Shot Continuous Prompt Transfer*. ICLR 2024.
https://arxiv.org/abs/2310.01691, who go through distances to anchors instead.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from fedsp.data.batching import pad
from fedsp.data.seeding import derive_seed
from fedsp.models.payload import PROMPT, Payload
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.training.loop import Optimisation, fit

Sequences = Sequence[Sequence[int]]


def adapt_prompt(
    prompt: SoftPrompt, model: PromptedLM, auxiliary: PromptedLM, texts: Sequences, *, steps: int, batch_size: int, optimisation: Optimisation, seed: int
) -> list[float]:
    """Steps on the prompt in place; returns the loss of each, KL(auxiliary || global) in nats per token.

    Raises:
        TrainingDiverged: a loss is not finite.
    """
    rng = random.Random(derive_seed(seed, "adapt"))
    with torch.no_grad():
        told = prompt.prefix(auxiliary).clone()

    def loss(indices: list[int]) -> Tensor:
        batch = pad([texts[index] for index in indices], model.device)
        real = batch.mask.bool()
        with torch.no_grad():
            wanted = torch.log_softmax(auxiliary.logits(auxiliary(batch.ids, batch.mask, told)[real]), dim=-1)
        said = torch.log_softmax(model.logits(model(batch.ids, batch.mask, prompt.prefix(model))[real]), dim=-1)
        return kl_div(said, wanted, log_target=True, reduction="batchmean")

    batches = [rng.sample(range(len(texts)), min(batch_size, len(texts))) for _ in range(steps)]
    return fit(prompt.trained(), loss, batches, optimisation).losses


class TranslatedPrompt(SoftPrompt):
    """A key/value prompt that travels in the auxiliary model's space and is read, through one affine map per layer, in the global model's."""

    maps: Tensor
    offsets: Tensor

    def __init__(self, spec: PromptSpec, values: Tensor, *, maps: Tensor, offsets: Tensor, seed: int = 0) -> None:
        super().__init__(spec, values, seed=seed)
        self.register_buffer("maps", maps, persistent=False)  # (L, 2, H K, H K)
        self.register_buffer("offsets", offsets, persistent=False)  # (L, 2, H K)

    def read(self, values: Tensor, model: PromptedLM) -> Tensor:
        """The translated keys and values (P, L, 2, H, K), with gradients to those that travel."""
        pairs = super().read(values, model)
        flat = pairs.flatten(start_dim=-2)  # (P, L, 2, H K)
        return (torch.einsum("...plkh,lkhj->...plkj", flat, self.maps) + self.offsets).view_as(pairs)

    @torch.no_grad()
    def translated(self, payload: Payload, model: PromptedLM) -> Payload:
        """A payload as the global model reads it."""
        self.load(payload)
        return {PROMPT: self.prefix(model).cpu()}


@torch.no_grad()
def fit_translation(model: PromptedLM, auxiliary: PromptedLM, texts: Sequences, *, ridge: float = 1e-2, most: int = 20_000) -> tuple[Tensor, Tensor]:
    """Maps (L, 2, HK, HK) and offsets (L, 2, HK) that take the auxiliary model's keys and values of a text to the global model's.

    Ridge regression on centred pairs of at most `most` tokens; the penalty is `ridge` times the mean variance. A layer that no depth of the
    auxiliary model reads stays as it is.
    """
    shape = model.shape
    width = shape.heads * shape.head_size
    pairs: list[tuple[Tensor, Tensor]] = []
    tokens = 0
    for text in texts:
        ids = torch.tensor(text, device=model.device)
        pairs.append((auxiliary.activations(ids)[1].cpu(), model.activations(ids)[1].cpu()))
        tokens += len(text)
        if tokens >= most:
            break
    given, wanted = (torch.cat([pair[side] for pair in pairs]).flatten(start_dim=3).double() for side in (0, 1))  # (N, depths or L, 2, H K)
    maps, offsets = torch.eye(width).repeat(shape.layers, 2, 1, 1), torch.zeros(shape.layers, 2, width)
    for layer in range(shape.layers):
        if layer not in auxiliary.prompt_layers:
            continue
        depth = auxiliary.prompt_layers.index(layer)
        for kind in (0, 1):
            x, y = given[:, depth, kind], wanted[:, layer, kind]
            x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
            gram = (x - x_mean).T @ (x - x_mean)
            penalty = ridge * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype)
            solved = torch.linalg.solve(gram + penalty, (x - x_mean).T @ (y - y_mean))
            maps[layer, kind], offsets[layer, kind] = solved.float(), (y_mean - x_mean @ solved).float()
    return maps.to(model.device), offsets.to(model.device)
