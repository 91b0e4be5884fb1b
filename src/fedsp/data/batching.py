"""Batches of token ids: rows padded on the right, several rows packed into one, or contexts packed
with their branches (alternative continuations)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heapreplace
from typing import NamedTuple

import torch
from torch import Tensor


class Padded(NamedTuple):
    """Token ids (B, T), padded on the right, and the mask (B, T): 1 at tokens, 0 at padding."""

    ids: Tensor
    mask: Tensor


class PackedBatch(NamedTuple):
    """A context and its branches per row: token ids (B, T), each token's position in context plus
    branch (B, T), and its branch (B, T): 0 context, n the n-th branch, -1 padding."""

    ids: Tensor
    positions: Tensor
    branches: Tensor


def pack_branches(
    contexts: Sequence[Sequence[int]],
    branches: Sequence[Sequence[Sequence[int]]],
    device: torch.device,
) -> PackedBatch:
    """Each context and its branches, one behind the other, as one row, padded to the longest."""
    width = max(
        len(context) + sum(map(len, rows)) for context, rows in zip(contexts, branches, strict=True)
    )
    ids, positions, which = torch.zeros(3, len(contexts), width, dtype=torch.long).unbind()
    which.fill_(-1)
    for row, (context, tails) in enumerate(zip(contexts, branches, strict=True)):
        start = 0
        for number, part in enumerate([context, *tails]):
            there = slice(start, start + len(part))
            ids[row, there] = torch.tensor(part, dtype=torch.long)
            positions[row, there] = torch.arange(len(part)) + (len(context) if number else 0)
            which[row, there] = number
            start += len(part)
    return PackedBatch(ids.to(device), positions.to(device), which.to(device))


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
