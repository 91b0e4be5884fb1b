"""A finished run, with everything that a report shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fedsp.audit.findings import read_found
from fedsp.config import RunConfig
from fedsp.experiments.run_directory import RunDirectory, read_json
from fedsp.federation.methods.registry import MethodEntry, find_method


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run and where it stands in its study."""

    key: str
    study: str
    method: str
    task: str
    model: str
    partition: str
    choice: str
    seed: int
    folder: Path
    config: RunConfig
    figures: dict[str, Any]
    records: list[dict[str, Any]]
    about: dict[str, Any]
    depths: list[dict[str, Any]] = field(default_factory=list)
    disclosure: dict[str, float] = field(default_factory=dict)

    @property
    def cell(self) -> tuple[str, ...]:
        """Where it stands in its study, but for the seed."""
        return (self.study, self.method, self.task, self.model, self.partition, self.choice)

    @property
    def name(self) -> str:
        """The same and the seed, for people."""
        return ", ".join(
            part
            for part in (self.method, self.choice, self.task, self.partition, f"seed {self.seed}")
            if part
        )

    @property
    def entry(self) -> MethodEntry:
        """The run's method."""
        return find_method(self.config.method)

    @property
    def clients_hold(self) -> str:
        asks = self.config.partition.clients and self.config.round.clients != 0
        return self.entry.clients_hold if asks else "nothing"

    @property
    def text_is(self) -> str:
        """What becomes of the text: the privacy of data that the method gives by construction."""
        if not self.entry.rounds or self.config.round.clients == 0:
            return "clients' text unused"
        if self.config.partition.clients == 0:
            return "gathered at the server"
        return (
            "gathered at one owner"
            if self.config.partition.clients == 1
            else "stays with its owners"
        )

    @property
    def model_parameters(self) -> float:
        """Parameters of the model at a client, those that depths or ends share once; 0 where there
        is no client."""
        return self._model("client")

    @property
    def global_parameters(self) -> float:
        """The same of the global model."""
        return self._model("server")

    def _model(self, side: str) -> float:
        return float(self.figures["cost"].get(side, {}).get("model_parameters", 0))

    @property
    def package(self) -> float:
        """Bytes of what a client is handed before the first round, float32; where the whole model
        is broadcast, nothing is handed out before."""
        broadcast = (
            self.figures["cost"].get("client", {}).get("parameters_sent", 0)
            >= self.model_parameters
        )
        return float(self.figures["package_bytes"]) or (
            0.0 if broadcast else 4 * self.model_parameters
        )

    @property
    def bytes(self) -> float:
        """Bytes of all messages, both ways, as serialised, and of the package for each client that
        was asked."""
        clients = len({client for record in self.records for client in record["asked"]})
        return float(self.figures["bytes_up"] + self.figures["bytes_down"] + self.package * clients)

    @property
    def distillation_seconds(self) -> float:
        """Seconds of distilling the auxiliary model, in full for every run that uses it; runs of a
        study that share one model share this time."""
        if not self.config.auxiliary.folder:
            return float(self.figures["seconds_distillation"])
        made = Path(self.config.auxiliary.folder).with_suffix(".json")
        here = self.folder.parent / "packages" / made.name  # where the study has been moved
        path = next((path for path in (here, made) if path.exists()), None)
        return float(read_json(path, "seconds")["seconds"]) if path else 0.0

    @property
    def score(self) -> float:
        """The share of test questions that are right: accuracy, or exact match where the task has
        that."""
        test = self.figures["test"]
        return float(test["accuracy"] if "accuracy" in test else test["exact_match"])

    @property
    def loss(self) -> float:
        """Answer loss on the test questions, nats per token."""
        return float(self.figures["test"]["answer_loss"])

    @property
    def client_operations(self) -> float:
        """Floating-point operations of all clients in all rounds: those measured in one round of
        the first client, times the updates."""
        return float(
            self.figures["cost"].get("client", {}).get("operations", 0.0) * self.figures["updates"]
        )

    @property
    def client_steps(self) -> int:
        """Steps of all clients in all rounds."""
        return int(
            self.figures["updates"]
            * (self.config.client.auxiliary_steps + self.config.client.prompt_steps)
        )

    @property
    def cosines(self) -> list[float]:
        """The mean cosine between two clients' changes, round by round."""
        return [
            record["update_cosine"]
            for record in self.records
            if record.get("update_cosine") is not None
        ]

    def of_clients(self, figure: str, scale: float = 1.0) -> list[float]:
        """A figure of each client."""
        return [scale * client[figure] for client in self.figures["clients"].values()]

    @cached_property
    def _scores(self) -> dict[str, tuple[float, int, float]]:
        rows = RunDirectory(self.folder, self.config).scores()
        scores = {}
        for row in rows:
            choice = max(
                range(len(row["log_likelihoods"])), key=lambda index: row["log_likelihoods"][index]
            )
            right = row["right"] if "right" in row else choice in row["gold"]
            scores[row.get("question", row["id"])] = (
                -row["log_likelihoods"][row["gold"][0]],
                row["tokens"][row["gold"][0]],
                float(right),
            )
        return scores

    def losses(self, questions: Sequence[str]) -> list[float]:
        """A number per question whose mean is the answer loss, nats per token."""
        tokens = sum(self._scores[question][1] for question in questions) / len(questions)
        return [self._scores[question][0] / tokens for question in questions]

    def right(self, questions: Sequence[str]) -> list[float]:
        """1 for each question that counts as right, else 0."""
        return [self._scores[question][2] for question in questions]

    @property
    def questions(self) -> list[str]:
        return sorted(self._scores)


def open_finished(folder: Path, key: str, **where: Any) -> Run | None:
    """The run in a folder; None if it is not finished, or had no test questions."""
    directory = RunDirectory.open(folder)
    if not directory.finished or "test" not in directory.result():
        return None
    about = {"seed": directory.config.seed} | where
    file = folder / "depths.json"
    depths = read_json(file, "rows")["rows"] if file.exists() else []
    disclosure = read_found(folder, "disclosure") or {}
    return Run(
        key=key,
        disclosure=disclosure,
        depths=depths,
        folder=folder,
        config=directory.config,
        figures=directory.result(),
        records=directory.records(),
        about=directory.about(),
        **about,
    )
