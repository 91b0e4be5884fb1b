"""A finished run, with everything that a report shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fedsp.audit.findings import read_found
from fedsp.config import RunConfig
from fedsp.experiments.run_directory import CONFIG, RunDirectory, read_json
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
    depths: list[dict[str, Any]]
    disclosure: dict[str, float]
    inputs: dict[str, str]

    @property
    def cell(self) -> tuple[str, ...]:
        """Where it stands in its study, but for the seed."""
        return (self.study, self.method, self.task, self.model, self.partition, self.choice)

    @property
    def name(self) -> str:
        """The same and the seed, for people."""
        parts = (self.method, self.choice, self.task, self.partition)
        return ", ".join([*filter(None, parts), f"seed {self.seed}"])

    @property
    def entry(self) -> MethodEntry:
        """The run's method."""
        return find_method(self.config.method)

    @property
    def clients_hold(self) -> str:
        return self.entry.clients_hold if self.config.asks_clients else "nothing"

    @property
    def text_is(self) -> str:
        """What becomes of the text: the privacy of data that the method gives by construction."""
        if not self.entry.rounds or self.config.round.clients == 0:
            return "clients' text unused"
        if self.config.partition.clients == 0:
            return "gathered at the server"
        alone = self.config.partition.clients == 1
        return "gathered at one owner" if alone else "stays with its owners"

    @property
    def role(self) -> Literal["federated", "client alone", "server alone", "other"]:
        """Who trains: all clients; one of them; the server on its own examples while clients exist;
        or nobody, or one party with all text."""
        config = self.config
        if config.asks_clients and self.entry.federated and config.partition.clients != 1:
            return "client alone" if config.round.only else "federated"
        trains = self.entry.rounds and config.server.steps > 0
        return "server alone" if config.partition.clients > 0 and trains else "other"

    def cost(self, side: str, name: str) -> float:
        """A figure that was measured of the "server" or a "client"; 0 where it was not. The
        parameters of a model are those that depths or ends share once."""
        return float(self.figures["cost"].get(side, {}).get(name, 0))

    @property
    def package(self) -> float:
        """Bytes of what a client is handed before the first round, float32; where the whole model
        is broadcast, nothing is handed out before."""
        held = self.cost("client", "model_parameters")
        broadcast = self.cost("client", "parameters_sent") >= held
        return float(self.figures["package_bytes"]) or (0.0 if broadcast else 4 * held)

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
        made = RunDirectory(self.folder, self.config).package.with_suffix(".json")
        return float(read_json(made, "seconds")["seconds"]) if made.exists() else 0.0

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
        return self.cost("client", "operations") * float(self.figures["updates"])

    @property
    def client_steps(self) -> int:
        """Steps of all clients in all rounds."""
        client = self.config.client
        return int(self.figures["updates"] * (client.auxiliary_steps + client.prompt_steps))

    @property
    def cosines(self) -> list[float]:
        """The mean cosine between two clients' changes, round by round."""
        found = (record.get("update_cosine") for record in self.records)
        return [cosine for cosine in found if cosine is not None]

    def of_clients(self, figure: str, scale: float = 1.0) -> list[float]:
        """A figure of each client; none where nothing divides the test questions."""
        return [scale * client[figure] for client in self.figures.get("clients", {}).values()]

    @cached_property
    def _scores(self) -> dict[str, tuple[float, int, float]]:
        """Negative log-likelihood and tokens of the right answer, and whether it was found."""
        return {
            row["question"]: (
                -row["log_likelihoods"][row["gold"][0]],
                row["tokens"][row["gold"][0]],
                float(row["right"]),
            )
            for row in RunDirectory(self.folder, self.config).scores()
        }

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
    """The run in a folder; None if there is none, it is not finished, or had no test questions.

    Raises:
        ConfigurationError: no package brings its method any more.
        RunError, StorageError: it cannot be read.
    """
    if not (folder / CONFIG).exists():
        return None
    directory = RunDirectory.open(folder, to_show=True)
    if not directory.finished or "test" not in directory.result():
        return None
    find_method(directory.config.method)
    file = folder / "depths.json"
    depths = read_json(file, "rows")["rows"] if file.exists() else []
    return Run(
        key=key,
        disclosure=read_found(folder, "disclosure") or {},
        depths=depths,
        folder=folder,
        config=directory.config,
        figures=directory.result(),
        records=directory.records(),
        about=directory.about(),
        inputs=directory.inputs(),
        **{"seed": directory.config.seed, **where},
    )
