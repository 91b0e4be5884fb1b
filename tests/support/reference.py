"""The reference material that may lie beside a checkout, and lm-evaluation-harness's own tasks on
rows of ours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

REFERENCE = Path(os.environ.get("FEDSP_REFERENCE", Path(__file__).resolve().parents[3] / "shared"))


def harness_task(name: str, rows: list[dict[str, Any]], folder: Path) -> Any:
    """One of lm-evaluation-harness's own tasks, reading these rows instead of the hub's."""
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness comes with the eval extra"
    )
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(
        Path(lm_eval.__file__).parent
        / "tasks"
        / {"arc_easy": "arc"}.get(name, name)
        / f"{name}.yaml"
    )
    path = folder / f"{name}-harness.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": None,
    }
    local = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
    }
    return ConfigurableTask(
        config={key: value for key, value in config.items() if key != "tag"} | splits | local
    )
