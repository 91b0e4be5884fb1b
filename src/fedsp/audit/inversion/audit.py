"""The inversion audit of a finished run: from one example and one step, where it must succeed, to
what the run's server really sees."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsp.audit.findings import INVERSION
from fedsp.audit.inversion.gradient_matching import (
    LocalSteps,
    Target,
    best_distances,
    local_change,
    match_embeddings,
    match_text,
)
from fedsp.audit.inversion.scenarios import (
    AttackContext,
    Level,
    Recovery,
    cut,
    guess,
    noise_of,
    noised,
    recovery_of,
)
from fedsp.audit.inversion.span_test import (
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
from fedsp.audit.shadows import (
    Opened,
    Shadow,
    alignment,
    changes_of,
    encoded_rows,
    open_audited,
    train_shadow,
)
from fedsp.audit.statistics import exact_interval
from fedsp.data.encoding import Encoded, collate
from fedsp.data.seeding import derive_seed
from fedsp.errors import RunError, require_installed
from fedsp.experiments.server_setup import first_tokens
from fedsp.federation.agreement import stages_of
from fedsp.federation.callbacks import Callbacks
from fedsp.models.payload import as_row
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt
from fedsp.storage import write_json
from fedsp.training.per_example_gradients import example_gradients

DECOYS, PURSUED, SOUGHT = 9, 3, 4
"""Decoy texts per candidate test; texts attacked by matching pursuit; texts that gradient matching
seeks in one client's update."""
LONGEST, SIMULATED, ITERATIONS = 64, 4, 200
"""Maximum tokens of a text and maximum local steps that an attack considers; iterations of gradient
matching."""
EPSILONS = (8.0, 1.0)
TRIED = 20
"""Shadow runs tried until a client is sampled and answers in the first round."""
POSITIONS = 4
"""Token positions attacked in a residual prompt's gradient, whose dictionary is larger than that of
a key/value prompt by a factor of the number of heads."""


def audit_inversion(
    folder: Path, *, examples: int = 20, callbacks: Callbacks | None = None
) -> dict[str, Any]:
    """Audit a finished run and write the result to its `inversion.json`: for each observation and
    attack the share of tokens reconstructed. `examples` texts are attacked one at a time; with 0,
    only what the run's server sees is attacked.

    Raises:
        RunError: the folder holds no finished run of FedSP with simulated clients.
        ConfigurationError: rouge-score is not installed.
    """
    check_inversion()
    callbacks = callbacks or Callbacks()
    opened = open_audited(folder, callbacks)
    rng = random.Random(derive_seed(opened.run.config.seed, "inversion"))
    context = AttackContext(
        opened,
        encoded_rows(opened),
        {space: _prompt(opened, space) for space in ("key_value", "residual")},
    )
    shadow = next(
        (
            one
            for one in (train_shadow(opened, index, rounds=1) for index in range(TRIED))
            if one.answered
        ),
        None,
    )
    if shadow is None:
        raise RunError(
            f"{folder}: in {TRIED} repetitions of its first round no client was sampled and"
            " answered: audit a run that samples more clients per round"
        )
    bodies = [body for body in context.bodies() if len(body.ids) > POSITIONS]
    drawn = rng.sample(bodies, min(examples, len(bodies)))
    table: list[dict[str, Any]] = []
    alone = (
        itertools.chain(
            _spans(context, drawn, bodies),
            _matches(context, drawn[: max(2, examples // 2)], bodies),
        )
        if drawn
        else ()
    )
    for level in itertools.chain(alone, _deployed(context, shadow)):
        table.append(level.to_json())
        callbacks.info(f"{level.seen}, {level.attack}: {table[-1]['tokens'][0]:.0%} of the tokens")
    figures = {"rows": table, "candidates": _candidates(context, shadow, rng)}
    write_json(opened.run.path / INVERSION, figures)
    return figures


def check_inversion() -> None:
    """Whether what the audit needs is there.

    Raises:
        ConfigurationError: rouge-score is not installed.
    """
    require_installed("study", "the inversion audit needs", "rouge_score")


def _spans(context: AttackContext, drawn: list[Encoded], like: list[Encoded]) -> Iterator[Level]:
    """One example and one step of SGD, read by the span test and, beyond the prompt's length, by
    pursuit."""
    opened, prompts = context.opened, context.prompts
    prompt = prompts["key_value"]
    keys = key_dictionary(
        opened.auxiliary, prompt, min(max(len(row.ids) for row in drawn), LONGEST)
    )
    length = prompt.spec.length
    short = [cut(row, length + 1) for row in drawn]
    one = f"one example of at most {length} tokens, one step of SGD, key/value prompt"
    yield Level(
        seen=one,
        attack="span test",
        read=[_one(context, prompt, row, keys) for row in short],
        guess=guess([[text] for text in short], like),
    )
    for bits in (torch.float16, torch.bfloat16):
        read = [_one(context, prompt, row, keys, rounded=bits) for row in short]
        yield Level(
            seen=f"{one}, sent in {str(bits).removeprefix('torch.')}",
            attack="span test",
            read=read,
            guess=guess([[text] for text in short], like),
        )
    few = [cut(row, length + length // 4 + 1) for row in drawn[:PURSUED]]
    pursued = [_one(context, prompt, row, keys, pursuit=True) for row in few]
    yield Level(
        seen="one example, longer than the prompt, one step of SGD, key/value prompt",
        attack="pursuit",
        read=pursued,
        guess=guess([[text] for text in few], like),
    )
    for epsilon in EPSILONS:
        read = [_one(context, prompt, row, keys, noise=noise_of(epsilon)) for row in short]
        yield Level(
            seen=f"{one}, with the noise of epsilon = {epsilon:g}",
            attack="span test",
            read=read,
            guess=guess([[text] for text in short], like),
        )
    tiny = [cut(row, POSITIONS + 1) for row in drawn]
    mixed = residual_dictionary(opened.auxiliary, prompts["residual"], POSITIONS)
    read = [_one(context, prompts["residual"], row, mixed) for row in tiny]
    yield Level(
        seen=f"one example of {POSITIONS} tokens, one step of SGD, residual prompt",
        attack="span test",
        read=read,
        guess=guess([[text] for text in tiny], like),
    )


def _matches(context: AttackContext, drawn: list[Encoded], like: list[Encoded]) -> Iterator[Level]:
    """One example, read by simulating what its client does."""
    local = _local_steps(context.opened)
    for space, tokens, steps, epsilon in (
        ("residual", POSITIONS, LocalSteps(), None),
        ("residual", 2 * POSITIONS, LocalSteps(), None),
        ("key_value", POSITIONS, LocalSteps(), None),
        ("residual", POSITIONS, local, None),
        *(("residual", POSITIONS, LocalSteps(), epsilon) for epsilon in EPSILONS),
    ):
        done = f"{len(steps.rates)} steps of AdamW" if steps.rates else "one step of SGD"
        promise = "" if epsilon is None else f", with the noise of epsilon = {epsilon:g}"
        texts = [cut(row, tokens + 1) for row in drawn]
        read = [
            _matched(
                context,
                context.prompts[space],
                text,
                steps,
                0.0 if epsilon is None else noise_of(epsilon),
            )
            for text in texts
        ]
        name = space.replace("_", "/")
        yield Level(
            seen=f"one example of {tokens} tokens, {done}, {name} prompt{promise}",
            attack="gradient matching",
            read=read,
            guess=guess([[text] for text in texts], like),
        )

    own = [cut(row, POSITIONS + 1) for row in drawn[:SOUGHT]]
    space = context.opened.run.config.prompt.space
    ids = torch.tensor([text.ids for text in own], device=context.opened.auxiliary.device)
    embedded = context.opened.auxiliary.model.get_input_embeddings()(ids[:, :-1]).detach()[None]
    change = local_change(
        context.opened.auxiliary, context.prompts[space], embedded, ids[:, -1], local
    )[0].detach()
    name = (
        f"a client with {len(own)} examples of {POSITIONS} tokens, {len(local.rates)} steps of"
        f" AdamW, {space.replace('_', '/')} prompt"
    )
    yield Level(
        seen=name,
        attack="gradient matching",
        read=[_sought(context, context.prompts[space], change, own)],
        guess=guess([own], like),
    )


def _sought(
    context: AttackContext, prompt: SoftPrompt, change: Tensor, texts: list[Encoded]
) -> Recovery:
    """Jointly match SOUGHT texts, whose answers are known, to one change of the prompt; the recall
    is over the first POSITIONS tokens of all `texts`."""
    model = context.opened.auxiliary
    answers = torch.tensor([text.ids[text.start] for text in texts[:SOUGHT]], device=model.device)
    target = Target(
        change=change.float().view(prompt.spec.shape).to(model.device),
        answers=answers,
        tokens=POSITIONS,
        steps=_local_steps(context.opened),
    )
    sought = match_embeddings(
        model,
        prompt,
        target,
        iterations=ITERATIONS,
        restarts=1,
        seed=context.opened.run.config.seed,
    )
    return Recovery(
        recall(best_distances(model, sought).cpu(), [cut(text, POSITIONS + 1) for text in texts])
    )


def _matched(
    context: AttackContext, prompt: SoftPrompt, row: Encoded, steps: LocalSteps, noise: float
) -> Recovery:
    """One text whose answer is its last token, from the change that it makes."""
    model = context.opened.auxiliary
    ids = torch.tensor(row.ids, device=model.device)
    embedded = model.model.get_input_embeddings()(ids[:-1]).detach()[None, None]
    change = local_change(model, prompt, embedded, ids[-1:], steps)[0].detach()
    target = Target(
        change=noised(change, noise).to(model.device),
        answers=ids[-1:],
        tokens=len(row.ids) - 1,
        steps=steps,
    )
    return recovery_of(match_text(model, prompt, target, iterations=ITERATIONS), row)


def _local_steps(opened: Opened) -> LocalSteps:
    """The steps of the run's own clients in their first round, no more than SIMULATED of them."""
    config = opened.run.config
    stage = stages_of(config.client, None, config.round.rounds).messenger
    rates = tuple(stage.optimisation.rate(step) for step in range(min(SIMULATED, stage.steps)))
    return LocalSteps(rates, stage.optimisation.weight_decay)


def _prompt(opened: Opened, space: Any) -> SoftPrompt:
    """A prompt of the run's length, from real activations, in either space."""
    length, tokens = opened.run.config.prompt.length, first_tokens(opened.server)
    spec = PromptSpec(space=space, length=length, model=opened.auxiliary.prompt_shape)
    if tokens is None:
        return SoftPrompt(
            spec,
            torch.randn(spec.shape, generator=torch.Generator().manual_seed(0))
            * opened.run.config.prompt.init_scale,
        )
    inputs, pairs = opened.server.model.activations(tokens[:length].to(opened.server.model.device))
    return SoftPrompt(spec, (inputs if space == "residual" else pairs).cpu()).to(
        opened.auxiliary.device
    )


def _one(
    context: AttackContext,
    prompt: SoftPrompt,
    row: Encoded,
    dictionary: Dictionary,
    *,
    rounded: Any = torch.float32,
    noise: float = 0.0,
    pursuit: bool = False,
) -> Recovery:
    """One example's own gradient, as it would arrive, by the span test or by pursuit."""
    model = context.opened.auxiliary
    gradient = noised(example_gradients(model, prompt, collate([row]))[1][0].cpu(), noise)
    rows = gradient_rows(prompt, model, gradient.to(rounded).float())
    count = len(row.ids) - 1
    dictionary = Dictionary(dictionary.vectors[:count])
    if pursuit:
        found = matching_pursuit(rows, dictionary, count)
        return replace(
            recovery_of([token for _, token in sorted(found)], row), tokens=recall_of(found, [row])
        )
    # a residual row mixes many more directions than there are tokens
    rank = count if prompt.spec.space == "key_value" else rows.shape[1]
    distances = span_test(rows, dictionary, rank)
    return recovery_of(read_back(distances, count), row)


def _deployed(context: AttackContext, shadow: Shadow) -> Iterator[Level]:
    """What the run's server sees: each client's update of the first round, and their sum; and the
    same in one step of SGD on a whole lot."""
    opened = context.opened
    config = opened.run.config
    space = config.prompt.space
    model, prompt = opened.auxiliary, context.prompts[space]
    dictionary = (key_dictionary if space == "key_value" else residual_dictionary)(
        model, prompt, LONGEST if space == "key_value" else POSITIONS
    )
    seen = len(dictionary.vectors)

    def short(lot: list[Encoded]) -> list[Encoded]:
        return [cut(row, seen + 1) for row in lot]

    def span(change: Tensor, lot: list[Encoded]) -> Recovery:
        return Recovery(
            recall(
                span_test(
                    gradient_rows(prompt, model, change.float().view(prompt.spec.shape)),
                    dictionary,
                    10_000,
                ),
                short(lot),
            )
        )

    def guessed(lots: Iterable[list[Encoded]]) -> float:
        return guess([short(lot) for lot in lots], context.rows)

    size = config.client.batch_size
    lots = [lot[:size] for lot in context.lots(LONGEST).values()]
    gradients = [
        example_gradients(model, prompt, collate(lot))[1].mean(dim=0).cpu() for lot in lots
    ]
    read = [span(gradient, lot) for gradient, lot in zip(gradients, lots, strict=True)]
    yield Level(
        seen=f"a lot of {size} examples, one step of SGD, {space.replace('_', '/')} prompt",
        attack="span test",
        read=read,
        guess=guessed(lots),
    )

    mine = {
        client: lot
        for client, lot in context.lots(LONGEST, shadow.included.tolist()).items()
        if client in shadow.updates[0]
    }
    changes = changes_of(shadow, 0, list(mine))
    private = config.privacy.unit == "example" and config.privacy.epsilon
    kind = "the run's first round, again on half of the text" + (
        f", epsilon = {config.privacy.epsilon:g}" if private else ""
    )
    read = [span(change, lot) for change, lot in zip(changes, mine.values(), strict=True)]
    yield Level(
        seen=f"{kind}, one client",
        attack="span test",
        read=read,
        guess=guessed(mine.values()),
        observed=True,
    )
    everyone = [row for lot in mine.values() for row in lot]
    total = as_row(shadow.broadcasts[1]) - as_row(shadow.broadcasts[0])
    yield Level(
        seen=f"{kind}, the sum of all clients",
        attack="span test",
        read=[span(total, everyone)],
        guess=guessed([everyone]),
        observed=True,
    )

    own = opened.federation.clients.party(next(iter(mine))).prompt
    own.load(shadow.broadcasts[0])
    lot = next(iter(mine.values()))
    first = [cut(row, POSITIONS + 1) for row in lot]
    yield Level(
        seen=f"{kind}, one client",
        attack="gradient matching",
        read=[_sought(context, own, changes[0], lot)],
        guess=guess([first], context.rows),
        observed=True,
    )


def _candidates(
    context: AttackContext, shadow: Shadow, rng: random.Random, count: int = 200
) -> dict[str, Any]:
    """How often the cosine with a client's update picks the text that was trained on out of ten: a
    list of plausible texts is all that an attacker needs."""
    opened = context.opened
    clients = sorted(shadow.updates[0])
    prompt = opened.federation.clients.party(clients[0]).prompt
    included = shadow.included.tolist()
    inside = [
        index for index, there in enumerate(included) if there and opened.holders[index] in clients
    ]
    outside = [index for index, there in enumerate(included) if not there]
    if len(outside) < DECOYS or not inside:
        raise RunError(
            f"{opened.run.path}: its clients hold {len(included)} examples, too few to pick one of"
            f" {DECOYS + 1}"
        )
    picked = rng.sample(inside, min(count, len(inside)))
    decoys = [rng.sample(outside, DECOYS) for _ in picked]
    needed = sorted({*picked, *(index for some in decoys for index in some)})
    cosines = alignment(
        opened.auxiliary,
        prompt,
        shadow.broadcasts[0],
        changes_of(shadow, 0, clients),
        [context.rows[index] for index in needed],
    )
    place = {index: number for number, index in enumerate(needed)}

    def right(index: int, some: list[int]) -> bool:
        holder = clients.index(opened.holders[index])
        return all(
            float(cosines[place[index], holder]) > float(cosines[place[other], holder])
            for other in some
        )

    hits = sum(right(*pair) for pair in zip(picked, decoys, strict=True))
    return {
        "right": (hits / len(picked), *exact_interval(hits, len(picked))),
        "guess": 1 / (DECOYS + 1),
        "texts": len(picked),
    }
