"""The table of docs/results/core.md: where does the gain come from?

    python benchmarks/core_table.py MODEL QA TEXT OUTPUT --tasks arc_easy sciq piqa --seeds 0 1 2
    python benchmarks/core_table.py MODEL QA TEXT OUTPUT --table

MODEL is a folder with a causal LM, QA a folder of `<task>/{train,validation,test}.jsonl.gz`, TEXT a folder of public texts. Each run has a
folder below OUTPUT; finished ones are not repeated, so the command can be stopped and started again, and several can share a machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch

from fedsp import commands
from fedsp.config_file import make_config
from fedsp.display import quiet_libraries
from fedsp.server import evaluate_prompt

TEST_QUESTIONS = 600
PUBLIC = ["openstax-physics.txt.gz", "openstax-chemistry-bundle.txt.gz", "openstax-microbiology.txt.gz"]
SERVER = {"steps": 5, "batch_size": 8}
PAPER = {"preset": "paper", "prompt": {"length": 16}, "client": {"align_steps": 5, "speak_steps": 5, "learning_rate": 5e-3}}
FULL = {"auxiliary": {"plan": "every(1)"}, "distill": {"steps": 0}}
METHODS: dict[str, dict[str, Any]] = {
    "server only": {"round": {"clients": 0}, "server": SERVER, **FULL},
    "clients only, paper": {**PAPER, "server": {"steps": 0}},
    "FedSP, paper": {**PAPER, "server": {**SERVER, "learning_rate": 5e-3}},
    "clients only, messenger": {},
    "FedSP, messenger": {"server": SERVER},
    "FedPrompt, clients only (ceiling)": FULL,
    "everything in one place": {"partition": {"clients": 0, "server_share": 1.0}, "server": {"steps": 25, "batch_size": 8}, **FULL},
}


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Nested values, later parts over earlier ones."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            result[key] = merged(result[key], value) if isinstance(value, dict) and key in result else value
    return result


def files_of(qa: Path, task: str, output: Path) -> dict[str, str]:
    """Train, validation and at most TEST_QUESTIONS test questions. PIQA has no public test labels: its validation file is the test, and
    validation is held out of train."""
    folder = qa / task
    test = folder / ("test.jsonl.gz" if (folder / "test.jsonl.gz").exists() else "validation.jsonl.gz")
    import gzip

    with gzip.open(test, "rt") as file:
        lines = list(file)
    some = output / f"{task}-test.jsonl"
    output.mkdir(parents=True, exist_ok=True)
    some.write_text("".join(random.Random(0).sample(lines, min(TEST_QUESTIONS, len(lines)))))
    files = {"task": task, "train": str(folder / "train.jsonl.gz"), "test": str(some)}
    return files if test.name.startswith("validation") else {**files, "validation": str(folder / "validation.jsonl.gz")}


def values(arguments: argparse.Namespace, method: str, task: str, seed: int) -> dict[str, Any]:
    """The configuration of one cell. Every method has the same partition: the server's share is one eleventh."""
    base: dict[str, Any] = {
        "seed": seed,
        "model": {"name": str(arguments.model), "device": "cpu"},
        "data": {**files_of(arguments.qa, task, arguments.output), "max_tokens": 160},
        "partition": {"clients": 5, "server_share": 1 / 11},
        "distill": {"steps": 200, "text": [str(arguments.text / name) for name in PUBLIC], **json.loads(arguments.distill)},
        "round": {"rounds": 6},
        "client": {"speak_steps": 5, "batch_size": 8},
    }
    return merged(base, METHODS[method], {"output": str(arguments.output / task / method.replace(" ", "-").replace(",", "") / f"seed-{seed}")})


def run_cell(arguments: argparse.Namespace, method: str, task: str, seed: int) -> None:
    """Run a cell unless it is finished; auxiliary models depend on the preset and the seed alone, and are made once."""
    chosen = values(arguments, method, task, seed)
    folder = Path(chosen["output"])
    if (folder / "result.json").exists():
        return
    if "plan" not in chosen.get("auxiliary", {}):
        package = arguments.output / "auxiliary" / f"{chosen.get('preset', 'messenger')}-{seed}"
        if not package.exists():
            made = commands.distill(make_config(chosen), package)
            (arguments.output / f"auxiliary-{package.name}.json").write_text(json.dumps(made))
        chosen = merged(chosen, {"auxiliary": {"folder": str(package)}})
    started = (folder / "config.toml").exists()
    figures = commands.resume(folder) if started else commands.run(chosen)
    print(task, method, seed, {key: round(value, 4) for key, value in figures["test"].items()}, f"{figures['seconds']:.0f} s", flush=True)


def zero_shot(arguments: argparse.Namespace, task: str) -> None:
    """The figures of no prompt at all."""
    path = arguments.output / task / "zero-shot.json"
    if path.exists():
        return
    config = make_config(merged(values(arguments, "server only", task, 0), {"output": "unused"}))
    server = commands.open_server(config, commands.load_questions(config))
    figures = evaluate_prompt(server.model, None, server.questions.test, server.questions.task, server.tokenizer, server.max_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures))
    print(task, "zero-shot", figures, flush=True)


def table(output: Path, tasks: list[str]) -> str:
    """Markdown: mean and standard deviation over seeds, and the share of the ceiling's gain in loss."""
    lines = []
    for task in tasks:
        zero = json.loads((output / task / "zero-shot.json").read_text())
        cells = {
            method: [json.loads(path.read_text()) for path in sorted((output / task / method.replace(" ", "-").replace(",", "")).glob("seed-*/result.json"))]
            for method in METHODS
        }
        lines += [
            f"\n**{task}** ({int(zero['examples'])} test questions)\n",
            "| method | seeds | accuracy % | normalised % | answer perplexity | loss, nats | share of the ceiling's gain | bytes | minutes | peak GB |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines.append(
            f"| zero-shot | - | {100 * zero['accuracy']:.1f} | {100 * zero['accuracy_norm']:.1f} | {zero['answer_perplexity']:.1f} | {zero['answer_loss']:.3f} | 0 % | 0 | - | - |"
        )
        ceiling = [cell["test"]["answer_loss"] for cell in cells["FedPrompt, clients only (ceiling)"]]
        for method, results in cells.items():
            if not results:
                continue
            spread = lambda key, scale=1.0, results=results: _spread([scale * cell["test"][key] for cell in results])
            gain = zero["answer_loss"] - statistics.fmean(cell["test"]["answer_loss"] for cell in results)
            share = f"{100 * gain / (zero['answer_loss'] - statistics.fmean(ceiling)):.0f} %" if ceiling else "-"
            traffic = statistics.fmean(cell["bytes_up"] + cell["bytes_down"] for cell in results) / 1e6
            minutes = statistics.fmean(cell["seconds_rounds"] for cell in results) / 60
            peak = max(cell["peak_memory_bytes"] for cell in results) / 1e9
            lines.append(
                f"| {method} | {len(results)} | {spread('accuracy', 100)} | {spread('accuracy_norm', 100)} | {spread('answer_perplexity')} | {_spread([cell['test']['answer_loss'] for cell in results], 3)} | {share} | {traffic:.1f} MB | {minutes:.1f} | {peak:.1f} |"
            )
    return "\n".join(lines)


def _spread(numbers: list[float], digits: int = 1) -> str:
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return f"{mean} ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else f"{mean} (one seed)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "qa", "text", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tasks", nargs="+", default=["arc_easy", "sciq", "piqa"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--distill", default="{}", help='keys of [distill] as JSON, such as {"steps": 1000}; give it an OUTPUT of its own')
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print the table of what is finished, and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    if arguments.table:
        print(table(arguments.output, arguments.tasks))
        return
    for seed in arguments.seeds:
        for task in arguments.tasks:
            zero_shot(arguments, task)
            for method in arguments.methods:
                run_cell(arguments, method, task, seed)


if __name__ == "__main__":
    main()
