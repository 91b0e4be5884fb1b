"""What crosses a wire: requests and replies survive the way, and nothing that was changed, cut,
forged or inflated is ever accepted."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedsp.errors import PayloadError, TrainingDiverged
from fedsp.federation.aggregation.mean import validate_update
from fedsp.federation.codecs import parse_codec
from fedsp.federation.messages import Failure, Request, Update
from fedsp.federation.state_store import StateStore
from fedsp.federation.transport.message import Message
from fedsp.federation.transport.wire import (
    LONGEST_HEADER,
    REFUSALS,
    most_bytes,
    read_reply,
    read_request,
    sign_reply,
    signed_reply,
    write_refusal,
    write_request,
    write_update,
)
from fedsp.models.payload import PROMPT, check, pack, shapes_of

PROMPT_SENT = {PROMPT: torch.linspace(-1, 1, 4 * 8 * 16).reshape(4, 8, 16)}
REQUEST = Request(
    run="0123456789abcdef",
    round=3,
    client="hospital-a",
    seed=12345678901234567,
    payload=PROMPT_SENT,
)
REPLY = Update(
    round=3,
    client="hospital-a",
    payload={PROMPT: PROMPT_SENT[PROMPT] + 0.01},
    losses={"prompt": 2.5},
    validation=1.25,
    seconds=0.5,
    shortened=2,
)
GOOD = write_update(REPLY, pack(REPLY.payload))


def verdict(message: Message) -> str | None:
    """Why a reply is not aggregated, from the bytes on; None if it is."""
    return validate_update(
        read_reply(message, REQUEST), {"hospital-a": REQUEST}, {}, max_change=1.0
    )


def forged(payload: bytes, **fields: Any) -> Message:
    """A reply whose digest fits its payload, as a malicious client makes it."""
    header = json.loads(GOOD.header) | {"sha256": hashlib.sha256(payload).hexdigest()} | fields
    return Message(json.dumps(header), payload)


@pytest.mark.parametrize("run", ["\ud800", "a\udfffb"])
def test_half_a_character_in_a_request_is_refused_before_anything_is_written_of_it(
    run: str,
) -> None:
    header = json.loads(write_request(REQUEST).header) | {"run": run}
    with pytest.raises(PayloadError, match="the message's header is not JSON"):
        read_request(Message(json.dumps(header), write_request(REQUEST).payload))


def test_the_names_that_a_reply_gives_are_not_told_at_length() -> None:
    """They stand in the journal and on the screen."""
    known = {PROMPT: torch.zeros(2)}
    with pytest.raises(PayloadError) as refused:
        check({"x" * 100_000: torch.zeros(2)}, shapes_of(known))
    assert len(str(refused.value)) < 300


def test_requests_and_replies_survive_the_way() -> None:
    read = read_request(write_request(REQUEST))
    assert torch.equal(read.payload[PROMPT], PROMPT_SENT[PROMPT]) and replace(
        read, payload=PROMPT_SENT
    ) == replace(REQUEST, payload=PROMPT_SENT)
    reply = read_reply(GOOD, REQUEST)
    assert isinstance(reply, Update) and torch.equal(reply.payload[PROMPT], REPLY.payload[PROMPT])
    assert (reply.losses, reply.validation, reply.shortened, reply.bytes_up) == (
        {"prompt": 2.5},
        1.25,
        2,
        len(GOOD.payload),
    )
    assert verdict(GOOD) is None


def test_an_answer_says_six_figures_and_no_more() -> None:
    update = replace(REPLY, seconds=0.12345, spikes=3, bytes_up=7, bytes_down=8)
    message = write_update(update, b"x", parse_codec("int8"))
    assert json.loads(message.header) == {
        "fedsp": 1,
        "kind": "update",
        "codec": "int8",
        "round": 3,
        "client": "hospital-a",
        "losses": {"prompt": 2.5},
        "validation": 1.25,
        "seconds": 0.123,
        "shortened": 2,
        "spikes": 3,
        "sha256": hashlib.sha256(b"x").hexdigest(),
    }
    read = read_reply(write_update(update, pack(update.payload)), REQUEST)
    assert isinstance(read, Update) and (read.seconds, read.spikes, read.shortened) == (0.123, 3, 2)
    asked = json.loads(write_request(replace(REQUEST, answer_in=parse_codec("sign"))).header)
    assert asked == {
        "fedsp": 1,
        "kind": "train",
        "package": "",
        "run": REQUEST.run,
        "round": 3,
        "client": "hospital-a",
        "seed": REQUEST.seed,
        "codec": "float32",
        "answer": "sign",
        "sha256": hashlib.sha256(pack(PROMPT_SENT)).hexdigest(),
    }


@pytest.mark.parametrize("train", [True, False])
def test_what_is_asked_survives_the_way(train: bool) -> None:
    message = write_request(replace(REQUEST, train=train))
    assert (
        json.loads(message.header)["kind"] == ("train" if train else "validate")
        and read_request(message).train is train
    )
    with pytest.raises(PayloadError, match="the message is not a request"):
        read_request(
            replace(
                message,
                header=message.header.replace('"train"' if train else '"validate"', '"look"'),
            )
        )


def test_bounds_of_a_reply_are_met_to_the_last_byte() -> None:
    most = most_bytes({PROMPT: tuple(PROMPT_SENT[PROMPT].shape)})
    for size, said in (
        (most, "SHA-256"),
        (most + 1, f"has {most + 1} bytes, more than the {most} that the messenger can have"),
    ):
        assert said in str(verdict(replace(GOOD, payload=b"x" * size)))
    eight = {f"stage_{'abcdefgh'[number]}": 1e4 for number in range(8)}
    for losses, why in (
        (eight, None),
        ({**eight, "more": 1.0}, "losses are not a few numbers"),
        ({"a": 1e4 + 1}, "is not a number from 0 to 10000"),
        ({"a" * 21: 1.0}, "not a few"),
    ):
        assert (
            (verdict(forged(GOOD.payload, losses=losses)) is None)
            if why is None
            else why in str(verdict(forged(GOOD.payload, losses=losses)))
        )
    for name, most_of_it, called in (
        ("seconds", 1e9, "seconds"),
        ("shortened", 1e12, "count of shortened examples"),
        ("spikes", 1e12, "count of spikes"),
    ):
        assert verdict(forged(GOOD.payload, **{name: most_of_it})) is None
        assert (
            verdict(forged(GOOD.payload, **{name: most_of_it + 1}))
            == f"the reply's {called} is not a number from 0 to {most_of_it:g}"
        )
    room = LONGEST_HEADER - len(json.dumps(json.loads(GOOD.header) | {"more": ""}))
    assert verdict(forged(GOOD.payload, more="x" * room)) is None
    assert f"has {LONGEST_HEADER + 1} characters, more than {LONGEST_HEADER}" in str(
        verdict(forged(GOOD.payload, more="x" * (room + 1)))
    )
    assert "the reply's loss 'a' is not a number" in str(
        verdict(forged(GOOD.payload, losses={"a": -1}))
    )
    header = json.loads(GOOD.header)
    del header["codec"], header["spikes"]
    read = read_reply(Message(json.dumps(header), GOOD.payload), REQUEST)
    assert isinstance(read, Update) and read.spikes == 0, (
        "as a client of an earlier version answers, in numbers as they are"
    )
    unknown = write_refusal(REQUEST, "policy").header.replace('"policy"', '"whatever"')
    assert (
        getattr(read_reply(Message(unknown), REQUEST), "reason", "")
        == "the client refused and gave no known reason"
    )


SECRET = hashlib.sha256(b"the client's").digest()


def keyed(statement: bytes) -> bytes:
    """A signature that only whoever has the secret can make."""
    return hmac.digest(SECRET, statement, "sha256")


def genuine(statement: bytes, signature: bytes) -> bool:
    return hmac.compare_digest(keyed(statement), signature)


ASKED = write_request(REQUEST)
SIGNED = sign_reply(GOOD, ASKED, keyed)


@given(
    place=st.integers(0, 10_000),
    letter=st.characters(codec="utf-8"),
    how=st.sampled_from(["replace", "insert", "cut"]),
)
def test_a_signed_reply_is_taken_as_it_was_signed_and_in_no_other_way(
    place: int, letter: str, how: str
) -> None:
    assert signed_reply(SIGNED, ASKED, genuine) == GOOD
    at = place % len(SIGNED.header)
    header = SIGNED.header[:at] + (
        letter + SIGNED.header[at + (how == "replace") :] if how != "cut" else ""
    )
    changed = replace(SIGNED, header=header)
    try:
        assert signed_reply(changed, ASKED, genuine) == GOOD, (
            "what bytes.fromhex reads alike, blanks between digits, is the same signature"
        )
    except PayloadError as error:
        told = str(error)
        assert told.startswith("the reply is not signed with the client's key")
        assert ("it has no signature" in told) == ("\n" not in header)


def test_a_signature_is_for_one_request_and_its_payload_is_under_it() -> None:
    made = sign_reply(GOOD, write_request(REQUEST), keyed)
    assert (
        made.header.partition("\n")[2] == GOOD.header
        and len(bytes.fromhex(made.header.partition("\n")[0])) == 32
        and made.payload == GOOD.payload
    )
    assert signed_reply(made, write_request(REQUEST), genuine) == GOOD
    for other in (
        replace(REQUEST, seed=1),
        replace(REQUEST, run="ab"),
        replace(REQUEST, round=4),
        replace(REQUEST, payload={PROMPT: PROMPT_SENT[PROMPT] + 1}),
    ):
        with pytest.raises(
            PayloadError, match="not signed with the client's key, or answers another request"
        ):
            signed_reply(SIGNED, write_request(other), genuine)
    with pytest.raises(PayloadError, match="not signed"):
        signed_reply(SIGNED, write_request(REQUEST, "another package"), genuine)
    swapped = signed_reply(replace(SIGNED, payload=SIGNED.payload[:-1] + b"x"), ASKED, genuine)
    assert "SHA-256" in str(getattr(read_reply(swapped, REQUEST), "reason", "")), (
        "the header that is signed has the payload's digest"
    )
    for nothing in (GOOD, Message(""), Message("\n"), Message("zz\n" + GOOD.header)):
        with pytest.raises(PayloadError, match="not signed"):
            signed_reply(nothing, ASKED, genuine)


def test_a_validation_reply_carries_no_prompt() -> None:
    message = write_update(REPLY, b"")
    reply = read_reply(message, replace(REQUEST, train=False))
    assert message.payload == b"" and isinstance(reply, Update) and reply.validation == 1.25


@pytest.mark.parametrize("code", sorted(REFUSALS))
def test_a_refusal_is_a_code_and_the_servers_own_sentence(code: str) -> None:
    message = write_refusal(REQUEST, code)
    assert (
        set(json.loads(message.header)) == {"fedsp", "kind", "round", "client", "code", "sha256"}
        and not message.payload
    )
    reply = read_reply(message, REQUEST)
    assert isinstance(reply, Failure) and reply.reason == REFUSALS[code]


def test_no_text_of_a_client_s_error_leaves(tmp_path: Path) -> None:
    from fedsp.federation.transport.request_handler import answer

    class Broken:
        def client_update(self, client: object, request: Request) -> Update:
            raise ValueError("the patient Jane Doe was born in Penrith")

    class Diverged:
        def client_update(self, client: object, request: Request) -> Update:
            raise TrainingDiverged("the loss of Jane Doe is nan")

    nobody: Any = lambda client: SimpleNamespace(store=StateStore(tmp_path))
    methods: list[tuple[Any, str]] = [(Broken(), "failed"), (Diverged(), "diverged")]
    for method, code in methods:
        logged: list[str] = []

        def log(request: Request, error: Exception, here: list[str] = logged) -> None:
            here.append(str(error))

        message = answer(write_request(REQUEST), method, nobody, log=log)
        assert (
            "Jane" not in message.header
            and json.loads(message.header)["code"] == code
            and "Jane" in logged[0]
        )


def flipped(data: bytes, positions: list[int]) -> bytes:
    body = bytearray(data)
    for position in positions:
        body[position // 8 % len(body)] ^= 1 << position % 8
    return bytes(body)


payloads = st.one_of(
    st.lists(st.integers(0, 8 * len(GOOD.payload) - 1), min_size=1, max_size=6, unique=True).map(
        lambda flips: flipped(GOOD.payload, flips)
    ),
    st.integers(0, len(GOOD.payload) - 1).map(lambda length: GOOD.payload[:length]),
    st.binary(min_size=1, max_size=64).map(lambda more: GOOD.payload + more),
    st.binary(max_size=4096),
)


@settings(
    max_examples=1500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(payload=payloads)
def test_a_payload_changed_on_its_way_is_never_accepted(payload: bytes) -> None:
    assert payload == GOOD.payload or verdict(Message(GOOD.header, payload)) is not None


def layouts(header: dict[str, Any], body: bytes) -> bytes:
    """safetensors bytes by hand, for what its own writer would not write."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


BODY = PROMPT_SENT[PROMPT].numpy().tobytes()
DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
]
shapes = st.lists(st.integers(0, 9), max_size=4).filter(lambda shape: shape != [4, 8, 16])
forgeries = st.one_of(
    st.sampled_from(DTYPES).map(lambda dtype: save({PROMPT: PROMPT_SENT[PROMPT].to(dtype)})),
    shapes.map(lambda shape: save({PROMPT: torch.zeros(shape)})),
    st.tuples(
        st.integers(0, 511),
        st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e38, -1e38]),
    ).map(
        lambda place: save(
            {
                PROMPT: (
                    PROMPT_SENT[PROMPT]
                    .flatten()
                    .index_fill(0, torch.tensor([place[0]]), place[1])
                    .reshape(4, 8, 16)
                )
            }
        )
    ),
    st.sampled_from(["prompt", "prompt.value", "weights", "", "../prompt.values"]).map(
        lambda name: save({name: PROMPT_SENT[PROMPT]})
    ),
    st.just(save({PROMPT: PROMPT_SENT[PROMPT], "more": torch.zeros(2)})),
    st.just(pickle.dumps(PROMPT_SENT)),
    st.binary(max_size=512).map(lambda more: pickle.dumps(more)),
    st.tuples(st.integers(0, 2**63), st.integers(0, 2**63))
    .map(
        lambda offsets: layouts(
            {PROMPT: {"dtype": "F32", "shape": [4, 8, 16], "data_offsets": list(offsets)}}, BODY
        )
    )
    .filter(lambda data: b"[0, 2048]" not in data),
    st.sampled_from(["F99", "F4", "BF16", "F8_E4M3", "C64", "", "f32"]).map(
        lambda dtype: layouts(
            {PROMPT: {"dtype": dtype, "shape": [4, 8, 16], "data_offsets": [0, 2048]}}, BODY
        )
    ),
    st.lists(st.integers(-(2**62), 2**62), max_size=4)
    .filter(lambda shape: shape != [4, 8, 16])
    .map(
        lambda shape: layouts(
            {PROMPT: {"dtype": "F32", "shape": shape, "data_offsets": [0, 2048]}}, BODY
        )
    ),
    st.integers(0, 2**64 - 1)
    .map(lambda length: length.to_bytes(8, "little") + GOOD.payload[8:])
    .filter(lambda data: data != GOOD.payload),
)


@settings(
    max_examples=1500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(payload=forgeries)
def test_a_forged_payload_is_never_accepted_though_its_digest_fits(payload: bytes) -> None:
    assert verdict(forged(payload)) is not None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
)


@settings(
    max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    field=st.sampled_from(sorted(json.loads(GOOD.header))),
    value=json_values,
    cut=st.integers(0, len(GOOD.header)),
    junk=st.text(max_size=40),
    how=st.integers(0, 3),
)
def test_no_header_breaks_the_server_or_passes_for_another(
    field: str, value: object, cut: int, junk: str, how: int
) -> None:
    changed = json.dumps(json.loads(GOOD.header) | {field: value})
    header = [
        changed,
        GOOD.header[:cut],
        GOOD.header[:cut] + junk + GOOD.header[cut:],
        "[" * cut + junk,
    ][how]
    reply = read_reply(Message(header, GOOD.payload), REQUEST)
    if (
        verdict(Message(header, GOOD.payload)) is None
    ):  # then it says what the good one says, but for figures about the client itself
        assert (
            isinstance(reply, Update)
            and (reply.round, reply.client) == (3, "hospital-a")
            and torch.equal(reply.payload[PROMPT], REPLY.payload[PROMPT])
        )


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (forged(GOOD.payload, client="hospital-b"), "is for another client"),
        (forged(GOOD.payload, round=2), "a reply to round 2 in round 3"),
        (forged(GOOD.payload, round=True), "no usable round"),
        (forged(GOOD.payload, fedsp=2), "not one of fedsp's"),
        (forged(GOOD.payload, kind="train"), "neither an update nor a refusal"),
        (
            forged(GOOD.payload, losses={"prompt": float("nan")}),
            "loss 'prompt' is not a number from 0",
        ),
        (forged(GOOD.payload, losses={"prompt": 10**400}), "loss 'prompt' is not a number from 0"),
        (forged(GOOD.payload, losses={"Jane Doe": 1.0}), "losses are not"),
        (forged(GOOD.payload, validation="low"), "validation loss is not a number from 0 to 10000"),
        (forged(GOOD.payload, validation=1e308), "validation loss is not a number"),
        (forged(GOOD.payload, validation=-1e9), "validation loss is not a number"),
        (forged(GOOD.payload, validation=10**400), "validation loss is not a number"),
        (forged(GOOD.payload, seconds=None), "seconds"),
        (Message("{" + " " * 5000), "more than 4096"),
        (Message("", GOOD.payload), "not JSON"),
        (forged(b""), "no payload"),
        (forged(GOOD.payload + bytes(10_000)), "more than the 3072 that the messenger can have"),
    ],
)
def test_each_fault_has_its_sentence(message: Message, reason: str) -> None:
    assert reason in str(verdict(message))


def test_a_damaged_request_is_not_trained_on() -> None:
    message = write_request(REQUEST)
    with pytest.raises(PayloadError, match="changed on its way"):
        read_request(Message(message.header, message.payload[:-1] + b"\x00"))


JUDGE = """
import hashlib, json, os, sys
import torch
from safetensors.torch import save
from fedsp.federation.aggregation.mean import validate_update
from fedsp.federation.state_store import StateStore
from fedsp.federation.transport.message import Message
from fedsp.models.payload import PROMPT, check, pack, shapes_of
from fedsp.federation.messages import Request
from fedsp.federation.transport.wire import read_reply

torch.set_num_threads(1)  # so that a fork has all that its parent had

def peak():
    status = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

header = {"fedsp": 1, "kind": "update", "round": 1, "client": "a", "losses": {}}
header |= {"validation": None, "seconds": 1.0, "shortened": 0, "spikes": 0}

def judge(kind):
    shape = (64, 48, 2048)
    request = Request(run="ab", round=1, client="a", seed=1, payload={PROMPT: torch.zeros(shape)})
    large = torch.zeros(shape)
    if kind == "not finite":
        large[3, 5, 7] = float("nan")
    data = save({PROMPT: large.to(torch.bfloat16) if kind == "another dtype" else large})
    if kind == "cut":
        data = data[:-100]
    if kind == "header too long":
        data = (1 << 40).to_bytes(8, "little") + data[8:]
    message = Message(json.dumps(header | {"sha256": hashlib.sha256(data).hexdigest()}), data)
    del large
    first = Request(run="ab", round=1, client="a", seed=1, payload={PROMPT: torch.zeros(300, 1000)})
    data_of_first = save({PROMPT: torch.ones(300, 1000)})
    digest = hashlib.sha256(data_of_first).hexdigest()
    # code of the first use
    to_first = read_reply(Message(json.dumps(header | {"sha256": digest}), data_of_first), first)
    validate_update(to_first, {"a": first}, {}, 9.0)
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = peak()
    reason = validate_update(read_reply(message, request), {"a": request}, {}, 1.0)
    found = {"accepted": reason is None, "took": peak() - before, "payload": len(data)}
    print(json.dumps(found), flush=True)

for kind in sys.argv[1:]:
    child = os.fork()
    if not child:
        judge(kind)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, kind
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="the peak of a process's memory is read from Linux's /proc",
)
def test_judging_a_reply_takes_little_more_memory_than_twice_its_size() -> None:
    """Resident memory, torch's own included, in a process for each; the payload's own bytes are
    there before. One copy more would make it three times."""
    kinds = ["good", "not finite", "another dtype", "cut", "header too long"]
    done = subprocess.run(
        [sys.executable, "-c", JUDGE, *kinds],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    for kind, line in zip(kinds, done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert found["accepted"] == (kind == "good")
        assert found["took"] + found["payload"] < 2.5 * found["payload"], (kind, found)
