"""How many threads torch should have on this machine, as busy as it is."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

CHOSEN_BY_HAND = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
GAIN = 1.1
"""How much faster several threads must be than one to be worth having."""
TURNS = 7


def measured_threads(seconds: Callable[[int], float] | None = None) -> tuple[int, float]:
    """As many threads as torch would take, or one where they multiply matrices hardly faster than
    it, as on a machine whose cores others use; and how many times as fast as one they are. They
    take turns, for some 0.1 s; nothing is measured, and torch's own number stands (1.0), where the
    environment says how many, or there is one core.

    seconds: the time of the work with so many threads.
    """
    most = torch.get_num_threads()
    if most == 1 or any(name in os.environ for name in CHOSEN_BY_HAND):
        return most, 1.0
    timed = seconds or _seconds_of_products
    try:
        for threads in (most, 1):
            timed(threads)  # the first call starts the threads
        turns = [(timed(1), timed(most)) for _ in range(TURNS)]
    finally:
        torch.set_num_threads(most)
    faster = statistics.median(one / several for one, several in turns)
    return (most if faster >= GAIN else 1), faster


def _seconds_of_products(threads: int) -> float:
    """Of two products in the shape of a small model's layer, 512 tokens wide."""
    torch.set_num_threads(threads)
    left, right = torch.ones(512, 384), torch.ones(384, 1536)
    started = time.perf_counter()
    for _ in range(2):
        left @ right
    return time.perf_counter() - started
