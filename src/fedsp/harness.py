"""A run's tuned prompt as a model of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), for whatever task it has:

    python -m fedsp.harness --model fedsp --model_args run=DIR --tasks sciq,arc_easy

Importing this module registers the model, so `lm_eval.simple_evaluate(model="fedsp", model_args={"run": "DIR"}, ...)` works too.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from fedsp.commands import open_run
from fedsp.data.tasks import Example
from fedsp.errors import RunError
from fedsp.evaluation import score


@register_model("fedsp")
class TunedPrompt(LM):  # type: ignore[misc]
    """The global model of a run behind its best prompt, or behind none.

    Args:
        run: the run's folder.
        zero_shot: leave the prompt out.

    Raises:
        RunError: there is no run, or it holds no prompt.
    """

    def __init__(self, run: str, zero_shot: bool | str = False, **_: Any) -> None:
        super().__init__()
        if not Path(run).is_dir():
            raise RunError(f"run={run}: there is no such folder")
        opened = open_run(run)
        self._model, self._tokenizer, self._max_tokens = opened.model, opened.server.tokenizer, opened.server.max_tokens
        self._prefix = opened.prefix(zero_shot=str(zero_shot).lower() == "true")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood, nats, and whether greedy decoding would give it."""
        groups = [(context, [str(request.args[1]) for request in group]) for context, group in groupby(requests, key=lambda request: str(request.args[0]))]
        examples = [
            Example(str(index), context or str(self._tokenizer.eos_token), tuple(continuations), (0,)) for index, (context, continuations) in enumerate(groups)
        ]
        scored, _ = score(self._model, self._prefix, examples, self._tokenizer, max_tokens=self._max_tokens)
        return [pair for row in scored for pair in zip(row.log_likelihoods, row.greedy, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not offered: a prompt is tuned for answers behind a context, and a text without one has none.

        Raises:
            RunError: always.
        """
        raise RunError("this task asks for the likelihood of whole texts: a prompt tuned on answers has nothing to say of them; choose a task with questions")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """For each (context, settings): greedy text up to the first stop string or `max_gen_toks` tokens (256 if the task does not say)."""
        texts = []
        for request in requests:
            context, settings = str(request.args[0]), dict(request.args[1])
            ids = torch.tensor(self._tokenizer.encode(context or str(self._tokenizer.eos_token)), device=self._model.device)
            room = min(int(settings.get("max_gen_toks", 256)), self._max_tokens // 2)
            new = self._model.generate(ids[-(self._max_tokens - room) :], self._prefix, most=room, stop=self._tokenizer.eos_token_id)
            text = str(self._tokenizer.decode(new, skip_special_tokens=True))
            stops = settings.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            texts.append(text)
        return texts


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
