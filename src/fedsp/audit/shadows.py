"""Shadow runs: the finished run's configuration, trained anew through the same code on independent
random halves of the clients' text.

Each shadow is the target once; the other shadows then give the score distributions of members and
non-members (Carlini et al., S&P 2022, https://arxiv.org/abs/2112.03570). Only prompts are trained,
so a shadow costs no more than a run without its tests.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedsp.config import RunConfig
from fedsp.data.dataset import load_dataset
from fedsp.data.encoding import Encoded, collate, encode_targets
from fedsp.data.partition import Partition
from fedsp.data.seeding import derive_seed
from fedsp.errors import RunError
from fedsp.experiments.build import Federation, build_federation, open_clients
from fedsp.experiments.run import round_config
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import Server, open_server
from fedsp.federation.agreement import agreement_of, example_privacy
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.loop import RoundConfig, RunState, federate
from fedsp.federation.messages import Failure, Request, Transport, Update
from fedsp.federation.methods.base import Method
from fedsp.federation.methods.registry import find_method
from fedsp.federation.transport.local import local
from fedsp.models.auxiliary import AuxiliaryModel
from fedsp.models.payload import Payload, as_row
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.trainable import Messenger
from fedsp.training.per_example_gradients import example_gradients, example_losses

Row = TypeVar("Row")


@dataclass(frozen=True)
class Options:
    """How thorough audits are: shadow runs of the membership audit, records that it looks at (None:
    all), and single texts of the inversion audit; `callbacks` hear of progress."""

    shadows: int = 16
    records: int | None = None
    texts: int = 20
    callbacks: Callbacks = field(default_factory=Callbacks)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A finished run of FedSP with everything needed to run it again, the rows that the clients
    that it may ask hold, each with its holder and as tokens, and the prompt that it began with."""

    run: RunDirectory
    server: Server
    federation: Federation
    auxiliary: AuxiliaryModel
    rows: list[int]
    holders: list[str]
    encoded: list[Encoded]
    start: Payload

    @property
    def messenger(self) -> Messenger:
        """What a client loads its broadcasts into; all have the same."""
        return self.federation.clients.party(self.holders[0]).messenger

    def by_client(
        self, rows: Sequence[Row], included: Sequence[bool] | None = None
    ) -> dict[str, list[Row]]:
        """Rows by their holders, sorted: all, or those that are included."""
        held: dict[str, list[Row]] = {client: [] for client in sorted(set(self.holders))}
        there = included or [True] * len(rows)
        for row, client, known in zip(rows, self.holders, there, strict=True):
            if known:
                held[client].append(row)
        return held


@dataclass(frozen=True)
class Shadow:
    """The result of a shadow run: its members as a mask (N,) over N rows, the broadcast of each
    round and the final prompt, and each client's updated prompt by round."""

    included: Tensor
    broadcasts: list[Payload]
    updates: list[dict[str, Payload]]

    @property
    def answered(self) -> set[str]:
        """The clients that answered in any round: of the others' text nothing was seen, and nothing
        was trained on."""
        return {client for replies in self.updates for client in replies}


def promise_of(config: RunConfig) -> str:
    """What a run promises about a single example of a client, in words."""
    privacy = config.privacy
    if privacy.unit != "example":
        return "no differential privacy of examples"
    if privacy.epsilon is None:
        return f"noise_multiplier = {privacy.noise_multiplier:g}"
    return f"epsilon = {privacy.epsilon:g}"


def check_audited(run: RunDirectory) -> None:
    """Whether a run can be opened and run again on halves of its clients' text, by its
    configuration.

    Raises:
        RunError: it is not finished, or no run of FedSP with clients whose text is here, or its
            weights were held in few bits.
    """
    config, folder = run.config, run.path
    run.result()
    if not find_method(config.method).deployable:
        raise RunError(
            f"{folder} is a run of method = {config.method!r}: this audit is for 'fedsp'"
        )
    if config.federation:
        raise RunError(
            f"{folder} was deployed, and its clients' text is not here: audit a run of the same"
            " configuration with simulated clients"
        )
    if not config.partition.clients or config.round.clients == 0:
        raise RunError(f"{folder} has no client updates to audit: audit a run with clients")
    if (
        config.model.precision in ("8bit", "4bit")
        or config.model.device == "split"
        or config.auxiliary.precision != "float32"
    ):
        raise RunError(
            f"{folder} has weights of reduced precision or on several devices, which this audit"
            " cannot train and compare: repeat it with model.precision = 'auto', without"
            " model.device = 'split', and with auxiliary.precision = 'float32'"
        )


def check_prompt(run: RunDirectory) -> None:
    """Refuse a run that `check_audited` does, or whose messenger is no soft prompt (RunError)."""
    check_audited(run)
    config = run.config
    if config.messenger.kind != "prompt" or config.prompt.space == "input":
        raise RunError(
            f"{run.path} has messenger.kind = {config.messenger.kind!r}"
            + (" and prompt.space = 'input'" if config.messenger.kind == "prompt" else "")
            + ": this audit reads the changes of soft prompts at layers; choose other audits with"
            " --only"
        )


def open_audited(folder: Path, callbacks: Callbacks) -> Opened:
    """A finished run, opened again.

    Raises:
        RunError: it is none that can be audited, or its text or its auxiliary model is not what it
            was begun with.
    """
    run = RunDirectory.open(folder)
    check_audited(run)
    config = run.config
    if config.auxiliary.folder:
        config = config.model_copy(
            update={"auxiliary": config.auxiliary.model_copy(update={"folder": str(run.package)})}
        )
    server = open_server(config, load_dataset(config, run.partition()))
    federation = build_federation(server, run, callbacks, None)
    auxiliary = federation.package
    assert isinstance(auxiliary, AuxiliaryModel)
    run.hold({"data.train": server.dataset.train_digest, "auxiliary model": auxiliary.digest()})
    asked = federation.clients.register
    clients = sorted(
        (client, held)
        for client, held in server.dataset.partition.clients.items()
        if client in asked
    )
    rows = [row for _, held in clients for row in held]
    return Opened(
        run=run,
        server=server,
        federation=federation,
        auxiliary=auxiliary,
        rows=rows,
        holders=[client for client, held in clients for _ in held],
        encoded=encode_targets(server.tokenizer, server.dataset.held(rows), server.max_tokens),
        start=federation.messenger.payload(),
    )


def train_shadow(opened: Opened, index: int, rounds: int | None = None) -> Shadow:
    """Train one shadow: each row is included with probability 1/2, drawn from the run's seed and
    `index`; all other settings are the run's own, but for validation and what needs it (the
    acceptance check, a line search). `rounds` limits the number of rounds. Every shadow starts from
    the run's initial prompt."""
    config, server = opened.run.config, opened.server
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "shadow", index))
    included = torch.rand(len(opened.rows), generator=generator) < 0.5
    members = opened.by_client(opened.rows, included.tolist())
    held = {client: rows for client, rows in members.items() if rows}
    dataset = replace(
        server.dataset, partition=Partition(server.dataset.partition.server, [], held)
    )
    broadcasts: list[Payload] = []
    updates: list[dict[str, Payload]] = []
    with tempfile.TemporaryDirectory(prefix="fedsp-shadow-") as temporary:
        changes = {
            "seed": derive_seed(config.seed, "shadow", index, "run"),
            "output": temporary,
            "validation": config.validation.model_copy(update={"by": "none"}),
            "aggregation": config.aggregation.model_copy(update={"max_loss_rise": None}),
            "round": config.round.model_copy(
                update={"optimizer": "none"} if config.round.optimizer == "line_search" else {}
            ),
        }
        seeded = config.model_copy(update=changes)
        run = RunDirectory.create(seeded)
        clients = open_clients(config, opened.auxiliary, dataset, run)
        inner = local(replace(clients, method=opened.federation.clients.method))

        def transport(requests: list[Request]) -> Iterable[Update | Failure]:
            replies = list(inner(requests))
            broadcasts.append(requests[0].payload if requests else {})
            updates.append(
                {reply.client: reply.payload for reply in replies if isinstance(reply, Update)}
            )
            return replies

        settings = round_config(seeded, run, len(clients.register))
        settings = replace(settings, rounds=min(rounds or settings.rounds, settings.rounds))
        method = opened.federation.clients.method
        final = rounds_again(opened, run, method, clients.register, transport, settings)
    return Shadow(included, [*broadcasts, final], updates)


def rounds_again(
    opened: Opened,
    run: RunDirectory,
    method: Method,
    register: Mapping[str, int],
    transport: Transport,
    settings: RoundConfig,
) -> Payload:
    """Federate from the run's initial prompt, without validation; returns the last broadcast."""
    server = opened.server
    own = server.dataset.held(server.dataset.partition.server)
    party = opened.federation.server(encode_targets(server.tokenizer, own, server.max_tokens), run)
    begin = RunState(round=0, payload=opened.start, best=opened.start, best_round=0, best_loss=None)
    final = federate(
        method,
        party,
        register,
        transport,
        settings,
        state=begin,
        validate=lambda payload: 0.0,
        save=lambda *_: None,
    )
    return final.payload


def promised(opened: Opened, shadow: Shadow) -> float:
    """The example-level epsilon that a shadow run guarantees, the largest over clients with the
    examples that each holds in it; infinite without such a guarantee."""
    config = opened.run.config
    privacy = example_privacy(agreement_of(config, opened.server.max_tokens))
    if privacy is None:
        return math.inf
    spent = [0.0]
    for client, rows in opened.by_client(opened.rows, shadow.included.tolist()).items():
        rounds = sum(client in replies for replies in shadow.updates)
        if rows and rounds:
            lot, steps = config.client.batch_size, config.client.prompt_steps
            spent.append(privacy.spent(len(rows), lot, steps, rounds))
    return max(spent)


@torch.no_grad()
def losses_under(
    model: PromptedLM, messenger: Messenger, payload: Payload, rows: Sequence[Encoded]
) -> Tensor:
    """The loss of each row (N,), nats per answer token, with a payload in the messenger."""
    messenger.load(payload)
    prefix = messenger.prefix(model)
    return _by_length(
        rows, 64, lambda some: example_losses(model, prefix, collate(some).to(model.device))
    )


def alignment(opened: Opened, at: Payload, changes: Tensor, rows: Sequence[Encoded]) -> Tensor:
    """Cosines (N, C) of N rows' negative gradients through the auxiliary model at the broadcast
    `at` with the C rows of `changes`, each a flattened change of it."""
    model, messenger = opened.auxiliary, opened.messenger
    messenger.load(at)
    directions = normalize(changes, dim=1, eps=1e-300).float().to(model.device)

    def cosines(some: Sequence[Encoded]) -> Tensor:
        gradients = -example_gradients(model, messenger, collate(some))[1].flatten(start_dim=1)
        return normalize(gradients, dim=1, eps=1e-30) @ directions.T

    return _by_length(rows, 32, cosines)


def changes_of(shadow: Shadow, round: int, clients: Sequence[str]) -> Tensor:
    """Each client's prompt minus the broadcast of a round, flattened, one row per client; zeros for
    a client that did not answer."""
    broadcast, replies = shadow.broadcasts[round], shadow.updates[round]
    sent = as_row(broadcast)
    return torch.stack([as_row(replies.get(client, broadcast)) - sent for client in clients])


def _by_length(
    rows: Sequence[Encoded], at_once: int, measure: Callable[[Sequence[Encoded]], Tensor]
) -> Tensor:
    """What is measured of each row, in their order, rows of like length together."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    parts = [
        measure([rows[index] for index in order[start : start + at_once]]).cpu()
        for start in range(0, len(order), at_once)
    ]
    return torch.cat(parts)[torch.tensor(order).argsort()]
