"""Repeated distillation: every `distill.again_every` rounds the auxiliary model is distilled again
with the current prompt in front of both models, and sent to clients again. It always starts from
the first auxiliary model, so a resumed run is bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import Server, fit_auxiliary
from fedsp.federation.messages import Failure, Request, Transport, Update
from fedsp.models.auxiliary import AuxiliaryModel
from fedsp.models.soft_prompt import read_prompt


def redistilling(
    transport: Transport,
    server: Server,
    auxiliary: AuxiliaryModel,
    run: RunDirectory,
    info: Callable[[str], None],
) -> Transport:
    """A transport that, in round `distill.again_every` + 1 and every so many rounds after it, first
    distils again; a package that a client does not have yet counts as bytes sent down to it."""
    every = server.config.distill.again_every
    package = auxiliary.weights()
    fitted_in = 1
    has = {
        client: made_for(line["round"], every) for line in run.records() for client in line["asked"]
    }  # which package each client had when it was last asked

    def asking(requests: list[Request]) -> Iterable[Update | Failure]:
        nonlocal fitted_in
        round = requests[0].round
        due = made_for(round, every)
        if due > fitted_in:
            auxiliary.load_weights(package)
            around = read_prompt(run.path / "prompts" / f"round-{due - 1:05d}.safetensors")
            fit_auxiliary(server, auxiliary, around=around.to(server.model.device))
            fitted_in = due
            info(
                f"round {round}: the package was distilled again around the prompt of round"
                f" {due - 1}"
            )
        new = {request.client for request in requests if has.get(request.client, 1) < due}
        has.update({request.client: due for request in requests})
        for reply in transport(requests):
            yield replace(
                reply, bytes_down=reply.bytes_down + (auxiliary.bytes if reply.client in new else 0)
            )

    return asking


def made_for(round: int, every: int) -> int:
    """The round for which the package of a round was made."""
    return round - (round - 1) % every
