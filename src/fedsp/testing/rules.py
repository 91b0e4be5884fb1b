"""What an aggregation rule of your own must do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedsp.federation.aggregation.registry import Rule, replies_needed
from fedsp.testing.faults import require

FAR: dict[str, Callable[[Tensor], Tensor]] = {
    "far above": lambda honest: torch.full_like(honest, 1e6),
    "far below": lambda honest: torch.full_like(honest, -1e6),
    "far on both sides": lambda honest: (
        1e6 * (-1.0) ** torch.arange(len(honest))[:, None] + 0 * honest
    ),
    "far in one number": lambda honest: torch.cat([honest[:, :1] - 1e6, honest[:, 1:]], dim=1),
    "some fifty times as far as the others": lambda honest: honest - 50 * honest.norm(),
}
"""What malicious clients send instead of their rows (f, d)."""


def check_rule(rule: Rule, *, name: str = "", dimensions: int = 6) -> None:
    """An aggregation rule gives one finite change (d,) in the type of the rows (n, d), whatever
    their order; is exact where all agree; moves as they move; leaves them unchanged; takes rows of
    any length; and stays where the others are with f malicious rows of 2 f + 1 (2 f + 3 where its
    `name`, as registered or else the function's, has `krum` in it) and of more: above, below, on
    both sides, in one number only, and not as far away that they could be told by that.

    Raises:
        Nonconforming: what is missing.
    """
    faults: list[str] = []
    drawn = torch.Generator().manual_seed(0)

    def apply(rows: Tensor, f: int, what: str) -> Tensor | None:
        before = rows.clone()
        try:
            found = rule(rows, f)
        except Exception as error:  # a rule raises what it likes
            faults.append(f"{what}: {error!r} is raised")
            return None
        if not torch.equal(rows, before):
            faults.append(f"{what}: the rows are changed")
            return None
        if not isinstance(found, Tensor) or found.shape != rows.shape[1:]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            faults.append(f"{what}: {shape} is returned, expected a tensor ({rows.shape[1]},)")
            return None
        if found.dtype != rows.dtype or not torch.isfinite(found).all():
            faults.append(f"{what}: the change is {found.dtype} or not finite")
            return None
        return found

    for f in (0, 1, 3):
        count = 2 * f + 5
        rows = torch.randn(count, dimensions, generator=drawn, dtype=torch.float64)
        what = f"{count} rows, f = {f}"
        found = apply(rows, f, what)
        if found is None:
            continue
        shift = torch.full((dimensions,), 5.0, dtype=rows.dtype)
        turned = apply(rows.flip(0), f, f"{what}, in another order")
        moved = apply(rows + shift, f, f"{what}, all moved")
        same = apply(rows[:1].repeat(count, 1), f, f"{what}, all the same")
        for other, expected, fault in (
            (turned, found, "the order of the rows matters"),
            (moved, found + shift, "it does not move as the rows do"),
            (same, rows[0], "it is not the row where all are the same"),
        ):
            if other is not None and not torch.allclose(other, expected, rtol=1e-5, atol=1e-5):
                faults.append(f"{what}: {fault}")
    apply(torch.randn(5, 1000, generator=drawn, dtype=torch.float64), 1, "5 rows of 1,000 numbers")
    name = name or getattr(rule, "__name__", "")
    for f in (1, 3):
        for count in (replies_needed(name, f), 2 * f + 5):
            honest = torch.randn(count - f, dimensions, generator=drawn, dtype=torch.float64)
            radius = float((honest - honest.mean(dim=0)).norm(dim=1).max())
            # no further than f rows can take a geometric median, and one radius
            reach = (1 + 2 * (count - f) / (count - 2 * f)) * radius
            for where, lie in FAR.items():
                what = f"{count} rows, f = {f} of them {where}"
                for sent in ([lie(honest[:f]), honest], [honest, lie(honest[:f])]):
                    found = apply(torch.cat(sent), f, what)
                    if found is None:
                        break
                    if float((found - honest.mean(dim=0)).norm()) > reach:
                        faults.append(f"{what}: they carry it off")
                        break
    require("the aggregation rule", faults)
