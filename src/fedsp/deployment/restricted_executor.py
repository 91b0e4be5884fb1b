"""Flower's processes at a client, kept from running code that the server sends.

By default a SuperNode runs any app bundle, of any type, that the server sends, with the rights of
its user. So the node is started with `--isolation process`, where it starts nothing by itself, and
this module's executor beside it starts ClientApps only, with the app of this installation:

    python -P -m fedsp.deployment.restricted_executor superexec ...     Flower's `flower-superexec`
    python -P -m fedsp.deployment.restricted_executor clientapp ...     Flower's `flwr-clientapp`

The parts of Flower that are replaced are checked first; an incompatible release is refused.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedsp.deployment.grid import handle_client_message, limit_memory, make_client_app
from fedsp.deployment.processes import options
from fedsp.errors import DeploymentError

REPLACED = {
    "flwr.supernode.runtime.run_clientapp": (
        "install_from_fab",
        "get_project_dir",
        "get_load_client_app_fn",
        "run_clientapp",
    ),
    "flwr.supercore.superexec.run_superexec": ("get_executor", "AutoExecPlugin", "run_superexec"),
}
"""What of Flower is put out of service, and what runs it."""


def require_pinning() -> None:
    """See that this release of Flower can be kept from running code that the server sends.

    Raises:
        DeploymentError: it is built in another way, so this client would have to trust the server
            with its machine.
    """
    for module, names in REPLACED.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            found = None
        plugin = getattr(found, "AutoExecPlugin", None)
        complete = all(hasattr(found, name) for name in names)
        if not complete or (plugin and not hasattr(plugin, "supported_task_types")):
            raise DeploymentError(
                "this release of Flower cannot be kept from running code that the server sends"
                f" ({module} is not compatible): install flwr 1.42"
            )


def command(kind: str, **values: object) -> list[str]:
    """The command that runs this module as one of the two above, with these options."""
    module = "fedsp.deployment.restricted_executor"
    return [sys.executable, "-P", "-m", module, kind, *options(**values)]


class OnlyOurApp:
    """An executor, in Flower's sense, that starts ClientApps alone, and those by this module."""

    def __init__(self, client_app: Any, accepted: Any, refused: Any) -> None:
        self._client_app, self._accepted, self._refused = client_app, accepted, refused

    def get_eligible_capacity(
        self, supported_task_types: set[Any], **_: Any
    ) -> tuple[set[Any], set[str]]:
        """ClientApps, whatever else is offered."""
        return {self._client_app} & set(supported_task_types), set()

    def launch(self, spec: Any) -> Any:
        """Start our ClientApp for a task of that kind; start nothing for any other."""
        if spec.task_type != self._client_app:
            return self._refused("only fedsp's own ClientApp is run here")
        ours = command(
            "clientapp",
            runtime_api_address=spec.runtime_api_address,
            token=spec.token,
            insecure=spec.insecure,
            root_certificates=None if spec.insecure else spec.root_certificates_path,
            parent_pid=spec.parent_pid,
        )
        subprocess.Popen(ours)
        return self._accepted()

    def reconcile(self) -> None:
        """Nothing to maintain."""

    def close(self) -> None:
        """Nothing to release."""


def pin_executor() -> None:
    """Put OnlyOurApp in the place of every executor that Flower's `flower-superexec` could choose.

    Raises:
        DeploymentError: this release of Flower is built in another way.
    """
    require_pinning()
    module: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")
    kinds = importlib.import_module("flwr.supercore.constant").TaskType
    results = importlib.import_module("flwr.supercore.superexec.executor").LaunchResult
    module.get_executor = lambda *_, **__: OnlyOurApp(
        kinds.CLIENT_APP, results.accepted, results.failed
    )
    module.AutoExecPlugin.supported_task_types = frozenset({kinds.CLIENT_APP})


def pin_client_app() -> None:
    """Put this installation's app in the place of the bundle that Flower's `flwr-clientapp` would
    install and load.

    Raises:
        DeploymentError: this release of Flower is built in another way.
    """
    require_pinning()
    module: Any = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    module.install_from_fab = lambda *_, **__: None
    module.get_project_dir = lambda *_, **__: Path()
    module.get_load_client_app_fn = lambda **_: lambda *__: make_client_app(handle_client_message)


def main(kind: str) -> None:
    """Run one of Flower's two commands, pinned."""
    if kind == "superexec":
        pin_executor()
        importlib.import_module("flwr.supercore.cli").flower_superexec()
    else:
        limit_memory()
        pin_client_app()
        importlib.import_module("flwr.supernode.cli").flwr_clientapp()


if __name__ == "__main__":
    main(sys.argv.pop(1))
