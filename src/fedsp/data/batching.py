"""Batches of token ids: rows padded on the right, several rows packed into one, or contexts packed
with their branches (alternative continuations), side by side or as a tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapreplace
from itertools import pairwise, starmap
from typing import NamedTuple

import torch
from torch import Tensor


class Padded(NamedTuple):
    """Token ids (B, T), padded on the right, and the mask (B, T): 1 at tokens, 0 at padding."""

    ids: Tensor
    mask: Tensor


class PackedBatch(NamedTuple):
    """A context and its branches per row: token ids (B, T), each token's position in context plus
    branch (B, T), and the place in the row behind the last token that may see it (B, T): that of
    the row's end for a context, of its branch's end for a branch, and of its subtree's for a node
    of a tree."""

    ids: Tensor
    positions: Tensor
    ends: Tensor

    def seen(self) -> Tensor:
        """Which tokens each token attends to (B, T, T): those before it, and itself, up to their
        ends."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (places[None, None, :] <= places[None, :, None]) & (
            places[None, :, None] < self.ends[:, None, :]
        )


class _Row(NamedTuple):
    ids: list[int]
    positions: list[int]
    ends: list[int]


def _packed(rows: Sequence[_Row], device: torch.device) -> PackedBatch:
    """Rows padded to the longest; padding sees itself alone."""
    width = max(len(row.ids) for row in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long).unbind()
    ends = torch.arange(1, width + 1).repeat(len(rows), 1)
    for index, row in enumerate(rows):
        length = len(row.ids)
        for made, given in zip((ids, positions, ends), row, strict=True):
            made[index, :length] = torch.tensor(given, dtype=torch.long)
    return PackedBatch(ids.to(device), positions.to(device), ends.to(device))


def pack_branches(
    contexts: Sequence[Sequence[int]],
    branches: Sequence[Sequence[Sequence[int]]],
    device: torch.device,
) -> PackedBatch:
    """Each context and its branches, one behind the other, as one row, padded to the longest."""
    rows = []
    for context, tails in zip(contexts, branches, strict=True):
        row = _Row(list(context), list(range(len(context))), [0] * len(context))
        for tail in tails:
            end = len(row.ids) + len(tail)
            row.ids.extend(tail)
            row.positions.extend(range(len(context), len(context) + len(tail)))
            row.ends.extend([end] * len(tail))
        row.ends[: len(context)] = [len(row.ids)] * len(context)
        rows.append(row)
    return _packed(rows, device)


def pack_trees(
    contexts: Sequence[Sequence[int]],
    branches: Sequence[Sequence[Sequence[int]]],
    device: torch.device,
) -> tuple[PackedBatch, list[list[list[int]]]]:
    """Each context and its branches as one row, padded to the longest, in which tokens that
    branches begin with alike stand once; and where in its row each token of each branch stands."""
    rows, places = [], []
    for context, tails in zip(contexts, branches, strict=True):
        row = _Row(list(context), list(range(len(context))), [0] * len(context))
        found: list[list[int]] = [[] for _ in tails]
        path: list[int] = []  # where the tokens of the branch before stand
        before: Sequence[int] = ()
        for number in sorted(range(len(tails)), key=lambda number: tuple(tails[number])):
            tail = tails[number]
            alike = _alike(before, tail)
            for place in path[alike:]:
                row.ends[place] = len(row.ids)
            del path[alike:]
            for depth in range(alike, len(tail)):
                path.append(len(row.ids))
                row.ids.append(tail[depth])
                row.positions.append(len(context) + depth)
                row.ends.append(0)
            found[number], before = list(path), tail
        for place in [*range(len(context)), *path]:
            row.ends[place] = len(row.ids)
        rows.append(row)
        places.append(found)
    return _packed(rows, device), places


def tree_size(branches: Sequence[Sequence[int]]) -> int:
    """The tokens of branches as `pack_trees` packs them."""
    ordered = sorted(map(tuple, branches))
    return sum(map(len, ordered)) - sum(starmap(_alike, pairwise(ordered)))


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next(
        (place for place, (left, right) in enumerate(pairs) if left != right),
        min(len(one), len(other)),
    )


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> Padded:
    """Rows of token ids as one tensor, padded to the longest."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long).unbind()
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    return Padded(ids.to(device), mask.to(device))


def pack(padded: Padded, *, weight: int, room: int) -> tuple[PackedBatch, Tensor]:
    """Pack padded rows as branches without a context: the batch, and for each token (B, T) its
    index in the flattened batch; padding has the index of its row's first token. The number of
    packed rows, of at most `room` tokens each, is that of least cost, tokens * (`weight` + length
    of a packed row), of up to 14 candidates."""
    lengths, tokens = padded.mask.sum(dim=1).tolist(), padded.ids.tolist()
    longest = max(lengths)
    counts = {
        min(len(lengths), math.ceil(sum(lengths) / (longest * 1.12**step))) for step in range(13)
    }
    plans = [_spread(lengths, count) for count in {*counts, len(lengths)}]
    width, shared = min(
        (plan for plan in plans if plan[0] <= min(room, 4 * longest)),
        key=lambda plan: len(plan[1]) * plan[0] * (weight + plan[0]),
    )
    cells = torch.zeros(padded.ids.shape, dtype=torch.long)
    for number, rows in enumerate(shared):
        start = number * width
        for row in rows:
            cells[row] = start
            cells[row, : lengths[row]] += torch.arange(lengths[row])
            start += lengths[row]
    branches = [[tokens[row][: lengths[row]] for row in rows] for rows in shared]
    return pack_branches([[]] * len(shared), branches, padded.ids.device), cells.to(
        padded.ids.device
    )


def _spread(lengths: Sequence[int], count: int) -> tuple[int, list[list[int]]]:
    """Distribute rows of these lengths over `count` packed rows, longest first, each into the least
    filled: the length of the longest packed row, and the row indices in each."""
    shared: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        tokens, number = filled[0]
        shared[number].append(row)
        heapreplace(filled, (tokens + lengths[row], number))
    return max(filled)[0], shared
