"""The shape of the package, beside the import contracts of `make lint`: short listings, libraries
that few modules know, and nothing that is ever executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "fedsp"
EMPTY = {
    "data.__init__",
    "models.__init__",
    "training.__init__",
    "federation.__init__",
    "experiments.__init__",
    "deployment.__init__",
    "audit.__init__",
    "report.__init__",
}
EMPTY |= {f"federation.{part}.__init__" for part in ("aggregation", "methods", "transport")} | {
    "audit.inversion.__init__"
}
ONLY_IN = {
    "transformers": {
        "data.encoding",
        "models.adapter",
        "models.blocks",
        "models.prompted_lm",
        "models.running_texts",
        "models.gguf",
        "models.loading",
        "models.auxiliary",
        "report.console",
        "audit.inversion.queries",
        "deployment.package_check",
    },
    "dp_accounting": {"privacy"},
    "flwr": {"deployment.grid", "deployment.simulation", "deployment.app.messenger"},
    "ray": {"deployment.simulation"},
    "lm_eval": {"experiments.lm_eval_model"},
    "peft": {"models.messengers.peft_adapters"},
    "rouge_score": {
        "audit.inversion.audit",
        "audit.inversion.scenarios",
        "training.generation",
    },
    "sklearn": {"data.topics", "audit.membership"},
    "jinja2": {"report.page"},
    "matplotlib": {"report.figures"},
    "mlflow": {"experiments.tracking.mlflow"},
    "wandb": {"experiments.tracking.wandb"},
    "cryptography": {"deployment.parties.credentials"},
    "zstandard": {"federation.compression"},
    "bitsandbytes": {"models.loading"},
    "uvicorn": {
        "deployment.fleet_proxy",
        "deployment.monitoring.health",
        "deployment.model_server.server",
    },
    "prometheus_client": {"deployment.monitoring.health"},
    "fastapi": {"deployment.model_server.openai_api"},
    "typer": {"cli"},
    "rich": {"report.console"},
    "pydantic": {
        "config",
        "config_file",
        "deployment.model_server.openai_api",
        "experiments.study",
    },
}
MOST_ENTRIES = 15


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(SOURCE.rglob("*.py"))
    }


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                (f"{node.module}.{alias.name}" for alias in node.names)
                if node.module == "fedsp"
                else [node.module]
            )


MODULES = modules()


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_libraries_stay_in_their_rooms(library: str) -> None:
    users = {
        module
        for module, tree in MODULES.items()
        if any(name.split(".")[0] == library for name in imports(tree))
    }
    assert users <= ONLY_IN[library]


def test_the_listing_can_be_read_at_a_glance() -> None:
    here = [path for path in SOURCE.iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert sum(path.is_file() for path in here) <= 10 and sum(path.is_dir() for path in here) <= 9
    for folder in SOURCE.rglob("*"):
        if folder.is_dir() and folder.name != "__pycache__":
            assert (
                len(
                    [
                        path
                        for path in folder.iterdir()
                        if path.name not in ("__pycache__", "__init__.py")
                    ]
                )
                <= MOST_ENTRIES
            ), folder


def test_only_the_command_line_prints() -> None:
    for module, tree in MODULES.items():
        calls = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ]
        assert not calls or module in {"cli", "report.console"}, f"{module} prints"


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - EMPTY))
def test_nothing_that_is_read_is_ever_executed(module: str) -> None:
    """No pickle in any dress, no torch.load, no eval or exec, and no numpy or YAML loader that
    would unpickle."""
    assert not FORBIDDEN & {name.split(".")[0] for name in imports(MODULES[module])}
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}, module
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            assert (owner, node.func.attr) not in {
                ("torch", "load"),
                ("np", "load"),
                ("numpy", "load"),
                ("yaml", "load"),
                ("yaml", "unsafe_load"),
            }, module
        if isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code"}:
            assert isinstance(node.value, ast.Constant) and node.value.value is False, module


def test_no_model_or_tokenizer_is_loaded_without_saying_that_its_code_is_not_run() -> None:
    loading = [
        (module, node)
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"from_pretrained", "from_config"}
    ]
    assert len(loading) >= 4
    for module, call in loading:
        assert any(word.arg == "trust_remote_code" for word in call.keywords), (
            f"{module}, line {call.lineno}"
        )


def test_every_public_thing_has_a_docstring() -> None:
    for module, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


def test_the_paper_stays_on_a_page() -> None:
    assert len((SOURCE / "algorithm.py").read_text().splitlines()) <= 170
