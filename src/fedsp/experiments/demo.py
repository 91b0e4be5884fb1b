"""The demo: the embedded model tuned by ten clients who never see it, beside four controls, all by
the public functions of `fedsp.api`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from fedsp.config import RunConfig
from fedsp.config_file import make_config
from fedsp.data.dataset import load_dataset
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.server_setup import make_auxiliary, open_server, score_test
from fedsp.experiments.start import Figures, require_new, start_run
from fedsp.experiments.study import merge
from fedsp.federation.callbacks import Callbacks

DEMO: Figures = {
    "model": {"name": "embedded", "device": "cpu"},
    "data": {
        "task": "continuation",
        "train": str(EMBEDDED / "train.jsonl"),
        "validation": str(EMBEDDED / "validation.jsonl"),
        "test": str(EMBEDDED / "test.jsonl"),
    },
    "partition": {"kind": "natural", "column": "owner", "server_share": 1 / 11},
    "distill": {"steps": 300, "text": [str(EMBEDDED / "public.txt")], "sequence_length": 64},
    "auxiliary": {"plan": "ends(1)"},
    "prompt": {"length": 16},
    "round": {"rounds": 20, "clients": 5},
    "client": {"prompt_steps": 10, "learning_rate": 0.1},
    "server": {"learning_rate": 0.1},
    "validation": {"examples": 100},
}
"""The configuration of the demo, less what its rows vary."""

DEMO_ROWS: dict[str, Figures] = {
    "server-only": {"round": {"clients": 0}, "server": {"steps": 10}},
    "clients-only": {},
    "fedsp": {"server": {"steps": 10}},
    "central": {
        "partition": {"clients": 0, "server_share": 1.0, "kind": "even"},
        "server": {"steps": 10},
    },
}


def demo_config(method: str, *, seed: int, folder: Path, auxiliary: Path | None) -> RunConfig:
    """The configuration of one row of the demo's table; all rows share one auxiliary model."""
    own = {"seed": seed, "output": str(folder / method)}
    made = {"auxiliary": {"folder": str(auxiliary)}} if auxiliary else {}
    return make_config(merge(DEMO, own, made, DEMO_ROWS[method]), "the demo")


def demo(
    *, seed: int = 0, folder: str | Path | None = None, callbacks: Callbacks | None = None
) -> list[Figures]:
    """Tune the embedded model with ten clients who never see it, and with four controls; one row of
    test figures each.

    Every test question is about somebody that neither the clients nor the server have a question
    about.

    Raises:
        RunError: the folder is in use.
    """
    torch.set_num_threads(1)  # the model is so small that a second thread costs more than it gives
    callbacks = callbacks or Callbacks()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="fedsp-demo-") as temporary:
            return demo(seed=seed, folder=temporary, callbacks=callbacks)
    folder = Path(folder)
    require_new(folder)
    auxiliary = folder / "auxiliary"
    config = demo_config("clients-only", seed=seed, folder=folder, auxiliary=None)
    server = open_server(config, load_dataset(config))
    started = time.perf_counter()
    make_auxiliary(server, auxiliary, callbacks)
    callbacks.info(f"distilled in {time.perf_counter() - started:.0f} s")
    started = time.perf_counter()
    test, task = server.dataset.test, server.dataset.task
    figures, _ = score_test(server.model, None, test, task, server.tokenizer, server.max_tokens)
    rows: list[Figures] = [
        {"method": "zero-shot", **figures, "bytes": 0, "seconds": time.perf_counter() - started}
    ]
    for method in DEMO_ROWS:
        callbacks.info(f"{method}:")
        result = start_run(
            demo_config(method, seed=seed, folder=folder, auxiliary=auxiliary), callbacks
        )
        rows.append(
            {
                "method": method,
                **result["test"],
                "bytes": result["bytes_up"] + result["bytes_down"],
                "seconds": result["seconds"],
            }
        )
    return rows
