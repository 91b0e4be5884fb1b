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

from fedsp.audit.inversion.adapters import (
    as_deployed,
    by_matching,
    by_spans,
    reads_tokens_alone,
)
from fedsp.audit.inversion.gradient_matching import (
    LocalSteps,
    PromptTarget,
    best_distances,
    local_change,
    match_embeddings,
    match_text,
)
from fedsp.audit.inversion.scenarios import (
    AttackContext,
    Recovery,
    cut,
    guess,
    level,
    noised,
    recovery_of,
    without_template,
)
from fedsp.audit.inversion.span_test import (
    gradient_rows,
    key_dictionary,
    matching_pursuit,
    recall,
    recall_of,
    residual_dictionary,
    span_test,
)
from fedsp.audit.shadows import (
    Opened,
    Options,
    Shadow,
    alignment,
    changes_of,
    check_audited,
    check_prompt,
    open_audited,
    promise_of,
    train_shadow,
)
from fedsp.audit.statistics import exact_interval
from fedsp.data.encoding import Encoded, collate
from fedsp.data.seeding import derive_seed
from fedsp.errors import RunError, require_installed
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import first_tokens
from fedsp.federation.agreement import stages_of
from fedsp.models.adapter import Adapter
from fedsp.models.payload import as_row
from fedsp.models.soft_prompt import PromptSpec, SoftPrompt, initial_values
from fedsp.training.per_example_gradients import example_gradients

Row = dict[str, Any]
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


def audit_inversion(folder: Path, options: Options) -> dict[str, Any]:
    """For each observation of a finished run and each attack the share of tokens reconstructed from
    changes of its soft prompt or adapters.
    `options.texts` texts are attacked one at a time; with 0, only what the run's server sees is
    attacked.

    Raises:
        RunError: the folder holds no finished run of FedSP with simulated clients.
    """
    opened = open_audited(folder, options.callbacks)
    rng = random.Random(derive_seed(opened.run.config.seed, "inversion"))
    shadows = (train_shadow(opened, index, rounds=1) for index in range(TRIED))
    shadow = next((one for one in shadows if one.answered), None)
    if shadow is None:
        raise RunError(
            f"{folder}: in {TRIED} repetitions of its first round no client was sampled and"
            " answered: audit a run that samples more clients per round"
        )
    bodies = [body for body in without_template(opened.encoded) if len(body.ids) > POSITIONS]
    drawn = rng.sample(bodies, min(options.texts, len(bodies)))
    few = drawn[: max(2, options.texts // 2)]
    levels: list[Iterator[Row]]
    if isinstance(opened.messenger, Adapter):
        levels = list(_of_adapters(opened, opened.messenger, shadow, drawn, few, bodies))
    else:
        prompts = {space: _prompt(opened, space) for space in ("key_value", "residual")}
        context = AttackContext(opened, prompts)
        levels = [_deployed(context, shadow)]
        if drawn:
            levels = [_spans(context, drawn, bodies), _matches(context, few, bodies), *levels]
    table = []
    for row in itertools.chain(*levels):
        table.append(row)
        options.callbacks.info(
            f"{row['level']}, {row['attack']}: {row['tokens'][0]:.0%} of the tokens"
        )
    return {"rows": table, "candidates": _candidates(opened, shadow, rng)}


def check_inversion(run: RunDirectory) -> None:
    """Refuse a run that cannot be audited (RunError), and to begin without rouge-score
    (ConfigurationError)."""
    if run.config.messenger.kind == "adapter":
        check_audited(run)
    else:
        check_prompt(run)
    require_installed("study", "the inversion audit needs", "rouge_score")


def _of_adapters(
    opened: Opened,
    adapter: Adapter,
    shadow: Shadow,
    drawn: list[Encoded],
    few: list[Encoded],
    like: list[Encoded],
) -> Iterator[Iterator[Row]]:
    """The levels for adapters, at the broadcast of the first round."""
    adapter.load(shadow.broadcasts[0])
    first = reads_tokens_alone(opened.auxiliary, adapter)
    if drawn and first:
        yield by_spans(opened, adapter, drawn, like, EPSILONS)
    if drawn:
        yield by_matching(
            opened,
            adapter,
            few,
            like,
            tokens=POSITIONS,
            iterations=ITERATIONS,
            epsilons=EPSILONS,
        )
    if first:
        yield as_deployed(opened, adapter, shadow, _first_round(opened))


def _first_round(opened: Opened) -> str:
    """What the run's server sees, in words."""
    return f"the run's first round, again on half of the text, {promise_of(opened.run.config)}"


def _spans(context: AttackContext, drawn: list[Encoded], like: list[Encoded]) -> Iterator[Row]:
    """One example and one step of SGD, read by the span test and, beyond the prompt's length, by
    pursuit."""
    model, prompt = context.opened.auxiliary, context.prompts["key_value"]
    length = prompt.spec.length
    keys = key_dictionary(model, prompt, min(max(len(row.ids) for row in drawn), LONGEST))
    short = [cut(row, length + 1) for row in drawn]
    one = f"one example of at most {length} tokens, one step of SGD, key/value prompt"

    def spanned(seen: str, texts: list[Encoded], **how: Any) -> Row:
        given: dict[str, Any] = {"prompt": prompt, "dictionary": keys} | how
        read = [_one(context, row=row, **given) for row in texts]
        attack = "pursuit" if "pursuit" in how else "span test"
        return level(seen, attack, read, guess([[text] for text in texts], like))

    yield spanned(one, short)
    for bits in (torch.float16, torch.bfloat16):
        yield spanned(f"{one}, sent in {str(bits).removeprefix('torch.')}", short, rounded=bits)
    yield spanned(
        "one example, longer than the prompt, one step of SGD, key/value prompt",
        [cut(row, length + length // 4 + 1) for row in drawn[:PURSUED]],
        pursuit=True,
    )
    for epsilon in EPSILONS:
        yield spanned(f"{one}, with the noise of epsilon = {epsilon:g}", short, epsilon=epsilon)
    residual = context.prompts["residual"]
    yield spanned(
        f"one example of {POSITIONS} tokens, one step of SGD, residual prompt",
        [cut(row, POSITIONS + 1) for row in drawn],
        prompt=residual,
        dictionary=residual_dictionary(model, residual, POSITIONS),
    )


def _matches(context: AttackContext, drawn: list[Encoded], like: list[Encoded]) -> Iterator[Row]:
    """One example, read by simulating what its client does."""
    model, local, sgd = context.opened.auxiliary, _local_steps(context.opened), LocalSteps()
    for space, tokens, steps, epsilon in (
        ("residual", POSITIONS, sgd, None),
        ("residual", 2 * POSITIONS, sgd, None),
        ("key_value", POSITIONS, sgd, None),
        ("residual", POSITIONS, local, None),
        *(("residual", POSITIONS, sgd, epsilon) for epsilon in EPSILONS),
    ):
        done = f"{len(steps.rates)} steps of AdamW" if steps.rates else "one step of SGD"
        promise = "" if epsilon is None else f", with the noise of epsilon = {epsilon:g}"
        texts = [cut(row, tokens + 1) for row in drawn]
        yield level(
            f"one example of {tokens} tokens, {done}, {space.replace('_', '/')} prompt{promise}",
            "gradient matching",
            [_matched(context, context.prompts[space], text, steps, epsilon) for text in texts],
            guess([[text] for text in texts], like),
        )

    own = [cut(row, POSITIONS + 1) for row in drawn[:SOUGHT]]
    space = context.opened.run.config.prompt.space
    ids = torch.tensor([text.ids for text in own], device=model.device)
    embedded = model.model.get_input_embeddings()(ids[:, :-1]).detach()[None]
    change = local_change(model, context.prompts[space], embedded, ids[:, -1], local)[0].detach()
    yield level(
        f"a client with {len(own)} examples of {POSITIONS} tokens, {len(local.rates)} steps of"
        f" AdamW, {space.replace('_', '/')} prompt",
        "gradient matching",
        [_sought(context, context.prompts[space], change, own)],
        guess([own], like),
    )


def _sought(
    context: AttackContext, prompt: SoftPrompt, change: Tensor, texts: list[Encoded]
) -> Recovery:
    """Jointly match SOUGHT texts, whose answers are known, to one change of the prompt; the recall
    is over the first POSITIONS tokens of all `texts`."""
    model = context.opened.auxiliary
    answers = torch.tensor([text.ids[text.start] for text in texts[:SOUGHT]], device=model.device)
    target = PromptTarget(
        model=model,
        prompt=prompt,
        change=change.float().view(prompt.spec.shape).to(model.device),
        answers=answers,
        tokens=POSITIONS,
        steps=_local_steps(context.opened),
    )
    sought = match_embeddings(
        target,
        iterations=ITERATIONS,
        restarts=1,
        seed=context.opened.run.config.seed,
    )
    return Recovery(
        recall(best_distances(model, sought).cpu(), [cut(text, POSITIONS + 1) for text in texts])
    )


def _matched(
    context: AttackContext,
    prompt: SoftPrompt,
    row: Encoded,
    steps: LocalSteps,
    epsilon: float | None,
) -> Recovery:
    """One text whose answer is its last token, from the change that it makes."""
    model = context.opened.auxiliary
    ids = torch.tensor(row.ids, device=model.device)
    embedded = model.model.get_input_embeddings()(ids[:-1]).detach()[None, None]
    change = local_change(model, prompt, embedded, ids[-1:], steps)[0].detach()
    target = PromptTarget(
        model=model,
        prompt=prompt,
        change=noised(change, epsilon).to(model.device),
        answers=ids[-1:],
        tokens=len(row.ids) - 1,
        steps=steps,
    )
    return recovery_of(match_text(target, iterations=ITERATIONS), row)


def _local_steps(opened: Opened) -> LocalSteps:
    """The steps of the run's own clients in their first round, no more than SIMULATED of them."""
    config = opened.run.config
    stage = stages_of(config.client, None, config.round.rounds).messenger
    rates = tuple(stage.optimisation.rate(step) for step in range(min(SIMULATED, stage.steps)))
    return LocalSteps(rates, stage.optimisation.weight_decay)


def _prompt(opened: Opened, space: Any) -> SoftPrompt:
    """A prompt of the run's length, from real activations, in either space."""
    section, tokens = opened.run.config.prompt, first_tokens(opened.server)
    spec = PromptSpec(space=space, length=section.length, model=opened.auxiliary.prompt_shape)
    values = initial_values(
        spec, opened.server.model, scale=section.init_scale, tokens=tokens, seed=0
    )
    return SoftPrompt(spec, values).to(opened.auxiliary.device)


def _one(
    context: AttackContext,
    prompt: SoftPrompt,
    row: Encoded,
    dictionary: Tensor,
    *,
    rounded: Any = torch.float32,
    epsilon: float | None = None,
    pursuit: bool = False,
) -> Recovery:
    """One example's own gradient, as it would arrive, by the span test or by pursuit."""
    model, count = context.opened.auxiliary, len(row.ids) - 1
    gradient = noised(example_gradients(model, prompt, collate([row]))[1][0].cpu(), epsilon)
    rows = gradient_rows(prompt, model, gradient.to(rounded).float())
    dictionary = dictionary[:count]
    if pursuit:
        found = matching_pursuit(rows, dictionary, count)
        read = recovery_of([token for _, token in sorted(found)], row)
        return replace(read, tokens=recall_of(found, [row]))
    # a residual row mixes many more directions than there are tokens
    rank = count if prompt.spec.space == "key_value" else rows.shape[1]
    nearest = span_test(rows, dictionary, rank).argmin(dim=1)
    return recovery_of(nearest.tolist(), row)


def _deployed(context: AttackContext, shadow: Shadow) -> Iterator[Row]:
    """What the run's server sees: each client's update of the first round, and their sum; and the
    same in one step of SGD on a whole lot."""
    opened, config = context.opened, context.opened.run.config
    space, size = config.prompt.space, config.client.batch_size
    model, prompt = opened.auxiliary, context.prompts[space]
    dictionary = (
        key_dictionary(model, prompt, LONGEST)
        if space == "key_value"
        else residual_dictionary(model, prompt, POSITIONS)
    )

    def spanned(
        seen: str, changes: Iterable[Tensor], lots: Iterable[list[Encoded]], observed: bool = True
    ) -> Row:
        cuts = [[cut(row, len(dictionary) + 1) for row in lot] for lot in lots]
        shaped = (change.float().view(prompt.spec.shape) for change in changes)
        spans = (
            span_test(gradient_rows(prompt, model, change), dictionary, 10_000) for change in shaped
        )
        read = [Recovery(recall(span, lot)) for span, lot in zip(spans, cuts, strict=True)]
        return level(seen, "span test", read, guess(cuts, context.opened.encoded), observed)

    rows = [row if len(row.ids) <= LONGEST else cut(row, LONGEST) for row in opened.encoded]
    lots = [lot[:size] for lot in opened.by_client(rows).values()]
    yield spanned(
        f"a lot of {size} examples, one step of SGD, {space.replace('_', '/')} prompt",
        [example_gradients(model, prompt, collate(lot))[1].mean(dim=0).cpu() for lot in lots],
        lots,
        observed=False,
    )

    mine = {
        client: lot
        for client, lot in opened.by_client(rows, shadow.included.tolist()).items()
        if client in shadow.updates[0]
    }
    changes = changes_of(shadow, 0, list(mine))
    kind = _first_round(opened)
    yield spanned(f"{kind}, one client", changes, mine.values())
    everyone = [row for lot in mine.values() for row in lot]
    total = as_row(shadow.broadcasts[1]) - as_row(shadow.broadcasts[0])
    yield spanned(f"{kind}, the sum of all clients", [total], [everyone])

    own = opened.federation.clients.party(next(iter(mine))).prompt
    own.load(shadow.broadcasts[0])
    lot = next(iter(mine.values()))
    yield level(
        f"{kind}, one client",
        "gradient matching",
        [_sought(context, own, changes[0], lot)],
        guess([[cut(row, POSITIONS + 1) for row in lot]], context.opened.encoded),
        observed=True,
    )


def _candidates(
    opened: Opened, shadow: Shadow, rng: random.Random, count: int = 200
) -> dict[str, Any]:
    """How often the cosine with a client's update picks the text that was trained on out of ten: a
    list of plausible texts is all that an attacker needs."""
    clients = sorted(shadow.updates[0])
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
    texts = [opened.encoded[index] for index in needed]
    cosines = alignment(opened, shadow.broadcasts[0], changes_of(shadow, 0, clients), texts)
    place = {index: number for number, index in enumerate(needed)}

    def right(index: int, some: list[int]) -> bool:
        own = cosines[:, clients.index(opened.holders[index])]
        return bool((own[place[index]] > own[[place[other] for other in some]]).all())

    hits = sum(right(*pair) for pair in zip(picked, decoys, strict=True))
    return {
        "right": (hits / len(picked), *exact_interval(hits, len(picked))),
        "guess": 1 / (DECOYS + 1),
        "texts": len(picked),
    }
