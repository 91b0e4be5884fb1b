"""The HTTP side: `/v1/models`, `/v1/completions` and `/v1/chat/completions` in the form of OpenAI's
API (https://platform.openai.com/docs/api-reference), and `/healthz`.

What is asked for and not supported is refused by name. No text and no answer is ever logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticKnownError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from fedsp.data.chat import end_of_turn, question_ids
from fedsp.data.encoding import Tokenizer, decode_behind, encode_texts
from fedsp.deployment.model_server.engine import End, Engine, Full, Wanted
from fedsp.errors import FedspError, did_you_mean
from fedsp.training.generation import sampler

LARGEST = 4 << 20
"""Bytes of one request's body."""

KIND = re.compile(r"str$|list\[|constrained-")
"""What pydantic puts behind the name of a key that takes several kinds of value."""

LOOKS_EVERY = 1.0
"""Seconds after which a text that waits is looked after: its client may have gone."""


def _number(value: object) -> object:
    """A number as JSON has it: pydantic would take true and texts for one, too."""
    if isinstance(value, bool | str):
        raise PydanticKnownError("float_type")
    return value


Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]
Stop = Annotated[str, Field(max_length=1000)]
NEUTRAL = Field(0.0, ge=0.0, le=0.0)
CHANGES_NOTHING: tuple[tuple[str, object], ...] = (
    ("logit_bias", {}),
    ("tools", []),
    ("response_format", {"type": "text"}),
    ("store", False),
)
"""Options that are not supported, at values that ask for nothing."""


class Asked(BaseModel):
    """What requests of both kinds say. Options that would change the answer and are not supported
    are taken at the value that changes nothing."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, asked: object) -> object:
        """Without options that are not set: clients pass null on for each of them."""
        if not isinstance(asked, dict):
            return asked
        return {
            name: value
            for name, value in asked.items()
            if value is not None and (name, value) not in CHANGES_NOTHING
        }

    model: str
    max_tokens: Whole | None = Field(None, ge=1)
    temperature: Number = Field(1.0, ge=0.0, le=100.0)
    top_p: Number = Field(1.0, gt=0.0, le=1.0)
    seed: Whole | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    user: str | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: float | None = NEUTRAL
    frequency_penalty: float | None = NEUTRAL

    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class StreamOptions(BaseModel):
    """`include_usage`: whether the last piece counts tokens."""

    include_usage: bool = False


class Completion(Asked):
    """A request to continue texts as they stand."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    role: str
    content: str | list[Part]
    name: str | None = None


class Chat(Asked):
    """A request to answer a conversation, by the model's chat template."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)


class Refused(Exception):
    """A request that cannot be done: the status, and one sentence."""

    def __init__(self, status: int, sentence: str, param: str | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.param = status, sentence, param

    def response(self) -> JSONResponse:
        kind = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
        error = {
            "message": self.sentence,
            "type": kind.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": None,
        }
        return JSONResponse({"error": error}, self.status)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served.

    rooms: the longest text, tokens, that each name's models read. most: tokens of one answer at
    most. key: what requests must bear; None: nothing.
    """

    engine: Engine
    tokenizer: Tokenizer
    rooms: Mapping[str, int]
    most: int
    key: str | None = None


class Answer:
    """An answer while it is written: `take` gives what is new of its text and settled, neither half
    a character nor what may become a text that ends it."""

    def __init__(self, tokenizer: Tokenizer, wanted: Wanted, stops: Sequence[str]) -> None:
        self.wanted = wanted
        self.reason: End | None = None
        self._tokenizer, self._stops = tokenizer, stops
        self._new: list[int] = []
        self._given = 0

    @property
    def tokens(self) -> int:
        return len(self._new)

    def hear(self, told: int | End) -> None:
        """A new token, or why there are no more."""
        if self.reason:  # a text that ends it was found before
            return
        if isinstance(told, str):
            self.reason = told
        else:
            self._new.append(told)

    def take(self) -> str:
        text = decode_behind(self._tokenizer, self.wanted.ids, self._new)
        ends = [text.index(stop) for stop in self._stops if stop in text]
        if ends:
            text, self.reason, self.wanted.left = text[: min(ends)], "stop", True
        elif self.reason is None:
            text = text[: len(text) - self._unsettled(text)]
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new

    def _unsettled(self, text: str) -> int:
        whole = text.rstrip("\ufffd")
        starts = (
            size
            for stop in self._stops
            for size in range(min(len(stop) - 1, len(whole)), 0, -1)
            if whole.endswith(stop[:size])
        )
        return len(text) - len(whole) + max(starts, default=0)


def make_app(served: Served) -> FastAPI:
    """The application that answers requests with what is served."""
    app = FastAPI(title="fedsp", docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(Admission, key=served.key)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(FedspError)
    async def impossible(_: Request, error: FedspError) -> Response:
        return Refused(400, str(error)).response()

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        unread = error.status_code == 400
        what = (
            "the request is no JSON that can be read" if unread else "this server does not do that"
        )
        return Refused(error.status_code, f"{what} ({error.detail})").response()

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        faults = error.errors()
        # of a key that takes several kinds of value each has its faults, and a name behind the key:
        # those of the kind that was given tell more than that it is not another
        same = [one for one in faults if one["loc"][:2] == faults[0]["loc"][:2]]
        first = max(same, key=lambda one: (not str(one["type"]).endswith("_type"), len(one["loc"])))
        if first["type"] == "json_invalid":
            return Refused(400, "the request is not JSON").response()
        key, *inside = first["loc"][1:] or ("the request",)
        places = [str(key), *(str(part) for part in inside if not KIND.match(str(part)))]
        where = ".".join(places)
        what = (
            "is not supported"
            if first["type"] == "extra_forbidden"
            else f"cannot be taken: {first['msg'][:1].lower()}{first['msg'][1:]}"
        )
        return Refused(400, f"{where} {what}", where).response()

    @app.get("/healthz")
    async def healthy() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_about(name) for name in served.rooms]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        _require(served, name)
        return _about(name)

    @app.post("/v1/completions")
    async def complete(asked: Completion, request: Request) -> Response:
        _require(served, asked.model)
        texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        _require_utf8(texts)
        rows = await asyncio.to_thread(encode_texts, served.tokenizer, texts)
        most = asked.max_tokens or min(16, served.most)
        return await _respond(served, asked, rows, most, request)

    @app.post("/v1/chat/completions")
    async def chat(asked: Chat, request: Request) -> Response:
        _require(served, asked.model)
        turns = [
            (
                message.role,
                message.content
                if isinstance(message.content, str)
                else "".join(part.text for part in message.content),
            )
            for message in asked.messages
        ]
        _require_utf8([part for turn in turns for part in turn])
        ids = await asyncio.to_thread(question_ids, served.tokenizer, turns, "messages")
        room = served.rooms[asked.model] - len(ids)
        most = asked.max_completion_tokens or asked.max_tokens or max(1, min(served.most, room))
        return await _respond(served, asked, [ids], most, request)

    return app


class Admission:
    """Refuses requests without the key, and those that are too large or do not say how large. Plain
    ASGI, so that an answer is told when its client has gone."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refused(scope) if scope["type"] == "http" else None
        await (refused.response() if refused else self._app)(scope, receive, send)

    def _refused(self, scope: Scope) -> Refused | None:
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] != "/healthz":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                return Refused(401, "the key is missing or wrong: send it as a bearer")
        if scope["method"] == "POST":
            chunked = b"transfer-encoding" in headers  # whatever length is said too
            length = b"" if chunked else headers.get(b"content-length", b"")
            if not length.isdigit() or int(length) > LARGEST:
                sentence = f"a request must say its length, at most {LARGEST} bytes"
                return Refused(413 if length.isdigit() else 411, sentence)
        return None


def _require_utf8(texts: Sequence[str]) -> None:
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise Refused(400, "a text holds half of a surrogate pair, which is no letter")


def _about(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "fedsp"}


def _require(served: Served, name: str) -> None:
    if name not in served.rooms:
        known = ", ".join(served.rooms)
        raise Refused(
            404, f"no model {name!r} is served{did_you_mean(name, served.rooms)}: {known}", "model"
        )


def _begin(
    served: Served, asked: Asked, rows: Sequence[Sequence[int]], most: int, heard: asyncio.Event
) -> list[Answer]:
    """Let the texts of a request wait for their turn; `heard` is set whenever one has news."""
    room = served.rooms[asked.model]
    if most > served.most:
        raise Refused(400, f"{most} tokens are asked for: this server writes at most {served.most}")
    for ids in rows:
        if not ids:
            raise Refused(400, "the tokenizer makes no token of the text: give other words")
        if len(ids) + most > room:
            raise Refused(
                400,
                f"the text has {len(ids)} tokens and {most} are to be written, but the model reads"
                f" {room}: shorten the text or ask for fewer",
            )
    stops = asked.stops()
    if "" in stops:
        raise Refused(400, "an empty text would end every answer at its beginning", "stop")
    loop, answers = asyncio.get_running_loop(), []
    ends = end_of_turn(served.tokenizer)
    for number, ids in enumerate(rows):
        seed = secrets.randbits(62) if asked.seed is None else asked.seed + number
        wanted = Wanted(
            model=asked.model,
            ids=tuple(ids),
            most=most,
            ends=ends,
            choose=sampler(asked.temperature, asked.top_p, seed),
            told=lambda told: None,
        )
        answer = Answer(served.tokenizer, wanted, stops)

        def hear(told: int | End, answer: Answer = answer) -> None:
            answer.hear(told)
            heard.set()

        def told(told: int | End, hear: Callable[[int | End], None] = hear) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(hear, told)

        wanted.told = told
        answers.append(answer)
    try:
        served.engine.ask(*(answer.wanted for answer in answers))
    except Full:
        raise Refused(429, "too many texts are waiting: try again in a while") from None
    return answers


async def _pieces(
    answers: Sequence[Answer], heard: asyncio.Event, request: Request
) -> AsyncIterator[tuple[int, str]]:
    """What is new of each answer, until all have ended; whatever ends this ends the answers too."""
    try:
        open_ones = dict(enumerate(answers))
        while open_ones:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(heard.wait(), LOOKS_EVERY)
            heard.clear()
            if await request.is_disconnected():
                return
            for number, answer in list(open_ones.items()):
                new = answer.take()
                if answer.reason == "failed":
                    raise Refused(503, "the answer could not be written: try again later")
                if answer.reason:
                    del open_ones[number]
                yield number, new
    finally:
        for answer in answers:
            answer.wanted.left = True


async def _respond(
    served: Served, asked: Asked, rows: Sequence[Sequence[int]], most: int, request: Request
) -> Response:
    heard = asyncio.Event()
    answers = _begin(served, asked, rows, most, heard)
    chat = isinstance(asked, Chat)
    kind = "chat.completion" if chat else "text_completion"
    about = {
        "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
        "created": int(time.time()),
        "model": asked.model,
    }

    def usage() -> dict[str, int]:
        read, written = sum(map(len, rows)), sum(answer.tokens for answer in answers)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    def choice(
        number: int, text: str, reason: End | None, key: str, first: bool = True
    ) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        said = {key: {**role, "content": text}} if chat else {"text": text}
        return {"index": number, **said, "finish_reason": reason, "logprobs": None}

    if not asked.stream:
        texts = [""] * len(answers)
        async for number, new in _pieces(answers, heard, request):
            texts[number] += new
        choices = [
            choice(number, text, answers[number].reason, "message")
            for number, text in enumerate(texts)
        ]
        return JSONResponse({**about, "object": kind, "choices": choices, "usage": usage()})

    about["object"] = "chat.completion.chunk" if chat else kind

    async def events() -> AsyncIterator[str]:
        begun: set[int] = set()
        try:
            async for number, new in _pieces(answers, heard, request):
                reason = answers[number].reason
                if new or reason:
                    piece = choice(number, new, reason, "delta", first=number not in begun)
                    begun.add(number)
                    yield _event({**about, "choices": [piece]})
        except Refused as error:  # the response has begun
            yield _event({"error": {"message": error.sentence, "type": "server_error"}})
            return
        if asked.stream_options and asked.stream_options.include_usage:
            yield _event({**about, "choices": [], "usage": usage()})
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
