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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsp.audit.findings import TRAP
from fedsp.audit.inspection import inspect_auxiliary
from fedsp.audit.shadows import Opened, encoded_rows, open_audited
from fedsp.audit.statistics import exact_interval
from fedsp.data.encoding import Encoded, Tokenizer
from fedsp.data.seeding import derive_seed
from fedsp.errors import RunError
from fedsp.experiments.server_setup import EMBEDDED
from fedsp.federation.agreement import agreement_of, promised_epsilon
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.clients import Clients, make_client, make_method
from fedsp.federation.codecs import parse_codec
from fedsp.federation.messages import Request, Update
from fedsp.federation.state_store import StateStore
from fedsp.federation.transport.local import local
from fedsp.models.auxiliary import AuxiliaryModel, load_auxiliary
from fedsp.models.payload import PROMPT, Payload
from fedsp.models.soft_prompt import PromptSpec
from fedsp.privacy import LEDGER, Ledger
from fedsp.storage import write_json

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
    require_trap(honest, spec)
    auxiliary = _copy(honest)
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
    first, last = (
        f"{path}{honest.path_of_blocks}.{_group(honest, depth)}.attn"
        for depth in (0, honest.plan.depth - 1)
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
    pairs = torch.zeros(spec.shape)
    pairs[:, list(honest.prompt_layers)] = (
        auxiliary.keys_and_values(residual[:, list(honest.prompt_layers)].to(auxiliary.device))
        .detach()
        .cpu()
    )
    return Trap(auxiliary, {PROMPT: pairs}, [(word, layer, 1, 0, 0) for word in range(count)])


def require_trap(honest: AuxiliaryModel, spec: PromptSpec) -> None:
    """Whether a trap can be made of an architecture.

    Raises:
        RunError: it cannot.
    """
    if honest.model.config.model_type != "gpt2":
        raise RunError(
            "the audit's trap is made for GPT-2's architecture, not for"
            f" {honest.model.config.model_type}: audit a run of a GPT-2 model"
        )
    if honest.plan.depth < 2 or spec.model.heads < 2 or room_for_words(spec) < 2:
        raise RunError("the audit's trap needs two layers, two heads and three virtual tokens")


def _copy(honest: AuxiliaryModel) -> AuxiliaryModel:
    """The package as its client opens it: written, and read again."""
    with tempfile.TemporaryDirectory(prefix="fedsp-trap-") as folder:
        honest.save(Path(folder))
        return load_auxiliary(Path(folder), device=honest.device, positions=honest.positions)


def _group(auxiliary: AuxiliaryModel, depth: int) -> int:
    """The first depth that shares its layer with this one: its weights are kept there."""
    return auxiliary.plan.groups.index(auxiliary.plan.groups[depth])


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
    there = [
        token
        for token, number in sorted(mine.items())
        if number < len(texts) and _is_word(tokenizer, token)
    ]
    absent = [token for token in sorted(theirs) if token not in mine and _is_word(tokenizer, token)]
    if len(absent) < count // 2:
        absent = [
            token
            for token in range(len(tokenizer))
            if token not in mine and _is_word(tokenizer, token)
        ]
    half = min(count // 2, len(there), len(absent))
    if not half:
        raise RunError(
            f"{len(there)} usable words occur in a client's text and {len(absent)} do not, but the"
            " trap audit needs one of each: audit a run with more text per client"
        )
    drawn = [(token, True) for token in rng.sample(there, half)] + [
        (token, False) for token in rng.sample(absent, half)
    ]
    rng.shuffle(drawn)
    return [token for token, _ in drawn], [known for _, known in drawn]


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


def audit_trap(folder: Path, *, callbacks: Callbacks | None = None) -> dict[str, Any]:
    """The audit of a finished run, also written to its `trap.json`: each client does a first round,
    by the run's own settings, with a package made to tell whether each of some words stands in its
    text; once with a few of its examples, once with all.

    Raises:
        RunError: there is no finished run of FedSP with simulated clients, of a GPT-2, with room
            for the words.
    """
    callbacks = callbacks or Callbacks()
    opened = open_audited(folder, callbacks)
    config, honest = opened.run.config, opened.auxiliary
    assert isinstance(honest, AuxiliaryModel)
    spec = PromptSpec(
        space=config.prompt.space, length=config.prompt.length, model=honest.prompt_shape
    )
    require_trap(honest, spec)
    rows = encoded_rows(opened)
    held = {
        client: [row for row, holder in zip(rows, opened.holders, strict=True) if holder == client]
        for client in sorted(set(opened.holders))
    }
    table = []
    for most in (QUESTIONS, None):
        counts = [_count_words(opened, honest, spec, client, held, most) for client in held]
        words, right = sum(one for one, _ in counts), sum(one for _, one in counts)
        examples = sum(min(most or len(own), len(own)) for own in held.values()) / len(held)
        table.append(
            {
                "examples": examples,
                "words": words,
                "right": (right / words, *exact_interval(round(right), words)),
            }
        )
        callbacks.info(
            f"{examples:.0f} examples per client: {right / words:.0%} of {words} words classified"
            " correctly as present in its text or absent"
        )
    figures = {
        "clients": len(held),
        "steps": config.client.prompt_steps,
        "batch_size": config.client.batch_size,
        "epsilon": config.privacy.epsilon if config.privacy.unit == "example" else None,
        "rows": table,
        "unusual": {
            "the run's own": _unusual(honest),
            "the trap": _unusual(make_trap(honest, spec, range(room_for_words(spec))).auxiliary),
        },
    }
    write_json(opened.run.path / TRAP, figures)
    return figures


def _count_words(
    opened: Opened,
    honest: AuxiliaryModel,
    spec: PromptSpec,
    client: str,
    held: dict[str, list[Encoded]],
    most: int | None,
) -> tuple[int, float]:
    """The words that are sought in some of a client's examples, and of how many it is told rightly
    whether they stand there."""
    rng = random.Random(derive_seed(opened.run.config.seed, "trap", client, most or 0))
    texts = held[client] if most is None else rng.sample(held[client], min(most, len(held[client])))
    others = [row for other, own in held.items() for row in own if other != client]
    words, there = draw_words(
        texts, others or held[client], opened.server.tokenizer, room_for_words(spec), rng
    )
    trap = make_trap(honest, spec, words)
    return len(words), right_words(trap.read(_answer(opened, trap, client, texts)), there)


def _answer(opened: Opened, trap: Trap, client: str, texts: Sequence[Encoded]) -> Payload:
    """A client's answer of its first round, as the server reads it.

    Raises:
        RunError: the client does not answer.
    """
    config, auxiliary = opened.run.config, trap.auxiliary
    agreement = agreement_of(config, opened.server.max_tokens)
    with tempfile.TemporaryDirectory(prefix="fedsp-trap-") as folder:
        store, ledger = StateStore(Path(folder) / "state"), Ledger(Path(folder) / LEDGER)
        party = make_client(
            client,
            agreement,
            auxiliary,
            list(texts),
            store,
            ledger,
            promised_epsilon(agreement, len(texts)),
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
            answer_in=parse_codec(config.compression.up),
        )
        (reply,) = transport([request])
    if not isinstance(reply, Update):
        raise RunError(f"{client} does not answer a package of this kind: {reply.reason}")
    return reply.payload


def _unusual(auxiliary: AuxiliaryModel) -> list[str]:
    """What `fedsp inspect` finds unusual in a package, on the text that comes with fedsp."""
    found: list[str] = inspect_auxiliary(
        auxiliary, (EMBEDDED / "public.txt").read_text(encoding="utf-8")
    )["unusual"]
    return found
