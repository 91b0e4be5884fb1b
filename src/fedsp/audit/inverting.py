"""The inversion audit of a finished run: from one example and one step, where it must succeed, to what the run's server really sees."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedsp.audit.inversion import (
    Dictionary,
    gradient_rows,
    key_dictionary,
    matching_pursuit,
    read_back,
    recall,
    recall_of,
    residual_dictionary,
    span_test,
)
from fedsp.audit.shadows import Opened, alignment, changes_of, encoded_rows, open_audited, train_shadow
from fedsp.audit.tables import INVERSION
from fedsp.data.encoding import Encoded, collate
from fedsp.payload import as_row
from fedsp.per_example import example_gradients
from fedsp.privacy import clipped_sum, noise_for, noised_mean
from fedsp.prompts import PromptSpec, SoftPrompt
from fedsp.rounds import derive_seed
from fedsp.server import Watcher, first_tokens
from fedsp.storage import write_json

DECOYS = 9
PURSUED = 3
POSITIONS = 4
"""Positions that are looked at of a residual prompt's gradient, whose dictionary is as many times larger as the model has heads."""


def audit_inversion(folder: Path, *, examples: int = 20, watcher: Watcher | None = None) -> dict[str, Any]:
    """The audit of a finished run, also written to its `inversion.json`: a row for each level of what is seen, with the share of tokens read back.

    Raises:
        RunError: there is no finished run of FedSP with simulated clients.
    """
    watcher = watcher or Watcher()
    opened = open_audited(folder, watcher)
    rows = encoded_rows(opened)
    rng = random.Random(derive_seed(opened.run.config.seed, "inversion"))
    drawn = rng.sample(rows, min(examples, len(rows)))
    prompts = {space: _prompt(opened, space) for space in ("key_value", "residual")}
    longest = min(max(len(row.ids) for row in drawn), 64)
    keys = key_dictionary(opened.auxiliary, prompts["key_value"], longest)
    table: list[dict[str, Any]] = []

    def add(level: str, attack: str, found: Sequence[tuple[float, bool | None]], guess: float) -> None:
        exact = [whole for _, whole in found if whole is not None]
        share = sum(value for value, _ in found) / len(found)
        table.append(
            {"level": level, "attack": attack, "tokens": share, "texts": sum(exact) / len(exact) if exact else None, "guess": guess, "examples": len(found)}
        )
        watcher.say(f"{level}, {attack}: {share:.0%} of the tokens")

    length = prompts["key_value"].spec.length
    short = [_cut(row, length + 1) for row in drawn]
    guesses = _guess(rows)
    one = f"one example of at most {length} tokens, one step of SGD"
    add(
        f"{one}, key/value prompt",
        "span test",
        [_one(opened, prompts["key_value"], row, keys) for row in short],
        _guessed_alone(guesses, short),
    )
    for bits in (torch.float16, torch.bfloat16):
        name = f"{one}, key/value prompt, sent in {str(bits).removeprefix('torch.')}"
        add(
            name,
            "span test",
            [_one(opened, prompts["key_value"], row, keys, rounded=bits) for row in short],
            _guessed_alone(guesses, short),
        )
    few = [_cut(row, length + length // 4 + 1) for row in drawn[:PURSUED]]
    pursued = [_one(opened, prompts["key_value"], row, keys, pursuit=True) for row in few]
    add("one example, longer than the prompt, one step of SGD, key/value prompt", "pursuit", pursued, _guessed_alone(guesses, few))
    tiny = [_cut(row, POSITIONS + 1) for row in drawn]
    mixed = residual_dictionary(opened.auxiliary, prompts["residual"], POSITIONS)
    add(
        f"one example of {POSITIONS} tokens, one step of SGD, residual prompt",
        "span test",
        [_one(opened, prompts["residual"], row, mixed) for row in tiny],
        _guessed_alone(guesses, tiny),
    )
    for epsilon in (8.0, 1.0):
        name = f"{one}, key/value prompt, epsilon = {epsilon:g}"
        add(
            name,
            "span test",
            [_one(opened, prompts["key_value"], row, keys, noise=noise_for(epsilon, 1e-5, 1.0, 1)) for row in short],
            _guessed_alone(guesses, short),
        )
    _deployed(opened, rows, prompts, keys if opened.run.config.prompt.space == "key_value" else mixed, guesses, add)
    figures = {"rows": table, "candidates": _candidates(opened, rows, rng)}
    write_json(opened.run.path / INVERSION, figures)
    return figures


def _prompt(opened: Opened, space: Any) -> SoftPrompt:
    """A prompt of the run's length, from real activations, in either space."""
    length, tokens = opened.run.config.prompt.length, first_tokens(opened.server)
    spec = PromptSpec(space, length, opened.auxiliary.prompt_shape)
    if tokens is None:
        return SoftPrompt(spec, torch.randn(spec.shape, generator=torch.Generator().manual_seed(0)) * opened.run.config.prompt.init_scale)
    inputs, pairs = opened.server.model.activations(tokens[:length].to(opened.server.model.device))
    return SoftPrompt(spec, (inputs if space == "residual" else pairs).cpu()).to(opened.auxiliary.device)


def _one(
    opened: Opened, prompt: SoftPrompt, row: Encoded, dictionary: Dictionary, *, rounded: torch.dtype = torch.float32, noise: float = 0.0, pursuit: bool = False
) -> tuple[float, bool]:
    """One example's own gradient, as it would arrive: the share of its tokens that is read back, and whether all of it is."""
    gradient = example_gradients(opened.auxiliary, prompt, collate([row]))[1][0].cpu()
    if noise:
        bound = float(gradient.norm())
        gradient = noised_mean(clipped_sum(gradient.flatten()[None], bound), bound=bound, noise_multiplier=noise, expected=1.0).float().view_as(gradient)
    rows = gradient_rows(prompt, opened.auxiliary, gradient.to(rounded).float())
    count = len(row.ids) - 1
    dictionary = Dictionary(dictionary.vectors[:count])
    if pursuit:
        share = recall_of(matching_pursuit(rows, dictionary, count), [row])
        return share, share == 1.0
    rank = count if prompt.spec.space == "key_value" else rows.shape[1]  # a residual row mixes many more directions than there are tokens
    distances = span_test(rows, dictionary, rank)
    return recall(distances, [row]), read_back(distances, count) == list(row.ids[:-1])


def _deployed(opened: Opened, rows: list[Encoded], prompts: dict[str, SoftPrompt], dictionary: Dictionary, guesses: list[int], add: Any) -> None:
    """What the run's server sees: each client's update of the first round, and their sum; and the same in one step of SGD on a whole lot."""
    space = opened.run.config.prompt.space
    prompt = prompts[space]
    clients = sorted(set(opened.holders))
    held = {client: [row for row, holder in zip(rows, opened.holders, strict=True) if holder == client] for client in clients}
    longest = 64
    size = opened.run.config.client.batch_size
    lots = [_lot(some[:size], longest) for some in held.values()]
    gradients = [example_gradients(opened.auxiliary, prompt, collate(lot))[1].mean(dim=0).cpu() for lot in lots]
    read = [
        (recall(span_test(gradient_rows(prompt, opened.auxiliary, gradient), dictionary, 10_000), lot), None)
        for gradient, lot in zip(gradients, lots, strict=True)
    ]
    add(f"a lot of {size} examples, one step of SGD, {space} prompt", "span test", read, _mean([_guessed(guesses, lot) for lot in lots]))
    shadow = train_shadow(opened, 0)
    changes = changes_of(shadow, 0, clients)
    members = [(row, holder) for row, holder, there in zip(rows, opened.holders, shadow.included.tolist(), strict=True) if there]
    mine = {client: _lot([row for row, holder in members if holder == client], longest) for client in clients}
    shape = prompt.spec.shape
    read = [
        (recall(span_test(gradient_rows(prompt, opened.auxiliary, change.float().view(shape)), dictionary, 10_000), mine[client]), None)
        for change, client in zip(changes, clients, strict=True)
    ]
    kind = "the run's own updates" + (
        f", epsilon = {opened.run.config.privacy.epsilon:g}" if opened.run.config.privacy.unit == "example" and opened.run.config.privacy.epsilon else ""
    )
    add(f"{kind}, one client", "span test", read, _mean([_guessed(guesses, lot) for lot in mine.values()]))
    total = as_row(shadow.broadcasts[1]) - as_row(shadow.broadcasts[0])
    everyone = [row for lot in mine.values() for row in lot]
    read = [(recall(span_test(gradient_rows(prompt, opened.auxiliary, total.float().view(shape)), dictionary, 10_000), everyone), None)]
    add(f"{kind}, the sum of all clients", "span test", read, _guessed(guesses, everyone))


def _candidates(opened: Opened, rows: list[Encoded], rng: random.Random, count: int = 50) -> dict[str, float]:
    """How often the cosine with a client's update picks the text that was trained on out of ten: a list of plausible texts is all that an attacker needs."""
    shadow = train_shadow(opened, 1)
    clients = sorted(set(opened.holders))
    prompt = opened.sides.clients.party(clients[0]).prompt
    included = shadow.included.tolist()
    inside, outside = ([index for index, there in enumerate(included) if there == side] for side in (True, False))
    picked = rng.sample(inside, min(count, len(inside)))
    decoys = [rng.sample(outside, DECOYS) for _ in picked]
    needed = sorted({*picked, *(index for some in decoys for index in some)})
    cosines = alignment(opened.auxiliary, prompt, shadow.broadcasts[0], changes_of(shadow, 0, clients), [rows[index] for index in needed])
    place = {index: number for number, index in enumerate(needed)}
    right = sum(
        all(
            float(cosines[place[index], clients.index(opened.holders[index])]) > float(cosines[place[other], clients.index(opened.holders[index])])
            for other in some
        )
        for index, some in zip(picked, decoys, strict=True)
    )
    return {"right": right / len(picked), "guess": 1 / (DECOYS + 1), "texts": float(len(picked))}


def _cut(row: Encoded, tokens: int) -> Encoded:
    """The first tokens of an example, the last of them as its answer."""
    kept = row.ids[:tokens]
    return Encoded(kept, len(kept) - 1)


def _lot(rows: Sequence[Encoded], longest: int) -> list[Encoded]:
    return [row if len(row.ids) <= longest else _cut(row, longest) for row in rows]


def _guess(rows: Sequence[Encoded]) -> list[int]:
    """Tokens by how common they are: what somebody guesses who sees nothing. (Counted on the very texts, which flatters the guess.)"""
    return [token for token, _ in Counter(token for row in rows for token in row.ids).most_common()]


def _guessed(common: list[int], texts: Sequence[Encoded]) -> float:
    """The recall of the most common tokens at every position of a lot."""
    right = total = 0
    for position in range(max(len(row.ids) for row in texts) - 1):
        there = {row.ids[position] for row in texts if position < len(row.ids) - 1}
        right, total = right + len(there & set(common[: len(there)])), total + len(there)
    return right / max(1, total)


def _guessed_alone(common: list[int], texts: Sequence[Encoded]) -> float:
    """The same for texts that are seen one at a time, mean over them."""
    return _mean([_guessed(common, [row]) for row in texts])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
