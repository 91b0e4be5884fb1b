"""A soft prompt and an adapter as one messenger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from fedsp.models.adapter import Adapter
from fedsp.models.payload import PROMPT, Payload, check, shapes_of
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import SoftPrompt
from fedsp.models.trainable import Messenger, Tensors


class PromptAndAdapter(Messenger):
    """A soft prompt and an adapter as one messenger; its tensors are those of both."""

    def __init__(self, prompt: SoftPrompt, adapter: Adapter) -> None:
        self.prompt, self.adapter = prompt, adapter

    def trained(self) -> dict[str, nn.Parameter]:
        own = {f"prompt.{name}": parameter for name, parameter in self.prompt.trained().items()}
        return self.adapter.trained() | own

    def payload(self) -> Payload:
        return dict(sorted((self.prompt.payload() | self.adapter.payload()).items()))

    def load(self, payload: Payload) -> None:
        check(payload, shapes_of(self.payload()))
        self.prompt.load({PROMPT: payload[PROMPT]})
        self.adapter.load({name: payload[name] for name in payload if name != PROMPT})

    def own_state(self) -> Tensors:
        return self.prompt.own_state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.prompt.restore(state)

    def distance(self, payload: Payload) -> Tensor:
        rest = {name: payload[name] for name in payload if name != PROMPT}
        far = self.adapter.distance(rest)
        return self.prompt.distance({PROMPT: payload[PROMPT]}).to(far.device) + far

    def prefix(self, model: PromptedLM) -> Tensor:
        return self.prompt.prefix(model)

    @contextmanager
    def apart(self, count: int) -> Iterator[Mapping[str, Tensor]]:
        with self.prompt.apart(count) as prompts, self.adapter.apart(count) as others:
            yield dict(sorted({**prompts, **others}.items()))

    def prefix_of(self, copies: Mapping[str, Tensor], model: PromptedLM) -> Tensor:
        return self.prompt.prefix_of(copies, model)
