"""A whole federation on the small model that comes with fedsp: three clients, ten rounds.

The server distils an auxiliary model, the clients tune low-rank adapters in the layers that both
sides hold on their own questions, the server averages and tunes them in the global model. Run it:
`python examples/federation.py`
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import fedsp
from fedsp.experiments.embedded import EMBEDDED


def main(folder: Path) -> dict[str, float]:
    """Run the federation in a folder, and return the accuracy without and with what was tuned."""
    for split, count in (("train", 200), ("validation", 50), ("test", 100)):
        rows = (EMBEDDED / f"{split}.jsonl").read_text().splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    result = fedsp.run(
        {
            "output": str(folder / "run"),
            "model": {"name": "embedded", "device": "cpu"},
            "data": {
                "task": "continuation",
                **{
                    split: str(folder / f"{split}.jsonl")
                    for split in ("train", "validation", "test")
                },
            },
            "partition": {"clients": 3, "server_share": 0.2},
            "distill": {"steps": 20, "sequence_length": 64, "text": [str(EMBEDDED / "public.txt")]},
            "round": {"rounds": 10},
            "client": {"learning_rate": 2e-3},
            "server": {"steps": 10, "learning_rate": 2e-3},
        }
    )
    rows = fedsp.evaluate(result["folder"])
    fedsp.export(result["folder"], folder / "adapter")  # a PEFT LoRA adapter
    return {row["prompt"]: row["accuracy"] for row in rows}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(main(Path(temporary)), indent=2))
