"""The trap audit of a finished run: what a malicious model owner learns about the words in a
client's text from one round, with a package built for this attack.

In the package's first block each sought word attends to a virtual token of its own, and every other
token to the text; in its last block the answer attends to the whole text. So the values of a word's
virtual token have a nonzero gradient if and only if the word occurs before an answer, and the
client's update reveals it. This applies to prompts the idea of planted neurons that fire for one
input (Boenisch et al., EuroS&P 2023, https://arxiv.org/abs/2112.02918; Fowl et al., ICLR 2022,
https://arxiv.org/abs/2110.13057).
"""

from __future__ import annotations

import math
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsp.audit.inspection import inspect_auxiliary
from fedsp.audit.shadows import Opened, Options, open_audited, promise_of
from fedsp.audit.statistics import exact_interval
from fedsp.data.encoding import Encoded, Tokenizer
from fedsp.data.seeding import derive_seed
from fedsp.errors import RunError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.federation.agreement import agreement_of, promised_epsilon
from fedsp.federation.clients import Clients, client_messenger, make_method, make_party
from fedsp.federation.messages import Request, Update
from fedsp.federation.state_store import StateStore
from fedsp.federation.transport.local import local
from fedsp.models.auxiliary import AuxiliaryModel, load_auxiliary
from fedsp.models.payload import PROMPT, Payload
from fedsp.models.soft_prompt import PromptSpec
from fedsp.privacy import LEDGER, Ledger

WORDS, LETTERS = 16, 4
"""Maximum number of words sought in a client's text, half of which occur there; minimum letters of
a token that counts as a word."""
QUESTIONS = 16
"""Examples per client in the test with few examples."""
SURE = 60.0
"""Margin, in nats, of the attended position's score over all others: the other attention weights
are then below float32 precision."""


@dataclass(frozen=True)
class Trap:
    """A malicious package, the prompt broadcast with it, and for each word the index of the prompt
    entry whose change reveals that word."""

    auxiliary: AuxiliaryModel
    payload: Payload
    places: list[tuple[int, ...]]

    def read(self, answer: Payload) -> Tensor:
        """The change of each word's prompt entry (W,), W words; larger for words that occur."""
        change = answer[PROMPT] - self.payload[PROMPT]
        return torch.stack([change[place] for place in self.places])


def room_for_words(spec: PromptSpec) -> int:
    """How many words a trap can seek, an even number: each needs a virtual token, one dimension of
    the first head's keys and two of the hidden states."""
    return (
        min(WORDS, spec.length - 1, spec.model.head_size - 1, (spec.model.hidden - 7) // 2) // 2 * 2
    )


def make_trap(honest: AuxiliaryModel, spec: PromptSpec, words: Sequence[int]) -> Trap:
    """A package of the honest one's architecture and layer plan, whose prompt of this shape tells
    which of these tokens stand in front of an answer.

    Raises:
        RunError: the architecture is not GPT-2's, or has one layer, one head, or no room for so
            many words.
    """
    if honest.model.config.model_type != "gpt2":
        raise RunError(
            "the audit's trap is made for GPT-2's architecture, not for"
            f" {honest.model.config.model_type}: audit a run of a GPT-2 model"
        )
    if honest.plan.depth < 2 or spec.model.heads < 2 or room_for_words(spec) < 2:
        raise RunError("the audit's trap needs two layers, two heads and three virtual tokens")
    # as its client opens it: written, and read again
    with tempfile.TemporaryDirectory(prefix="fedsp-trap-") as folder:
        honest.save(Path(folder))
        auxiliary = load_auxiliary(Path(folder), device=honest.device, positions=honest.positions)
    weights = {name: torch.zeros_like(tensor) for name, tensor in auxiliary.weights().items()}
    hidden, size, count = spec.model.hidden, spec.model.head_size, len(words)
    # What a token's embedding is marked with, the last for no word; a virtual token's residual; and
    # where numbers are carried.
    marks, keys = range(count + 1), range(count + 1, 2 * count + 1)
    text, balance, value, carried, present, absent_mark = range(2 * count + 1, 2 * count + 7)

    def put(name: str, inputs: Sequence[int], outputs: Sequence[int], number: float = 1.0) -> None:
        weights[name][list(inputs), list(outputs)] = number

    path = f"{honest.path_of_backbone}.".lstrip(".")
    # of mean zero and of one length, so that the norms leave their direction
    embeddings = weights[f"{path}wte.weight"]
    embeddings[:, [text, marks[-1], present, balance, absent_mark]] = torch.tensor(
        [1.0, 1.0, 0.5, -2.0, -0.5]
    )
    embeddings[list(words), marks[-1]] = 0.0
    embeddings[list(words), list(marks[:-1])] = 1.0
    # The last token is the answer that is always expected, so that every true one pulls the same
    # way.
    embeddings[-1, [text, present, balance, absent_mark]] = torch.tensor([5.0, -0.5, -6.0, 0.5])
    # what a norm makes of a 1.0 in a token's vector, and in a virtual token's
    token, virtual = math.sqrt(hidden / 6.5), math.sqrt(hidden / 2)
    scale = SURE * math.sqrt(size)
    groups = honest.plan.groups  # weights are kept at the first depth that shares the layer
    first, last = (
        f"{path}{honest.path_of_blocks}.{groups.index(group)}.attn"
        for group in (groups[0], groups[-1])
    )
    for name, tensor in weights.items():
        if name.rpartition(".")[0].endswith(("ln_1", "ln_2", "ln_f")) and name.endswith("weight"):
            tensor.fill_(1.0)
    # First block, first head: a sought word attends to its virtual token, every other token to the
    # text, so that it gives no virtual token a gradient.
    put(f"{first}.c_attn.weight", marks, marks, scale / (token * virtual))
    put(f"{first}.c_attn.weight", keys, [hidden + mark for mark in marks[:-1]])
    put(f"{first}.c_attn.weight", [text], [hidden + marks[-1]], virtual / token)
    put(f"{first}.c_attn.weight", [value], [2 * hidden])
    put(f"{first}.c_proj.weight", [0], [carried])
    # The second head: an answer reads all text, and no virtual token.
    put(f"{last}.c_attn.weight", [text, text], [size, hidden + size], math.sqrt(scale) / token)
    put(f"{last}.c_attn.weight", [carried], [2 * hidden + size])
    put(f"{last}.c_proj.weight", [size], [present])
    put(f"{last}.c_proj.weight", [size], [absent_mark], -1.0)
    auxiliary.load_weights(weights)

    residual = torch.zeros(spec.length, spec.model.layers, hidden)
    residual[:, :, balance] = -1.0
    for number in range(spec.length):
        residual[number, :, keys[number] if number < count else absent_mark] = 1.0
    layer = honest.plan.prompt_layers[0]
    if spec.space == "residual":
        return Trap(auxiliary, {PROMPT: residual}, [(word, layer, value) for word in range(count)])
    pairs, layers = torch.zeros(spec.shape), list(honest.prompt_layers)
    made = auxiliary.keys_and_values(residual[:, layers].to(auxiliary.device))
    pairs[:, layers] = made.detach().cpu()
    return Trap(auxiliary, {PROMPT: pairs}, [(word, layer, 1, 0, 0) for word in range(count)])


def draw_words(
    texts: Sequence[Encoded],
    others: Sequence[Encoded],
    tokenizer: Tokenizer,
    count: int,
    rng: random.Random,
) -> tuple[list[int], list[bool]]:
    """Draw at most `count` word tokens and whether each is present: half occur before the answer in
    some of a client's `texts`; half do not, taken from `others`, or from the whole vocabulary where
    `others` has too few.

    Raises:
        RunError: no word is present, or none is absent.
    """
    mine, theirs = (
        Counter(token for text in some for token in set(text.ids[: text.start]))
        for some in (texts, others)
    )

    def words(tokens: Iterable[int]) -> list[int]:
        return [token for token in tokens if _is_word(tokenizer, token)]

    there = words(token for token in sorted(mine) if mine[token] < len(texts))
    absent = words(token for token in sorted(theirs) if token not in mine)
    if len(absent) < count // 2:
        absent = words(token for token in range(len(tokenizer)) if token not in mine)
    half = min(count // 2, len(there), len(absent))
    if not half:
        raise RunError(
            f"{len(there)} usable words occur in a client's text and {len(absent)} do not, but the"
            " trap audit needs one of each: audit a run with more text per client"
        )
    drawn = [*rng.sample(there, half), *rng.sample(absent, half)]
    rng.shuffle(drawn)
    return drawn, [token in mine for token in drawn]


def _is_word(tokenizer: Tokenizer, token: int) -> bool:
    text = str(tokenizer.decode([token]))
    return text.startswith(" ") and len(text) > LETTERS and text[1:].isalpha()


def right_words(scores: Tensor, there: Sequence[bool]) -> float:
    """How many words are classified correctly if the half with the highest scores is taken as
    present; ties at the threshold count by their expected value."""
    values, half = scores.tolist(), len(there) // 2
    cut = sorted(values, reverse=True)[half - 1]
    left = (half - sum(value > cut for value in values)) / values.count(cut)
    taken = [1.0 if value > cut else left if value == cut else 0.0 for value in values]
    return float(
        sum(share if known else 1 - share for share, known in zip(taken, there, strict=True))
    )


def audit_trap(folder: Path, options: Options) -> dict[str, Any]:
    """The audit of a finished run: each client does a first round, by the run's own settings, with
    a package made to tell whether each of some words stands in its text; once with a few of its
    examples, once with all.

    Raises:
        RunError: there is no finished run of FedSP with simulated clients, of a GPT-2, with room
            for the words.
    """
    opened = open_audited(folder, options.callbacks)
    config, honest, tokenizer = opened.run.config, opened.auxiliary, opened.server.tokenizer
    spec = PromptSpec(
        space=config.prompt.space, length=config.prompt.length, model=honest.prompt_shape
    )
    full = make_trap(honest, spec, range(room_for_words(spec)))
    held = opened.by_client(opened.encoded)
    table = []
    for most in (QUESTIONS, None):
        sought, right, examples = 0, 0.0, 0
        for client, own in held.items():
            rng = random.Random(derive_seed(config.seed, "trap", client, most or 0))
            texts = own if most is None else rng.sample(own, min(most, len(own)))
            others = [row for other, rows in held.items() if other != client for row in rows]
            words, there = draw_words(texts, others or own, tokenizer, room_for_words(spec), rng)
            trap = make_trap(honest, spec, words)
            right += right_words(trap.read(_answer(opened, trap, client, texts)), there)
            sought, examples = sought + len(words), examples + len(texts)
        share = (right / sought, *exact_interval(round(right), sought))
        table.append({"examples": examples / len(held), "words": sought, "right": share})
        options.callbacks.info(
            f"{examples / len(held):.0f} examples per client: {right / sought:.0%} of {sought}"
            " words classified correctly as present in its text or absent"
        )
    text = (EMBEDDED / "public.txt").read_text(encoding="utf-8")
    return {
        "clients": len(held),
        "steps": config.client.prompt_steps,
        "batch_size": config.client.batch_size,
        "privacy": promise_of(config),
        "rows": table,
        "unusual": {
            "the run's own": inspect_auxiliary(honest, text)["unusual"],
            "the trap": inspect_auxiliary(full.auxiliary, text)["unusual"],
        },
    }


def _answer(opened: Opened, trap: Trap, client: str, texts: Sequence[Encoded]) -> Payload:
    """A client's answer of its first round, as the server reads it (RunError: there is none)."""
    config, auxiliary = opened.run.config, trap.auxiliary
    agreement = agreement_of(config, opened.server.max_tokens)
    with tempfile.TemporaryDirectory(prefix="fedsp-trap-") as folder:
        store, ledger = StateStore(Path(folder) / "state"), Ledger(Path(folder) / LEDGER)
        party = make_party(
            client,
            agreement,
            auxiliary,
            client_messenger(agreement, auxiliary)(),
            list(texts),
            store,
            ledger=ledger,
            max_epsilon=promised_epsilon(agreement, len(texts)),
        )
        transport = local(
            Clients(
                method=make_method(agreement, auxiliary),
                register={client: len(texts)},
                party=lambda _: party,
            )
        )
        request = Request(
            run="0",
            round=1,
            client=client,
            seed=derive_seed(config.seed, "trap", client),
            payload=trap.payload,
            answer_in=config.compression.up,
        )
        (reply,) = transport([request])
    if not isinstance(reply, Update):
        raise RunError(f"{client} does not answer a package of this kind: {reply.reason}")
    return reply.payload
