"""From a configuration to a `Federation`: the server's side, the clients' side and the method, for
FedSP and every baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from fedsp.config import Agreement, RunConfig
from fedsp.data.dataset import FederatedDataset
from fedsp.data.encoding import Encoded, Tokenizer, encode_targets
from fedsp.errors import ConfigurationError
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import Server, initial_prompt, make_auxiliary, token_limit
from fedsp.federation.agreement import agreement_of
from fedsp.federation.attacks import Attack, make_attack
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.clients import (
    Clients,
    absent_clients,
    client_messenger,
    make_method,
    make_party,
    prompt_spec,
)
from fedsp.federation.methods.base import Method
from fedsp.federation.methods.registry import Setup, find_method
from fedsp.federation.party import Party
from fedsp.models.auxiliary import AuxiliaryModel, disclosed_share, parse_plan
from fedsp.models.loading import reduce_precision
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.trainable import Messenger
from fedsp.privacy import LEDGER, Ledger
from fedsp.training.dp_sgd import examples_together


@dataclass(kw_only=True)
class Federation:
    """A method and its parties.

    model, messenger: what the server reads through, and what it broadcasts.
    package: the auxiliary model that clients hold, if they hold one; client_messenger makes their
    messenger in it.
    disclosed_share: the share of the global model's parameters that clients hold bit for bit.
    attack: what malicious clients do, in a simulation of them.
    """

    method: Method
    model: PromptedLM
    messenger: Messenger
    clients: Clients
    package: AuxiliaryModel | None = None
    client_messenger: Callable[[], Messenger] | None = None
    disclosed_share: float = 0.0
    attack: Attack | None = None

    def server(self, examples: Sequence[Encoded], run: RunDirectory) -> Party:
        """The server's side of a run as a party, with the examples that it trains on."""
        return Party(
            id="server",
            model=self.model,
            messenger=self.messenger,
            examples=examples,
            store=run.state_store("server"),
        )


def method_setup(
    server: Server, run: RunDirectory | None = None, callbacks: Callbacks | None = None
) -> Setup:
    """What a run offers to a method that builds its two sides; `run` is None where only the server
    is opened."""
    section = server.config.auxiliary

    def package() -> AuxiliaryModel:
        assert run is not None
        return make_auxiliary(server, run.auxiliary, callbacks or Callbacks())

    return Setup(
        model=server.model,
        tokenizer=server.tokenizer,
        seed=server.config.seed,
        lora=server.config.lora.model_dump(),
        messenger=server.config.messenger.model_dump(),
        prompt=prompt_spec(server.config.prompt, server.model.shape),
        plan=lambda: parse_plan(section.plan, server.model.shape.layers, section.prompt_layers),
        initial_prompt=partial(initial_prompt, server),
        package=package,
    )


def build_federation(
    server: Server, run: RunDirectory, callbacks: Callbacks, register: dict[str, int] | None
) -> Federation:
    """Both sides of a run's method. With a `register` the clients' text is on other machines."""
    config, dataset = server.config, server.dataset
    entry, setup = find_method(config.method), method_setup(server, run, callbacks)
    agreement, attack = agreement_of(config, server.max_tokens), make_attack(config, dataset)
    model, messenger = entry.server_side(setup)
    asks = (
        entry.federated
        and config.round.clients != 0
        and bool(dataset.partition.clients if register is None else register)
    )
    if not asks:
        method = make_method(agreement, None, config.server, entry)
        return Federation(
            method=method, model=model, messenger=messenger, clients=absent_clients(method, {})
        )
    side = entry.client_side(setup, model, messenger)
    share = _disclosed_share(server, side.package) if side.package else 1.0
    if side.package:
        reduce_precision(side.package, config.auxiliary.precision, "auxiliary.precision")
    method = make_method(agreement, side.package, config.server, entry)
    if register is None:
        clients = clients_here(
            method, agreement, side.model, server.tokenizer, side.messenger, dataset, run, attack
        )
        clients.register = config.round.may_ask(clients.register)
    else:
        clients = absent_clients(method, register)
    return Federation(
        method=method,
        model=model,
        messenger=messenger,
        clients=clients,
        package=side.package,
        client_messenger=side.messenger,
        disclosed_share=share,
        attack=attack,
    )


def _disclosed_share(server: Server, package: AuxiliaryModel) -> float:
    """The disclosed share as it was measured when the package was made, since the weights here may
    be rounded or elsewhere; measured now if it was not.

    Raises:
        ConfigurationError: the package does not say it, and here it cannot be measured.
    """
    if package.discloses is not None:
        return package.discloses
    if server.config.model.precision in ("8bit", "4bit") or server.config.model.device == "split":
        raise ConfigurationError(
            "auxiliary.folder: the package does not say what it discloses, as an earlier version"
            " made it: make it again with `fedsp distill`"
        )
    return disclosed_share(package, server.model)


def open_clients(
    config: RunConfig, auxiliary: AuxiliaryModel, dataset: FederatedDataset, run: RunDirectory
) -> Clients:
    """Every client that a run of FedSP may ask, in this process, without the global model."""
    agreement = agreement_of(config, token_limit(config, auxiliary))
    method = make_method(agreement, auxiliary, config.server)
    clients = clients_here(
        method,
        agreement,
        auxiliary,
        auxiliary.tokenizer,
        client_messenger(agreement, auxiliary),
        dataset,
        run,
        make_attack(config, dataset),
    )
    if config.round.only in clients.register:
        clients.register = config.round.may_ask(clients.register)
    return clients


def clients_here(
    method: Method,
    agreement: Agreement,
    model: PromptedLM,
    tokenizer: Tokenizer,
    messenger: Callable[[], Messenger],
    dataset: FederatedDataset,
    run: RunDirectory,
    attack: Attack | None = None,
) -> Clients:
    """Clients in this process. A party is made when it is asked for, from its examples and its
    state on disk; few stay in memory.

    Raises:
        PrivacyError: the run has example-level privacy, and the model's gradient of one example
            depends on others.
    """
    private = agreement.privacy.unit == "example"
    if private:
        examples_together(model, messenger(), agreement.max_tokens)

    @lru_cache(maxsize=32)
    def encoded(client: str) -> list[Encoded]:
        examples = dataset.held(dataset.partition.clients[client])
        poisoned = attack.poison(client, examples) if attack else examples
        return encode_targets(tokenizer, poisoned, agreement.max_tokens)

    def party(client: str) -> Party:
        store = run.state_store(f"client {client}")
        ledger = Ledger(store.folder / LEDGER) if private else None
        return make_party(
            client, agreement, model, messenger(), encoded(client), store, ledger=ledger
        )

    return Clients(
        method=method,
        register={client: len(rows) for client, rows in dataset.partition.clients.items()},
        party=party,
    )
