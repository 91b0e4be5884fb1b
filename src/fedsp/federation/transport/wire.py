"""The format of a request and of a reply: a header of a few JSON fields, and the prompt's bytes.
Whatever comes back is read as if it were hostile: by size first, then by digest, then by name, type
and range."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedsp.errors import PayloadError
from fedsp.federation.codecs import FLOAT32, Codec, parse_codec
from fedsp.federation.compression import read_values
from fedsp.federation.messages import Failure, Request, Update
from fedsp.federation.transport.message import Message
from fedsp.models.payload import Payload, Shapes, pack, shapes_of
from fedsp.storage import parse_json

VERSION = 1
LONGEST_HEADER = 4096
ROOM = 1024
"""Bytes by which a payload may be longer than its numbers: names and padding, never another tensor.
"""

REFUSALS = {
    "policy": "the client's own policy does not allow this request",
    "request": "the request that reached the client could not be used",
    "codec": (
        "the client does not know the codec that the request is in or asks for: compression.up and"
        " compression.down need its version of fedsp"
    ),
    "answer": (
        "the client's update has values that are not finite or too large for compression.up: lower"
        " client.learning_rate"
    ),
    "broadcast": "the client does not have the broadcast of the round before",
    "storage": "the client's disk did not take what it has to keep; its own log says which file",
    "withheld": "the owner of the text did not release this update",
    "diverged": "a loss of the client's training was not finite",
    "failed": "the client could not finish this request; its own log says why",
}
"""Refusal codes, and the sentence that the server shows for each. Clients send only the code: the
text of an error could contain private text."""


END = Message(json.dumps({"fedsp": VERSION, "kind": "end"}))
"""Sent to every client when a run is finished; no reply is expected."""


Known = Callable[[str, int], Payload | None]
"""The broadcast of a run and a round, where the client has it."""


class CannotRead(PayloadError):
    """A request whose payload this client cannot read, though another may: without the payload, and
    with the code of the refusal."""

    def __init__(self, request: Request, code: str) -> None:
        super().__init__(REFUSALS[code])
        self.request, self.code = request, code


def sign_reply(reply: Message, request: Message, sign: Callable[[bytes], bytes]) -> Message:
    """The reply with the client's signature, in hexadecimal, on a line before its header. It covers
    the request's header and the reply's, which has the payload's digest.
    """
    return replace(reply, header=f"{sign(_statement(reply, request)).hex()}\n{reply.header}")


def signed_reply(
    message: Message, request: Message, has_signed: Callable[[bytes, bytes], bool]
) -> Message:
    """The reply without its signature; `has_signed` says of a statement and a signature whether the
    client's key made it.

    Raises:
        PayloadError: it is not signed by that key, or for another request.
    """
    signature, divided, header = message.header.partition("\n")
    if not divided:
        raise PayloadError(
            "the reply is not signed with the client's key: it has no signature, as those of"
            " earlier versions of fedsp; use one version at all parties"
        )
    reply = replace(message, header=header)
    try:
        genuine = has_signed(_statement(reply, request), bytes.fromhex(signature))
    except ValueError:
        genuine = False
    if not genuine:
        raise PayloadError(
            "the reply is not signed with the client's key, or answers another request"
        )
    return reply


def _statement(reply: Message, request: Message) -> bytes:
    asked = hashlib.sha256(request.header.encode()).hexdigest()
    return f"fedsp reply 1\n{asked}\n{reply.header}".encode()


def write_request(request: Request, package: str = "", *, follows: bool = False) -> Message:
    """A request as it travels, with the digest of the package that it is about. It `follows` where
    the client has the broadcast of the round before: then, where there is one, only the change
    travels."""
    short = follows and bool(request.change)
    header = {
        "kind": "train" if request.train else "validate",
        "package": package,
        "run": request.run,
        "round": request.round,
        "client": request.client,
        "seed": request.seed,
        "codec": str(request.sent_in if short else FLOAT32),
        "answer": str(request.answer_in),
    }
    return _message(header, request.change if short else pack(request.payload))


def most_bytes(shapes: Shapes) -> int:
    """The most bytes of a payload with these tensors: numbers, names and padding."""
    numbers = sum(math.prod(shape) for shape in shapes.values())
    return 4 * numbers + ROOM + 256 * (len(shapes) - 1)


def read_request(message: Message, known: Known = lambda run, round: None) -> Request:
    """The request in a message.

    Raises:
        CannotRead: it is in a codec, or asks for one, that is not known here; or it is a change of
            a broadcast that did not come here.
        PayloadError: it is damaged, or no request.
    """
    fields = _fields(message, {"kind": str, "run": str, "round": int, "client": str, "seed": int})
    if fields["kind"] not in ("train", "validate"):
        raise PayloadError("the message is not a request")
    named = {name: fields[name] for name in ("run", "round", "client", "seed")}
    request = Request(**named, payload={}, train=fields["kind"] == "train")
    try:
        codec, answer = _codec(fields, "codec"), _codec(fields, "answer")
    except PayloadError as error:
        raise CannotRead(request, "codec") from error
    before = {} if codec == FLOAT32 else known(request.run, request.round - 1)
    if before is None:
        raise CannotRead(request, "broadcast")
    return replace(request, payload=_values(message, fields, before, codec), answer_in=answer)


def write_update(update: Update, payload: bytes, codec: Codec = FLOAT32) -> Message:
    """A client's answer as it travels: the prompt's bytes, in this codec, where it was asked to
    train, and six figures."""
    header = {
        "kind": "update",
        "codec": str(codec),
        "round": update.round,
        "client": update.client,
        "losses": update.losses,
        "validation": update.validation,
        "seconds": round(update.seconds, 3),
        "shortened": update.shortened,
        "spikes": update.spikes,
    }
    return _message(header, payload)


def write_refusal(request: Request, code: str) -> Message:
    """A client's fault as it travels: one of the codes of REFUSALS."""
    return _message(
        {"kind": "refusal", "round": request.round, "client": request.client, "code": code}, b""
    )


def read_reply(message: Message, request: Request) -> Update | Failure:
    """What a client answered to a request, or why that cannot be used.

    Raises nothing, whatever the bytes are: a client that sends nonsense has failed, and the round
    goes on.
    """
    try:
        reply: Update | Failure = _read_reply(message, request)
    except PayloadError as error:
        reply = Failure.of(request, str(error))
    return replace(reply, bytes_up=len(message.payload))


def _read_reply(message: Message, request: Request) -> Update:
    most = most_bytes(shapes_of(request.payload))
    if len(message.payload) > most:
        raise PayloadError(
            f"the reply has {len(message.payload)} bytes, more than the {most} that the"
            " messenger can have"
        )
    fields = _fields(message, {"kind": str, "round": int, "client": str})
    if fields["client"] != request.client:
        raise PayloadError("the reply is for another client")
    if fields["kind"] == "refusal":
        code = str(fields.get("code"))
        raise PayloadError(REFUSALS.get(code, "the client refused and gave no known reason"))
    if fields["kind"] != "update":
        raise PayloadError("the reply is neither an update nor a refusal")
    losses, validation, spikes = (fields.get(key) for key in ("losses", "validation", "spikes"))
    if (
        not isinstance(losses, dict)
        or len(losses) > 8
        or not all(re.fullmatch(r"[a-z_]{1,20}", name) for name in losses)
    ):
        raise PayloadError("the reply's losses are not a few numbers by name")
    by_stage = {name: _figure(value, f"loss {name!r}", 1e4) for name, value in losses.items()}
    validated = None if validation is None else _figure(validation, "validation loss", 1e4)
    codec = _codec(fields, "codec")
    if codec not in (FLOAT32, request.answer_in):
        raise PayloadError(f"the reply is in {codec}, and {request.answer_in} was asked for")
    payload = _values(message, fields, request.payload, codec) if request.train else request.payload
    return Update(
        round=fields["round"],
        client=request.client,
        payload=payload,
        losses=by_stage,
        validation=validated,
        seconds=_figure(fields.get("seconds"), "seconds", 1e9),
        shortened=int(_figure(fields.get("shortened"), "count of shortened examples", 1e12)),
        # clients of an earlier version do not tell it
        spikes=int(_figure(0 if spikes is None else spikes, "count of spikes", 1e12)),
    )


def _message(fields: dict[str, Any], payload: bytes) -> Message:
    digest = hashlib.sha256(payload).hexdigest()
    return Message(json.dumps({"fedsp": VERSION, **fields, "sha256": digest}), payload)


def _fields(message: Message, expected: dict[str, type]) -> dict[str, Any]:
    """The header's fields, those expected among them and of their type."""
    if len(message.header) > LONGEST_HEADER:
        raise PayloadError(
            f"the message's header has {len(message.header)} characters, more than {LONGEST_HEADER}"
        )
    try:
        fields = parse_json(message.header)
    except ValueError as error:
        raise PayloadError("the message's header is not JSON") from error
    if not isinstance(fields, dict) or fields.get("fedsp") != VERSION:
        raise PayloadError(
            f"the message is not one of fedsp's of format {VERSION}: use one version of fedsp at"
            " all parties"
        )
    wrong = [name for name, kind in expected.items() if type(fields.get(name)) is not kind]
    if wrong:
        raise PayloadError(f"the message's header has no usable {wrong[0]}")
    return fields


def _values(message: Message, fields: dict[str, Any], known: Payload, codec: Codec) -> Payload:
    if hashlib.sha256(message.payload).hexdigest() != fields.get("sha256"):
        raise PayloadError(
            "the payload is not what its SHA-256 digest says: it was changed on its way"
        )
    return read_values(message.payload, known, codec)


def _codec(fields: dict[str, Any], name: str) -> Codec:
    try:  # versions without codecs do not name any
        return parse_codec(str(fields.get(name, FLOAT32)))
    except ValueError as error:
        raise PayloadError(f"the message's {name} is not known here: {error}") from error


def _figure(value: object, name: str, most: float) -> float:
    """A figure that a client reports: a number from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise PayloadError(f"the reply's {name} is not a number from 0 to {most:g}")
    return float(value)
