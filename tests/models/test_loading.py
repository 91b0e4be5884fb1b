"""Models by the name that the Hugging Face hub knows them by."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.gguf_made import tiny_llama

LOAD = """
import time

def never(seconds):
    raise SystemExit(f"it waits for {seconds} s")

time.sleep = never
from fedsp.errors import ModelError
from fedsp.models.loading import load_model, load_tokenizer

print(load_model("ours/fetched", device="cpu").name)
for load in (load_model, load_tokenizer):
    try:
        load("nobody/nothing")
    except ModelError as error:
        print(error)
"""


def test_where_the_hub_does_not_answer_what_was_fetched_is_read_at_once(tmp_path: Path) -> None:
    """Its client tries each file six times otherwise, for 23 seconds."""
    kept = tmp_path / "hub" / "models--ours--fetched"
    tiny_llama().save_pretrained(tmp_path / "saved")
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("1234567")
    shutil.copytree(tmp_path / "saved", kept / "snapshots" / "1234567")
    closed = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env={**os.environ, **closed},
        capture_output=True,
        text=True,
        timeout=120,
    )
    why = "a name that the hub answers to (http://127.0.0.1:9 does not answer, and nothing was"
    assert done.stdout.splitlines() == ["ours/fetched"] + [
        f"cannot load the {what} 'nobody/nothing': it is neither a folder with a {what} nor {why}"
        " fetched of it before)"
        for what in ("model", "tokenizer")
    ], done.stderr
