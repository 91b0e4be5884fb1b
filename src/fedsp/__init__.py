"""fedsp: tune a private language model on private text. The model stays on the server, the text
with its owners; only a small messenger travels.

import fedsp
result = fedsp.run("run.toml")
rows = fedsp.evaluate(result["folder"])
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

QUIET = {
    "DO_NOT_TRACK": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_ERROR_REPORTING": "false",
}
"""What keeps the libraries underneath from telling their makers of a run. Read when each is
imported, so it is set before any is, and whatever was set before."""

os.environ.update(QUIET)

_PUBLIC = {
    "Averaging": "fedsp.federation.methods.base",
    "Callbacks": "fedsp.federation.callbacks",
    "ClientSide": "fedsp.federation.methods.registry",
    "Example": "fedsp.data.tasks",
    "FedSP": "fedsp.algorithm",
    "FedspError": "fedsp.errors",
    "Messenger": "fedsp.models.trainable",
    "MessengerEntry": "fedsp.models.messengers.registry",
    "MethodEntry": "fedsp.federation.methods.registry",
    "Place": "fedsp.models.messengers.registry",
    "Request": "fedsp.federation.messages",
    "RoundConfig": "fedsp.federation.loop",
    "RunConfig": "fedsp.config",
    "Sizes": "fedsp.models.messengers.registry",
    "SoftPrompt": "fedsp.models.soft_prompt",
    "Stage": "fedsp.training.stage",
    "Stages": "fedsp.federation.methods.registry",
    "Task": "fedsp.data.tasks",
    "Update": "fedsp.federation.messages",
    "Weights": "fedsp.models.weights",
    "adapt": "fedsp.api",
    "check_data": "fedsp.api",
    "distill": "fedsp.api",
    "evaluate": "fedsp.api",
    "export": "fedsp.api",
    "federate": "fedsp.federation.loop",
    "generate": "fedsp.api",
    "plan": "fedsp.api",
    "read_prompt": "fedsp.models.soft_prompt",
    "register_messenger": "fedsp.models.messengers.registry",
    "register_method": "fedsp.federation.methods.registry",
    "register_rule": "fedsp.federation.aggregation.registry",
    "register_task": "fedsp.data.tasks",
    "resume": "fedsp.api",
    "run": "fedsp.api",
    "serve_model": "fedsp.api",
    "run_study": "fedsp.experiments.study",
    "write_report": "fedsp.report.page",
}
"""What is public, and where it is defined; docs/reference/python.md documents it."""
_NEEDS = {"write_report": ("study", "reports need", "jinja2", "matplotlib")}
"""What the module of a public name imports beyond the base installation: its extra, the words of
its error, and the libraries."""

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `import fedsp` stays quick."""
    if name == "__version__":
        return import_module("importlib.metadata").version("fedsp")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fedsp' has no attribute {name!r}")
    if name in _NEEDS:
        import_module("fedsp.errors").require_installed(*_NEEDS[name])
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
