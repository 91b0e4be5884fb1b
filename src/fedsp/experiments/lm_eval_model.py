"""What a run tuned as a model of lm-evaluation-harness
(https://github.com/EleutherAI/lm-evaluation-harness), for any of its tasks:

    python -m fedsp.experiments.lm_eval_model --model fedsp --model_args run=DIR --tasks sciq

Importing this module registers the model, so `lm_eval.simple_evaluate(model="fedsp",
model_args={"run": "DIR"}, ...)` works too.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from fedsp.data.chat import end_of_turn
from fedsp.data.encoding import encode_texts, first_token
from fedsp.data.tasks import Example
from fedsp.errors import ConfigurationError, RunError
from fedsp.experiments.start import answers_of, open_run
from fedsp.models.prompted_lm import continue_text
from fedsp.training.answers import Answering
from fedsp.training.evaluation import score
from fedsp.training.generation import sampler


@register_model("fedsp")
class TunedPrompt(LM):  # type: ignore[misc]
    """The global model of a run with the best that it tuned, or without.

    Args:
        run: the run's folder.
        zero_shot: leave out what was tuned.
        answers: who answers: global, auxiliary, proxy or mean (`fedsp.training.answers`).
        weight: that of proxy-tuned answers.

    Raises:
        RunError: there is no run, or it has no auxiliary model to answer with.
        ConfigurationError: nobody is called what `answers` says, it goes with `zero_shot`, or the
            weight is no number.
    """

    def __init__(
        self,
        run: str,
        zero_shot: bool | str = False,
        answers: Answering = "global",
        weight: float | str = 1.0,
        **_: Any,
    ) -> None:
        super().__init__()
        if not Path(run).is_dir():
            raise RunError(f"run={run}: there is no such folder")
        opened = open_run(run)
        self._model, self._tokenizer = opened.model, opened.server.tokenizer
        self._max_tokens = opened.server.max_tokens
        bare = str(zero_shot).lower() == "true"
        try:
            number = float(weight)
        except ValueError as error:
            raise ConfigurationError(f"weight={weight}: it must be a number, such as 1") from error
        self._answers = answers_of(opened, answers, number, zero_shot=bare)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood, nats, and whether greedy decoding
        would give it."""
        groups = [
            (context, [str(request.args[1]) for request in group])
            for context, group in groupby(requests, key=lambda request: str(request.args[0]))
        ]
        examples = [
            Example(id=str(index), context=context, choices=tuple(continuations), gold=(0,))
            for index, (context, continuations) in enumerate(groups)
        ]
        scored, _ = score(
            self._model,
            None,
            examples,
            self._tokenizer,
            max_tokens=self._max_tokens,
            answers=self._answers.scorer(),
        )
        return [
            pair for row in scored for pair in zip(row.log_likelihoods, row.greedy, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not supported: whole texts have no context for an answer to follow. Raises RunError."""
        raise RunError(
            "this task asks for the likelihood of whole texts, which a prompt tuned on answers does"
            " not support: choose a task with questions"
        )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """For each (context, settings): text up to the first stop string or `max_gen_toks` tokens
        (256 if the task does not say), the most likely token each time or, with `do_sample` and a
        `temperature`, drawn from torch's generator. The oldest context gives way to what is
        generated.

        Raises:
            RunError: the settings ask for something else, or for more tokens than the model reads.
        """
        return [self._generate(str(request.args[0]), dict(request.args[1])) for request in requests]

    def _generate(self, context: str, asked: dict[str, Any]) -> str:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(asked))
        most, sampled = int(settings.pop("max_gen_toks")), settings.pop("do_sample")
        temperature = float(settings.pop("temperature", 0.0))
        stops = [stop for stop in settings.pop("until") if stop]
        if settings:
            raise RunError(
                f"the task asks for {', '.join(sorted(settings))} in generation: a tuned prompt"
                " generates with max_gen_toks, until, do_sample and temperature alone"
            )
        if sampled and temperature <= 0:
            raise RunError(
                "the task asks for do_sample without a temperature: set one above 0, or leave"
                " do_sample out"
            )
        room = self._answers.room()
        if most >= room:
            whose = (
                "the task asks for"
                if {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
                & set(asked)
                else "the task does not say how many, and the harness asks for"
            )
            raise RunError(
                f"{whose} {most} tokens, but the model reads {room} behind the prompt, context and"
                " answer together: set max_gen_toks lower"
            )
        ids, first = encode_texts(self._tokenizer, [context])[0], first_token(self._tokenizer)
        if not ids and first is None:
            raise RunError(
                "the task has an empty context, and this tokenizer has no token that begins or ends"
                " a text: nothing can stand there"
            )
        ids = ids or [first or 0]
        draw: Callable[[torch.Tensor], int] = lambda logits: int(
            torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)
        )
        shown = torch.tensor(ids[-(room - most) :], device=self._model.device)
        new = continue_text(
            self._answers.reader(),
            shown,
            most=most,
            room=room,
            stop=end_of_turn(self._tokenizer),
            choose=draw if sampled else sampler(0.0, 1.0, 0),
        )
        text = str(self._tokenizer.decode(new, skip_special_tokens=True))
        for stop in stops:
            text = text.split(stop)[0]
        return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
