"""What Flower costs: the table of docs/results/flower.md.

    python benchmarks/flower_overhead.py OUTPUT [--rounds 5] [--deployment-only | --simulation-only]

One small model with random weights (8 layers, hidden size 256), and prompts as long as it takes for
0.2, 8 and 12 MB: the sizes of the test model's, OPT-1.3B's and GPT2-XL's. The same run, one step
per client, in one process, as a Flower simulation, and as a deployment over TLS on this machine.
Round time is the median of the rounds after the first; the first holds the start-up of Flower's and
Ray's processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomli_w
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from fedsp import api as commands
from fedsp.cli import quiet_libraries
from fedsp.config_file import make_config, read_config
from fedsp.deployment.parties.new_federation import init_federation
from fedsp.deployment.processes import free_port
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.run_directory import RunDirectory

LAYERS, HIDDEN = 8, 256
SIZES = {"0.2 MB": 24, "8 MB": 976, "12 MB": 1464}
"""Prompt lengths: 8 * 256 * 4 bytes for each virtual token."""


def make_model(folder: Path) -> Path:
    """A GPT-2 with random weights, room for long prompts, and the embedded tokenizer."""
    config = GPT2Config(
        vocab_size=1024,
        n_layer=LAYERS,
        n_embd=HIDDEN,
        n_head=4,
        n_positions=1600,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in (EMBEDDED / "model").glob("tokenizer*"):
        shutil.copy(path, folder / path.name)
    return folder


def settings(folder: Path, length: int, clients: int, rounds: int) -> dict[str, Any]:
    """One run: one step of two examples per client and round, nothing at the server."""
    rows = (EMBEDDED / "train.jsonl").read_text().splitlines()[: 4 * clients]
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return {
        "preset": "prompt",
        "output": str(folder / "run"),
        "model": {"name": str(folder.parent / "model"), "device": "cpu"},
        "data": {"task": "continuation", "train": str(folder / "train.jsonl"), "max_tokens": 32},
        "partition": {"clients": clients},
        "auxiliary": {"plan": "shared(0)"},
        "distill": {"steps": 0, "text": []},
        "prompt": {"length": length, "init": "normal"},
        "round": {"rounds": rounds},
        "client": {"prompt_steps": 1, "batch_size": 2},
        "validation": {"by": "none"},
    }


def simulated(engine: str, values: dict[str, Any]) -> RunDirectory:
    """The run in one process or as a Flower simulation."""
    commands.run(make_config(values), engine=engine)
    return RunDirectory.open(Path(values["output"]))


def deployed(values: dict[str, Any], folder: Path) -> RunDirectory:
    """The run with a process for each client, over TLS on this machine."""
    clients, port, place = values.pop("partition")["clients"], free_port(), folder / "federation"
    names = [f"client-{number}" for number in range(clients)]
    init_federation(place, names, f"localhost:{port}")
    server = place / "server"
    rows = Path(values["data"].pop("train")).read_text().splitlines()
    values |= {
        "output": str(server / "run"),
        "auxiliary": {**values["auxiliary"], "folder": "package"},
    }
    values |= {"federation": {"folder": ".", "listen": f"127.0.0.1:{port}"}}
    (server / "run.toml").write_text(tomli_w.dumps(values))
    digest = commands.distill(read_config(server / "run.toml"), server / "package")["sha256"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = []
    for index, name in enumerate(names):
        shutil.copytree(server / "package", place / name / "package")
        (place / name / "questions.jsonl").write_text("\n".join(rows[index::clients]) + "\n")
        party = (
            (place / name / "party.toml")
            .read_text()
            .replace("the digest that the owner of the model tells you", digest)
        )
        (place / name / "party.toml").write_text(
            party.replace('task = "multiple_choice"', 'task = "continuation"')
        )
        with open(place / name / "log", "wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "fedsp", "join", "party.toml"],
                    cwd=place / name,
                    stdout=log,
                    stderr=log,
                    env=environment,
                )
            )
    subprocess.run(
        [sys.executable, "-m", "fedsp", "serve", "run.toml"],
        cwd=server,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for process in started:
        process.wait(60)
    return RunDirectory.open(server / "run")


def measure(run: RunDirectory) -> dict[str, Any]:
    """Seconds of the first and of the later rounds, payload bytes of one round, and what Flower's
    calls came to in one round."""
    records = run.records()
    later = [record["seconds"] for record in records[1:]]
    calls = [sum(up + down for _, up, down in counts.values()) for counts in run.proxy_counts()]
    return {
        "first round, s": records[0]["seconds"],
        "later rounds, s": statistics.median(later),
        "slowest, s": max(later),
        "prompts per round, MB": (records[-1]["bytes_down"] + records[-1]["bytes_up"]) / 1e6,
        "over HTTP per round, MB": sum(calls) / 1e6 / len(records) if calls else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[3, 10, 30])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    shutil.rmtree(arguments.output, ignore_errors=True)
    make_model(arguments.output / "model")
    rows = []
    for size, length in SIZES.items():
        for clients in arguments.clients:
            engines = ["local", "flower"] + (
                ["deployment"] if clients == min(arguments.clients) else []
            )
            for engine in engines:
                folder = arguments.output / f"{engine}-{clients}-{length}"
                values = settings(folder, length, clients, arguments.rounds)
                figures = measure(
                    deployed(values, folder)
                    if engine == "deployment"
                    else simulated(engine, values)
                )
                rows.append({"prompt": size, "clients": clients, "engine": engine, **figures})
                print(json.dumps(rows[-1]), flush=True)
    (arguments.output / "rows.json").write_text(json.dumps(rows, indent=2))
    local = {
        (row["prompt"], row["clients"]): row["later rounds, s"]
        for row in rows
        if row["engine"] == "local"
    }
    print(
        "\n| prompt | clients | engine | first round, s | later rounds, s | slowest, s | over"
        " local, s | prompts per round, MB | over HTTP per round, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        over = row["later rounds, s"] - local[row["prompt"], row["clients"]]
        http = row["over HTTP per round, MB"]
        print(
            f"| {row['prompt']} | {row['clients']} | {row['engine']} | {row['first round, s']:.2f}"
            f" | {row['later rounds, s']:.2f} | {row['slowest, s']:.2f} | {over:+.2f} |"
            f" {row['prompts per round, MB']:.2f} | {'-' if http is None else f'{http:.2f}'} |"
        )


if __name__ == "__main__":
    main()
