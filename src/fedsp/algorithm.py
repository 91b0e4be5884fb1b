"""FedSP: Federated learning with tunable Soft Prompts.

Chenhe Dong, Yuexiang Xie, Bolin Ding, Ying Shen, Yaliang Li. *Messenger Soft Prompts are Messengers
in Federated Learning*. Findings of EMNLP 2023. https://arxiv.org/abs/2311.06805

The algorithm. The server holds a global model M_g, frozen. Clients 1..K hold text, and a copy of a
small auxiliary model M_a that the server has made from layers of M_g and distilled from it
(`fedsp.models.auxiliary`, `fedsp.training.distillation`). Only the soft prompt p travels.

    p = p^0
    for round t = 1 .. R:
        the server broadcasts p to the clients it asks
        each asked client k, on its own text:
            p_k = p
            S steps on M_a^k, p_k frozen                   (alternating training, stage 1)
            S steps on p_k, M_a^k frozen                   (alternating training, stage 2)
            p_k is sent back; M_a^k stays
        p = sum_k n_k p_k / sum_k n_k                      (`fedsp.federation.aggregation.mean`)
        p: S steps through M_g on the server's own labels  (the server step)
    the p with the best validation loss under M_g is the result

Every loss is the cross-entropy of answer tokens, nats per token. Stage 1, the server step,
distillation and sharing are switched off by settings: no steps, or another layer plan. The loop
over rounds is `fedsp.federation.loop`, sending and receiving is `fedsp.federation.transport`, and
what a party keeps between rounds is `fedsp.federation.party.Party.round_state`.

Deviations from the authors' released code, each a choice (`preset = "paper"` keeps the paper's
settings otherwise):

 1. Clients start from one broadcast prompt, not from ten random ones that are then averaged.
 2. The prompt alone travels; the auxiliary model and its differences do not.
 3. With a projection, its MLP is trained wherever the prompt is, and folded before anything
   travels.
 4. Targets have the leading space that the evaluation gives them.
 5. Weights of the mean are the server's register of examples, never what a client reports.
 6. Selection is by validation, never by a test split; the server's training is a step of the round,
   not of the evaluation.
 7. Prompts, gradients and optimizer state are float32; AdamW keeps its default eps.
 8. Dropout is off on both sides, and tokens stand behind the prompt (`positions = "from_zero"` for
   the authors' convention).
 9. The prompt of each auxiliary depth is that of one stated global layer; nothing is repeated or
   averaged to make shapes fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedsp.federation.messages import Request, Update
from fedsp.federation.methods.base import Side, Work
from fedsp.federation.party import Party
from fedsp.models.payload import Payload
from fedsp.models.trainable import Tensors
from fedsp.training.stage import Stage


@dataclass(frozen=True, kw_only=True)
class FedSP:
    """The method, as a value; its interface is `fedsp.federation.methods.base.Method`.

    auxiliary_stage, prompt_stage: the two stages of alternating training at a client. server_stage:
    the server step. package: the auxiliary weights as handed out, from which every client's own
    ones start; needed only if `auxiliary_stage` has steps.
    """

    auxiliary_stage: Stage
    prompt_stage: Stage
    server_stage: Stage
    package: Tensors = field(default_factory=dict, repr=False)

    def init(self, server: Party) -> Payload:
        """The first prompt, the same for all clients."""
        return server.messenger.payload()

    def client_update(self, client: Party, request: Request) -> Update:
        """One round at client k: alternating training, and the reply."""
        with client.round_state(
            request.round, request.seed, request.payload, start=self.package
        ) as local:
            client.messenger.load(request.payload)
            validation = client.validate()
            if request.train:
                local.train(client.model, self.auxiliary_stage)
                local.train(client.messenger, self.prompt_stage)
        return local.update(validation)

    def server_update(
        self, server: Party, aggregated: Payload, round: int, seed: int
    ) -> tuple[Payload, float | None]:
        """The server step: the tuned prompt, and the last loss."""
        if not self.server_stage.steps:
            return aggregated, None
        with server.round_state(round, seed, aggregated) as local:
            server.messenger.load(aggregated)
            loss = local.train(server.messenger, self.server_stage)
        return server.messenger.payload(), loss

    def work(self, party: Party, side: Side) -> list[Work]:
        """The stages of one side, in order."""
        if side == "server":
            stages = [Work(self.server_stage, party.messenger)]
        else:
            stages = [
                Work(self.auxiliary_stage, party.model),
                Work(self.prompt_stage, party.messenger),
            ]
        return [work for work in stages if work.stage.steps]
