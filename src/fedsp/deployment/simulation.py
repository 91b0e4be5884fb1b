"""A run as a Flower simulation: the server in one process, clients in Ray's workers, one core each.
The clients' processes never load the global model."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsp.config_file import read_config
from fedsp.data.dataset import load_dataset
from fedsp.deployment.grid import GridLink, make_client_app
from fedsp.errors import DeploymentError
from fedsp.experiments.build import open_clients
from fedsp.experiments.run import run_experiment
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import with_layers_chosen
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.clients import Clients
from fedsp.federation.messages import Transport
from fedsp.federation.transport.message import Message
from fedsp.federation.transport.remote import Timeouts, remote
from fedsp.federation.transport.request_handler import answer
from fedsp.models.auxiliary import load_auxiliary
from fedsp.models.loading import choose_device, reduce_precision

A_YEAR = 365.0 * 24 * 3600
PATIENT = Timeouts(reply=A_YEAR, retry=A_YEAR, poll=0.02)
"""A simulated client that waits for its turn on a core is neither lost nor late: one that was asked
again would train again."""


def simulate(run: RunDirectory, callbacks: Callbacks) -> dict[str, Any]:
    """The whole of a run, or what is left of it; returns the figures of `result.json`.

    Raises:
        FedspError: whatever cannot be done.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's 15 starves the clients on a machine that does anything else
    os.environ.setdefault("RAY_worker_niceness", "0")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    from flwr.simulation import run_simulation

    clients = len(load_dataset(run.config, run.partition()).partition.clients)
    figures: dict[str, Any] = {}
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        torch.set_num_threads(run.threads)
        figures.update(run_experiment(run, partial(over_grid, grid, run), callbacks))

    folder = str(run.path.resolve())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of run_simulation, which Flower has marked as going away
        run_simulation(
            app,
            make_client_app(lambda message, _: simulated(folder, message)),
            max(1, clients),
            backend_config={
                "client_resources": {"num_cpus": 1},
                "init_args": {"logging_level": "error", "log_to_driver": False},
            },
        )
    if not figures:
        raise DeploymentError(
            f"the simulation ended before the run did; what was done is in {run.path} and can be"
            " resumed"
        )
    return figures


def over_grid(grid: Grid, run: RunDirectory, clients: Clients) -> Transport:
    """A transport to simulated clients: Flower's nodes, sorted, stand for the clients, sorted.

    Raises:
        DeploymentError: there are fewer nodes than clients.
    """
    nodes = sorted(grid.get_node_ids())
    if len(nodes) < len(clients.register):
        raise DeploymentError(
            f"the simulation has {len(nodes)} nodes for {len(clients.register)} clients: give"
            f" Flower {len(clients.register)} of them"
        )
    node_of = dict(zip(sorted(clients.register), nodes, strict=False))
    transport = remote(GridLink(grid), node_of, PATIENT, run.log_traffic, lambda text: None)
    return lambda requests: transport(
        [replace(request, change=b"") for request in requests]
    )  # a worker keeps no broadcast: the next client may be another's


def simulated(folder: str, message: Message) -> Message:
    """The answer of a simulated client. A worker process opens the clients' side of a run once."""
    clients = _opened(folder)
    return answer(message, clients.method, clients.party)


def server_main(grid: Grid, context: Context) -> None:
    """The ServerApp of a simulation that was started by `flwr run`; a run that is there already
    goes on."""
    settings = read_config(Path(str(context.run_config["config"])))
    started = (Path(settings.output) / "config.toml").exists()
    run = (
        RunDirectory.open(Path(settings.output))
        if started
        else RunDirectory.create(with_layers_chosen(settings))
    )
    torch.set_num_threads(run.threads)
    run_experiment(
        run, partial(over_grid, grid, run), Callbacks(info=logging.getLogger("flwr").info)
    )


def handle_client_message(message: Message, context: Context) -> Message:
    """The ClientApp of a simulation that was started by `flwr run`."""
    settings = read_config(Path(str(context.run_config["config"])))
    return simulated(str(Path(settings.output).resolve()), message)


@lru_cache(maxsize=1)
def _opened(folder: str) -> Clients:
    run = RunDirectory.open(Path(folder))
    torch.set_num_threads(run.threads)
    config = run.config
    auxiliary = load_auxiliary(
        Path(config.auxiliary.folder or run.auxiliary),
        device=choose_device(config.model.device),
        positions=config.model.positions,
    )
    reduce_precision(auxiliary, config.auxiliary.precision, "auxiliary.precision")
    return open_clients(config, auxiliary, load_dataset(config, run.partition()), run)
