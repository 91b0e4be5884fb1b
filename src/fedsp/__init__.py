"""fedsp: tune a private language model on private text. The model stays on the server, the text with its owners; only soft prompts travel.

import fedsp
result = fedsp.run("run.toml")
rows = fedsp.evaluate(result["folder"])
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from fedsp.quiet import QUIET

os.environ.update(QUIET)

_PUBLIC = {
    "FedspError": "fedsp.errors",
    "RunConfig": "fedsp.config",
    "SoftPrompt": "fedsp.prompts",
    "evaluate": "fedsp.commands",
    "export": "fedsp.commands",
    "generate": "fedsp.commands",
    "read_prompt": "fedsp.prompts",
    "resume": "fedsp.commands",
    "run": "fedsp.commands",
    "run_study": "fedsp.study",
    "write_report": "fedsp.report",
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
