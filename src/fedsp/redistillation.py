"""Distillation again, around the prompt as it stands: every few rounds the auxiliary model is fitted to the global one with that prompt in front of
both, and handed out again. It always starts from the first package, so a resumed run makes the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from fedsp.auxiliary import AuxiliaryModel
from fedsp.payload import PROMPT, Payload
from fedsp.prompts import PromptSpec, SoftPrompt, read_prompt
from fedsp.rounds import Exchange, Failure, Request, Update
from fedsp.runs import RunDirectory
from fedsp.server import Server, fit_auxiliary


def redistilling(exchange: Exchange, server: Server, auxiliary: AuxiliaryModel, run: RunDirectory, say: Callable[[str], None]) -> Exchange:
    """An exchange that, in round `distill.again_every` + 1 and every so many rounds after it, first distils again; a new package counts as bytes sent down
    to each client that is asked in that round."""
    every = server.config.distill.again_every
    section = server.config.prompt
    spec = PromptSpec(section.space, section.length, server.model.shape)
    package = auxiliary.weights()
    fitted_in = 1

    def prompt_before(round: int, payload: Payload) -> SoftPrompt:
        path = run.path / "prompts" / f"round-{round - 1:05d}.safetensors"
        return (read_prompt(path) if path.exists() else SoftPrompt(spec, payload[PROMPT])).to(server.model.device)

    def asking(requests: list[Request]) -> Iterable[Update | Failure]:
        nonlocal fitted_in
        round = requests[0].round
        due = round - (round - 1) % every
        if due > fitted_in:
            auxiliary.load_weights(package)
            fit_auxiliary(server, auxiliary, around=prompt_before(due, requests[0].payload))
            fitted_in = due
            say(f"round {round}: the package was distilled again around the prompt of round {due - 1}")
        more = auxiliary.bytes if due == round and round > 1 else 0
        for reply in exchange(requests):
            yield replace(reply, bytes_down=reply.bytes_down + more)

    return asking
