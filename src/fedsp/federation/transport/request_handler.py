"""What a client's process does with a message: read it, check it against its policy, train, and
answer. No text of an error ever leaves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedsp.errors import FedspError, PayloadError, PolicyError, StorageError, TrainingDiverged
from fedsp.federation.codecs import FLOAT32
from fedsp.federation.compression import difference, encode_with_residual
from fedsp.federation.messages import Request, Update
from fedsp.federation.methods.base import Method
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.federation.transport.message import Message
from fedsp.federation.transport.wire import CannotRead, read_request, write_refusal, write_update
from fedsp.models.payload import Payload, pack
from fedsp.models.trainable import entries_below


def answer(
    message: Message,
    method: Method,
    party: Callable[[str], Party],
    *,
    allow: Callable[[Request], None] = lambda request: None,
    log: Callable[[Request, Exception], None] = lambda request, error: None,
    known: Callable[[str, int], Payload | None] = lambda run, round: None,
) -> Message:
    """The message that answers a message. `allow` raises PolicyError for what the client refuses;
    `log` is called with every fault, on this machine only; `known` has the broadcasts that the
    client received.

    Raises:
        PayloadError: the message is no request, so there is nobody to answer.
    """
    try:
        request = read_request(message, known)
    except CannotRead as error:
        log(error.request, error)
        return write_refusal(error.request, error.code)
    try:
        allow(request)
        own = party(request.client)
        with own.store.together():
            update = method.client_update(own, request)
            try:
                reply = write_update(update, answer_bytes(update, request, own), request.answer_in)
            except PayloadError as error:
                log(request, error)
                reply = write_refusal(request, "answer")
        return reply
    except Exception as error:
        # whatever it is: its text may hold the client's text, so only a code leaves
        log(request, error)
        return write_refusal(request, _code(error))


def answer_bytes(update: Update, request: Request, party: Party) -> bytes:
    """The payload of a reply in the requested codec, empty if nothing was trained. The client keeps
    the quantization error (residual) for its next reply.

    Raises:
        PayloadError: a value is not finite, or too large for the codec.
        StorageError: the residual could not be written.
    """
    if not request.train:
        return b""
    if request.answer_in == FLOAT32:
        return pack(update.payload)
    data, _, residual = encode_with_residual(
        difference(update.payload, request.payload),
        entries_below(party.store.load(before=request.round), "residual"),
        request.answer_in,
    )
    party.store.save(
        request.round, {f"residual/{name}": tensor for name, tensor in residual.items()}
    )
    return data


def take_back(store: StateStore, round: int) -> None:
    """Let what a round's answer has left out be what was left out before it: that answer is not
    sent, so none of it is to be part of a later one.

    Raises:
        StorageError: it could not be read or written.
    """
    before = entries_below(store.load(before=round), "residual")
    now = entries_below(store.at(round), "residual")
    instead = {name: before.get(name, torch.zeros_like(left)) for name, left in now.items()}
    if instead:
        store.save(round, {f"residual/{name}": tensor for name, tensor in instead.items()})


def _code(error: Exception) -> str:
    if isinstance(error, PolicyError):
        return "policy"
    if isinstance(error, TrainingDiverged):
        return "diverged"
    if isinstance(error, StorageError):
        return "storage"
    return "request" if isinstance(error, FedspError) else "failed"
