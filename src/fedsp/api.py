"""The Python API behind the commands of the command line, such as `fedsp.run` and
`fedsp.evaluate`. Each raises a FedspError, one sentence, for whatever cannot be done."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedsp.audit.inspection import inspect_auxiliary
from fedsp.audit.model_card import model_card
from fedsp.config import RunConfig, TaskSection
from fedsp.config_file import (
    apply_override,
    make_config,
    read_config,
    read_party,
    resolve_from_here,
)
from fedsp.data.chat import end_of_turn, question_ids
from fedsp.data.check import check_files
from fedsp.data.dataset import examples_digest, examples_of_file
from fedsp.data.encoding import decode_behind, encode_texts
from fedsp.data.files import read_passages, read_rows
from fedsp.data.rendering import Rendering
from fedsp.data.tasks import LABELLED, find_task
from fedsp.errors import (
    ConfigurationError,
    DataError,
    FedspError,
    PromptError,
    RunError,
    require_flower,
    require_installed,
)
from fedsp.experiments.adaptation import adapt_run
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.plan import LEAST_ROOM, folder_or_hub_name, plan_run
from fedsp.experiments.run_directory import RunDirectory, differing_keys
from fedsp.experiments.server_setup import validation_sample
from fedsp.experiments.start import (
    Engine,
    Figures,
    OpenRun,
    answers_of,
    in_this_process,
    in_workers,
    make_package,
    open_run,
    require_local,
    require_new,
    resume_run,
    start_run,
)
from fedsp.federation.agreement import agreement_of
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.methods.registry import find_method
from fedsp.models.auxiliary import chosen_counts, named_counts
from fedsp.models.gguf import is_gguf
from fedsp.models.loading import choose_device, load_model, load_tokenizer, save_model
from fedsp.models.messengers.registry import require_everywhere
from fedsp.models.prompted_lm import continue_text, length_of
from fedsp.models.soft_prompt import SoftPrompt, read_prompt
from fedsp.storage import write_bytes
from fedsp.training.answers import WEIGHTS, Answering, Answers, mean_of, proxy_tuned
from fedsp.training.generation import sampler, written_figures
from fedsp.training.loop import Optimisation
from fedsp.training.server_adaptation import Adaptation


def as_config(
    config: RunConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()
) -> RunConfig:
    """Return a validated `RunConfig` from a `RunConfig`, nested values, or a TOML file's path."""
    if isinstance(config, str | Path):
        return read_config(Path(config), overrides)
    given = config.model_dump(exclude_none=True) if isinstance(config, RunConfig) else config
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"expected a configuration: a file's name, nested values or a RunConfig, not {given!r}"
        )
    values: Figures = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in given.items()
    }
    for override in overrides:
        apply_override(values, override)
    resolve_from_here(values)
    return make_config(values)


def _flower(directory: RunDirectory, callbacks: Callbacks) -> Figures:
    require_flower()
    from fedsp.deployment.simulation import simulate

    return simulate(directory, callbacks)


def _deployed(directory: RunDirectory, callbacks: Callbacks) -> Figures:
    require_flower()
    from fedsp.deployment.serve import serve

    return serve(directory, callbacks)


ENGINES: dict[str, Engine] = {"local": in_this_process, "flower": _flower, "deployment": _deployed}
"""How a run reaches its clients: in this process, in a Flower simulation, or on machines of their
own."""


def run(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    callbacks: Callbacks | None = None,
    engine: str = "local",
    workers: int | None = None,
) -> Figures:
    """Run the configuration's federation; returns the figures of `result.json` and the folder.
    Every engine gives the same bits.

    `workers`: processes in which the clients of a round train, one thread each, where the engine is
    local; the server has one thread then, and the bits do not depend on how many there are. None:
    everything is in this process, with torch's threads.
    """
    way, threads = _engine(engine, workers), torch.get_num_threads()
    suited = _suited(as_config(config, overrides), engine)
    try:
        torch.set_num_threads(1 if workers else threads)
        return start_run(suited, callbacks, way)
    except (FedspError, KeyboardInterrupt, SystemExit):
        RunDirectory(Path(suited.output), suited).remove_if_not_begun()
        raise
    finally:
        torch.set_num_threads(threads)


def _engine(name: str, workers: int | None) -> Engine:
    if workers is None:
        return ENGINES[name]
    if name != "local":
        raise ConfigurationError(
            f"workers: engine {name} has processes of its own; leave workers out, or use engine"
            " local"
        )
    if workers < 1:
        raise ConfigurationError(f"workers = {workers}: expected at least 1")
    return in_workers(workers)


def _suited(config: RunConfig, engine: str) -> RunConfig:
    if engine != "deployment":
        require_local(config)
    elif config.federation is None:
        raise ConfigurationError(
            "the configuration has no [federation] section: use `fedsp run` to simulate clients, or"
            " `fedsp federation init` to write a configuration for `fedsp serve`"
        )
    if engine == "flower" and not find_method(config.method).deployable:
        raise ConfigurationError(
            f"method = {config.method!r} is for experiments only and runs in one process: use"
            " engine local"
        )
    if engine == "flower":
        require_everywhere(config.messenger.kind)
    return config


def resume(
    folder: str | Path,
    config: RunConfig | None = None,
    *,
    callbacks: Callbacks | None = None,
    engine: str = "local",
    workers: int | None = None,
) -> Figures:
    """Resume an unfinished run; the result is bit-identical to that of an uninterrupted run. For a
    finished run, send what MLflow and remote clients have not received yet. Returns its figures.
    `workers`: as `run`, if the run was begun with them or with one thread.

    Raises:
        RunError: there is no run, another process has it, or it has another configuration than the
            one given.
    """
    directory = RunDirectory.open(Path(folder))
    config = config and _as_chosen(config, directory.config)
    if config is not None and (differing := differing_keys(config, directory.config)):
        raise RunError(
            f"{folder} holds a run of another configuration ({', '.join(differing)}"
            f" differ{'s' if len(differing) == 1 else ''}): resume it without a configuration file,"
            " or start a new run with output=..."
        )
    _suited(directory.config, engine)
    return resume_run(directory, callbacks, _engine(engine, workers))


def _as_chosen(config: RunConfig, begun: RunConfig) -> RunConfig:
    """A configuration whose layers are to be chosen, with those of the run that was begun, if they
    are as many."""
    counts, plan = chosen_counts(config.auxiliary.plan), begun.auxiliary.plan
    if counts is None or counts != named_counts(plan):
        return config
    section = config.auxiliary.model_copy(update={"plan": plan})
    return config.model_copy(update={"auxiliary": section})


def join(path: str | Path, *, callbacks: Callbacks | None = None) -> int:
    """Take part in a deployment as the client of a `party.toml`, until the run is finished; returns
    the requests answered."""
    require_flower()
    from fedsp.deployment.join import join as join_deployment

    return join_deployment(read_party(Path(path)), callbacks or Callbacks())


def init_federation(folder: str | Path, clients: Sequence[str], address: str) -> None:
    """Write a folder of keys and configuration for each party of a deployment."""
    require_flower()
    from fedsp.deployment.parties.new_federation import init_federation as init

    init(Path(folder), list(clients), address)


def plan(
    config: RunConfig | Mapping[str, Any] | str | Path, *, overrides: Sequence[str] = ()
) -> Figures:
    """What a run will cost and disclose, before anything is trained."""
    return plan_run(as_config(config, overrides))


def distill(
    config: RunConfig | Mapping[str, Any] | str | Path,
    folder: str | Path,
    *,
    overrides: Sequence[str] = (),
    callbacks: Callbacks | None = None,
) -> Figures:
    """Make the auxiliary model of a configuration and write it as the folder that clients get; for
    a deployment, with the agreement and signed.

    Raises:
        RunError: the folder is in use.
    """
    config = as_config(config, overrides)
    if not config.federation:
        return make_package(config, folder, callbacks)
    require_flower()
    from fedsp.deployment.package import seal_package
    from fedsp.deployment.parties.credentials import SIGNING, sign

    require_new(Path(folder).resolve())
    key = Path(config.federation.folder) / SIGNING
    sign(b"", key)  # a key that cannot be used is not found out after the distillation
    return make_package(
        config,
        folder,
        callbacks,
        lambda made, _, server: seal_package(made, agreement_of(config, server.max_tokens), key),
    )


def inspect(
    folder: str | Path, *, text: str | Path | None = None, reference: str | None = None
) -> Figures:
    """Check a package, the folder that clients get, for signs of a crafted model
    (`fedsp.audit.inspection`), on a text file (None: a built-in text) and against a trusted
    `reference` model (hub name or folder); returns the findings and the digest to compare with
    the owner's."""
    require_flower()
    from fedsp.deployment.package import AGREEMENT, load_foreign, package_digest, read_agreement

    folder = Path(folder)
    digest = package_digest(folder)
    private = (folder / AGREEMENT).exists() and read_agreement(folder).privacy.unit == "example"
    auxiliary = load_foreign(folder, device=choose_device("auto"), positions="hugging_face")
    known = folder_or_hub_name(reference) if reference else None
    trusted = load_model(known, precision="float32") if known else None
    words = "\n\n".join(read_passages([text or EMBEDDED / "public.txt"]))
    return {
        "folder": str(folder),
        "sha256": digest,
        "differential_privacy": private,
        **inspect_auxiliary(auxiliary, words, trusted),
    }


def check_data(
    files: str | Path | Sequence[str | Path] = (),
    *,
    config: RunConfig | Mapping[str, Any] | str | Path | None = None,
    task: str | None = None,
    model: str | None = None,
    max_tokens: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Figures:
    """What is in files of examples (`fedsp.data.check.check_files`): those given, or those that a
    configuration names, whose task, columns, model and limit hold unless others are given. Without
    a configuration the task is the one given or the one whose fields the first file has, `columns`
    are the files' names of fields by the names that the task has for them, and lengths in tokens
    need a `model`, whose tokenizer alone is loaded.

    Raises:
        ConfigurationError: no file is given, or the configuration is at fault.
        DataError: a file is missing or cannot be read at all.
    """
    files = [files] if isinstance(files, str | Path) else files
    section = TaskSection(task=task) if task else None
    if config is not None:
        run_config = as_config(config)
        data = run_config.data
        section = data.model_copy(update={"task": task} if task else {})
        columns = {**data.columns, **(columns or {})}
        files = files or [name for name in (data.train, data.validation, data.test) if name]
        model = model or run_config.model.name
        max_tokens = max_tokens or data.max_tokens
    if not files:
        raise ConfigurationError("no file of examples is given: name some, or a run's file")
    if max_tokens and not model:
        raise ConfigurationError(
            f"max_tokens = {max_tokens}: tokens are counted by a model's tokenizer, so name a model"
        )
    if section:
        find_task(section.task)
    return check_files(
        [Path(name) for name in files],
        Rendering.of(section) if section else None,
        columns=columns,
        tokenizer=load_tokenizer(folder_or_hub_name(model)) if model else None,
        max_tokens=max_tokens,
    )


def evaluate(
    folder: str | Path,
    *,
    split: str = "test",
    data: str | Path | None = None,
    prompt: str | Path | None = None,
    zero_shot: bool = True,
    auxiliary: bool = False,
    write: int | None = None,
) -> list[Figures]:
    """Evaluate the global model with a run's best prompt or weights, or the prompt in a file, and
    untuned for comparison (`zero_shot`), on the run's `split` or on the rows of a file, `data`.
    With `auxiliary` also what the auxiliary model has learned itself, and both models together
    (`fedsp.training.answers`), with the weight of proxy-tuned answers that validation chooses. With
    `write` each also writes an answer of at most so many tokens to every question, which is
    measured (`fedsp.training.generation`).

    Raises:
        DataError: the run has no questions of that split, or `write` leaves the model no room to
            read them.
        RunError: `auxiliary`, but the run's clients have none.
        ConfigurationError: `write` is below 1, or rouge-score is not installed.
    """
    if write is not None:
        if write < 1:
            raise ConfigurationError(f"write = {write}: answers have at least one token")
        require_installed("study", "answers that are written are measured by", "rouge_score")
    run = open_run(folder)
    if prompt and auxiliary and not isinstance(run.messenger, SoftPrompt):
        raise RunError(
            f"{folder} tuned no prompt, so its auxiliary model reads none from a file: leave"
            " --prompt or --auxiliary out"
        )
    if prompt:
        other = read_prompt(Path(prompt)).to(run.server.model.device)
        run = replace(run, messenger=other, best=other.payload())
    server = run.server
    if data:
        asked = _rendering(run).examples(read_rows(Path(data), run.directory.config.data.columns))
    else:
        if split not in ("test", "validation"):
            raise DataError(f"unknown split {split!r}: choose test or validation")
        asked = examples_of_file(run.directory.config.data, _rendering(run), split)
        asked = (
            asked or {"test": server.dataset.test, "validation": server.dataset.validation}[split]
        )
        if not asked:
            raise DataError(
                f"the run in {folder} has no {split} questions: give a file of them with --data"
            )
        run.directory.hold_known({f"data.{split}": examples_digest(asked)})
    length = length_of(run.prefix())
    room = min(server.max_tokens, server.model.room_behind(length))
    if room < LEAST_ROOM:
        raise PromptError(
            f"a prompt of {length} tokens leaves {room} of the model's"
            f" {server.model.max_positions} positions for text: use a shorter one"
        )

    bare, tuned = run.side(zero_shot=True), run.side()
    what = "tuned prompt" if isinstance(run.messenger, SoftPrompt) else "tuned weights"
    rows: list[Figures] = []
    accepted = [[row.choices[one].strip() for one in row.gold] for row in asked]

    def add(name: str, answers: Answers, room: int = room) -> None:
        figures, parts = run.score_in_parts(answers, asked, room)
        labels = {"labels": parts["labels"]} if "labels" in parts else {}
        tasks = parts.get("tasks", {})
        if write:
            written = run.write(answers, asked, write)
            figures |= {**written_figures(written, accepted), "written": written}
            for task, own in tasks.items():
                at = [place for place, example in enumerate(asked) if example.task == task]
                own |= written_figures([written[one] for one in at], [accepted[one] for one in at])
        rows.append({"prompt": name, **figures, **labels})
        rows.extend({"prompt": f"{name}, {task}", **own} for task, own in tasks.items())

    trained = find_method(run.directory.config.method).rounds
    if zero_shot or not trained:
        add("zero-shot", bare, min(server.max_tokens, server.model.room_behind(0)))
    if trained:
        add(what, tuned)
    if not auxiliary:
        return rows
    own, untuned = run.auxiliary_sides
    by_proxy = {weight: proxy_tuned(bare, own, untuned, weight) for weight in WEIGHTS}
    weight = 1.0
    validated = False
    with suppress(DataError):  # the run's own questions may be gone; those asked are here
        validated = bool(server.dataset.validation)
    if validated:
        few = validation_sample(server)
        losses = {one: run.score(by_proxy[one], few, room)["answer_loss"] for one in WEIGHTS}
        weight = min(WEIGHTS, key=lambda one: losses[one])
    others: dict[str, Answers] = {
        "auxiliary model, untuned": untuned,
        "auxiliary model, tuned": own,
        f"proxy-tuned, weight {weight:g}": by_proxy[weight],
        "mean of global and auxiliary": mean_of(tuned, own),
    }
    for name, answers in others.items():
        add(name, answers)
    return rows


def _rendering(run: OpenRun) -> Rendering:
    """How rows of a run become examples; its own are read only where they have the labels to choose
    from."""
    section = run.directory.config.data
    known = section.labels or (section.task != LABELLED and not section.task_column)
    return Rendering.of(section) if known else run.server.dataset.rendering


def generate(
    folder: str | Path,
    text: str,
    *,
    most: int = 40,
    zero_shot: bool = False,
    answers: Answering = "global",
    weight: float = 1.0,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> str:
    """A completion of `text`, at most `most` tokens and no further than the first of the texts in
    `stop`, which is left out, by the global model with a run's best prompt or weights (or without,
    `zero_shot`); where the run's task is chat, the answer to it as a user's message, behind a
    `system` message if there is one; so in a run of several tasks too, if there is one. `answers`:
    who answers, the global model, the auxiliary model, or both together (`fedsp.training.answers`);
    `weight` is that of proxy-tuned answers. `temperature`, `top_p`, `seed`: of
    `fedsp.training.generation.sampler`; at temperature 0 the likeliest token is taken each time.

    Raises:
        DataError: there is nothing to complete, or no room for it.
        ConfigurationError: nobody is called what `answers` says, or it goes with `zero_shot`; a
            number is out of range, a text in `stop` is empty, or `system` is given and the task is
            not chat.
        RunError: there is no run, or it has no auxiliary model to answer with.
    """
    if not text.strip():
        raise DataError("there is no text to complete: give at least one word")
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError("the text to complete is not UTF-8: set the terminal to UTF-8")
    if not 0 <= temperature < math.inf:
        raise ConfigurationError(
            f"temperature = {temperature}: it must be 0 (the likeliest token) or above"
        )
    if not 0 < top_p <= 1:
        raise ConfigurationError(f"top_p = {top_p}: it must be above 0 and at most 1")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ConfigurationError(f"seed = {seed}: it must be a number of at most 63 bits")
    if "" in stop:
        raise ConfigurationError("stop: an empty text would end every answer at its beginning")
    run = open_run(folder)
    server, tokenizer = run.server, run.server.tokenizer
    data = run.directory.config.data
    chat = data.task == "chat" or bool(system and data.task_column)
    if system and not chat:
        raise ConfigurationError(
            f"system: the run in {folder} is of the task {data.task!r}, which has no system"
            " message; write it into the text"
        )
    if chat:
        turns = [*([("system", system)] if system else []), ("user", text)]
        ids = question_ids(tokenizer, turns)
    else:
        (ids,) = encode_texts(tokenizer, [text])
    if not ids:
        raise DataError(
            "the model's tokenizer makes no token of the text to complete: give other words"
        )
    answering = answers_of(run, answers, weight, zero_shot=zero_shot)
    room = answering.room()
    if len(ids) + most > room:
        raise DataError(
            f"the text has {len(ids)} tokens and {most} are to be generated, but the model has"
            f" {room} positions after the prompt: shorten the text or generate fewer tokens"
        )
    decoded = partial(decode_behind, tokenizer, ids)
    new = continue_text(
        answering.reader(),
        torch.tensor(ids, device=server.model.device),
        most=most,
        room=room,
        stop=end_of_turn(tokenizer),
        choose=sampler(temperature, top_p, seed),
        ended=lambda new: bool(stop) and any(end in decoded(new) for end in stop),
    )
    written = decoded(new)
    return written[: min((written.index(end) for end in stop if end in written), default=None)]


def serve_model(
    folders: Sequence[str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key_file: str | Path | None = None,
    most: int = 512,
    answers: Answering = "global",
    weight: float = 1.0,
    callbacks: Callbacks | None = None,
) -> None:
    """Serve what runs of one base model tuned over HTTP, until the process is ended: each by the
    name of its folder, and the base model as `base`, under `/v1/completions` and
    `/v1/chat/completions` in the form of OpenAI's API (`fedsp.deployment.model_server`).

    host, port: where it listens; port 0 is any free one. key_file: a file with the key that
    requests must bear, which only a server for this machine alone can do without. most: tokens of
    one answer at most. answers, weight: who answers, as `generate`.

    Raises:
        ConfigurationError: it cannot listen there, other machines could reach it without a key, or
            nobody is called what `answers` says.
        DataError: the file of the key cannot be used.
        RunError: there is no run, runs cannot be served together, or one has no auxiliary model to
            answer with.
    """
    require_installed("serve", "serving a model needs", "fastapi", "uvicorn")
    from fedsp.deployment.model_server.server import serve_models

    serve_models(
        [Path(folder) for folder in folders],
        host=host,
        port=port,
        key_file=Path(key_file) if key_file else None,
        most=most,
        answering=answers,
        weight=weight,
        info=(callbacks or Callbacks()).info,
    )


def adapt(
    folder: str | Path,
    questions: str | Path,
    to: str | Path,
    *,
    answers: Answering | None = None,
    weight: float = 1.0,
    steps: int = 300,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    temperature: float = 1.0,
    callbacks: Callbacks | None = None,
) -> Figures:
    """Bring more of what a run's auxiliary model has learned into the global model, at the server,
    without labels: `fedsp.experiments.adaptation.adapt_run`.

    `steps` AdamW steps of `batch_size` answers, the learning rate rising for a tenth of them and
    then falling linearly to zero; `temperature` softens the teacher's and the student's
    probabilities.

    Raises:
        ConfigurationError: one of these is not above zero, or a teacher is wanted that is none.
        RunError, DataError, TrainingDiverged: as `adapt_run`.
    """
    for name, value in (
        ("steps", steps),
        ("batch_size", batch_size),
        ("learning_rate", learning_rate),
        ("temperature", temperature),
    ):
        if not 0 < value < math.inf:
            raise ConfigurationError(f"{name} = {value}: it must be a number above zero")
    settings = Adaptation(
        steps=steps,
        batch_size=batch_size,
        optimisation=Optimisation(learning_rate=learning_rate, weight_decay=0.0, total_steps=steps),
        temperature=temperature,
    )
    return adapt_run(
        folder, questions, to, settings, answers=answers, weight=weight, callbacks=callbacks
    )


ADAPTER_USE = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, {folder!r})
"""
FIND_EMBEDDED = "from fedsp.experiments.embedded import EMBEDDED\n"
MERGED_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
"""


def export(folder: str | Path, to: str | Path, *, merged: bool = False) -> Figures:
    """Write what a run tuned best as a PEFT adapter, with a model card: a soft prompt, as keys and
    values of the global model, as one for prefix tuning; adapters as one for LoRA. `merged`: as a
    whole model with its tokenizer, with adapters in its weights, or with the weights that were
    tuned.

    Raises:
        RunError: the target is in use, or the run tuned nothing.
        ModelError: PEFT has no form for it; or merged, it is neither adapters nor weights.
        PromptError: the prompt was tuned at positions that PEFT does not know.
    """
    to = Path(to)
    require_new(to)
    method = RunDirectory.open(Path(folder)).config.method
    if not find_method(method).rounds:
        raise RunError(f"{folder} is a run of method = {method!r}, which tunes nothing to export")
    run = open_run(folder)
    run.messenger.load(run.best)
    named = run.directory.config.model.name
    if is_gguf(named):
        run.model.name = Path(named).name  # not the folder that is made of it
    # a card is handed on: no folder of this machine stands in it
    base = Path(named).name if Path(named).exists() else named
    if merged:
        use = MERGED_USE.format(folder=to.resolve().name)
    elif named == "embedded":
        use = FIND_EMBEDDED + ADAPTER_USE.format(
            base='EMBEDDED / "model"', folder=to.resolve().name
        )
    else:
        found = f'".", gguf_file={base!r}' if is_gguf(named) else repr(base)
        use = ADAPTER_USE.format(base=found, folder=to.resolve().name)
    library = "transformers" if merged else "peft"
    there = to.is_dir()
    try:
        if merged:
            what = run.messenger.merge(run.model)
            save_model(run.model, run.server.tokenizer, to)
        else:
            what = run.messenger.export(run.model, to)
        card = model_card(
            run.directory, kind=what["kind"], base_model=base, use=use, library=library
        )
        write_bytes(to / "README.md", card.encode())
    except BaseException:  # an adapter without its card is none, and would be in the way
        shutil.rmtree(to, ignore_errors=True)
        if there:
            to.mkdir(exist_ok=True)
        raise
    return {"folder": str(to), **what, "merged": merged, "base_model": run.model.name}
