"""FedSP: Federated learning with tunable Soft Prompts.

Chenhe Dong, Yuexiang Xie, Bolin Ding, Ying Shen, Yaliang Li. *Tunable Soft Prompts are Messengers in Federated Learning*.
Findings of EMNLP 2023. https://arxiv.org/abs/2311.06805

The algorithm. The server holds a global model M_g, frozen. Clients 1..K hold text, and a copy of a small auxiliary model M_a that the server
has made from layers of M_g and distilled from it (`fedsp.models.auxiliary`, `fedsp.training.distillation`). Only the soft prompt p travels.

    p = p^0
    for round t = 1 .. R:
        the server broadcasts p to the clients it asks
        each asked client k, on its own text:
            align:  S steps on M_a^k, p frozen             (alternating training, stage 1)
            speak:  S steps on p, M_a^k frozen             (alternating training, stage 2)
            p_k is sent back; M_a^k stays
        p = sum_k n_k p_k / sum_k n_k                      (`fedsp.federation.aggregation.mean`)
        p: S steps through M_g on the server's own labels  (the server step)
    the p with the best validation loss under M_g is the result

Every loss is the cross-entropy of answer tokens, nats per token. Align, server step, distillation and sharing are switched off by
numbers: no steps, or another layer plan. The loop over rounds is `fedsp.federation.loop`; what travels how, `fedsp.federation.transport`.

Deviations from the authors' released code, each a choice (`preset = "paper"` keeps the paper's settings otherwise):

 1. Clients start from one broadcast prompt, not from ten random ones that are then averaged.
 2. The prompt alone travels; the auxiliary model and its differences do not.
 3. With a projection, its MLP is trained wherever the prompt is, and folded before anything travels.
 4. Targets have the leading space that the evaluation gives them.
 5. Weights of the mean are the server's register of examples, never what a client says of itself.
 6. Selection is by validation, never by a test split; the server's training is a step of the round, not of the evaluation.
 7. Prompts, gradients and optimizer state are float32; AdamW keeps its default eps.
 8. Dropout is off on both sides, and tokens stand behind the prompt (`positions = "from_zero"` for the authors' convention).
 9. The prompt of each auxiliary depth is that of one stated global layer; nothing is repeated or averaged to make shapes fit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fedsp.federation.messages import Request, Update
from fedsp.federation.methods.base import Side, Stage, Work, part, take_steps, validation_loss
from fedsp.federation.party import Party
from fedsp.models.payload import Payload
from fedsp.models.soft_prompt import SoftPrompt
from fedsp.models.trainable import Tensors, trainable
from fedsp.training.loop import TrainResult


@dataclass(frozen=True)
class FedSP:
    """The method, as a value. `keep_optimizer` lets AdamW's moments rest with each party between rounds, as the authors do.

    `package` are the auxiliary weights as handed out, from which every client's own ones start; none where no client aligns.
    """

    align: Stage
    speak: Stage
    server: Stage
    keep_optimizer: bool = False
    package: Tensors = field(default_factory=dict, repr=False)

    def init(self, server: Party) -> Payload:
        """One prompt for all."""
        return server.prompt.payload()

    def client_update(self, client: Party, request: Request) -> Update:
        """Align, then speak; answer with the prompt. See `Method.client_update`."""
        started = time.perf_counter()
        state = client.rest.load(before=request.round) if self._rests(client.prompt) else {}
        client.prompt.take_up(request.payload, part(state, "prompt"))
        if not self.align.steps:
            return self._speak(client, request, state, started)
        with client.own_weights(part(state, "auxiliary"), self.package):
            return self._speak(client, request, state, started)

    def _speak(self, client: Party, request: Request, state: Tensors, started: float) -> Update:
        validation = validation_loss(client, client.held_out)
        if not request.train:
            return Update(request.round, client.id, request.payload, validation=validation)
        fits = {work.name: self._fit(client, work, request.payload, request.round, request.seed, state) for work in self.work(client, "client")}
        self._save_state(client, request.round, fits)
        losses = {name: fitted.last for name, fitted in fits.items() if fitted.last is not None}
        spikes = sum(fitted.spikes for fitted in fits.values())
        return Update(request.round, client.id, client.prompt.payload(), losses, validation, time.perf_counter() - started, client.shortened, spikes)

    def server_update(self, server: Party, aggregated: Payload, round: int, seed: int) -> tuple[Payload, float | None]:
        """Steps on the aggregated prompt through the frozen global model. See `Method.server_update`."""
        if not self.server.steps:
            return aggregated, None
        state = server.rest.load(before=round) if self._rests(server.prompt) else {}
        server.prompt.take_up(aggregated, part(state, "prompt"))
        fits = {work.name: self._fit(server, work, aggregated, round, seed, state) for work in self.work(server, "server")}
        self._save_state(server, round, fits)
        return server.prompt.payload(), fits["server"].last if fits else None

    def work(self, party: Party, side: Side) -> list[Work]:
        """Align and speak at a client, the server step at the server. See `Method.work`."""
        prompt = party.prompt.trained()
        if side == "server":
            stages = [Work("server", self.server, prompt)]
        else:
            stages = [Work("align", self.align, trainable(party.model.model) if self.align.steps else {}), Work("speak", self.speak, prompt)]
        return [work for work in stages if work.stage.steps]

    def _fit(self, party: Party, work: Work, received: Payload, round: int, seed: int, state: Tensors) -> TrainResult:
        """One stage of one party: steps on its prompt or its auxiliary model; the other is frozen."""
        party.prompt.requires_grad_(work.name != "align")
        return take_steps(party, work, received, round, seed, part(state, work.name) if self.keep_optimizer else None)

    def _rests(self, prompt: SoftPrompt) -> bool:
        """Whether a party has anything to keep from one round to the next."""
        return bool(self.align.steps) or self.keep_optimizer or bool(prompt.spec.projection)

    def _save_state(self, party: Party, round: int, fits: dict[str, TrainResult]) -> None:
        if not self._rests(party.prompt):
            return
        state: Tensors = {f"prompt/{name}": tensor for name, tensor in party.prompt.own_state().items()}
        if "align" in fits:
            state |= {f"auxiliary/{name}": parameter for name, parameter in trainable(party.model.model).items()}
        if self.keep_optimizer:
            state |= {f"{name}/{key}": tensor for name, fitted in fits.items() for key, tensor in fitted.moments.items()}
        party.rest.save(round, state)
