"""The command line as a person meets it: what it prints, its exit codes, its files."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from fedsp import api as commands
from fedsp import cli
from fedsp.cli import app
from fedsp.config_file import read_config
from fedsp.errors import StorageError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.run_directory import RunDirectory
from fedsp.models import auxiliary
from support.small_runs import settings

QUICK = [
    "round.rounds=2",
    "partition.clients=3",
    "client.batch_size=4",
    "client.prompt_steps=1",
    "distill.steps=2",
    "distill.sequence_length=32",
    "messenger.rank=4",
    f"data.train={EMBEDDED / 'validation.jsonl'}",
    f"data.test={EMBEDDED / 'validation.jsonl'}",
    f'distill.text=["{EMBEDDED / "public.txt"}"]',
    "model.name=embedded",
    "model.device=cpu",
]


@pytest.fixture
def fedsp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Run a command line in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedsp", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.mark.study
@pytest.mark.costs
def test_a_run_from_init_to_export(fedsp, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config, run = tmp_path / "run.toml", tmp_path / "run"
    assert fedsp("init", config)[0] == 0
    code, out, _ = fedsp("plan", config, *QUICK, "--json", tmp_path / "plan.json")
    assert code == 0 and "global / auxiliary" in out
    assert json.loads((tmp_path / "plan.json").read_text())["layers"] == [0, 2, 4, 6, 7]
    code, out, error = fedsp(
        "run", config, *QUICK, f"output={run}", "--json", tmp_path / "run.json"
    )
    assert (code, error) == (0, "")
    assert (
        "round 1/2" in out
        and "round 2/2" in out
        and "distillation 2/2" in out
        and "discloses" in out
    )
    assert "cost: client: parameters trained" in out and "{" not in out
    figures = json.loads((tmp_path / "run.json").read_text())
    assert figures["test"]["examples"] == 200 and figures["bytes_up"] == figures["bytes_down"] > 0
    code, out, _ = fedsp("evaluate", run, "--json", tmp_path / "e.json")
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert code == 0 and [row["prompt"] for row in rows] == ["zero-shot", "tuned weights"]
    assert rows[1]["accuracy"] == figures["test"]["accuracy"] and "zero-shot" in out
    code, out, _ = fedsp("generate", run, "Question: The town of", "--tokens", "3")
    assert code == 0 and out.startswith("Question: The town of")
    for text, more, sentence in [
        ("", [], "there is no text to complete"),
        ("caf\udce9", [], "a word of the command is not UTF-8 text"),
        ("The town of " * 100, [], "and 40 are to be generated, but the model has"),
        ("The town", ["--tokens", "5000"], "and 5000 are to be generated, but the model has"),
    ]:
        code, out, error = fedsp("generate", run, text, *more)
        assert code == 2 and sentence in error and not out
    assert fedsp("export", run, tmp_path / "adapter")[0] == 0
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    code, out, _ = fedsp("audit", run, "--only", "disclosure", "--json", tmp_path / "a.json")
    told = json.loads((tmp_path / "a.json").read_text())[str(run)]
    assert (
        code == 0
        and "What can malicious clients do?" in out
        and "What can malicious clients do?" in told["account"]
    )
    (run / "model.json").write_text('{"extraction": []}')
    code, out, error = fedsp("audit", run, "--only", "disclosure", "--json", tmp_path / "b.json")
    assert code == 2 and "is not what fedsp wrote" in error and "bit for bit" in out
    assert (
        json.loads((tmp_path / "b.json").read_text())[str(run)]["disclosure"] == told["disclosure"]
    ), "what was found is not lost"
    (run / "model.json").unlink()
    code, out, _ = fedsp("list", tmp_path)
    assert code == 0 and "2/2" in out and "finished" in out
    assert fedsp("distill", config, tmp_path / "package", *QUICK)[0] == 0
    assert (tmp_path / "package" / "auxiliary.json").exists()


def test_a_distillation_that_fails_leaves_no_package_behind(  # type: ignore[no-untyped-def]
    fedsp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fails; and what one that was killed has left is no obstacle to the next."""
    config, package = tmp_path / "run.toml", tmp_path / "package"
    assert fedsp("init", config)[0] == 0
    written: list[str] = []

    def failing(at: int) -> Any:
        def write(path: Path, *rest: Any, **named: Any) -> Any:
            written.append(Path(path).name)
            if len(written) == at:
                raise StorageError("the disk is full")
            return whole[write.__name__](path, *rest, **named)

        return write

    whole = {name: getattr(auxiliary, name) for name in ("write_tensors", "write_json")}
    for at in (1, 2):
        written.clear()
        for name in whole:
            faulty = failing(at)
            faulty.__name__ = name
            monkeypatch.setattr(auxiliary, name, faulty)
        code, _, error = fedsp("distill", config, package, *QUICK)
        assert code == 2 and "the disk is full" in error and len(written) == at
        assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    monkeypatch.undo()
    (tmp_path / ".package.part").mkdir()
    (tmp_path / ".package.part" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".package.part" / "stale.json").write_text("{}")
    mounted = tmp_path / "mounted"
    (mounted / ".part").mkdir(parents=True)
    monkeypatch.chdir(mounted)
    assert commands.distill(read_config(config, QUICK), ".")["folder"] == str(mounted)
    assert {"auxiliary.json", "model.safetensors"} <= {
        path.name for path in mounted.iterdir()
    } and not (mounted / ".part").exists()
    shutil.rmtree(mounted)
    assert commands.distill(read_config(config, QUICK), package)["sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package", "run.toml"]
    assert (
        "auxiliary.json" in {path.name for path in package.iterdir()}
        and not (package / "stale.json").exists()
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("x = " + "[" * 100_000, "is nested too deeply"),
        ("x = " + "9" * 5000, "is not a TOML file"),
        (b"\xff\xfe", "is not a TOML file: it is not UTF-8; save it as UTF-8"),
        ('[data]\ntrain = "C:\\Users\\x.csv"', "write a Windows path with / or in single quotes"),
        ("\ufeffseed = 1\n", "model"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_a_sentence(  # type: ignore[no-untyped-def]
    fedsp, tmp_path: Path, content: str | bytes, sentence: str
) -> None:
    (tmp_path / "run.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, error = fedsp("plan", tmp_path / "run.toml")
    assert (
        code == 2
        and sentence in error
        and error.startswith("fedsp: ")
        and "Traceback" not in error
        and "9999" not in error
    )


def test_figures_go_through_links_and_into_pipes(fedsp, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """And replace no device and no link."""
    config = tmp_path / "run.toml"
    fedsp("init", config)
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to("target.json")
    assert fedsp("plan", config, *QUICK, "--json", tmp_path / "link.json")[0] == 0
    assert (tmp_path / "link.json").is_symlink() and json.loads(
        (tmp_path / "target.json").read_text()
    )["layers"]
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    assert fedsp("plan", config, *QUICK, "--json", tmp_path / "pipe")[0] == 0
    reader.join(20)
    assert json.loads(read[0])["layers"] and not (tmp_path / "pipe").is_file()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["preset=prompt", "prompt.init_text=" + "A long text. " * 40], "File name too long"),
        (["data.train=" + "x" * 400], "File name too long"),
        (["output=" + "x" * 400], "File name too long"),
        (['data.train="a\\u0000b"'], "data.train: it contains a NUL character"),
        (["client.learning_rate=1e39"], "client.learning_rate: expected at most 100.0, not 1e+39"),
        (["client.learning_rate=inf"], "a number that is not infinite"),
        (["client.learning_rate=0"], "client.learning_rate: expected more than 0.0, not 0"),
        (
            ["client.batch_size=99999999999"],
            "client.batch_size: expected at most 65536",
        ),
        (
            ["profile=robust", "aggregation.malicious=1e-320"],
            "aggregation.malicious: less than a thousandth rounds down to no client",
        ),
    ],
)
def test_values_of_a_size_that_nothing_can_use_are_a_sentence(  # type: ignore[no-untyped-def]
    fedsp, tmp_path: Path, words: list[str], sentence: str
) -> None:
    config = tmp_path / "run.toml"
    fedsp("init", config)
    code, _, error = fedsp("run", config, *QUICK, f"output={tmp_path / 'run'}", *words)
    assert (
        code == 2 and sentence in error and error.startswith("fedsp: ") and "Traceback" not in error
    )


def test_a_run_that_is_refused_at_its_data_leaves_no_folder(fedsp, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config, run = tmp_path / "run.toml", tmp_path / "run"
    fedsp("init", config)
    code, _, error = fedsp("run", config, *QUICK, f"output={run}", "data.train=none.jsonl")
    assert code == 2 and "there is no file none.jsonl" in error
    assert not run.exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What is started ends at SIGINT, even where these tests run in the background of a shell,
    which then ignores it for all that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.study
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_run_that_is_ended_says_how_to_go_on(number: int, workers: int, tmp_path: Path) -> None:
    config, run = tmp_path / "run.toml", tmp_path / "run"
    command = [sys.executable, "-m", "fedsp"]
    subprocess.run([*command, "init", config], check=True)
    words = [*QUICK, "round.rounds=500", f"output={run}", "--workers", str(workers)]
    started = subprocess.Popen(
        [*command, "run", config, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    next(line for line in started.stdout if line.startswith("round 2/"))
    started.send_signal(number)
    _, error = started.communicate(timeout=60)
    assert started.returncode == 128 + number
    assert error.strip() == (
        "fedsp: ended from outside; finished rounds are kept: go on with `fedsp run --resume"
        f" {run}`"
    )
    assert len(RunDirectory.open(run).records()) >= 2


@pytest.mark.study
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_ended_leaves_the_terminal_as_it_was(number: int, tmp_path: Path) -> None:
    """In a terminal, where the cursor is hidden beside the bar of the steps, and before the first
    round of a run: its folder is not left behind unless something is in it."""
    config, run = tmp_path / "run.toml", tmp_path / "run"
    command = [sys.executable, "-m", "fedsp"]
    subprocess.run([*command, "init", config], check=True)
    long = ["distill.steps=100000", "round.rounds=3"]
    for words, sentence in (
        (["distill", config, tmp_path / "package", *QUICK, *long], "fedsp: ended from outside"),
        (
            ["run", config, *QUICK, *long, f"output={run}"],
            "fedsp: ended from outside; nothing was made",
        ),
    ):
        terminal, theirs = pty.openpty()
        started = subprocess.Popen(
            [*command, *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        shown = b""
        while b"/100000" not in shown:
            shown += os.read(terminal, 1 << 16)
        started.send_signal(number)
        with suppress(OSError):  # it ends
            while more := os.read(terminal, 1 << 16):
                shown += more
        os.close(terminal)
        assert started.wait(60) == 128 + number
        assert shown.decode().rstrip().endswith(sentence)
        assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h") > 0
    assert not run.exists()


def test_it_says_its_version(fedsp) -> None:  # type: ignore[no-untyped-def]
    assert fedsp("--version") == (0, f"fedsp {version('fedsp')}\n", "")


def test_a_file_in_the_way_of_a_folder_is_a_sentence(fedsp, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("")
    code, _, error = fedsp("federation", "init", tmp_path / "file" / "x", "--clients", "a")
    assert code == 2 and "Not a directory" in error and error.startswith("fedsp: ")


def test_words_that_are_no_text_are_a_sentence(fedsp, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = tmp_path / "run.toml"
    fedsp("init", config)
    for words in (
        ["run", config, *QUICK, "data.task=caf\udce9"],
        ["run", config, *QUICK, f"output={tmp_path}/caf\udce9", "seed=1"],
        ["plan", "caf\udce9.toml"],
    ):
        code, _, error = fedsp(*words)
        assert code == 2 and error.startswith("fedsp: ") and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["run", "nowhere.toml"],
            "there is no file nowhere.toml; `fedsp init nowhere.toml` writes one",
        ),
        (["run"], "nothing to run: give a TOML file"),
        (["run", "--resume", "nowhere"], "nowhere holds no run"),
        (["evaluate", "nowhere"], "nowhere holds no run"),
        (["list", "nowhere"], "there is no folder nowhere"),
        (["init", "x.toml", "--preset", "papr"], "unknown preset 'papr'; did you mean 'paper'?"),
        (["init", "x.toml", "--preset", "zzz"], "known: paper, prompt, messenger"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(  # type: ignore[no-untyped-def]
    fedsp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = fedsp(*arguments)
    assert code == 2 and out == ""
    assert error.startswith("fedsp: ") and sentence in error and "Traceback" not in error


def test_a_resumed_run_takes_no_settings(fedsp, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    commands.run(settings(tmp_path, round={"rounds": 1}))
    code, _, error = fedsp("run", "--resume", tmp_path / "run", "round.rounds=3")
    assert code == 2 and error == "fedsp: 'round.rounds=3': a resumed run keeps its own settings\n"


def test_a_configuration_without_a_federation_is_not_served(fedsp, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """That is said first, whatever else is in the way."""
    config = tmp_path / "run.toml"
    fedsp("init", config)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.toml").write_text("")
    code, _, error = fedsp("serve", config, *QUICK, f"output={tmp_path / 'used'}")
    assert code == 2 and "the configuration has no [federation] section" in error


def test_a_plan_knows_the_clients_and_a_file_its_sections(fedsp, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = tmp_path / "run.toml"
    config.write_bytes(tomli_w.dumps(settings(tmp_path)).encode())
    code, _, error = fedsp("plan", config, "round.only=client-9")
    assert code == 2 and "round.only: there is no client 'client-9'" in error
    config.write_text("[model]\n[data]\n[model]\n")
    code, _, error = fedsp("plan", config)
    assert code == 2 and "a section stands once, with all of its keys below it" in error


def test_unknown_models_and_full_folders(fedsp, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = tmp_path / "run.toml"
    fedsp("init", config)
    code, _, error = fedsp("plan", config, "model.name=no/such-model")
    assert code == 2 and "cannot load the model 'no/such-model'" in error
    code, _, error = fedsp("plan", config, *QUICK, "model.name=no/such-model")
    assert code == 2 and "cannot load the model 'no/such-model'" in error
    code, _, error = fedsp("run", config, *QUICK, f"output={tmp_path}")
    assert code == 2 and "is in use and does not hold a run" in error
    code, _, error = fedsp("init", config)
    assert code == 2 and "exists" in error


WITHOUT_TORCH = [
    ["--help"],
    ["run", "--help"],
    ["list"],
    ["init", "new.toml"],
    ["plan", "wrong.toml"],
    ["run", "wrong.toml"],
    ["serve", "missing.toml"],
    ["distill", "wrong.toml", "package"],
    ["study", "missing.toml"],
    ["join", "missing.toml"],
    ["run", "--resume", "missing"],
    ["evaluate", "missing"],
    ["generate", "missing", "x"],
    ["export", "missing", "out"],
    ["adapt", "missing", "x.jsonl", "out"],
    ["audit", "missing"],
    ["report", "."],
    ["federation", "init", "new", "--clients", "a"],
]


def test_what_needs_no_tensor_answers_without_torch(tmp_path: Path) -> None:
    """Importing torch and transformers takes seconds: help, lists and refusals do not wait."""
    (tmp_path / "wrong.toml").write_text('[model]\nnaem = "x"\n')
    (tmp_path / "runs").mkdir()
    code = (
        "import json, sys; from fedsp.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['fedsp', *arguments]\n"
        "    try:\n        main()\n    except SystemExit:\n        pass\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'flwr'} & set(sys.modules)\n"
        "    if heavy:\n        sys.exit(f'{arguments} imports {heavy}')"
    )
    command = [sys.executable, "-c", code, json.dumps(WITHOUT_TORCH)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_commands_fit_one_screen_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each, in a terminal of 80 columns and 40 lines."""
    monkeypatch.setenv("COLUMNS", "80")
    help_text = CliRunner().invoke(app, ["--help"]).output
    assert len(help_text.splitlines()) <= 40
    for heading in ("On one machine", "With clients on machines of their own", "With what was"):
        assert heading in help_text
    names = [one.name or one.callback.__name__ for one in app.registered_commands if one.callback]
    for name in [*names, "federation", "egress", "data"]:
        (line,) = [line for line in help_text.splitlines() if line.startswith(f"\u2502 {name} ")]
        assert line.rstrip(" \u2502").endswith("."), "whole"


def test_help_shows_what_brackets_and_arguments_say() -> None:
    """Behind click 8.5 the typer that Flower allows loses the help of arguments; as rich's markup a
    section's name in brackets would be a tag."""
    done = subprocess.run(
        [sys.executable, "-m", "fedsp", "serve", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert "The run's TOML file, with a [federation] section." in done.stdout, done.stdout


def test_a_plan_of_a_known_shape_answers_without_torch_and_with_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted once for a configuration of a model and a layer plan; other settings may differ."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values: dict[str, Any] = {"model": {"name": "embedded"}, "data": {}}
    (tmp_path / "run.toml").write_bytes(tomli_w.dumps(values).encode())
    counted = commands.plan(values)
    (kept,) = (tmp_path / "cache" / "fedsp").iterdir()
    code = (
        "import sys; from fedsp.cli import main\n"
        "sys.argv = ['fedsp', 'plan', 'run.toml', '--json', 'plan.json']\n"
        "main()\nsys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    assert json.loads((tmp_path / "plan.json").read_text()) == counted
    kept.write_text("{")
    assert commands.plan(values) == counted, "a damaged count is made again"
    other = commands.plan(values, overrides=["auxiliary.plan=ends(1)", "messenger.rank=32"])
    assert other["layers"] != counted["layers"]
    assert len(list(kept.parent.iterdir())) == 2, "another shape"
