"""What a private run promises, in words and numbers: `privacy_statement.json` (after NIST SP
800-226, section 3, and Ponomareva et al. 2023, https://arxiv.org/abs/2303.00654, section 5.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from fedsp.config import RunConfig
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.tracking.figures import PUBLISHED, PUBLISHED_BESIDES
from fedsp.federation.agreement import agreement_of, example_privacy
from fedsp.models.prompted_lm import PromptedLM
from fedsp.privacy import LEDGER, Ledger, epsilon, merged
from fedsp.training.dp_sgd import ALONE

NOT_COVERED = [
    "other runs over the same text: their epsilons add to this one, and only a client's own"
    " ledger, one for each folder of state, knows of all",
    "the choice of settings: learning rate, clip, rounds, prompt length, if they were chosen by"
    " looking at private text",
    "who was asked and who answered (at client level whoever knows it learns more:"
    " `epsilon_if_asked_is_known`), and how long an answer took",
    "several examples about one person: the promise is about one unit at a time",
    "how many examples a client has: the sampling, the noise and the divisor follow from it,"
    " and it is taken as known to all",
    "text that the server itself trains or validates on, and the text of the distillation",
]


def privacy_statement(
    run: RunDirectory,
    register: Mapping[str, int],
    max_tokens: int,
    asking: Sequence[str] = (),
    *,
    tested: PromptedLM | None = None,
) -> dict[str, Any] | None:
    """The statement of a run as it stands after its last round; None where no promise is made.

    At example level it is the worst over clients, each counted for every round it was asked in,
    whether its answer arrived or not, and for the one that it is about to be asked in (`asking`),
    with what its self-test found of the model that clients read with (`tried`). Where clients are
    elsewhere the server does not know how many examples they have, so what their ledgers hold it to
    is stated.
    """
    config = run.config
    if config.privacy.unit == "none" or not register:
        return None
    if config.privacy.unit == "client":
        about = _client_level(run, register)
    elif config.federation:
        # each holds the run to its target; without one only the client knows what a round costs it
        about = _about_examples(config) | {
            "epsilon": config.privacy.epsilon,
            "noise_multiplier": config.privacy.noise_multiplier,
            "by": "each client's own ledger",
        }
    else:
        about = _example_level(run, register, max_tokens, asking)
        if tested is not None and tested.largest_difference is not None:
            # of one example's gradient by others in its pass, and how many then share a pass
            about["self_test"] = {
                "largest_difference": tested.largest_difference,
                "allowed": ALONE,
                "examples_together": tested.together,
            }
    spent, delta = "an epsilon that only its own ledger knows", config.privacy.delta
    if about["epsilon"] is not None:
        spent = f"epsilon = {about['epsilon']:.3g}"
    return about | {
        "adjacency": f"one {about['of']} added or removed",
        "bound": config.privacy.clip,
        "delta": delta,
        "accountant": (
            f"dp-accounting {version('dp-accounting')}, privacy loss distributions, rounded up"
        ),
        "random_source": (
            "os.urandom, float64, four Box-Muller draws to a number; independent of the run's seed"
        ),
        "published": (
            [f"{name}: published with the run's figures" for name in PUBLISHED]
            + [f"{what}: told to trackers, if [tracking] names one" for what in PUBLISHED_BESIDES]
            if config.privacy.unit == "client"
            else []
        ),
        "not_covered": NOT_COVERED,
        "sentence": (
            f"Whoever sees {about['observer']} learns of any one {about['of']} no more than {spent}"
            f" at delta = {delta:g} allows (added or removed; {about['mechanism']};"
            f" {about['sampling']}). {about['trusted']}"
        ),
    }


def _example_level(
    run: RunDirectory, register: Mapping[str, int], max_tokens: int, asking: Sequence[str]
) -> dict[str, Any]:
    config = run.config
    privacy = example_privacy(agreement_of(config, max_tokens))
    assert privacy is not None
    rounds = Counter([*(client for record in run.records() for client in record["asked"]), *asking])
    lot, steps = config.client.batch_size, config.client.prompt_steps
    spent = {
        client: privacy.spent(examples, lot, steps, rounds[client])
        for client, examples in register.items()
    }
    worst = max(sorted(spent), key=lambda client: spent[client])
    taken = privacy.steps(register[worst], lot, steps)
    return _about_examples(run.config) | {
        "epsilon": spent[worst],
        "noise_multiplier": taken.noise_multiplier,
        "sampling_rate": taken.sampling_rate,
        "releases": rounds[worst] * steps,
        "worst_client": worst,
        "epsilon_by_client": spent,
    }


def _about_examples(config: RunConfig) -> dict[str, Any]:
    return {
        "unit": "example",
        "of": "example of a client",
        "target": config.privacy.epsilon,
        "mechanism": (
            "each example's gradient clipped, Gaussian noise added at the client in every step"
        ),
        "sampling": (
            f"Poisson lots of {config.client.batch_size} examples expected, drawn at the client"
            " from the operating system's random source"
        ),
        "trusted": (
            "Nobody but the client itself is trusted with its text; the server, other clients and"
            " the public see noised answers only."
        ),
        "observer": "all answers of a client, and everything made of them",
    }


def _client_level(run: RunDirectory, register: Mapping[str, int]) -> dict[str, Any]:
    config, ledger = run.config, Ledger(run.path / LEDGER)
    releases = ledger.releases()
    expected = config.round.asked(len(register))
    rate = expected / len(register)
    whole = tuple(replace(release, sampling_rate=1.0) for release in releases)
    return {
        "unit": "client",
        "of": "client with all its text",
        "epsilon": ledger.epsilon(config.privacy.delta) if releases else 0.0,
        "epsilon_if_asked_is_known": (
            epsilon(merged(whole), config.privacy.delta, 1e-3) if releases else 0.0
        ),
        "target": config.privacy.epsilon,
        "sampling_rate": rate,
        "noise_multiplier": (
            releases[0].noise_multiplier if releases else config.privacy.noise_multiplier
        ),
        "releases": sum(release.count for release in releases),
        "mechanism": (
            "each client's whole change clipped, unweighted sum, Gaussian noise added at the"
            f" server, divided by {expected} clients expected"
        ),
        "clients_expected": expected,
        "sampling": (
            "every client is asked in every round"
            if rate == 1
            else (
                f"each client is asked with probability {rate:.3g}, drawn at the server from the"
                " operating system's random source"
            )
        ),
        "trusted": "The server is trusted: it sees every client's change without noise.",
        "observer": (
            "all broadcasts and the prompts of the run (its journal of losses and cosines is the"
            " server's own, and not for publication)"
        ),
    }
