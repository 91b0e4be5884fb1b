"""What a client's process does with a frame: read it, hold it against its policy, train, and answer. No text of an error ever leaves."""

from __future__ import annotations

from collections.abc import Callable

from fedsp.errors import FedspError, PolicyError, TrainingDiverged
from fedsp.frames import Frame
from fedsp.methods.base import Method
from fedsp.parties import Party
from fedsp.rounds import Request
from fedsp.wire import read_request, write_refusal, write_update


def answer(
    frame: Frame,
    method: Method,
    party: Callable[[str], Party],
    *,
    allow: Callable[[Request], None] = lambda request: None,
    log: Callable[[Request, Exception], None] = lambda request, error: None,
) -> Frame:
    """The frame that answers a frame. `allow` raises PolicyError for what the client refuses; `log` is told of every fault, on this machine only.

    Raises:
        PayloadError: the frame is no request, so there is nobody to answer.
    """
    request = read_request(frame)
    try:
        allow(request)
        return write_update(method.client_update(party(request.client), request), train=request.train)
    except Exception as error:  # whatever it is: its text may hold the client's text, so only a code leaves
        log(request, error)
        return write_refusal(request, _code(error))


def _code(error: Exception) -> str:
    if isinstance(error, PolicyError):
        return "policy"
    if isinstance(error, TrainingDiverged):
        return "diverged"
    return "request" if isinstance(error, FedspError) else "failed"
