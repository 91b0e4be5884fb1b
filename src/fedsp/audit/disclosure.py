"""What clients hold of the global model: bit for bit, and nearly. Distillation changes every number
a little, so the first alone is not enough."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from fedsp.audit.findings import DISCLOSURE, NEAR
from fedsp.experiments.run_directory import RunDirectory
from fedsp.experiments.server_setup import model_name
from fedsp.federation.methods.registry import find_method
from fedsp.models.auxiliary import disclosed_share, load_auxiliary, nearly_disclosed_share
from fedsp.models.loading import choose_device, load_model
from fedsp.models.prompted_lm import PromptedLM
from fedsp.storage import write_json


def measure_disclosure(folder: Path) -> dict[str, float]:
    """The shares of the global model's parameters that the clients of a finished run hold:
    `disclosed_share` bit for bit, and `nearly_disclosed_share` in tensors whose relative distance
    from the global one is at most NEAR. Also written to the run's `disclosure.json`.

    Raises:
        RunError: there is no finished run, or its auxiliary model is not the one that it was begun
            with.
    """
    run = RunDirectory.open(folder)
    config, share = run.config, float(run.result()["disclosed_share"])
    # where clients hold nothing, the whole model, or its own layers
    figures = {"disclosed_share": share, "nearly_disclosed_share": share}
    if (
        find_method(config.method).package
        and config.partition.clients
        and config.round.clients != 0
    ):
        digest, found = _of_package(run.package.resolve(), model_name(config), config.model.device)
        # a run in fewer bits was begun with the rounded numbers
        if config.auxiliary.precision == "float32":
            run.hold({"auxiliary model": digest})
        figures = dict(found)
    write_json(run.path / DISCLOSURE, figures)
    return figures


@lru_cache(maxsize=256)
def _of_package(package: Path, name: str, device: str) -> tuple[str, tuple[tuple[str, float], ...]]:
    model = _model(name, device)
    auxiliary = load_auxiliary(package, device=choose_device(device), positions="hugging_face")
    return auxiliary.digest(), (
        ("disclosed_share", disclosed_share(auxiliary, model)),
        ("nearly_disclosed_share", nearly_disclosed_share(auxiliary, model, NEAR)),
    )


@lru_cache(maxsize=1)
def _model(name: str, device: str) -> PromptedLM:
    return load_model(name, device=device, precision="float32")
