"""What the demo's auxiliary model can answer by itself, with the prompts that the demo tuned: the
table of docs/results/core.md.

fedsp demo --seed 0 --output DEMO
python benchmarks/demo_auxiliary.py DEMO
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fedsp.cli import quiet_libraries
from fedsp.experiments.demo import DEMO_ROWS
from fedsp.experiments.server_setup import score_test
from fedsp.experiments.start import open_run
from fedsp.models.auxiliary import load_auxiliary
from fedsp.models.soft_prompt import SoftPrompt


def main(folder: Path) -> None:
    """Accuracy of each row's best prompt on the test questions, through the global model and
    through the auxiliary one."""
    quiet_libraries()
    torch.set_num_threads(1)
    auxiliary = load_auxiliary(
        folder / "auxiliary", device=torch.device("cpu"), positions="hugging_face"
    )
    print("| prompt of | global model | auxiliary model |\n|---|---|---|")
    for method in DEMO_ROWS:
        run = open_run(folder / method)
        assert isinstance(run.messenger, SoftPrompt)
        server, dataset = run.server, run.server.dataset
        scores = []
        for model in (run.model, auxiliary):
            with torch.no_grad():
                prefix = run.messenger.prefix(model)
            figures, _ = score_test(
                model, prefix, dataset.test, dataset.task, server.tokenizer, server.max_tokens
            )
            scores.append(f"{figures['accuracy']:.1%}")
        print(f"| {method} | {' | '.join(scores)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
