"""What the base installation does by itself, and what it says where an extra is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import metadata, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedsp import api as commands
from fedsp import cli
from fedsp.config_file import make_config
from fedsp.deployment.monitoring.health import Health
from fedsp.errors import ConfigurationError
from support.small_runs import settings


def base_installation() -> set[str]:
    """The distributions that `pip install fedsp` brings."""
    found: set[str] = set()
    wanted = ["fedsp"]
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needed = requires(name) or []
        except ModuleNotFoundError:
            continue
        for requirement in map(Requirement, needed):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
    return found


BASE = """
import json, sys
sys.modules |= dict.fromkeys(json.loads(sys.argv[1]))
from fedsp import cli
for arguments in json.loads(sys.argv[2]):
    sys.argv = ["fedsp", *arguments]
    try:
        cli.main()
    except SystemExit as stopped:
        if stopped.code:
            sys.exit(f"{arguments}: {stopped.code}")
"""


@pytest.mark.study
def test_a_run_from_init_to_generate_needs_no_extra(tmp_path: Path) -> None:
    """With every library hidden that only an extra, or this test, brings."""
    base = base_installation()
    hidden = [
        module
        for module, owners in packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & base
    ]
    assert {"flwr", "peft", "rouge_score", "sklearn", "fastapi", "lm_eval"} <= set(hidden)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(settings(tmp_path)))
    words = [
        ["init", "new.toml"],
        ["data", "check", "train.jsonl"],
        ["plan", "run.toml"],
        ["run", "run.toml"],
        ["evaluate", "run"],
        ["generate", "run", "The town of", "--tokens", "2"],
        ["export", "run", "out"],
        ["audit", "run", "--only", "disclosure"],
        ["list", "."],
    ]
    done = subprocess.run(
        [sys.executable, "-c", BASE, json.dumps(hidden), json.dumps(words)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extras")
    commands.run(make_config(settings(folder, round={"rounds": 1})))
    return folder


PACKAGE: dict[str, Any] = {"auxiliary": {"folder": "package"}}
RUNS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dp_accounting": (
        "privacy",
        {"privacy": {"unit": "example", "epsilon": 8.0, "delta": 1e-3}},
        "privacy",
    ),
    "gguf": ("gguf", {"model": {"name": "model.gguf", "device": "cpu"}}, "model.gguf"),
    "bitsandbytes": (
        "large",
        {"model": {"precision": "8bit"}, **PACKAGE},
        "model.precision = '8bit'",
    ),
    "accelerate": ("large", {"model": {"device": "split"}, **PACKAGE}, "model.device"),
    "sklearn": ("study", {"partition": {"topics": 3}}, "partition.topics"),
    "mlflow": ("mlflow", {"tracking": {"mlflow": "runs.db"}}, "tracking.mlflow"),
    "wandb": ("wandb", {"tracking": {"wandb": "project"}}, "tracking.wandb"),
    "tensorboard": ("tensorboard", {"tracking": {"tensorboard": "logs"}}, "tracking.tensorboard"),
    "peft": ("study", {"method": "lora"}, "method = 'lora'"),
}
COMMANDS: dict[tuple[str, ...], tuple[str, str]] = {
    ("report", "run"): ("matplotlib", "study"),
    ("serve-model", "run"): ("fastapi", "serve"),
    ("evaluate", "run", "--write", "3"): ("rouge_score", "study"),
    ("data", "check", "rows.xlsx"): ("openpyxl", "excel"),
    ("data", "check", "rows.sql"): ("sqlalchemy", "sql"),
    ("run", "run.toml", "output=other", "--engine", "flower"): ("flwr", "flower"),
}


def test_every_extra_of_a_user_s_is_tried_here() -> None:
    """The harness, of `eval`, is what loads our module, not the other way."""
    given = set(metadata("fedsp").get_all("Provides-Extra") or ())
    tried = {extra for extra, *_ in RUNS.values()} | {extra for _, extra in COMMANDS.values()}
    assert given - tried == {"dev", "docs", "mutants", "eval"}


def refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", ["fedsp", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("fedsp: "), said
    return said


@pytest.mark.parametrize("library", sorted(RUNS))
def test_a_run_that_needs_an_extra_says_which_before_it_begins(
    library: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra, changes, what = RUNS[library]
    shutil.copytree(finished / "run" / "auxiliary", tmp_path / "package")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "run.toml").write_text(tomli_w.dumps(settings(tmp_path, **changes)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    said = refused(["run", "run.toml"], monkeypatch, capsys)
    assert what in said and f"`pip install 'fedsp[{extra}]'`" in said, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_that_needs_an_extra_says_which(
    words: tuple[str, ...],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library, extra = COMMANDS[words]
    (tmp_path / "rows.xlsx").write_bytes(b"")
    (tmp_path / "rows.sql").write_text("-- url: sqlite:///rows.db\nselect * from rows order by id")
    (tmp_path / "run.toml").write_text(tomli_w.dumps(settings(tmp_path)))
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    said = refused(list(words), monkeypatch, capsys)
    assert f"{library.replace('_', '-')} is not installed: " in said, said
    assert f"`pip install 'fedsp[{extra}]'`" in said, said
    assert not (tmp_path / "other").exists()


def test_a_monitor_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigurationError, match=r"health needs `pip install 'fedsp\[flower\]'`"):
        Health("127.0.0.1:9", "health", "client")
