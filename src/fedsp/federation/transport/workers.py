"""Clients in several processes on this machine. They are forked from this one, so they share the
memory of its weights, and each trains with one thread, so no figure depends on how many there are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import connection
from typing import TypeVar

import torch

from fedsp.errors import ConfigurationError, RunError
from fedsp.federation.clients import Clients
from fedsp.federation.messages import Request, Transport, Update
from fedsp.federation.transport.local import Answer, answer_here, on_this_machine
from fedsp.models.payload import pack, unpack

Item = TypeVar("Item")
Result = TypeVar("Result")
FORKS = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
"""Whether this system forks processes that have computed: Windows does not, and on macOS they end
badly."""
_clients: list[Clients] = []
"""In a worker: the clients that it was forked with."""


@contextmanager
def workers(clients: Clients, count: int) -> Iterator[Transport]:
    """A transport whose clients train in so many processes. What a client keeps between rounds is
    on the disk, so any of them may train it.

    Raises (when iterated):
        TrainingDiverged: as `local`.
        RunError: a process was ended from outside.
    """
    count = min(count, len(clients.register) or 1)
    with forked(count, clients) as pool:

        def begin(request: Request) -> Answer:
            sent = replace(request, payload={}, change=b"")
            return partial(result_of, pool.submit(_answer, sent, pack(request.payload)))

        yield on_this_machine(begin, ahead=2 * count)


@contextmanager
def forked(count: int, *clients: Clients) -> Iterator[Executor]:
    """So many processes, forked from this one when they are first given work; they end with it.
    What is handed to them must be such that pickle takes it.

    Raises:
        ConfigurationError: this system does not fork processes.
    """
    if not FORKS:
        raise ConfigurationError(
            "workers: this system does not fork processes; leave workers out, and one process does"
            " all the work"
        )
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("fork"), initializer=_begin, initargs=clients
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_parallel(
    count: int, work: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[Result]:
    """What `work` returns for each item, in order, by so many processes at most.

    Raises:
        ConfigurationError, RunError: as `forked` and `result_of`, or whatever the work raises;
            what was not begun then is left undone.
    """
    with forked(min(count, len(items) or 1)) as pool:
        yield from map(result_of, [pool.submit(work, item) for item in items])


def result_of(future: Future[Result]) -> Result:
    """What a worker returned, or raise what it raised.

    Raises:
        RunError: it was ended from outside.
    """
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RunError(
            f"one of the worker processes was ended from outside ({error}), perhaps because memory"
            " ran out: resume with fewer workers; finished rounds are kept"
        ) from error


def _begin(*clients: Clients) -> None:
    """Of a worker: one thread, and an end when its parent ends, by whatever signal."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _clients.extend(clients)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _answer(request: Request, payload: bytes) -> tuple[Update, bytes]:
    update, up = answer_here(_clients[0], replace(request, payload=unpack(payload)))
    return replace(update, payload={}), up
