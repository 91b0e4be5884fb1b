"""What malicious clients do to the global model, by attack and defence: the tables of
docs/results/robustness.md.

    python benchmarks/robustness.py REFERENCE OUTPUT [--part 0/2]      # resumable; REFERENCE holds
                                  models/ and data/
    python benchmarks/robustness.py REFERENCE OUTPUT --tables

Ten clients on ARC-Easy, clients only, three rounds of three steps of eight examples. A cell is one
(seed, partition, defence, attack, share of liars), through the same code as `fedsp run`; what an
honest client answers to a broadcast is computed once for all cells.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from spread import mean_and_deviation

from fedsp.cli import quiet_libraries
from fedsp.config import RunConfig
from fedsp.config_file import make_config
from fedsp.data.dataset import FederatedDataset, load_dataset
from fedsp.data.encoding import encode_targets
from fedsp.errors import TooFewClients
from fedsp.experiments.build import Federation, build_federation
from fedsp.experiments.run import round_config
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import Server, open_server, score_test
from fedsp.federation.attacks import Attack, triggered
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.loop import federate
from fedsp.federation.messages import Failure, Request, Transport, Update
from fedsp.federation.party import Party
from fedsp.federation.transport.local import local
from fedsp.models.payload import Payload
from fedsp.training.stage import validation_loss

SEEDS = (0, 1, 2)
SHARES = (0.1, 0.2, 0.3, 0.4)
ATTACKS = (
    "sign_flip",
    "gaussian",
    "little_is_enough",
    "inner_product",
    "mimic",
    "scaling",
    "free_rider",
    "label_flip",
    "backdoor",
)
PARTITIONS: dict[str, dict[str, Any]] = {
    "even": {"kind": "even"},
    "Dirichlet 0.1": {"kind": "dirichlet", "topics": 10, "alpha": 0.1},
}
DEFENCES: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean, cut to 2 x median": {"norm_bound": 2.0},
    "trimmed mean": {"rule": "trimmed_mean"},
    "geometric median": {"rule": "geometric_median"},
    "multi-Krum": {"rule": "multi_krum"},
    "centred clipping": {"rule": "centred_clipping"},
    "mixing + trimmed mean": {"rule": "trimmed_mean", "mixing": True},
    "robust profile": {
        "rule": "trimmed_mean",
        "mixing": True,
        "norm_bound": 2.0,
        "max_loss_rise": 0.05,
    },
}
TEST, VALIDATION = 200, 60


def settings(reference: Path, folder: str, seed: int, partition: str) -> dict[str, Any]:
    data = reference / "data" / "qa" / "arc_easy"
    books = ("openstax-physics", "openstax-chemistry-bundle", "openstax-microbiology")
    return {
        "preset": "prompt",
        "seed": seed,
        "output": folder,
        "model": {"name": str(reference / "models" / "tiny-science"), "device": "cpu"},
        "data": {
            "task": "arc_easy",
            "max_tokens": 128,
            "test_examples": TEST,
            **{split: str(data / f"{split}.jsonl.gz") for split in ("train", "validation", "test")},
        },
        "partition": {"clients": 10, "server_share": 0.0, **PARTITIONS[partition]},
        "distill": {
            "steps": 120,
            "sequence_length": 64,
            "text": [str(reference / "data" / "text" / f"{book}.txt.gz") for book in books],
        },
        "round": {"rounds": 3, "weighting": "uniform", "max_change": 1e6},
        "client": {"prompt_steps": 3, "batch_size": 8},
        "validation": {"examples": VALIDATION},
    }


class World:
    """One seed and partition: everything that cells share."""

    def __init__(self, reference: Path, output: Path, seed: int, partition: str) -> None:
        self.values = settings(
            reference, str(output / f"world-{seed}-{partition.replace(' ', '-')}"), seed, partition
        )
        self.values["auxiliary"] = (
            {"folder": str(output / f"package-{seed}")}
            if (output / f"package-{seed}").exists()
            else {}
        )
        config = make_config(self.values)
        self.dataset: FederatedDataset = load_dataset(config)
        self.server: Server = open_server(config, self.dataset)
        with tempfile.TemporaryDirectory() as temporary:
            run = RunDirectory.create(config.model_copy(update={"output": temporary}))
            self.federation: Federation = build_federation(self.server, run, Callbacks(), None)
            if not config.auxiliary.folder:
                shutil.copytree(Path(temporary) / "auxiliary", output / f"package-{seed}")
                self.values["auxiliary"] = {"folder": str(output / f"package-{seed}")}
        held, asked = self.dataset.validation[:VALIDATION], self.dataset.test
        self.validation, self.test = (
            encode_targets(self.server.tokenizer, some, self.server.max_tokens)
            for some in (held, asked)
        )
        self.answers: dict[tuple[str, ...], Update] = {}

    def cell(self, defence: str, attack: str, share: float) -> dict[str, float]:
        """Answer loss (nats per token) and accuracy on the test questions through the global model;
        attack success for a backdoor.

        Raises:
            TooFewClients: the defence is not defined for so many liars.
        """
        aggregation = {**DEFENCES[defence], "malicious": share}
        validation = {
            "examples": VALIDATION,
            "by": "server" if "max_loss_rise" in aggregation else "none",
        }
        config: RunConfig = make_config(
            {
                **self.values,
                "validation": validation,
                "aggregation": aggregation,
                "attack": {"kind": attack, "share": share},
            }
        )
        with tempfile.TemporaryDirectory() as temporary:
            run = RunDirectory.create(config.model_copy(update={"output": temporary}))
            federation = build_federation(
                replace(self.server, config=config), run, Callbacks(), None
            )
            made = federation.attack
            transport = self._remembered(local(federation.clients), made)
            transport = made.transport(transport) if made else transport
            party = Party(
                id="server",
                model=federation.model,
                messenger=federation.messenger,
                examples=[],
                store=run.state_store("server"),
            )

            def validate(payload: Payload) -> float:
                party.messenger.load(payload)
                loss = validation_loss(party.model, party.messenger, self.validation)
                assert loss is not None
                return loss

            final = federate(
                federation.clients.method,
                party,
                federation.clients.register,
                transport,
                round_config(config, run, 10),
                state=None,
                validate=validate,
                save=lambda *_: None,
            )
        # the last prompt: choosing the best by validation would hide what an attack does
        party.messenger.load(final.payload)
        with torch.no_grad():
            prefix = party.messenger.prefix(party.model)
        loss = validation_loss(party.model, party.messenger, self.test)
        assert loss is not None
        figures, _ = score_test(
            party.model,
            prefix,
            self.dataset.test[:100],
            self.server.tokenizer,
            self.server.max_tokens,
        )
        found = {"loss": loss, "accuracy": figures["accuracy"]}
        if attack in ("backdoor", "none"):
            waited = [triggered(example) for example in self.dataset.test[:100]]
            found["success"] = score_test(
                party.model,
                prefix,
                waited,
                self.server.tokenizer,
                self.server.max_tokens,
            )[0]["accuracy"]
        return found

    def _remembered(self, honest: Transport, attack: Attack | None) -> Transport:
        """Honest work is done once for each broadcast and client; that of a client which lies about
        its data apart."""

        def transport(requests: list[Request]) -> Iterable[Update | Failure]:
            for request in requests:
                tampered = (
                    attack.kind
                    if attack
                    and request.client in attack.malicious
                    and attack.kind in ("label_flip", "backdoor")
                    else ""
                )
                digest = hashlib.sha256(
                    b"".join(
                        request.payload[name].numpy().tobytes() for name in sorted(request.payload)
                    )
                ).hexdigest()
                key = (request.client, str(request.round), digest, tampered)
                if key not in self.answers:
                    (reply,) = honest([request])
                    assert isinstance(reply, Update)
                    self.answers[key] = reply
                yield self.answers[key]

        return transport


def cells() -> Iterator[tuple[int, str, str, str, float]]:
    """All cells, in the order in which they are measured: two and four liars of ten for every seed,
    then one and three."""
    for shares, seed, partition, defence in itertools.product(
        ((0.2, 0.4), (0.1, 0.3)), SEEDS, PARTITIONS, DEFENCES
    ):
        if shares[0] == 0.2:
            yield seed, partition, defence, "none", 0.0
        for share, attack in itertools.product(shares, ATTACKS):
            yield seed, partition, defence, attack, share


def measure(reference: Path, output: Path, part: int, parts: int) -> None:
    """Every cell of this part that is not done yet, a line each."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"cells-{part}.jsonl"
    done = {
        tuple(json.loads(line)["cell"])
        for some in output.glob("cells-*.jsonl")
        for line in some.read_text().splitlines()
    }
    worlds = list(itertools.product(SEEDS, PARTITIONS))
    world, open_world = None, None
    for cell in cells():
        if worlds.index(cell[:2]) % parts != part or cell in done:
            continue
        if cell[:2] != open_world:
            world, open_world = World(reference, output, *cell[:2]), cell[:2]
        assert world is not None
        try:
            found: dict[str, float] | None = world.cell(*cell[2:])
        except TooFewClients:
            found = None
        with open(path, "a") as file:
            file.write(json.dumps({"cell": cell, "found": found}) + "\n")
        print(cell, found, flush=True)


def tables(output: Path) -> str:
    """Answer loss, and accuracy in brackets, by defence and attack, worst case last, a table for
    each partition and share of liars; over the seeds that are whole there; n/a where a rule is not
    defined."""
    rows = {
        tuple(row["cell"]): row["found"]
        for path in sorted(output.glob("cells-*.jsonl"))
        for row in map(json.loads, path.read_text().splitlines())
    }
    parts = []
    for partition, share in itertools.product(PARTITIONS, SHARES):
        of_table = [
            cell[2:]
            for cell in cells()
            if cell[:2] == (SEEDS[0], partition) and cell[4] in (0.0, share)
        ]
        whole = [
            seed for seed in SEEDS if all((seed, partition, *cell) in rows for cell in of_table)
        ]
        if not whole:
            continue
        found = {cell: [rows[(seed, partition, *cell)] for seed in whole] for cell in of_table}
        parts.append(
            f"### {partition}, {share:.0%} of the clients lie, seeds"
            f" {', '.join(map(str, whole))}\n\n| defence | nobody lies | "
            + " | ".join(ATTACKS)
            + " | backdoor succeeds (nobody lies) | worst |\n"
            + "|---" * (len(ATTACKS) + 4)
            + "|"
        )
        for defence in DEFENCES:
            entries = [
                found[defence, "none", 0.0],
                *(found[defence, attack, share] for attack in ATTACKS),
            ]
            means = [_mean(entry, "loss") for entry in entries]
            told = [_said(entry) for entry in entries]
            known = [mean for mean, _ in means[1:] if mean is not None]
            worst = f"{max(known):.3f}" if len(known) == len(ATTACKS) else "n/a"
            success, spread = _mean(entries[-1], "success")
            before, _ = _mean(entries[0], "success")
            said = (
                "n/a"
                if success is None or before is None
                else f"{success:.0%} ± {spread:.0%} ({before:.0%})"
            )
            parts.append(f"| {defence} | {' | '.join(told)} | {said} | {worst} |")
        parts.append("")
    return "\n".join(parts)


def _said(entry: list[dict[str, float] | None]) -> str:
    loss, spread = _mean(entry, "loss")
    accuracy, _ = _mean(entry, "accuracy")
    return (
        "n/a"
        if loss is None
        else f"{loss:.3f}{f' ± {spread:.3f}' if len(entry) > 1 else ''} ({accuracy:.0%})"
    )


def _mean(entry: list[dict[str, float] | None], figure: str) -> tuple[float | None, float]:
    numbers = [one[figure] for one in entry if one is not None]
    if not numbers or len(numbers) < len(entry):
        return None, 0.0
    mean, deviation = mean_and_deviation(numbers)
    return mean, deviation


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--part", default="0/1", help="which of how many processes share the work: 0/2 and 1/2"
    )
    parser.add_argument(
        "--tables", action="store_true", help="print the tables of what is measured"
    )
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    if arguments.tables:
        print(tables(arguments.output))
    else:
        measure(arguments.reference, arguments.output, *map(int, arguments.part.split("/")))
