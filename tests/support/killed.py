"""A process that is killed while it works, forked so that it need not import anything again."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import pytest
import torch


def end_of(work: Callable[[], object]) -> int:
    """How a forked child ends in which `work` runs: 0, 1 after an exception, or less a signal."""
    if torch.accelerator.is_available():
        pytest.skip("where there is a GPU, a process that has trained cannot fork and train")
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
