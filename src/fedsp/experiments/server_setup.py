"""The server's side, opened from a configuration: questions, global model, the package for clients,
the first prompt."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from fedsp.config import RunConfig
from fedsp.config_file import trains_weights
from fedsp.data.dataset import FederatedDataset, load_dataset
from fedsp.data.encoding import Tokenizer, encode_targets, first_token
from fedsp.data.files import read_passages
from fedsp.data.seeding import derive_seed
from fedsp.data.tasks import LABELLED, Example
from fedsp.errors import (
    AuxiliaryError,
    ConfigurationError,
    DataError,
    PromptError,
    leaves_no_room,
)
from fedsp.experiments.plan import (
    LEAST_ROOM,
    how_it_reads,
    model_name,
    require_sequences_fit,
)
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.clients import prompt_spec
from fedsp.federation.methods.registry import find_method
from fedsp.models.auxiliary import (
    AuxiliaryModel,
    build_auxiliary,
    chosen_counts,
    chosen_plan,
    disclosed_share,
    load_auxiliary,
    parse_plan,
    plan_of_package,
)
from fedsp.models.loading import (
    load_model,
    load_tokenizer,
    model_digest,
    require_vocabulary,
    tokenizer_digest,
)
from fedsp.models.prompted_lm import PromptedLM
from fedsp.models.soft_prompt import (
    SoftPrompt,
    import_peft,
    initial_values,
    read_prompt,
)
from fedsp.storage import MANIFEST
from fedsp.training.distillation import Distillation, Progress, distill, packed
from fedsp.training.evaluation import LogProbabilities, Scored, by_label, score, summarise
from fedsp.training.generation import own_texts
from fedsp.training.layer_choice import drop_layers
from fedsp.training.loop import Optimisation, text_loss

TO_CHOOSE_BY = 4
"""Sequences of public text by which layers are chosen."""
HELD_OUT, WATCHED = 32, 8
"""Sequences of public text, at most, that are not distilled on and tell how much worse than the
global model a package reads; and how many of them tell when to stop."""
FEWEST = 16 * HELD_OUT
"""Sequences of which some are held out, even where all could be distilled on."""


@dataclass(kw_only=True)
class Server:
    """What stays on the server: the global model, the initial prompt, the questions it owns, which
    `read` reads when they are asked for."""

    config: RunConfig
    model: PromptedLM
    tokenizer: Tokenizer
    read: Callable[[], FederatedDataset]
    max_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def dataset(self) -> FederatedDataset:
        """The examples of the run, divided among its parties."""
        return self.read()

    @cached_property
    def digest(self) -> str:
        """The digest of the global model and its tokenizer."""
        return model_digest(self.model, self.tokenizer)


def open_server(
    config: RunConfig, dataset: FederatedDataset | Callable[[], FederatedDataset]
) -> Server:
    """Load the global model and its tokenizer. The examples are those given, or are read when they
    are asked for.

    Raises:
        ModelError: the model cannot be loaded or cannot carry a prompt.
    """
    name = model_name(config)
    precision = "float32" if trains_weights(config) else config.model.precision
    model = load_model(
        name, device=config.model.device, positions=config.model.positions, precision=precision
    )
    model.recompute = config.model.recompute
    tokenizer = load_tokenizer(name)
    require_vocabulary(model, tokenizer)
    return Server(
        config=config,
        model=model,
        tokenizer=tokenizer,
        read=dataset if callable(dataset) else lambda: dataset,
        max_tokens=token_limit(config, model),
    )


def validation_sample(server: Server) -> list[Example]:
    """The validation questions that a run is judged by: at most `validation.examples`, drawn from
    its seed."""
    draw = random.Random(derive_seed(server.config.seed, "validation"))
    known = server.dataset.validation
    return draw.sample(known, min(len(known), server.config.validation.examples))


def token_limit(config: RunConfig, model: PromptedLM) -> int:
    """Tokens of one example: what the model has room for behind the prompt, or fewer if the
    configuration says so.

    Raises:
        PromptError: the prompt leaves no room for text.
    """
    room = model.room_behind(config.prompt.length)
    if room < LEAST_ROOM:
        raise leaves_no_room(config.prompt.length, room, model.max_positions)
    return min(room, config.data.max_tokens or room)


@dataclass(frozen=True)
class DistillationText:
    """Token sequences that the distillation reads, and some of the same text that it does not, by
    which it is judged."""

    read: list[list[int]]
    unread: list[list[int]]


def distillation_text(server: Server, count: int | None = None) -> DistillationText:
    """The texts of the distillation as token sequences: packed passages, as many texts of the
    global model's own, or the server's own examples one by one, of which none is held out; with
    `count`, at most so many. What is not read are `HELD_OUT` sequences behind those that are, or,
    where there are not so many, the last ones, if they are a sixteenth of all at most.

    Raises:
        DataError: there are none, or they are longer than the model can read.
    """
    section = server.config.distill
    require_sequences_fit(server.config, server.model.max_positions, server.model.name)
    length = section.sequence_length
    unread: list[list[int]] = []
    if section.text == ["server"]:
        own = server.dataset.held(server.dataset.partition.server)
        read = [list(row.ids) for row in encode_targets(server.tokenizer, own, length)]
    else:
        most = section.sequences
        wanted = most + HELD_OUT if count is None else min(count, most)
        if section.text == ["model"]:
            read = _own_texts(server, wanted)
        else:
            passages = read_passages(section.text)
            seed = server.config.seed
            read = packed(server.tokenizer, passages, length=length, count=wanted, seed=seed)
        if count is None:
            held = max(len(read) - most, HELD_OUT if len(read) >= FEWEST else 0)
            read, unread = read[: len(read) - held], read[len(read) - held :]
    if not read:
        raise DataError(
            "there is no text to distil on: the server holds no example (partition.server_share),"
            " or distill.text is empty"
        )
    return DistillationText(read, [text for text in unread if len(text) == length])


def _own_texts(server: Server, count: int) -> list[list[int]]:
    first = first_token(server.tokenizer)
    if first is None:
        raise DataError(
            f"distill.text: {server.model.name} has no token that begins a text, so it writes none"
            " by itself: name files of public text"
        )
    return own_texts(
        server.model,
        first=first,
        length=server.config.distill.sequence_length,
        count=count,
        seed=derive_seed(server.config.seed, "own texts"),
    )


def with_layers_chosen(config: RunConfig, callbacks: Callbacks | None = None) -> RunConfig:
    """The configuration with the layers themselves where its plan is `chosen(n)` or `chosen(n,
    ends)` and its method has a package: those of the package that it names, or those that are
    chosen by the loss on public text.

    Raises:
        AuxiliaryError: it names a package that is not there.
        ConfigurationError: so many layers do not fit the model, or others are in the package.
        DataError: there is no public text.
    """
    section, counts = config.auxiliary, chosen_counts(config.auxiliary.plan)
    if counts is None or not find_method(config.method).package:
        return config
    count, ends = counts
    if section.folder:
        made, of = plan_of_package(Path(section.folder))
        plan = chosen_plan(made.sources, ends)
        if len(made.sources) != count + 2 * ends or parse_plan(plan, of) != made:
            raise ConfigurationError(
                f"auxiliary.plan: the package in {section.folder} has the layers"
                f" {list(made.sources)}, which are not those of {section.plan}: set auxiliary.plan"
                " to match or make it again"
            )
    else:
        plan = chosen_plan(_choose(config, count, ends, callbacks or Callbacks()), ends)
    return config.model_copy(update={"auxiliary": section.model_copy(update={"plan": plan})})


def _choose(config: RunConfig, count: int, ends: int, callbacks: Callbacks) -> list[int]:
    asked, length = f"auxiliary.plan: {config.auxiliary.plan}", config.distill.sequence_length
    if config.distill.text == ["server"]:
        raise DataError(f"{asked} reads public text: name files of it in distill.text")
    server = open_server(config, load_dataset(config))
    layers = server.model.shape.layers
    room = layers - 2 * ends
    if not 1 <= count <= room:
        raise ConfigurationError(
            f"{asked} does not fit a model of {layers} layers: "
            + (
                f"at most {(layers - 1) // 2} can stay at each end"
                if room < 1
                else f"expected 1 to {room} layers{' between its ends' if ends else ''}"
            )
        )
    texts = [text for text in distillation_text(server, TO_CHOOSE_BY).read if len(text) == length]
    if not texts:
        raise DataError(
            f"{asked} reads public text, and that of distill.text has not the {length} tokens of"
            " one sequence: add text, or lower distill.sequence_length"
        )
    keep = {*range(ends), *range(layers - ends, layers)}
    dropped = drop_layers(server.model, texts, room - count, keep=keep)
    if dropped:
        callbacks.info(
            "layers that are dropped, and the loss on public text without them, nats a token: "
            + ", ".join(f"{one.layer} ({one.loss:.2f})" for one in dropped)
        )
    return sorted(set(range(layers)) - {one.layer for one in dropped})


def make_auxiliary(server: Server, folder: Path, callbacks: Callbacks) -> AuxiliaryModel:
    """The auxiliary model: read from where the configuration or an earlier start left it, else
    built, distilled and written to `folder`.

    Raises:
        AuxiliaryError: a folder is damaged, or was made for another tokenizer or plan.
    """
    config = server.config
    existing = folder if (folder / MANIFEST).exists() else None
    if config.auxiliary.folder:
        existing = Path(config.auxiliary.folder)
    plan = parse_plan(
        config.auxiliary.plan, server.model.shape.layers, config.auxiliary.prompt_layers
    )
    if existing:
        auxiliary = load_auxiliary(
            existing, device=server.model.device, positions=config.model.positions
        )
        if tokenizer_digest(auxiliary.tokenizer) != tokenizer_digest(server.tokenizer):
            raise AuxiliaryError(
                f"the auxiliary model in {existing} has another tokenizer than {server.model.name}:"
                " their tokens would not mean the same; make it again with `fedsp distill`"
            )
        if auxiliary.plan != plan:
            raise AuxiliaryError(
                f"the auxiliary model in {existing} has the plan {list(auxiliary.plan.sources)},"
                f" the configuration says {list(plan.sources)}: set auxiliary.plan to match or make"
                " it again"
            )
        if auxiliary.embeddings != config.auxiliary.embeddings:
            raise AuxiliaryError(
                f"the auxiliary model in {existing} has {auxiliary.embeddings} embeddings, the"
                f" configuration says {config.auxiliary.embeddings}: set auxiliary.embeddings to"
                " match or make it again"
            )
        if auxiliary.prompt_shape != server.model.shape:
            raise AuxiliaryError(
                f"the auxiliary model in {existing} was made for a model with"
                f" {auxiliary.prompt_shape}, but {server.model.name} has {server.model.shape}: make"
                " it again with `fedsp distill`"
            )
        _say_how_it_reads(auxiliary, callbacks)
        return auxiliary
    section = config.auxiliary
    auxiliary = build_auxiliary(
        server.model,
        plan,
        server.tokenizer,
        embeddings=section.embeddings,
        rank=section.embedding_rank,
        seed=derive_seed(config.seed, "embeddings"),
    )
    given = config.distill.is_read
    if given and config.distill.text == ["model"]:
        callbacks.info(
            "distill.text names no file: the global model writes"
            f" {config.distill.sequences + HELD_OUT} texts by itself to be distilled on"
        )
    text = distillation_text(server) if given else DistillationText([], [])
    if steps := config.distill.steps:
        started = time.perf_counter()
        made = fit_auxiliary(
            server,
            auxiliary,
            text,
            progress=lambda step, loss: callbacks.distilled(step, steps, loss),
        )
        server.seconds["distillation"] = time.perf_counter() - started
        if made < steps:
            callbacks.info(
                f"distillation ended after {made} of {steps} steps: the loss on text that it does"
                " not read had stopped falling"
            )
    auxiliary.discloses = disclosed_share(auxiliary, server.model)
    if text.unread:
        own, others = (text_loss(model, text.unread) for model in (auxiliary, server.model))
        auxiliary.excess_text_loss = own - others
    auxiliary.save(folder)
    callbacks.info(
        f"the auxiliary model discloses {auxiliary.discloses:.1%} of the global model's parameters"
        " bit for bit"
    )
    _say_how_it_reads(auxiliary, callbacks)
    return auxiliary


def _say_how_it_reads(auxiliary: AuxiliaryModel, callbacks: Callbacks) -> None:
    """Before anything is tuned through it."""
    callbacks.info(
        "how much worse than the global model the auxiliary model reads is not known: none of"
        f" distill.text was held out, for which it must make {FEWEST} sequences, or more than"
        " distill.sequences"
        if auxiliary.excess_text_loss is None
        else how_it_reads(auxiliary.excess_text_loss)
    )


def fit_auxiliary(
    server: Server,
    auxiliary: AuxiliaryModel,
    text: DistillationText,
    *,
    progress: Progress = lambda step, loss: None,
) -> int:
    """Distil the global model into the auxiliary one as the configuration says, in place; returns
    the steps made. Text that is not read tells when to stop.

    Raises:
        TrainingDiverged: a loss is not finite.
    """
    section = server.config.distill
    how = Distillation(
        steps=section.steps,
        batch_size=section.batch_size,
        optimisation=Optimisation(
            learning_rate=section.learning_rate,
            weight_decay=section.weight_decay,
            warmup=0.1,
            total_steps=section.steps,
        ),
        match_depths=section.match_depths,
        match_logits=section.match_logits,
    )
    losses = distill(
        auxiliary,
        server.model,
        text.read,
        how,
        seed=server.config.seed,
        progress=progress,
        held_out=text.unread[:WATCHED],
    )
    return len(losses)


def initial_prompt(server: Server) -> SoftPrompt:
    """The prompt that is broadcast in round 1.

    Raises:
        PromptError: the text is too short, or a file holds a prompt of another shape.
    """
    section = server.config.prompt
    spec = prompt_spec(section, server.model.shape)
    seed = derive_seed(server.config.seed, "prompt")
    if section.init not in ("text", "normal"):
        path = Path(section.init)
        read = import_peft(path, server.model) if path.is_dir() else read_prompt(path)
        if read.spec != replace(spec, projection=0):
            raise PromptError(
                f"{section.init} holds a {read.spec.space} prompt of shape {read.spec.shape}, the"
                f" run needs {spec.space} of shape {spec.shape}: change prompt.init or prompt.space"
                " and prompt.length"
            )
        values = read.values()
    else:
        values = initial_values(
            spec, server.model, scale=section.init_scale, tokens=first_tokens(server), seed=seed
        )
    return SoftPrompt(spec, values, seed=seed).to(server.model.device)


def blank_prompt(server: Server) -> SoftPrompt:
    """A prompt of the shape of the run's, of zeros, into which what was tuned is loaded."""
    spec = prompt_spec(server.config.prompt, server.model.shape)
    return SoftPrompt(spec, torch.zeros(spec.shape)).to(server.model.device)


def first_tokens(server: Server) -> torch.Tensor | None:
    """The tokens whose activations a prompt starts from; None where it starts from something
    else."""
    section = server.config.prompt
    if section.init != "text":
        return None
    passages = read_passages([section.init_text]) if section.init_text else None
    if passages:
        return torch.tensor(
            server.tokenizer.encode("\n\n".join(passages), add_special_tokens=False)
        )
    needed = math.ceil(section.length / server.config.distill.sequence_length)
    return torch.tensor(
        [token for sequence in distillation_text(server, needed).read for token in sequence][
            : section.length
        ]
    )


def score_test(
    model: PromptedLM,
    prefix: torch.Tensor | None,
    examples: list[Example],
    tokenizer: Tokenizer,
    max_tokens: int,
    answers: LogProbabilities | None = None,
) -> tuple[dict[str, float], list[Scored]]:
    """The figures of questions behind the keys and values `prefix` (None: zero-shot), or by
    `answers` in place of the model's own, with the number of questions whose context was cut; and
    the scores of each question."""
    scored, dropped = score(
        model, prefix, examples, tokenizer, max_tokens=max_tokens, answers=answers
    )
    figures = summarise(scored)
    if all(example.task == LABELLED for example in examples):
        figures |= by_label(scored, examples)[0]
    return figures | {"shortened_examples": float(dropped)}, scored
