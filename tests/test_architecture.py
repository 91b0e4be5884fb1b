"""The floors of the house: a module imports only from lower floors, and some libraries live in few rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "fedsp"
FLOORS = [
    {"errors", "quiet", "frames", "codings", "rows", "engines.leash"},
    {"__init__", "blocks", "storage", "payload", "config", "comparison", "engines.channel", "engines.processes", "data.topics", "audit.epsilon"},
    {"config_file", "rounds", "models", "compression", "data.files", "credentials", "engines.flower", "privacy", "robust", "audit.statistics"},
    {"loading", "data.tasks", "data.partition", "prompts", "aggregation", "wire", "engines.gate", "engines.pinned", "weights", "queries"},
    {"data.encoding", "engines.remote", "attacks"},
    {"fitting", "evaluation", "per_example"},
    {"package_check", "auxiliary", "adaptation", "private_fitting", "audit.inversion", "audit.matching"},
    {"parties", "distill", "package", "inspection"},
    {"methods.base"},
    {
        "algorithm",
        "methods.zero_shot",
        "methods.finetune",
        "methods.prefix_tuning",
        "methods.fedprompt",
        "methods.fedprompt_single",
        "methods.lora",
        "methods.offsite_tuning",
        "methods.private",
        "federation",
        "engines.answering",
        "cost",
    },
    {"runs"},
    {"server", "audit.tables"},
    {"clients", "redistillation", "tracking"},
    {"sides", "audit.depths", "audit.disclosure", "statement"},
    {"experiment", "plan", "engines.local", "display"},
    {"engines.simulation", "engines.deployment", "engines.joining", "audit.shadows"},
    {"audit.levels"},
    {"commands", "engines.app.messenger", "audit.membership", "audit.inverting", "audit.model", "audit.promise", "audit.account", "audit.trap"},
    {"demo", "harness", "study", "finished_run", "audit.auditing"},
    {"results"},
    {"figures", "tables"},
    {"report"},
    {"cli"},
    {"__main__"},
]
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
EMPTY = {"audit.__init__", "data.__init__", "engines.__init__", "methods.__init__"}
ONLY_IN = {
    "transformers": {"blocks", "models", "loading", "auxiliary", "display", "queries", "package_check"},
    "dp_accounting": {"privacy"},
    "flwr": {"engines.flower", "engines.simulation", "engines.app.messenger"},
    "ray": {"engines.simulation"},
    "lm_eval": {"harness"},
    "peft": {"methods.lora"},
    "rouge_score": {"audit.inverting", "audit.levels"},
    "sklearn": {"data.topics", "audit.membership"},
    "jinja2": {"report"},
    "matplotlib": {"figures"},
    "mlflow": {"tracking"},
    "cryptography": {"credentials"},
    "zstandard": {"compression"},
    "bitsandbytes": {"loading"},
    "uvicorn": {"engines.gate"},
    "typer": {"cli"},
    "rich": {"display"},
    "pydantic": {"config", "config_file", "study"},
}


def modules() -> dict[str, ast.Module]:
    return {".".join(path.relative_to(SOURCE).with_suffix("").parts): ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if node.module == "fedsp" else [node.module]


MODULES = modules()


def test_every_module_has_a_floor() -> None:
    assert set(MODULES) - EMPTY == set(FLOOR)


@pytest.mark.parametrize("module", sorted(set(MODULES) - EMPTY))
def test_imports_only_from_lower_floors(module: str) -> None:
    for name in imports(MODULES[module]):
        if name.startswith("fedsp."):
            assert FLOOR[name.removeprefix("fedsp.")] < FLOOR[module], f"{module} imports {name}, which is not on a lower floor"


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_libraries_stay_in_their_rooms(library: str) -> None:
    users = {module for module, tree in MODULES.items() if any(name.split(".")[0] == library for name in imports(tree))}
    assert users <= ONLY_IN[library]


@pytest.mark.parametrize("module", ["algorithm", *sorted(module for module in set(MODULES) - EMPTY if module.startswith("methods."))])
def test_a_method_knows_no_engine_no_configuration_and_no_other_method(module: str) -> None:
    names = set(imports(MODULES[module])) - {"fedsp.methods.base"}
    assert not any(name.startswith(("fedsp.engines", "fedsp.config", "fedsp.runs", "fedsp.federation", "fedsp.methods", "fedsp.algorithm")) for name in names)


@pytest.mark.parametrize("module", ["federation", "aggregation", "privacy", "robust"])
def test_the_loop_knows_nothing_of_language_models(module: str) -> None:
    assert not {"fedsp.models", "fedsp.prompts", "fedsp.data.tasks", "fedsp.data.encoding"} & set(imports(MODULES[module]))


def test_only_the_command_line_prints() -> None:
    for module, tree in MODULES.items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]
        assert not calls or module in {"cli", "display"}, f"{module} prints"


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - EMPTY))
def test_nothing_that_is_read_is_ever_executed(module: str) -> None:
    """No pickle in any dress, no torch.load, no eval or exec, and no numpy or YAML loader that would unpickle."""
    assert not FORBIDDEN & {name.split(".")[0] for name in imports(MODULES[module])}
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}, module
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            assert (owner, node.func.attr) not in {("torch", "load"), ("np", "load"), ("numpy", "load"), ("yaml", "load"), ("yaml", "unsafe_load")}, module
        if isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "trust_remote_code"}:
            assert isinstance(node.value, ast.Constant) and node.value.value is False, module


def test_no_model_or_tokenizer_is_loaded_without_saying_that_its_code_is_not_run() -> None:
    loading = [
        (module, node)
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {"from_pretrained", "from_config"}
    ]
    assert len(loading) >= 4
    for module, call in loading:
        assert any(word.arg == "trust_remote_code" for word in call.keywords), f"{module}, line {call.lineno}"


def test_every_public_thing_has_a_docstring() -> None:
    for module, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


def test_the_paper_stays_on_a_page() -> None:
    assert len((SOURCE / "algorithm.py").read_text().splitlines()) <= 170
