"""The clients' side, opened from a configuration and the package alone: nothing of the global model is needed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from fedsp.algorithm import FedSP
from fedsp.config import Agreement, ClientSection, RunConfig, ServerSection
from fedsp.data.encoding import Encoded
from fedsp.data.seeding import derive_seed
from fedsp.federation.methods.base import Method, Stage
from fedsp.federation.methods.private import PrivateAnswers
from fedsp.federation.party import Party, StateStore, Tunable
from fedsp.models.auxiliary import AuxiliaryModel
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.privacy import Ledger, epsilon
from fedsp.training.dp_sgd import ExamplePrivacy, examples_together
from fedsp.training.loop import Optimisation

HELD_OUT_AT_CLIENTS = 0.1


@dataclass
class Clients:
    """What the clients' side has, all of them together: the method, and, where they are `here`, access to each client's own rows."""

    method: Method
    register: dict[str, int]
    party: Callable[[str], Party]
    here: bool = True


def agreement_of(config: RunConfig, max_tokens: int) -> Agreement:
    """What a run asks of its clients: all that a client needs to know of the configuration, and no file name of the server's."""
    return Agreement(
        seed=config.seed,
        rounds=config.round.rounds,
        max_tokens=max_tokens,
        positions=config.model.positions,
        prompt=config.prompt.model_copy(update={"init": "broadcast", "init_text": None}),
        client=config.client,
        clients_validate=config.validation.by == "clients",
        privacy=config.privacy,
        compression=config.compression,
        runs=config.federation.runs if config.federation else 1,
    )


def stages(client: ClientSection, server: ServerSection | None, rounds: int) -> dict[str, Stage]:
    """The stages `align`, `speak` and `server` with a configuration's numbers; a client knows nothing of the server's steps."""

    def stage(steps: int, batch_size: int, rate: float, decay: float, proximal: float = 0.0) -> Stage:
        return Stage(steps, batch_size, Optimisation(rate, decay, client.warmup, rounds * steps), proximal)

    speak = stage(client.speak_steps, client.batch_size, client.learning_rate, client.weight_decay, client.proximal)
    return {
        "align": stage(client.align_steps, client.batch_size, client.align_learning_rate, client.weight_decay),
        "speak": speak,
        "server": stage(server.steps, server.batch_size, server.learning_rate, server.weight_decay) if server else replace(speak, steps=0),
    }


def make_method(agreement: Agreement, auxiliary: AuxiliaryModel | None, server: ServerSection | None = None) -> Method:
    """FedSP with the agreement's numbers. Where no client is asked there is no auxiliary model."""
    steps, privacy = stages(agreement.client, server, agreement.rounds), example_privacy(agreement)
    if privacy:
        steps["speak"] = replace(steps["speak"], privacy=privacy)
    method = FedSP(
        **steps,
        keep_optimizer=agreement.client.keep_optimizer,
        package=auxiliary.weights() if auxiliary and agreement.client.align_steps else {},
    )
    return PrivateAnswers(method, privacy) if privacy else method


def example_privacy(agreement: Agreement) -> ExamplePrivacy | None:
    """What every client promises of each of its examples; None where nothing is."""
    section = agreement.privacy
    if section.unit != "example":
        return None
    return ExamplePrivacy(section.clip, section.delta, agreement.rounds, section.epsilon, section.noise_multiplier)


def promised_epsilon(agreement: Agreement, examples: int) -> float:
    """What all runs under a package may cost each of a client's examples by the signed agreement; infinite where nothing is promised."""
    privacy = example_privacy(agreement)
    if privacy is None:
        return math.inf
    if privacy.epsilon is not None:
        return agreement.runs * privacy.epsilon
    release = privacy.steps(examples, agreement.client.batch_size, agreement.client.speak_steps).release
    return epsilon((replace(release, count=agreement.runs * agreement.rounds * release.count),), privacy.delta, 1e-3)


def make_client(client: str, agreement: Agreement, auxiliary: AuxiliaryModel, rows: list[Encoded], rest: StateStore, ledger: Ledger, most: float) -> Party:
    """A client of FedSP, from its own rows and the package alone: nothing of the global model is needed. `most` is the epsilon that everything in its
    ledger may come to."""
    return replace(make_party(client, agreement, auxiliary, client_prompt(agreement, auxiliary), rows, rest), ledger=ledger, most=most)


def require_independence(model: PromptedLM, tuned: Tunable, longest: int) -> None:
    """See, before anything is trained on an example of at most `longest` tokens, that the model reads each by itself.

    Raises:
        PrivacyError: it does not.
    """
    assert isinstance(tuned, SoftPrompt)
    examples_together(model, tuned, longest)


def client_prompt(agreement: Agreement, auxiliary: AuxiliaryModel) -> SoftPrompt:
    """The prompt that a client loads what it receives into."""
    section = agreement.prompt
    spec = PromptSpec(section.space, section.length, auxiliary.prompt_shape, section.projection)
    return SoftPrompt(spec, seed=derive_seed(agreement.seed, "prompt")).to(auxiliary.device)


def make_party(client: str, agreement: Agreement, model: PromptedLM, tuned: Tunable, rows: list[Encoded], rest: StateStore) -> Party:
    """A client of any method. Where clients validate, a tenth of its rows is held out."""
    held = max(1, round(HELD_OUT_AT_CLIENTS * len(rows))) if agreement.clients_validate and len(rows) > 1 else 0
    order = random.Random(derive_seed(agreement.seed, "held out", client)).sample(rows, len(rows))
    return Party(client, model, tuned, order[held:], rest, order[:held])


def absent_clients(method: Method, register: dict[str, int]) -> Clients:
    """Clients whose text is elsewhere, or that there are none of: they can be asked, never opened.

    `register` gives the examples of each, as the server has been told them out of band.
    """

    def nobody(client: str) -> Party:
        raise AssertionError(f"client {client!r} was opened in a process that does not hold its text")

    return Clients(method, register, nobody, here=False)
