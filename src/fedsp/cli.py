"""The command line: it parses, prints and exits. Everything else is in `fedsp.api`; heavy imports
wait until a command needs them."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional, cast

import typer

from fedsp.errors import (
    AuxiliaryError,
    ConfigurationError,
    DataError,
    FedspError,
    RunError,
    did_you_mean,
    require_flower,
)

if TYPE_CHECKING:
    from fedsp.config import RunConfig

QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment that the libraries read when they are imported: no progress bars and no advice."""

app = typer.Typer(
    name="fedsp",
    help="Tune a private language model on private text: the model stays on the server, the text"
    " with its owners, and only a small messenger travels: adapters, or a soft prompt.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


BEGIN, AFTER = "On one machine", "With what was tuned"
ELSEWHERE = "With clients on machines of their own"
"""Headings of the commands in `fedsp --help`."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedsp {version('fedsp')}")
        raise typer.Exit


@app.callback()
def _common(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version, and end."
        ),
    ] = False,
) -> None:
    pass


ConfigFile = Annotated[Path, typer.Argument(help="The run's TOML file; `fedsp init` writes one.")]
Overrides = Annotated[
    Optional[list[str]], typer.Argument(help="section.key=value, as in TOML: round.rounds=5")
]
Json = Annotated[
    Optional[Path], typer.Option("--json", help="Also write the figures to this file, as JSON.")
]
Workers = Annotated[
    Optional[int],
    typer.Option(
        min=1,
        help="Processes on this machine that share the work, one thread each; no score, loss or"
        " byte depends on how many.",
    ),
]


def _with_runs(given: Any) -> Any:
    """A folder, or several, refused where there is no run before seconds go into imports."""
    from fedsp.experiments.run_directory import RunDirectory

    for folder in given if isinstance(given, list) else [given] if given else []:
        RunDirectory.open(folder)
    return given


RunFolder = Annotated[Path, typer.Argument(help="A run's folder.", callback=_with_runs)]
Resume = Annotated[
    Optional[Path],
    typer.Option(help="Go on with the unfinished run in this folder.", callback=_with_runs),
]


@app.command(
    rich_help_panel=BEGIN, short_help="Ten offices tune a small model that they never see."
)
def demo(
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    output: Annotated[
        Optional[Path],
        typer.Option(help="Keep the runs in this new folder; otherwise they are thrown away."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Tune the embedded model with ten offices that never see it, and compare with each alone and
    with all text in one place, in about three minutes."""
    from fedsp.experiments.demo import demo as run_demo
    from fedsp.report.console import Display, demo_table

    with Display() as display:
        rows = run_demo(seed=seed, folder=output, callbacks=display.callbacks())
        display.print(demo_table(rows))
    _write(json_file, {"rows": rows})


@app.command(rich_help_panel=BEGIN, short_help="Write a commented run.toml with every key.")
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("run.toml"),
    preset: Annotated[
        str,
        typer.Option(
            help="messenger; prompt, for a soft prompt; or paper, FedSP exactly as published."
        ),
    ] = "messenger",
) -> None:
    """Write a commented run.toml with every key of a run and its default."""
    from fedsp.config_file import PRESETS, template
    from fedsp.storage import write_bytes

    if preset not in PRESETS:
        raise ConfigurationError(
            "unknown preset"
            f" {preset!r}{did_you_mean(preset, PRESETS) or '; known: ' + ', '.join(PRESETS)}"
        )
    if path.exists():
        raise ConfigurationError(f"{path} exists: give another name or remove it")
    write_bytes(path, template(preset).encode())
    typer.echo(
        f"{path} is written: set model.name and data.train, and data.test if you have a file for"
        f" it, then `fedsp plan {path}` and `fedsp run {path}`"
    )


@app.command(
    rich_help_panel=BEGIN, short_help="What a run will cost and disclose, before it is run."
)
def plan(config: ConfigFile, overrides: Overrides = None, json_file: Json = None) -> None:
    """Print what a run will cost and disclose, before anything is trained."""
    read = _read(config, overrides)
    from fedsp.experiments.plan import how_it_reads, plan_run
    from fedsp.report.console import Display, plan_table

    figures = plan_run(read)
    with Display() as display:
        display.print(plan_table(figures))
        if "excess_text_loss" in figures:
            display.print(how_it_reads(figures["excess_text_loss"]))
    _write(json_file, figures)


@app.command(rich_help_panel=ELSEWHERE, short_help="Make the package that clients get.")
def distill(
    config: ConfigFile,
    output: Annotated[Path, typer.Argument(help="New folder for the package.")],
    overrides: Overrides = None,
    json_file: Json = None,
) -> None:
    """Distil the auxiliary model and write the package, the folder that clients get: the model
    and, with a [federation] section, the signed agreement."""
    read = _read(config, overrides)
    _says_that_it_loads(f"the model of {config}")
    from fedsp import api as commands
    from fedsp.report.console import Display, figures_table

    with Display() as display:
        figures = commands.distill(read, output, callbacks=display.callbacks())
        display.print(figures_table("Auxiliary model", figures))
    typer.echo(f"SHA-256 digest of {output}:\n{figures['sha256']}")
    _write(json_file, figures)


@app.command(rich_help_panel=BEGIN, short_help="Run a federation with simulated clients.")
def run(
    config: Annotated[Optional[Path], typer.Argument(help="The run's TOML file.")] = None,
    overrides: Overrides = None,
    resume: Resume = None,
    engine: Annotated[
        str,
        typer.Option(
            help="local: in this process; flower: a Flower simulation with clients in separate"
            " processes. Results are bit-identical."
        ),
    ] = "local",
    workers: Workers = None,
    json_file: Json = None,
) -> None:
    """Run the federation with simulated clients."""
    if engine not in ("local", "flower"):
        raise ConfigurationError(
            f"unknown engine {engine!r}: local or flower; `fedsp serve` is for clients on machines"
            " of their own"
        )
    _run(config, overrides, resume, engine, json_file, workers)


def _run(
    config: Path | None,
    overrides: list[str] | None,
    resume: Path | None,
    engine: str,
    json_file: Path | None,
    workers: int | None = None,
) -> None:
    if resume and config and "=" in str(config) and not config.exists():
        raise ConfigurationError(f"{str(config)!r}: a resumed run keeps its own settings")
    if config is None and resume is None:
        raise ConfigurationError("nothing to run: give a TOML file, or --resume and a run's folder")
    if overrides and config is None:
        raise ConfigurationError(
            f"{overrides[0]!r} needs a TOML file to change; a resumed run keeps its own"
            " configuration"
        )
    read = _read(config, overrides) if config else None
    folder = resume or Path(read.output if read else "")
    deployed = engine == "deployment"

    def how() -> str:
        from fedsp.experiments.run_directory import CONFIG, ROUNDS

        rounds = folder / ROUNDS
        if not (folder / CONFIG).exists():
            return "nothing was made"
        finished = rounds.exists() and rounds.stat().st_size > 0
        kept = "finished rounds are" if finished else "what it made is"
        command = "serve" if deployed else "run"
        return f"{kept} kept: go on with `fedsp {command} --resume {folder}`"

    with _says_how_to_go_on(how):
        _says_that_it_loads(f"the run {folder}")
        from fedsp import api as commands
        from fedsp.report.console import Display, figures_table

        with Display(timed=deployed) as display:
            if engine == "local" and not (resume or workers):
                _measure_threads(display.callbacks().info)
            if resume:
                figures = commands.resume(
                    resume, read, callbacks=display.callbacks(), engine=engine, workers=workers
                )
            else:
                assert read is not None
                figures = commands.run(
                    read, callbacks=display.callbacks(), engine=engine, workers=workers
                )
            labels = figures.get("labels")
            shown = {**figures, "labels": f"{len(labels)}, in result.json"} if labels else figures
            display.print(figures_table("Run", shown))
    _write(json_file, figures)


@app.command(rich_help_panel=ELSEWHERE, short_help="The server: run a federation over TLS.")
def serve(
    config: Annotated[
        Optional[Path], typer.Argument(help="The run's TOML file, with a [federation] section.")
    ] = None,
    overrides: Overrides = None,
    resume: Resume = None,
    json_file: Json = None,
) -> None:
    """Run the federation with clients on machines of their own, over TLS. Exit code 0: the run is
    finished; 2: it is not, and can be resumed."""
    _run(config, overrides, resume, "deployment", json_file)


@app.command(
    rich_help_panel=ELSEWHERE, short_help="A client: take part with the text on this machine."
)
def join(
    party: Annotated[
        Path, typer.Argument(help="This client's TOML file; `fedsp federation init` writes one.")
    ] = Path("party.toml"),
) -> None:
    """Take part in a federation with the text on this machine, until the server says that the run
    is finished."""
    from fedsp.config_file import read_party

    name = read_party(party).name  # its faults are said before anything heavy is imported
    with _says_how_to_go_on(lambda: f"`fedsp join {party}` goes on where it stood"):
        _says_that_it_loads(f"the package of {name}")
        from fedsp import api as commands
        from fedsp.report.console import Display

        with Display(timed=True) as display:
            answered = commands.join(party, callbacks=display.callbacks())
            display.print(f"the run is finished; {answered} requests were answered")


@app.command(rich_help_panel=ELSEWHERE, short_help="A client: see that a package is what it says.")
def inspect(
    package: Annotated[
        Path, typer.Argument(help="The folder that the owner of the model has handed over.")
    ],
    text: Annotated[
        Optional[Path],
        typer.Option(
            help="Text file in the model's language to run the package on; it stays on this"
            " machine. Default: a short English text."
        ),
    ] = None,
    reference: Annotated[
        Optional[str],
        typer.Option(
            help="Hub name or folder of a model that you trust: the package's weight matrices are"
            " compared with those of its layers."
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Check a package (auxiliary model and signed agreement) before joining: is it a language
    model, or was it crafted to leak words of your text? Exit code 2 if anything is unusual."""
    from fedsp import api as commands
    from fedsp.report.console import Display, figures_table, rows_table

    with Display() as display:
        found = commands.inspect(package, text=text, reference=reference)
        display.print(
            figures_table(
                "Package",
                {key: found[key] for key in ("sha256", "differential_privacy")} | found["figures"],
            )
        )
        display.print(rows_table("Weight matrices, the unlikeliest first", found["tensors"][:5]))
        display.print(
            rows_table("Attention", found["attention"])
            if found["attention"]
            else "Attention: not measured, since this model's code returns no attention weights"
        )
        for sentence in found["unusual"]:
            display.print(f"unusual: {sentence}")
    _write(json_file, found)
    if found["unusual"]:
        raise AuxiliaryError(
            f"{package} is unusual in {len(found['unusual'])} ways: ask the owner of the model why"
            " before you join, or set policy.require_differential_privacy"
        )
    typer.echo(
        "Nothing unusual was found, which is no guarantee: a malicious package can also be a good"
        " language model (docs/explanation/security.md)."
    )


@app.command(
    rich_help_panel=BEGIN, short_help="How a run stands: rounds, time left, loss, clients."
)
def watch(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    seconds: Annotated[
        float, typer.Option(min=0.2, max=86400, help="How often the folder is read again.")
    ] = 2.0,
    json_file: Json = None,
) -> None:
    """Show how a run stands, by its folder alone: rounds, time left, validation loss, bytes,
    epsilon spent, and what each client did. Ctrl-C ends the view, not the run."""
    from fedsp.experiments.run_directory import RunDirectory
    from fedsp.report import console
    from fedsp.report.progress import progress

    run = RunDirectory.open(folder, to_show=True)
    if math.isnan(seconds):
        raise ConfigurationError("--seconds is no number: give seconds from 0.2 to 86400")
    with suppress(KeyboardInterrupt):
        console.watch(lambda: progress(run), seconds)
    _write(json_file, progress(run))


data = typer.Typer(
    name="data",
    help="Look at examples before anybody trains on them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(data, rich_help_panel=BEGIN, short_help="Look at examples before training on them.")


@data.command("check")
def data_check(
    files: Annotated[
        Optional[list[Path]], typer.Argument(help="Files of examples, one for each split.")
    ] = None,
    config: Annotated[
        Optional[Path],
        typer.Option(help="A run's TOML file, whose files, task, columns and model are taken."),
    ] = None,
    task: Annotated[
        Optional[str], typer.Option(help="The task of the rows; none: told by their fields.")
    ] = None,
    model: Annotated[
        Optional[str],
        typer.Option(help="A model by whose tokenizer lengths are counted, a hub name or folder."),
    ] = None,
    max_tokens: Annotated[
        Optional[int], typer.Option(min=8, help="The longest example that a run would keep whole.")
    ] = None,
    column: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="FIELD=NAME",
            help="A field of the task, and what the files call it, as data.columns has it;"
            " repeatable.",
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Say how files are read, what is in them, what is there twice, and what looks like a person's.

    Nothing is changed, and nothing leaves this machine. What is found by patterns is a hint: names
    and addresses are not found, and finding nothing proves nothing."""
    from fedsp.api import check_data
    from fedsp.report.console import Display, data_table

    figures = check_data(
        files or [],
        config=config,
        task=task,
        model=model,
        max_tokens=max_tokens,
        columns=_named_columns(column or []),
    )
    with Display() as display:
        for one in figures["files"]:
            display.print(data_table(one))
        for one in figures["shared"]:
            if one["examples"]:
                display.print(
                    f"{one['examples']:,} examples of {one['file']} are in a file before it, too"
                )
    _write(json_file, figures)
    for one in figures["files"]:
        if one["unusable"] == one["rows"]:
            raise DataError(f"{one['file']}: no row can be used: {one['fault']}")


federation = typer.Typer(
    name="federation",
    help="Prepare a deployment.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(
    federation, rich_help_panel=ELSEWHERE, short_help="Keys and configurations of all parties."
)


egress = typer.Typer(
    name="egress",
    help="What has left this client.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(egress, rich_help_panel=ELSEWHERE, short_help="A client: what has left it.")


@egress.command("report")
def egress_report(
    config: Annotated[Path, typer.Argument(help="The client's party.toml.")],
    audited: Annotated[
        Optional[Path],
        typer.Option(
            help="Folder of a finished run whose audits are told too: the run's own, from the owner"
            " of the model, or a trial."
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Say in sum what this client has sent, from the journal that it keeps of every message, and
    check that no line of it was changed. Exit code 2 if one was."""
    from fedsp.config_file import read_party
    from fedsp.federation.chained_log import cut_short
    from fedsp.federation.egress import EGRESS, egress_figures, read_egress
    from fedsp.report.console import egress_text

    journal = Path(read_party(config).state) / EGRESS
    figures = egress_figures(read_egress(journal)) | {"bytes_cut_short": cut_short(journal)}
    typer.echo(egress_text(figures))
    if audited:
        from fedsp.audit.summary import of_the_text

        figures["audited"] = of_the_text(audited, figures["runs"])
        typer.echo("\n".join(f"{about} {said}" for about, said in figures["audited"].items()))
    _write(json_file, figures)


@egress.command("release")
def egress_release(
    config: Annotated[Path, typer.Argument(help="The client's party.toml.")] = Path("party.toml"),
) -> None:
    """Look at each update that waits (`policy.release = "ask"`), and release or withhold it."""
    from fedsp.config_file import read_party
    from fedsp.deployment.parties.release import decide, waiting

    state = Path(read_party(config).state)
    found = waiting(state)
    for name, figures in found.items():
        norm = f", length of the change {figures['norm']:.4g}" if figures.get("norm") else ""
        epsilon = f", epsilon so far {figures['epsilon']:.3f}" if figures.get("epsilon") else ""
        typer.echo(
            f"run {figures['run']}, round {figures['round']}: {figures['bytes']:,} bytes in"
            f" {figures.get('codec')}{norm}{epsilon}"
        )
        try:
            released = typer.confirm("Release it?", default=False)
        except typer.Abort as error:
            raise RunError("no answer was given: this update waits on, and others too") from error
        decide(state, name, released=released)
        typer.echo("released" if released else "withheld: the server is told so, and no more")
    if not found:
        typer.echo("no update waits")


@federation.command("init")
def federation_init(
    folder: Annotated[
        Path, typer.Argument(help="The new folder; it will hold one folder per party.")
    ],
    clients: Annotated[
        str,
        typer.Option(
            help="Names of clients whose keys are made here, separated by commas. None: each makes"
            " its own (`fedsp party init`)."
        ),
    ] = "",
    address: Annotated[
        str, typer.Option(help="host:port at which clients reach the server.")
    ] = "localhost:8000",
) -> None:
    """Write keys, certificates, the register of clients and a commented configuration for each
    party."""
    require_flower()
    from fedsp.deployment.parties.new_federation import init_federation

    names = [name.strip() for name in clients.split(",")] if clients.strip() else []
    init_federation(folder, names, address)
    hand_over = (
        f"send each {folder}/NAME to the client of that name over a confidential channel"
        if names
        else f"enter the clients' requests with `fedsp federation admit` in {folder}/server"
    )
    typer.echo(f"keep {folder}/server on the server, {hand_over}, and keep {folder}/ca.key offline")


Server = Annotated[
    Path, typer.Option("--server", help="The server's folder, with register.toml.", metavar="DIR")
]


@federation.command("admit")
def federation_admit(
    request: Annotated[Path, typer.Argument(help="The request.json that the client has sent.")],
    server: Server = Path(),
    examples: Annotated[
        Optional[int],
        typer.Option(help="How many examples the client has told you it holds. Default: 1."),
    ] = None,
) -> None:
    """Enter a client's request into the server's register, or the new key of a client that is in
    it. It takes part from the next `fedsp serve`, `--resume` too."""
    require_flower()
    from fedsp.deployment.parties.admission import admit

    asked, replaced = admit(request, server, examples)
    how = "known by its new key" if replaced else "admitted"
    typer.echo(
        f"{asked.name} is {how}, {asked.fingerprint}: hear the same from the client by another way,"
        " or revoke it; it takes part from the next `fedsp serve`"
    )
    if not replaced:
        typer.echo(
            f"it counts as {examples or 1} example{'s' if (examples or 1) > 1 else ''} in the mean:"
            f" {server / 'register.toml'} has the number"
        )
        typer.echo(
            f"send it {server / 'ca.crt'}, {server / 'server.pub'} and the package, none of which"
            " is secret, and tell it the package's digest by another way"
        )


@federation.command("revoke")
def federation_revoke(
    name: Annotated[str, typer.Argument(help="The client's name in the register.")],
    server: Server = Path(),
) -> None:
    """Take a client out of the server's register; a server that is running refuses it at once."""
    require_flower()
    from fedsp.deployment.parties.admission import revoke

    had = revoke(name, server)
    told = f", {had.about!r}" if had.about else ""
    typer.echo(
        f"{name} is no longer in {server / 'register.toml'}, where it had {had.examples}"
        f" examples{told}: its key opens nothing any more"
    )


@federation.command("renew")
def federation_renew(
    server: Server = Path(),
    authority: Annotated[
        Path, typer.Option(help="The authority's key, which is kept offline.", metavar="FILE")
    ] = Path("../ca.key"),
) -> None:
    """Make the server's certificate anew, for the same names. A server that is running has to be
    started again (`--resume`)."""
    require_flower()
    from fedsp.deployment.parties.credentials import renew

    until, with_authority = renew(server, authority)
    typer.echo(f"the server's certificate is valid until {until:%Y-%m-%d}; start the server again")
    if with_authority:
        typer.echo(
            f"the authority's certificate was made anew too: send {server / 'ca.crt'} to every"
            " client, in place of the one before"
        )


@federation.command("events")
def federation_events(
    folder: Annotated[
        Path, typer.Argument(help="The server's folder, or a client's state folder.")
    ] = Path(),
    json_file: Json = None,
) -> None:
    """What a server or a client did for its security: keys made, admitted, revoked and refused,
    runs joined, requests refused, updates released. Exit code 2 if a line of it was changed."""
    from fedsp.federation.chained_log import SECURITY, read_log

    events = read_log(
        folder / SECURITY,
        "name a server's folder or a client's state folder, in which something was done",
    )
    for event in events:
        about = {key: event[key] for key in event if key not in ("time", "event", "chain")}
        told = ", ".join(f"{key} {value}" for key, value in about.items())
        typer.echo(f"{event['time']}  {event['event']}: {told}")
    last = events[-1]["chain"][:16] if events else "none, since there is no whole line"
    typer.echo(f"The log is whole; its last line has the digest {last}.")
    _write(json_file, {"events": events})


@federation.command("check")
def federation_check(
    party: Annotated[Path, typer.Argument(help="The client's party.toml.")] = Path("party.toml"),
) -> None:
    """Try a client's way to the server: name, port, TLS and certificate, key, clock, version. Exit
    code 2 at the first that fails, with what to do."""
    from fedsp.config_file import read_party

    settings = read_party(party, package_known=False)
    require_flower()
    from fedsp.deployment.monitoring.connection import check_connection

    for step in check_connection(settings):
        typer.echo(f"{step.name:8} {step.found}")


party_commands = typer.Typer(
    name="party",
    help="A client's own key.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(
    party_commands, rich_help_panel=ELSEWHERE, short_help="A client: make or change its own key."
)


@party_commands.command("init")
def party_init(
    name: Annotated[str, typer.Argument(help="This client's name.")],
    server: Annotated[str, typer.Option(help="host:port of the server.")] = "localhost:8000",
    folder: Annotated[
        Optional[Path], typer.Option(help="The new folder. Default: one of that name.")
    ] = None,
    about: Annotated[
        str,
        typer.Option(
            help="What your text is, in a sentence, for the model card of what is tuned; everybody"
            " who gets that model reads it."
        ),
    ] = "",
) -> None:
    """Make this client's key, its configuration, and the request to be admitted, which alone goes
    to the owner of the model."""
    require_flower()
    from fedsp.deployment.parties.admission import REQUEST, init_party

    place = folder or Path(name)
    made = init_party(place, name, server, about)
    typer.echo(
        f"send {place / REQUEST} to the owner of the model and tell its fingerprint, {made}, by"
        f" another way; put the ca.crt, server.pub and package that come back into {place}; the key"
        " never leaves this folder"
    )


@party_commands.command("rotate")
def party_rotate(
    config: Annotated[Path, typer.Argument(help="The client's party.toml.")] = Path("party.toml"),
    about: Annotated[
        str,
        typer.Option(
            help="What your text is, in a sentence. Read only where the key before was revoked:"
            " otherwise what the server's register says stands."
        ),
    ] = "",
) -> None:
    """Change this client's key, between two runs: once the server has admitted the request, the key
    before opens nothing, and the new one counts from its next start. Until then, going back is to
    rename client.key.before to client.key."""
    require_flower()
    from fedsp.deployment.parties.admission import REQUEST, rotate_key

    made = rotate_key(config, about)
    typer.echo(
        f"send {REQUEST} to the owner of the model, who enters it with `fedsp federation admit`;"
        f" the new key's fingerprint is {made}; a `fedsp join` that runs has the key before: end it"
    )


@app.command(rich_help_panel=AFTER, short_help="Measure what finished runs leak.")
def audit(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs.", callback=_with_runs)
    ],
    only: Annotated[
        Optional[str],
        typer.Option(
            help="Audits to run, separated by commas: disclosure, model, membership, inversion,"
            " trap, epsilon, traffic, depths. Default: the first five, and epsilon for runs"
            " with differential privacy."
        ),
    ] = None,
    shadows: Annotated[
        int,
        typer.Option(
            help="Shadow runs of the membership audit; each costs about as much as the run's rounds"
            " did."
        ),
    ] = 16,
    records: Annotated[
        Optional[int],
        typer.Option(
            min=20,
            help="Maximum number of client examples that the membership audit tests; default: all.",
        ),
    ] = None,
    texts: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of single texts that the inversion audit tries to reconstruct, which takes"
            " most of its time; 0: only the updates of the run.",
        ),
    ] = 20,
    json_file: Json = None,
) -> None:
    """Measure what finished runs leak: the model to clients, the text to the server and to
    others. `fedsp report` shows the results."""
    from fedsp.audit.registry import audit_runs
    from fedsp.audit.shadows import Options
    from fedsp.report.console import Display

    with Display() as display:
        found, refused = audit_runs(
            folders, only, Options(shadows, records, texts, display.callbacks()), display.finding
        )
    _write(json_file, found)
    if refused:
        raise RunError(refused)


@app.command(rich_help_panel=AFTER, short_help="Measure what a run tuned, beside zero-shot.")
def evaluate(
    folder: RunFolder,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    data: Annotated[
        Optional[Path],
        typer.Option(help="A file of examples in the form of the run's task, instead of a split."),
    ] = None,
    prompt: Annotated[
        Optional[Path], typer.Option(help="A prompt file to use instead of the run's best.")
    ] = None,
    zero_shot: Annotated[bool, typer.Option(help="Also without any prompt.")] = True,
    auxiliary: Annotated[
        bool,
        typer.Option(
            "--auxiliary",
            help="Also the auxiliary model itself, tuned and not, and both models together.",
        ),
    ] = False,
    write: Annotated[
        Optional[int],
        typer.Option(
            min=1,
            help="Also let each write an answer of at most so many tokens to every question:"
            " exact match after normalisation, token F1, ROUGE-L.",
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Evaluate the global model with what a run tuned best, and zero-shot for comparison."""
    _says_that_it_loads(f"the run {folder}")
    from fedsp import api as commands
    from fedsp.report.console import Display, rows_table

    with Display() as display:
        rows = commands.evaluate(
            folder,
            split=split,
            data=data,
            prompt=prompt,
            zero_shot=zero_shot,
            auxiliary=auxiliary,
            write=write,
        )
        display.print(rows_table(f"{folder}, {data or split}", rows))
    _write(json_file, {"rows": rows})


@app.command(rich_help_panel=AFTER, short_help="Let a run answer a text.")
def generate(
    folder: RunFolder,
    text: Annotated[str, typer.Argument(help="The text to complete.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 40,
    zero_shot: Annotated[bool, typer.Option("--zero-shot", help="Without what was tuned.")] = False,
    answers: Annotated[
        str,
        typer.Option(
            help="Who answers: global, auxiliary (the tuned auxiliary model), proxy (the global"
            " model, moved as tuning moves the auxiliary one) or mean (of both tuned models)."
        ),
    ] = "global",
    weight: Annotated[
        float, typer.Option(help="Weight of proxy answers; `evaluate --auxiliary` chooses one.")
    ] = 1.0,
    system: Annotated[
        Optional[str], typer.Option(help="System message, where the run's task is chat.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0: the likeliest token each time; above: tokens are drawn.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest tokens that add up to this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    stop: Annotated[
        Optional[list[str]],
        typer.Option(help="Text before which the answer ends, such as a line break; repeatable."),
    ] = None,
) -> None:
    """A completion by the global model with what a run tuned best, or its answer in a chat."""
    from fedsp import api as commands
    from fedsp.experiments.run_directory import RunDirectory

    written = commands.generate(
        folder,
        text,
        most=tokens,
        zero_shot=zero_shot,
        answers=cast(Any, answers),
        weight=weight,
        system=system,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or [],
    )
    chat = RunDirectory.open(folder).config.data.task == "chat"
    typer.echo(written.strip() if chat else text + written)


@app.command(
    "serve-model", rich_help_panel=AFTER, short_help="Serve runs by OpenAI's API over HTTP."
)
def serve_model(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs of one base model.", callback=_with_runs),
    ],
    host: Annotated[str, typer.Option(help="Address at which to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    key_file: Annotated[
        Optional[Path],
        typer.Option(help="File with the key that requests must bear (Authorization: Bearer)."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 512,
    answers: Annotated[
        str, typer.Option(help="Who answers: global, auxiliary, proxy or mean, as `generate`.")
    ] = "global",
    weight: Annotated[float, typer.Option(help="Weight of proxy answers.")] = 1.0,
) -> None:
    """Serve what runs tuned under /v1/completions and /v1/chat/completions, in the form of OpenAI's
    API: each run is a model of its folder's name, and `base` is the model without what was tuned.
    Texts that arrive together are written together. Ctrl-C ends it."""
    from fedsp import api as commands
    from fedsp.report.console import Display

    # SIGTERM is how a service ends
    with Display() as display, suppress(KeyboardInterrupt, _Ended):
        commands.serve_model(
            folders,
            host=host,
            port=port,
            key_file=key_file,
            most=tokens,
            answers=cast(Any, answers),
            weight=weight,
            callbacks=display.callbacks(),
        )


@app.command(rich_help_panel=AFTER, short_help="Bring more into the global model, without labels.")
def adapt(
    folder: RunFolder,
    questions: Annotated[
        Path, typer.Argument(help="Questions in the form of the run's task; no label is used.")
    ],
    output: Annotated[Path, typer.Argument(help="The new folder for the adapter.")],
    answers: Annotated[
        Optional[str],
        typer.Option(
            help="The teacher: mean, proxy or auxiliary, as in `fedsp generate`; none: the one that"
            " validation prefers."
        ),
    ] = None,
    weight: Annotated[float, typer.Option(help="Weight of proxy answers.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the teacher's and the student's probabilities.")
    ] = 1.0,
    json_file: Json = None,
) -> None:
    """Bring more of what the auxiliary model has learned into the global model, at the server and
    without labels: adapters in all of its layers learn to answer as a teacher does, such as both
    models together. They are written as a PEFT adapter if validation says that they are better."""
    _says_that_it_loads(f"the run {folder}")
    from fedsp import api as commands
    from fedsp.report.console import Display, figures_table

    with Display() as display:
        figures = commands.adapt(
            folder,
            questions,
            output,
            answers=cast(Any, answers),
            weight=weight,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            temperature=temperature,
            callbacks=display.callbacks(),
        )
        display.print(figures_table("Adaptation", figures))
    better = (
        f"{figures['measure']} {figures['before']:.4g} -> {figures['after']:.4g}, taught by"
        f" {figures['teacher']}"
    )
    typer.echo(
        f"{output} is a PEFT adapter (LORA): {better}"
        if figures["kept"]
        else f"not better, so nothing was written: {better}"
    )
    _write(json_file, figures)


@app.command(rich_help_panel=AFTER, short_help="Write what was tuned, for PEFT or merged.")
def export(
    folder: RunFolder,
    output: Annotated[Path, typer.Argument(help="The new folder.")],
    merged: Annotated[
        bool,
        typer.Option("--merged", help="A whole model, with what was tuned in its weights."),
    ] = False,
    json_file: Json = None,
) -> None:
    """Write what was tuned as a PEFT adapter (prefix tuning or LoRA) or as a whole model, with a
    model card: how it was made, what was measured, what was disclosed and promised."""
    from fedsp import api as commands

    figures = commands.export(folder, output, merged=merged)
    typer.echo(
        f"{output} is a whole model: AutoModelForCausalLM.from_pretrained({str(output)!r})"
        if merged
        else f"{output} is a {figures['kind']}: PeftModel.from_pretrained(model, {str(output)!r})"
    )
    _write(json_file, figures)


@app.command(rich_help_panel=BEGIN, short_help="A grid of methods, tasks, models and seeds.")
def study(
    file: Annotated[
        Path,
        typer.Argument(help="The study's TOML file: models, tasks, partitions, methods, grids."),
    ],
    root: Annotated[
        Optional[Path],
        typer.Option(
            help="Folder that relative file names in the study refer to; default: that of the"
            " study file."
        ),
    ] = None,
    threads: Annotated[
        Optional[int],
        typer.Option(
            min=1, help="Threads of torch; 1 is best where several processes share the study."
        ),
    ] = None,
    workers: Workers = None,
    json_file: Json = None,
) -> None:
    """Run a grid of methods x tasks x models x partitions x seeds. Run it again to resume, or in
    several processes at once to share the work."""
    from fedsp.experiments.study import run_study
    from fedsp.report.console import Display, figures_table

    told = "finished cells and rounds are kept: give the same command again to go on"
    with _says_how_to_go_on(lambda: told), Display() as display:
        figures = run_study(
            file, root=root, threads=threads, workers=workers, callbacks=display.study_callbacks()
        )
        display.print(figures_table("Study", figures))
    _write(json_file, figures)
    if figures["failed"]:
        raise RunError(
            f"{figures['failed']} of {figures['cells']} cells failed; each says why in its folder's"
            " failure.json, which you may remove to try it again"
        )


@app.command(rich_help_panel=AFTER, short_help="One page about runs or studies.")
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of studies, or of runs.")],
    output: Annotated[
        Path, typer.Option(help="Folder for report.html and the tables as Markdown, CSV and LaTeX.")
    ] = Path("report"),
    json_file: Json = None,
) -> None:
    """One page about finished runs: tables with spreads and paired comparisons, learning curves,
    costs; every number leads to its run."""
    from fedsp import write_report
    from fedsp.report.console import Display, figures_table

    with Display() as display:
        figures = write_report(folders, output)
        display.print(figures_table("Report", figures))
    _write(json_file, figures)


@app.command("list", rich_help_panel=AFTER, short_help="The runs below a folder.")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"),
    json_file: Json = None,
) -> None:
    """The runs below a folder."""
    from fedsp.experiments import run_directory
    from fedsp.report.console import Display, rows_table

    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}")
    rows = run_directory.list_runs(folder)
    with Display() as display:
        display.print(rows_table(f"Runs in {folder}", rows))
    _write(json_file, {"rows": rows})


def quiet_libraries() -> None:
    """Keep progress bars and advice of other libraries out of our output; their errors still come
    through."""
    for name, value in (QUIET | {"HF_HUB_VERBOSITY": "error"}).items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    if datasets := sys.modules.get("datasets"):
        datasets.disable_progress_bars()


def main() -> None:
    """Run a command. An error that the user can fix is one sentence on stderr, exit code 2."""
    quiet_libraries()
    try:
        if any("\ud800" <= letter <= "\udfff" for letter in " ".join(sys.argv)):
            raise ConfigurationError(
                "a word of the command is not UTF-8 text: set the terminal to UTF-8, and rename"
                " files whose names are not"
            )
        with _ends_at(signal.SIGTERM):
            app()
        return
    except SystemExit as ended:
        if ended.code in ENDED:
            how = f"; {ended.how}" if isinstance(ended, _Ended) and ended.how else ""
            typer.echo(f"fedsp: ended from outside{how}", err=True)
        raise
    except FedspError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        message = (
            f"{str(error.filename)[:200]} cannot be used ({error.strerror}): name another file or"
            " folder"
        )
    except UnicodeEncodeError as error:
        message = (
            f"the terminal cannot show a text, since it takes {error.encoding} only: set it to"
            " UTF-8 (PYTHONIOENCODING=utf-8)"
        )
    typer.echo(f"fedsp: {message}".encode(errors="backslashreplace").decode(), err=True)
    sys.exit(2)


ENDED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a command that is ended from outside, as a shell has them."""


class _Ended(SystemExit):
    """The end of a command by a signal. `how`: what is kept, and how to go on."""

    how = ""


def _end(number: int, _: object) -> NoReturn:
    raise _Ended(128 + number)


@contextmanager
def _ends_at(number: signal.Signals) -> Iterator[None]:
    """A signal ends what is done as an error would; only the main thread can see to that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, _end)
    try:
        yield
    finally:
        signal.signal(number, before or signal.SIG_DFL)


@contextmanager
def _says_how_to_go_on(how: Callable[[], str]) -> Iterator[None]:
    """Where the work is ended from outside, by Ctrl-C or SIGTERM, `main` also says what is kept and
    how to go on."""
    with _ends_at(signal.SIGINT):
        try:
            yield
        except _Ended as ended:
            ended.how = how()
            raise


def _says_that_it_loads(what: str) -> None:
    """Before the first seconds, in which nothing else can be said."""
    typer.echo(f"fedsp {version('fedsp')}: loading {what}")


def _measure_threads(info: Callable[[str], None]) -> None:
    """Give torch the threads that are worth having on this machine now."""
    import torch

    from fedsp.training.threads import measured_threads

    most = torch.get_num_threads()
    threads, faster = measured_threads()
    if threads < most:
        info(
            f"one thread, since {most} are {faster:.1f} times as fast on this machine as busy as it"
            " is now; OMP_NUM_THREADS sets another number"
        )
    torch.set_num_threads(threads)


def _named_columns(words: list[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for word, (field, _, name) in zip(words, pairs, strict=True):
        if not (field and name):
            raise ConfigurationError(
                f"--column {word!r}: expected a field of the task and what the files call it, such"
                " as question=Frage"
            )
    return {field: name for field, _, name in pairs}


def _read(config: Path, overrides: list[str] | None) -> RunConfig:
    from fedsp.config_file import read_config

    return read_config(config, overrides or ())


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    from fedsp.storage import write_bytes

    if path is not None:
        try:
            data = (json.dumps(figures, indent=2, default=str) + "\n").encode()
            # a terminal, a pipe: nothing to put in its place
            if path.exists() and not path.is_file():
                path.write_bytes(data)
            else:
                write_bytes(path.resolve(), data)
        except FedspError as error:
            raise DataError(f"the figures above could not be written: {error}") from error
