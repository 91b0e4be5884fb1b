"""Tasks, methods, aggregation rules and messengers that other installed packages bring, by entry
points (https://packaging.python.org/en/latest/specifications/entry-points/). A package is imported
when its name is asked for, and not before.

In the package's pyproject.toml, with the name by which it is asked for:

    [project.entry-points."fedsp.tasks"]
    true_or_false = "my_package.tasks:TRUE_OR_FALSE"
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar

from fedsp.errors import ConfigurationError, did_you_mean, first_line

TASKS, METHODS = "fedsp.tasks", "fedsp.methods"
AGGREGATORS, MESSENGERS = "fedsp.aggregators", "fedsp.messengers"
KEYS = {
    TASKS: "data.task",
    METHODS: "method",
    AGGREGATORS: "aggregation.rule",
    MESSENGERS: "messenger.kind",
}
"""The key that names one of a group."""
Kind = TypeVar("Kind")


class Named(Protocol):
    """What a configuration can name."""

    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)


@cache
def _installed(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def installed_names(group: str) -> list[str]:
    """The names that installed packages bring for a group."""
    return sorted(_installed(group))


def no_such(group: str, what: str, name: str, known: Iterable[str]) -> str:
    """What is said where a key names something that is neither known nor brought by a package."""
    names = list(dict.fromkeys([*known, *installed_names(group)]))
    meant = did_you_mean(name, names) or (
        "; one of your own is known in the process that registers it, and everywhere once an"
        " installed package brings it"
    )
    return f"{KEYS[group]}: there is no {what} {name!r}; choose {', '.join(names)}{meant}"


def load_installed(group: str, name: str, kind: type[Kind]) -> Kind | None:
    """What an installed package brings under a name; None if none does.

    Raises:
        ConfigurationError: two packages bring it, it cannot be imported, it is no `kind`, or has
            another name.
    """
    points = _installed(group).get(name, [])
    if not points:
        return None
    if len(points) > 1:
        packages = ", ".join(point.dist.name if point.dist else point.value for point in points)
        raise ConfigurationError(
            f"{KEYS[group]}: {name!r} is brought by several packages ({packages}): uninstall all"
            " but one"
        )
    (point,) = points
    try:
        found = point.load()
    except (Exception, SystemExit) as error:  # whatever another package does when it is imported
        why = f"it ends Python: {error!r}" if isinstance(error, SystemExit) else first_line(error)
        package = f"the Python package {point.dist.name}" if point.dist else "that package"
        raise ConfigurationError(
            f"{KEYS[group]}: {name!r} cannot be imported from {point.value}"
            f" ({why}): mend or uninstall {package}"
        ) from error
    if not isinstance(found, kind):
        raise ConfigurationError(
            f"{KEYS[group]}: {name!r} of {group}: {point.value} is a {type(found).__name__},"
            f" expected {kind.__name__}"
        )
    own = getattr(found, "name", name)
    if own != name:
        raise ConfigurationError(
            f"{KEYS[group]}: {name!r} of {group}: {point.value} has the name {own!r}; give both one"
            " name"
        )
    return found


class Register(dict[str, Entry], Generic[Entry]):
    """Entries by name, in the order of their registration; those that installed packages bring are
    added when they are asked for.

    group: that of the entry points. what: one of them in words. kind: the class of an entry.
    """

    def __init__(self, group: str, what: str, kind: type[Entry]) -> None:
        super().__init__()
        self.group, self.what, self.kind = group, what, kind

    def add(self, entry: Entry) -> Entry:
        """Make an entry known under its name; returns it.

        Raises:
            ConfigurationError: another has that name.
        """
        if self.setdefault(entry.name, entry) is not entry:
            raise ConfigurationError(
                f"{KEYS[self.group]}: a {self.what} named {entry.name!r} is registered already;"
                " give yours another name"
            )
        return entry

    def find(self, name: str) -> Entry:
        """The entry of a name, registered or brought by an installed package.

        Raises:
            ConfigurationError: there is none of that name, or two; or as `load_installed`.
        """
        if brought := load_installed(self.group, name, self.kind):
            self.add(brought)
        if name not in self:
            raise ConfigurationError(no_such(self.group, self.what, name, self))
        return self[name]
