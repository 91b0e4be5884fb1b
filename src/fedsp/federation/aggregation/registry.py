"""The register of aggregation rules. Nothing here imports torch, so that a configuration is checked
at once."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, TypeAlias

from fedsp.data.installed import AGGREGATORS, load_installed, no_such
from fedsp.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

Rule: TypeAlias = "Callable[[Tensor, int], Tensor]"
"""From changes (n, d) and f to one change (d,)."""

NO_FUNCTION = ("mean", "trust")
"""Values of `aggregation.rule` that need more than the changes: weights, the server's own step."""

OURS = ("median", "trimmed_mean", "krum", "multi_krum", "geometric_median", "centred_clipping")
"""Functions of `fedsp.federation.aggregation.robust`, by name."""

_REGISTERED: dict[str, Rule] = {}


def register_rule(name: str, rule: Rule) -> Rule:
    """Make a rule known as a value of `aggregation.rule`; returns it. It must withstand f malicious
    clients of 2 f + 1; `fedsp.testing.check_rule` says whether it does what is asked of a rule.

    Raises:
        ConfigurationError: another rule has that name; it has none, or is no function.
    """
    if not name or not callable(rule):
        raise ConfigurationError(
            f"aggregation.rule: expected a name and a function of it, not {name!r} and {rule!r}"
        )
    if name in (*NO_FUNCTION, *OURS) or _REGISTERED.setdefault(name, rule) is not rule:
        raise ConfigurationError(
            f"aggregation.rule: a rule named {name!r} is registered already; give yours another"
            " name"
        )
    return rule


def replies_needed(name: str, f: int) -> int:
    """How many replies the rule of this name must have to withstand f malicious clients."""
    return 2 * f + (3 if "krum" in name else 1)


def require_rule(name: str) -> None:
    """See that `aggregation.rule` may be this, registered or brought by an installed package.

    Raises:
        ConfigurationError: there is no such rule, or two; or as `load_installed`.
    """
    if brought := load_installed(AGGREGATORS, name, FunctionType):
        register_rule(name, brought)
    known = (*NO_FUNCTION, *OURS, *_REGISTERED)
    if name not in known:
        raise ConfigurationError(no_such(AGGREGATORS, "rule", name, known))


def find_rule(name: str) -> Rule:
    """The function of a rule.

    Raises:
        ConfigurationError: as `require_rule`.
    """
    from fedsp.federation.aggregation.robust import RULES

    require_rule(name)
    return RULES[name] if name in RULES else _REGISTERED[name]
