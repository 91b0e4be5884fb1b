"""Everything fedsp refuses. Each message is a sentence: what is wrong, where, what was expected,
what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


class FedspError(Exception):
    """Base of all errors that a user can mend; the command line prints the message and exits with
    code 2."""


class ConfigurationError(FedspError):
    """A configuration that cannot be run."""


class DataError(FedspError):
    """A file, row or partition that cannot be used."""


class ModelError(FedspError):
    """A language model that cannot carry a soft prompt."""


class PromptError(FedspError):
    """A soft prompt of another shape, or a file that holds none."""


class AuxiliaryError(FedspError):
    """An auxiliary model that is damaged, altered, or not of the kind that is needed."""


class CredentialError(FedspError):
    """A key, certificate or signature that does not hold."""


class PolicyError(FedspError):
    """A request that a client's own policy refuses."""


class PrivacyError(FedspError):
    """A promise of differential privacy that cannot be kept, or a budget that is spent."""


class DeploymentError(FedspError):
    """A process of a deployment that cannot be started or has ended."""


class PayloadError(FedspError):
    """Bytes or tensors that may not travel."""


class RunError(FedspError):
    """A run directory that cannot be used."""


class StorageError(FedspError):
    """The disk did not take what was written."""


class TrainingDiverged(FedspError):
    """A loss that is not a number."""


class TooFewClients(FedspError):
    """A round that ended with too few accepted updates; the run can be resumed."""


def first_line(error: Exception) -> str:
    """The first line of what another library says, with the next where that only announces it, or
    its kind where it says nothing; of the system's errors the words without their number."""
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno "):
        return error.strerror + (f": {error.filename}" if error.filename else "")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'close'?` when something known is close to `word`, else an empty string."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def keeps_no_layer(kind: str, *, distilled: bool) -> ConfigurationError:
    """What is said where a messenger of a kind lives in layers that a plan keeps verbatim, and the
    plan keeps none; it may live in `distilled` ones too."""
    other = ", or set messenger.layers to 'all'" if distilled else ""
    return ConfigurationError(
        f"messenger.kind: {kind!r} lives in layers that both sides hold, and auxiliary.plan keeps"
        f" none verbatim; take tail(2, 2), ends(1) or emulator(1, 2){other}"
    )


def leaves_no_room(length: int, room: int, positions: int) -> PromptError:
    """What is said where a prompt of this length leaves too few of a model's positions for text."""
    return PromptError(
        f"prompt.length = {length} leaves {max(room, 0)} of the model's {positions} positions for"
        " text: use a shorter prompt"
    )


def require_installed(
    extra: str, what: str, *libraries: str, error: type[FedspError] = ConfigurationError
) -> None:
    """Raise `error` where a library of an extra is missing; `what` says what needs it."""
    missing = next((name for name in libraries if find_spec(name) is None), None)
    if missing:
        name = "scikit-learn" if missing == "sklearn" else missing.replace("_", "-")
        raise error(f"{name} is not installed: {what} `pip install 'fedsp[{extra}]'`")


def require_flower() -> None:
    """Raise ConfigurationError where a library of simulations and deployments is missing."""
    require_installed("flower", "simulations and deployments need", "flwr", "cryptography")
