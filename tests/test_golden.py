"""Every number that the authors' own implementation computed, to 1e-5."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from fedsp.algorithm import FedSP
from fedsp.data.encoding import Batch, Encoded
from fedsp.federation.aggregation.mean import weighted_mean
from fedsp.federation.messages import Request
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.models.auxiliary import build_auxiliary, parse_plan
from fedsp.models.payload import PROMPT
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.training.distillation import masked_mse
from fedsp.training.loop import Optimisation, answer_loss
from fedsp.training.stage import Stage

CONFIGS = {
    "opt": OPTConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        dropout=0.0,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    ),
    "gpt2": GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


class Case:
    """One family's golden numbers, and our objects over the same weights."""

    def __init__(self, family: str, golden: dict[str, Tensor]) -> None:
        self.family, self.golden = family, golden
        model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)
        weights = {
            key.removeprefix(f"{family}.weights."): tensor
            for key, tensor in golden.items()
            if key.startswith(f"{family}.weights.")
        }
        model.load_state_dict(weights, strict=False)
        self.model = PromptedLM(model.requires_grad_(False), family, positions="from_zero")
        self.auxiliary = build_auxiliary(self.model, parse_plan("shared(0)", 4), tokenizer=None)
        self.spec = PromptSpec(space="key_value", length=5, model=self.model.shape)

    def of(self, name: str) -> Tensor:
        return self.golden[f"{self.family}.{name}"]

    def prompt(self, name: str = "prefix") -> SoftPrompt:
        return SoftPrompt(self.spec, self.of(name).view(self.spec.shape))

    def batch(self, index: int) -> Batch:
        return Batch(
            *(self.of(f"batch.{name}")[index] for name in ("input_ids", "attention_mask", "labels"))
        )

    def rows(self, index: int) -> list[Encoded]:
        batch = self.batch(index)
        return [
            Encoded(tuple(ids[: int(mask.sum())].tolist()), int((labels != -100).nonzero()[0]))
            for ids, mask, labels in zip(
                batch.input_ids, batch.attention_mask, batch.labels, strict=True
            )
        ]


@pytest.fixture(scope="module", params=["opt", "gpt2"])
def case(request: pytest.FixtureRequest, golden: dict[str, Tensor]) -> Case:
    return Case(request.param, golden)


def close(found: Tensor | float | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(
        torch.as_tensor(found).view(expected.shape), expected, rtol=1e-5, atol=1e-5
    )


def test_server_logits_loss_and_gradient(case: Case) -> None:
    prompt, batch = case.prompt(), case.batch(0)
    prefix = prompt.prefix(case.model)
    real = batch.attention_mask.bool()
    close(
        case.model.logits(case.model(batch.input_ids, batch.attention_mask, prefix))[real],
        case.of("server.logits")[real],
    )
    loss = answer_loss(case.model, prefix, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    close(loss, case.of("server.loss"))
    close(prompt.direct.grad, case.of("server.prefix_grad"))


def test_auxiliary_logits_and_loss(case: Case) -> None:
    prefix, batch = case.prompt().prefix(case.auxiliary), case.batch(0)
    real = batch.attention_mask.bool()
    close(
        case.auxiliary.logits(case.auxiliary(batch.input_ids, batch.attention_mask, prefix))[real],
        case.of("auxiliary.logits")[real],
    )
    close(answer_loss(case.auxiliary, prefix, batch), case.of("auxiliary.loss"))


def test_distillation_loss(case: Case) -> None:
    """The authors average over padding too; ours does not, so the mask is all ones here."""
    batch = case.batch(0)
    student, teacher = (
        model.read_padded(batch.input_ids, batch.attention_mask)
        for model in (case.auxiliary, case.model)
    )
    close(
        masked_mse(student, teacher, torch.ones_like(batch.attention_mask)),
        case.of("distill.hidden_mse"),
    )


def test_a_round(case: Case, tmp_path: Path) -> None:
    stage = Stage(
        name="client",
        seed_label="client",
        steps=3,
        batch_size=6,
        optimisation=Optimisation(learning_rate=5e-3, weight_decay=0.01),
    )
    method = FedSP(
        auxiliary_stage=replace(stage, name="auxiliary"),
        prompt_stage=stage,
        server_stage=stage,
        package=case.auxiliary.weights(),
    )
    updates = {}
    for index in range(2):
        client = Party(
            id=str(index),
            model=case.auxiliary,
            messenger=case.prompt(),
            examples=case.rows(index),
            store=StateStore(tmp_path / str(index)),
        )
        update = method.client_update(
            client,
            Request(run="run", round=1, client=client.id, seed=0, payload=case.prompt().payload()),
        )
        close(update.payload[PROMPT], case.of(f"round.client{index}.prefix"))
        close(update.losses["client"], case.of(f"round.client{index}.last_loss"))
        updates[client.id] = update.payload
    aggregated = weighted_mean(updates, {"0": 1.0, "1": 3.0})
    close(aggregated[PROMPT], case.of("round.aggregated_prefix"))
    server = Party(
        id="server",
        model=case.model,
        messenger=case.prompt(),
        examples=case.rows(2),
        store=StateStore(tmp_path / "server"),
    )
    payload, _ = method.server_update(server, aggregated, 1, 0)
    close(payload[PROMPT], case.of("round.server_prefix"))
    after = SoftPrompt(case.spec, payload[PROMPT])
    close(
        answer_loss(case.model, after.prefix(case.model), case.batch(2)),
        case.of("round.server_loss_after"),
    )
