"""What a check says is missing."""

from __future__ import annotations

from collections.abc import Sequence


class Nonconforming(AssertionError):
    """Something does not do what fedsp relies on; `faults` are sentences."""

    def __init__(self, what: str, faults: Sequence[str]) -> None:
        super().__init__(f"{what}:\n" + "\n".join(f"- {fault}" for fault in faults))
        self.faults = list(faults)


def require_kind(given: object, kind: type) -> None:
    """Raises Nonconforming where what is to be checked is something else."""
    if not isinstance(given, kind):
        require("what is to be checked", [f"expected a fedsp.{kind.__name__}, not {given!r}"])


def require(what: str, faults: Sequence[str]) -> None:
    """Raises Nonconforming where there are faults."""
    if faults:
        raise Nonconforming(what, faults)
