"""Soft prompts: the messengers. One tensor of float32 numbers, in one of three spaces.

Notation: P prompt length, L layers, H key/value heads, K head size, D hidden size.

- `key_value` (P, L, 2, H, K): the keys and values themselves, as in the paper and in prefix tuning
  (Li and Liang, ACL 2021, https://arxiv.org/abs/2101.00190). Each side uses them as they are.
- `residual` (P, L, D): the input of each layer's block. Each side makes keys and values from it
  with its own norm and projections, so the same numbers mean the same thing to the auxiliary and to
  the global model. Half the bytes of the other.
- `input` (P, D): embeddings in front of those of the text (Lester et al., EMNLP 2021,
  https://arxiv.org/abs/2104.08691), which each side reads through all of its layers.

With a projection the values are `origin` + MLP(embedding); on receipt `origin` is set so that they
equal the received values. Training updates the MLP and the embedding; only the resulting values
are sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedsp.data.seeding import derive_seed
from fedsp.errors import ModelError, PromptError, StorageError
from fedsp.models.payload import PROMPT, Payload, check
from fedsp.models.prompted_lm import ModelShape, PromptedLM
from fedsp.models.trainable import Messenger
from fedsp.storage import parse_json, read_tensors, write_json, write_tensors

Space = Literal["key_value", "residual", "input"]
PEFT_TENSOR = "prompt_embeddings"


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Everything needed to lay out a prompt: its space, P, the model's shape, and the projection's
    hidden size (0 for none)."""

    space: Space
    length: int
    model: ModelShape
    projection: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the one tensor that travels."""
        if self.space == "input":
            return (self.length, self.model.hidden)
        if self.space == "residual":
            return (self.length, self.model.layers, self.model.hidden)
        return (self.length, self.model.layers, 2, self.model.heads, self.model.head_size)


class SoftPrompt(nn.Module, Messenger):
    """A tunable soft prompt. Its parameters are what the optimizer trains; `values()` is what they
    amount to."""

    origin: Tensor

    def __init__(self, spec: PromptSpec, values: Tensor | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec
        start = torch.zeros(spec.shape) if values is None else values.detach().float().clone()
        if tuple(start.shape) != spec.shape:
            raise PromptError(
                f"a {spec.space} prompt of {spec.length} tokens for {spec.model} has shape"
                f" {spec.shape}, not {tuple(start.shape)}"
            )
        if spec.projection:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.embedding = nn.Parameter(torch.randn(spec.length, spec.model.hidden))
                self.projection = nn.Sequential(
                    nn.Linear(spec.model.hidden, spec.projection),
                    nn.Tanh(),
                    nn.Linear(spec.projection, torch.Size(spec.shape[1:]).numel()),
                )
            self.register_buffer("origin", torch.zeros(spec.shape), persistent=False)
        else:
            self.direct = nn.Parameter(start)
        self.load({PROMPT: start})

    def values(self) -> Tensor:
        """The prompt's numbers, float32, of the spec's shape, with gradients to the parameters."""
        if not self.spec.projection:
            return self.direct
        made: Tensor = self.projection(self.embedding).view(self.spec.shape)
        return self.origin + made

    def trained(self) -> dict[str, nn.Parameter]:
        """What an optimizer trains, by name."""
        return dict(self.named_parameters())

    def distance(self, payload: Payload) -> Tensor:
        """The squared distance of these values from a payload's, with gradients."""
        values = self.values()
        return (values - payload[PROMPT].to(values.device)).square().sum()

    def payload(self) -> Payload:
        """What may travel: the folded values, on the CPU."""
        return {PROMPT: self.values().detach().cpu().clone()}

    @torch.no_grad()
    def load(self, payload: Payload) -> None:
        """Set the prompt to received values: exactly, or up to rounding with a projection.

        Raises:
            PayloadError: the payload is not one finite float32 tensor of this prompt's shape.
        """
        check(payload, {PROMPT: self.spec.shape})
        if self.spec.projection:
            self.origin.copy_(
                payload[PROMPT].to(self.origin.device)
                - self.projection(self.embedding).view(self.spec.shape)
            )
        else:
            self.direct.copy_(payload[PROMPT])

    def own_state(self) -> dict[str, Tensor]:
        """State that the party keeps and never sends: projection and embedding, if any."""
        return self.state_dict() if self.spec.projection else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set the projection that `own_state` returned in an earlier round."""
        if state:
            self.load_state_dict(dict(state), strict=False)

    def like(self, model: PromptedLM, seed: int, values: Tensor | None = None) -> SoftPrompt:
        """Another prompt of the same settings, for a model that may read fewer layers; zeros, or
        `values`. Its projection is drawn from the run's seed."""
        spec = replace(self.spec, model=model.prompt_shape)
        return SoftPrompt(spec, values, seed=derive_seed(seed, "prompt")).to(model.device)

    def prefix(self, model: PromptedLM) -> Tensor:
        """Keys and values (P, depths, 2, H, K) for each depth of `model`, which reads the layers
        its `prompt_layers` name.

        Raises:
            PromptError: prompt and model have different shapes.
        """
        return self.read(self.values(), model)

    def read(self, values: Tensor, model: PromptedLM) -> Tensor:
        """As `prefix`, for `values` of this prompt's shape, or of one prompt per example, with a
        leading batch dimension that the result has too.

        Raises:
            PromptError: prompt and model have different shapes.
        """
        if self.spec.model != model.prompt_shape:
            raise PromptError(
                f"the prompt was made for {self.spec.model}, but {model.name} has"
                f" {model.prompt_shape}"
            )
        if self.spec.space == "input":
            return model.read_embeddings(values)
        layers = values.dim() - len(self.spec.shape) + 1
        values = values.index_select(
            layers, torch.tensor(model.prompt_layers, device=values.device)
        )
        return values if self.spec.space == "key_value" else model.keys_and_values(values)

    @contextmanager
    def apart(self, count: int) -> Iterator[Mapping[str, Tensor]]:
        """The values (count, *shape), a copy for each row of a batch, with gradients."""
        values = self.values().detach()
        yield {PROMPT: values[None].expand(count, *values.shape).clone().requires_grad_(True)}

    def prefix_of(self, copies: Mapping[str, Tensor], model: PromptedLM) -> Tensor:
        """`prefix` of such copies, one per row."""
        return self.read(copies[PROMPT], model)

    def save(self, path: Path, extra: Mapping[str, str] | None = None) -> None:
        """Write the values as safetensors, the spec in the header.

        Raises:
            StorageError: the disk did not take it.
        """
        write_tensors(
            path, self.payload(), {"spec": json.dumps(asdict(self.spec)), **(extra or {})}
        )

    def export(self, model: PromptedLM, folder: Path) -> dict[str, Any]:
        """Write the prompt as a PEFT adapter with one tensor: (P, D) for prompt tuning where its
        space is `input`; else, folded into keys and values under the global model,
        (P, L * 2 * H * K) for prefix tuning.

        Formats: https://huggingface.co/docs/peft/package_reference/prompt_tuning and prefix_tuning.

        Raises:
            PromptError: the prompt was tuned with tokens counted from zero, which PEFT cannot
                reproduce.
        """
        if model.positions != "hugging_face":
            raise PromptError(
                "this prompt was tuned with positions = 'from_zero', but PEFT counts the prompt:"
                " its logits would differ; tune with 'hugging_face' to export"
            )
        shape, embedded, tokens = model.shape, self.spec.space == "input", self.spec.length
        with torch.no_grad():
            values = self.values() if embedded else self.prefix(model)
            tensor = values.cpu().reshape(tokens, -1)
        write_tensors(folder / "adapter_model.safetensors", {PEFT_TENSOR: tensor}, {"format": "pt"})
        kind = "PROMPT_TUNING" if embedded else "PREFIX_TUNING"
        about = {
            "peft_type": kind,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model.name,
            "inference_mode": True,
            "num_virtual_tokens": tokens,
            "num_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "token_dim": shape.hidden if embedded else shape.heads * shape.head_size,
            "num_transformer_submodules": 1,
        }
        if not embedded:
            about |= {"encoder_hidden_size": about["token_dim"], "prefix_projection": False}
        write_json(folder / "adapter_config.json", about)
        words = f"PEFT {kind.lower().replace('_', '-')} adapter ({tokens} tokens)"
        return {"kind": words, "peft_type": kind, "virtual_tokens": tokens}

    def merge(self, model: PromptedLM) -> dict[str, Any]:
        """Raises ModelError: a prompt stands in front of the text, and in no weights."""
        raise ModelError(
            "only adapters and weights can be merged into a model, and this run tuned a soft"
            " prompt: export it without merging"
        )


def read_prompt(path: Path) -> SoftPrompt:
    """The prompt that `SoftPrompt.save` wrote, without its projection: it has been folded.

    Raises:
        PromptError: the file is missing, damaged, or holds something else.
    """
    try:
        tensors, metadata = read_tensors(path)
        fields: dict[str, Any] = parse_json(metadata["spec"])
        spec = PromptSpec(
            space=fields["space"], length=fields["length"], model=ModelShape(**fields["model"])
        )
        values = tensors[PROMPT]
    except StorageError as error:
        raise PromptError(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise PromptError(
            f"{path} is not a soft prompt that fedsp wrote: {error!r} is missing or wrong in its"
            " header"
        ) from error
    return SoftPrompt(spec, values)


def initial_values(
    spec: PromptSpec, model: PromptedLM, *, scale: float | None, tokens: Tensor | None, seed: int
) -> Tensor:
    """Initial values: activations of `model` on the first P of `tokens` (T,) if given, else normal
    with standard deviation `scale` (None: zeros).

    Raises:
        PromptError: there are fewer than P tokens.
    """
    if tokens is None:
        noise = torch.randn(spec.shape, generator=torch.Generator().manual_seed(seed))
        return noise * (scale or 0.0)
    if len(tokens) < spec.length:
        raise PromptError(
            f"prompt.init_text has {len(tokens)} tokens, a prompt of {spec.length} needs as many:"
            " give a longer text"
        )
    tokens = tokens[: spec.length].to(model.device)
    if spec.space == "input":
        with torch.no_grad():
            embedded: Tensor = model.model.get_input_embeddings()(tokens)
        return embedded.float().cpu()
    inputs, pairs = model.activations(tokens)
    return (inputs if spec.space == "residual" else pairs).cpu()


def import_peft(folder: Path, model: PromptedLM) -> SoftPrompt:
    """A prompt from a PEFT adapter: a key/value one from prefix tuning, one in front of the
    embeddings from prompt tuning.

    Raises:
        PromptError: the folder holds no such adapter, or one for another shape.
    """
    try:
        tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    except StorageError as error:
        raise PromptError(f"{folder} holds no PEFT adapter: {error}") from error
    if list(tensors) != [PEFT_TENSOR]:
        raise PromptError(
            f"{folder} is not a prefix-tuning adapter: it holds {sorted(tensors)}, expected"
            f" [{PEFT_TENSOR!r}]"
        )
    values = tensors[PEFT_TENSOR].float()
    space: Space = "input" if values.shape[1] == model.shape.hidden else "key_value"
    spec = PromptSpec(space=space, length=values.shape[0], model=model.shape)
    if values.shape[1] != torch.Size(spec.shape[1:]).numel():
        raise PromptError(
            f"the adapter holds {tuple(values.shape)} numbers, but {model.name} with {model.shape}"
            f" needs ({spec.length}, {torch.Size(spec.shape[1:]).numel()})"
        )
    return SoftPrompt(spec, values.view(spec.shape))
