"""fedsp: tune a private language model on private text. The model stays on the server, the text
with its owners; only soft prompts travel.

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
}
"""What keeps the libraries underneath from telling their makers of a run. Read when each is
imported, so it is set before any is, and whatever was set before."""

os.environ.update(QUIET)

_PUBLIC = {
    "FedspError": "fedsp.errors",
    "RunConfig": "fedsp.config",
    "SoftPrompt": "fedsp.models.soft_prompt",
    "evaluate": "fedsp.api",
    "export": "fedsp.api",
    "generate": "fedsp.api",
    "read_prompt": "fedsp.models.soft_prompt",
    "resume": "fedsp.api",
    "run": "fedsp.api",
    "run_study": "fedsp.experiments.study",
    "write_report": "fedsp.report.page",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `import fedsp` stays quick."""
    if name == "__version__":
        return import_module("importlib.metadata").version("fedsp")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fedsp' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
