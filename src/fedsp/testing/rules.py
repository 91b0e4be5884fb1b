"""What an aggregation rule of your own must do."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsp.federation.aggregation.registry import Rule
from fedsp.testing.faults import require


def check_rule(rule: Rule, *, dimensions: int = 6) -> None:
    """An aggregation rule gives one finite change (d,) in the type of the rows (n, d), whatever
    their order; is exact where all agree; moves as they move; leaves them unchanged; and with f of
    2 f + 5 rows far away stays where the others are.

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
        if not isinstance(found, Tensor) or found.shape != (dimensions,):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            faults.append(f"{what}: {shape} is returned, expected a tensor ({dimensions},)")
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
        far = rows.clone()
        far[count - f :] = 1e6
        resistant = apply(far, f, f"{what}, f of them far away")
        if f and resistant is not None:
            honest = far[: count - f]
            reach = 4 * float((honest - honest.mean(dim=0)).norm(dim=1).max())
            if float((resistant - honest.mean(dim=0)).norm()) > reach:
                faults.append(f"{what}: {f} rows that are far away carry it off")
    require("the aggregation rule", faults)
