"""Payloads in few bytes: what each codec says and leaves out, what is refused, and that no promise
of privacy depends on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedsp import api as commands
from fedsp import privacy, storage
from fedsp.config import CodecName
from fedsp.errors import ConfigurationError, PayloadError
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation import codecs, compression
from fedsp.federation.aggregation.private import private_mean
from fedsp.federation.codecs import FLOAT32, parse_codec
from fedsp.federation.compression import (
    decode,
    encode,
    encode_with_residual,
    read_values,
    write_values,
)
from fedsp.federation.loop import RunState
from fedsp.federation.messages import Failure, Request, Update
from fedsp.federation.methods.private import PrivateAnswers
from fedsp.federation.state_store import StateStore
from fedsp.federation.transport.message import Message
from fedsp.federation.transport.request_handler import answer, answer_bytes
from fedsp.federation.transport.wire import (
    CannotRead,
    read_reply,
    read_request,
    write_request,
    write_update,
)
from fedsp.models.payload import PROMPT, Payload, as_row, pack, shapes_of
from fedsp.privacy import Ledger
from support.private_runs import CLIENT, EXAMPLE
from support.small_runs import settings

NAMES = ["float16", "int8", "int4", "sign"]
CODINGS = [parse_codec(name) for name in NAMES]
CHANGE: Payload = {
    PROMPT: (
        torch.randn(20, 8, 24, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-4, 0, 8)[:, None]
    )
}
KNOWN: Payload = {PROMPT: torch.randn(20, 8, 24, generator=torch.Generator().manual_seed(2))}


def said(name: str, change: Payload = CHANGE) -> torch.Tensor:
    codec = parse_codec(name)
    return decode(encode(change, codec), codec, shapes_of(change))[PROMPT]


def test_rounded_numbers_are_off_by_half_a_step_of_their_block() -> None:
    blocks = CHANGE[PROMPT].flatten().view(-1, compression.BLOCK)
    for name, levels in (("int8", 127), ("int4", 7)):
        off = (said(name).flatten().view(-1, compression.BLOCK) - blocks).abs().amax(dim=1)
        step = blocks.abs().amax(dim=1) / levels
        assert bool((off <= step * (0.5 + levels / 256) + 1e-12).all()), (
            "half a step, and the rounding of its scale to bfloat16"
        )
    assert torch.equal(said("float16"), CHANGE[PROMPT].half().float())


def test_signs_have_the_mean_size_of_their_block() -> None:
    for shape in ((20, 8, 24), (30, 3), (7,)):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        decoded = said("sign", {PROMPT: values}).flatten()
        assert torch.equal(decoded > 0, values.flatten() >= 0)
        for block, found in zip(
            torch.split(values.flatten(), compression.BLOCK),
            torch.split(decoded, compression.BLOCK),
            strict=True,
        ):
            assert torch.allclose(found.abs(), block.abs().mean(), rtol=1 / 256)


def test_what_is_left_out_is_said_later() -> None:
    """Error feedback loses nothing: what was said and what is owed add up to what was meant."""
    generator = torch.Generator().manual_seed(4)
    for codec in CODINGS:
        meant, decoded = torch.zeros(20, 8, 24), torch.zeros(20, 8, 24)
        residual: Payload = {}
        for _ in range(5):
            change = {PROMPT: torch.randn(20, 8, 24, generator=generator)}
            _, now, residual = encode_with_residual(change, residual, codec)
            meant, decoded = meant + change[PROMPT], decoded + now[PROMPT]
        assert torch.allclose(decoded + residual[PROMPT], meant, atol=1e-4), codec


def test_bytes_are_few() -> None:
    half = 2 * CHANGE[PROMPT].numel()
    noise = {PROMPT: torch.randn(20, 8, 320, generator=torch.Generator().manual_seed(5))}
    least = {"float16": 1.0, "int8": 1.9, "int4": 4.0, "sign": 12.0}
    for name, times in least.items():
        assert 2 * noise[PROMPT].numel() / len(encode(noise, parse_codec(name))) > times, name
    assert len(write_values(KNOWN, KNOWN, FLOAT32)) > 2 * half


payloads = st.lists(st.integers(1, 5), min_size=0, max_size=3).flatmap(
    lambda shape: st.lists(
        st.floats(-1e4, 1e4, width=32),
        min_size=torch.Size(shape).numel(),
        max_size=torch.Size(shape).numel(),
    ).map(lambda numbers: {"a": torch.tensor(numbers).view(shape), "b": torch.zeros(3)})
)


@hypothesis_settings(max_examples=150, deadline=None)
@given(payloads, st.sampled_from(CODINGS))
def test_any_change_is_read_as_it_was_said(change: Payload, codec: Any) -> None:
    data, decoded, residual = encode_with_residual(change, {}, codec)
    again = decode(data, codec, shapes_of(change))
    assert all(
        torch.equal(again[name], decoded[name]) and again[name].shape == change[name].shape
        for name in change
    )
    for name in change:
        assert torch.allclose(decoded[name] + residual[name], change[name], rtol=1e-4, atol=1e-2)


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(CODINGS),
    st.binary(max_size=200),
    st.integers(0, 10_000),
    st.integers(0, 255),
    st.booleans(),
)
def test_other_bytes_are_refused_or_are_a_finite_change(
    codec: Any, raw: bytes, place: int, byte: int, inside: bool
) -> None:
    """Random bytes, and good ones with one byte changed, before and after zstandard."""
    good = encode({"a": torch.arange(12.0).view(3, 4)}, codec)
    plain = bytearray(zstandard.decompress(good) if inside else good)
    plain[place % len(plain)] = byte
    for data in (raw, bytes(plain), zstandard.compress(bytes(plain)), zstandard.compress(raw)):
        try:
            change = decode(data, codec, {"a": (3, 4)})
        except PayloadError:
            continue
        assert change["a"].shape == (3, 4) and bool(torch.isfinite(change["a"]).all())


def refused(data: bytes, name: str, sentence: str) -> None:
    with pytest.raises(PayloadError, match=sentence):
        decode(data, parse_codec(name), {"a": (3, 4)})


def test_what_is_no_change_is_refused_by_name() -> None:
    for bomb in (
        zstandard.compress(bytes(200_000_000)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(200_000_000)),
    ):
        assert len(bomb) < 20_000
        refused(bomb, "int8", "hold more than the .* that a change in int8 can have")
    refused(b"PK\x03\x04", "int8", "are not a valid change in int8")
    refused(
        encode({"a": torch.zeros(3, 5)}, parse_codec("int8")),
        "int8",
        "a change in int8 of something else",
    )
    refused(encode({"b": torch.zeros(3, 4)}, parse_codec("int4")), "int4", "of something else")
    refused(encode({"a": torch.zeros(3, 4)}, parse_codec("int4")), "int8", "of something else")
    endless = {
        "a/numbers": torch.ones(12, dtype=torch.int8),
        "a/scales": torch.full((1,), float("inf"), dtype=torch.bfloat16),
    }
    refused(zstandard.compress(save(endless)), "int8", "not finite")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_coding_cannot_say_is_refused_by_its_writer(name: str) -> None:
    for wrong in [float("nan"), float("inf")] + ([1e5] if name == "float16" else []):
        with pytest.raises(PayloadError, match="has values that are not finite or too large for"):
            encode({PROMPT: torch.full((2, 3), wrong)}, parse_codec(name))


@pytest.mark.parametrize("text", ["int16", "top_k(0.1)", "", "int8 "])
def test_an_unknown_coding_is_one_clear_sentence(text: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"compression\.up: expected 'float32', 'float16', 'int8', 'int4' or 'sign'",
    ):
        commands.run(settings(tmp_path, compression={"up": text}))


def test_the_configuration_and_the_wire_know_the_same_codings() -> None:
    assert get_args(CodecName) == codecs.KNOWN and [
        str(parse_codec(name)) for name in codecs.KNOWN
    ] == list(codecs.KNOWN)
    with pytest.raises(
        ValueError, match="there is no such codec: write float32, float16, int8, int4 or sign"
    ):
        parse_codec("int3")


# On the wire

INT8 = parse_codec("int8")
SENT = {PROMPT: KNOWN[PROMPT] + 0.5}
REQUEST = Request(
    run="ab",
    round=3,
    client="a",
    seed=7,
    payload=SENT,
    change=write_values(SENT, KNOWN, INT8),
    sent_in=INT8,
    answer_in=INT8,
)


def test_a_request_travels_as_a_change_to_those_who_can_read_it() -> None:
    whole, short = write_request(REQUEST), write_request(REQUEST, follows=True)
    assert len(short.payload) < len(whole.payload) / 3
    assert torch.equal(read_request(whole).payload[PROMPT], SENT[PROMPT])
    read = read_request(short, lambda run, round: KNOWN if (run, round) == ("ab", 2) else None)
    assert (
        torch.equal(read.payload[PROMPT], read_values(REQUEST.change, KNOWN, INT8)[PROMPT])
        and read.answer_in == INT8
    )
    with pytest.raises(CannotRead, match="does not have the broadcast of the round before"):
        read_request(short)


def changed(message: Message, **fields: Any) -> Message:
    return Message(json.dumps(json.loads(message.header) | fields), message.payload)


@pytest.mark.parametrize("field", ["codec", "answer"])
def test_a_codec_that_the_client_does_not_know_is_refused_with_a_code(field: str) -> None:
    nobody: Any = None
    reply = read_reply(
        answer(changed(write_request(REQUEST), **{field: "int3"}), nobody, nobody), REQUEST
    )
    assert isinstance(reply, Failure) and "the client does not know the codec" in reply.reason


def test_a_reply_is_in_the_codec_that_was_asked_for_or_whole() -> None:
    update = Update(round=3, client="a", payload={PROMPT: SENT[PROMPT] + CHANGE[PROMPT]})
    data = write_values(update.payload, SENT, INT8)
    for message, error in (
        (write_update(update, data, INT8), 0.02),
        (write_update(update, pack(update.payload)), 0.0),
    ):
        reply = read_reply(message, REQUEST)
        assert (
            isinstance(reply, Update)
            and float((reply.payload[PROMPT] - update.payload[PROMPT]).abs().max()) <= error
        )
    for codec, sentence in (
        ("int4", "the reply is in int4, and int8 was asked for"),
        ("zip", "the message's codec is not known here"),
        ("float32", "no payload"),
    ):
        reply = read_reply(changed(write_update(update, data, INT8), codec=codec), REQUEST)
        assert isinstance(reply, Failure) and sentence in reply.reason
    forged = zstandard.compress(bytes(100))
    reply = read_reply(
        changed(
            Message(write_update(update, b"", INT8).header, forged),
            sha256=hashlib.sha256(forged).hexdigest(),
        ),
        REQUEST,
    )
    assert isinstance(reply, Failure) and "are not a valid change in int8" in reply.reason


def test_an_answer_that_cannot_be_said_is_named_so() -> None:
    method: Any = type(
        "Method",
        (),
        {
            "client_update": lambda self, party, request: Update(
                round=3, client="a", payload={PROMPT: request.payload[PROMPT] + float("nan")}
            )
        },
    )()
    party: Any = type("Party", (), {"store": StateStore(Path("nowhere"))})
    said: list[str] = []
    reply = read_reply(
        answer(
            write_request(REQUEST),
            method,
            lambda client: party,
            log=lambda request, error: said.append(str(error)),
        ),
        REQUEST,
    )
    assert (
        isinstance(reply, Failure)
        and reply.reason
        == "the client's update has values that are not finite or too large for compression.up:"
        " lower client.learning_rate"
    )
    assert said == [
        "the change of prompt.values has values that are not finite or too large for int8: lower"
        " the learning rate"
    ]


# In runs


@pytest.mark.study
def test_a_compressed_run_resumes_to_the_same_bits_and_sends_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.small_runs import prompt_bits

    coded: dict[str, Any] = {"compression": {"up": "sign", "down": "int4"}}
    plain = commands.run(settings(tmp_path / "plain"))
    whole = commands.run(settings(tmp_path / "whole", **coded))
    assert (
        whole["bytes_up"] < plain["bytes_up"] / 20 and whole["bytes_down"] < plain["bytes_down"] / 2
    )
    records = RunDirectory.open(Path(whole["folder"])).records()
    assert records[1]["bytes_down"] < records[0]["bytes_down"] / 5, "the first broadcast is whole"
    original: Callable[..., None] = RunDirectory.save_round

    def killed(self: RunDirectory, state: RunState, *rest: Any) -> None:
        original(self, state, *rest)
        if state.round == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "save_round", killed)
        with pytest.raises(KeyboardInterrupt):
            commands.run(settings(tmp_path / "killed", **coded))
    commands.resume(tmp_path / "killed" / "run")
    assert prompt_bits(tmp_path / "killed" / "run") == prompt_bits(tmp_path / "whole" / "run")


@pytest.mark.study
def test_compression_costs_nothing_of_example_level_privacy(tmp_path: Path) -> None:
    """It is done to what the noise was added to already, and an answer that is asked for again has
    the same bytes."""
    costs = []
    for name, changes in (
        ("plain", {}),
        ("coded", {"compression": {"up": "int4", "down": "int8"}}),
    ):
        folder = Path(commands.run(settings(tmp_path / name, **EXAMPLE, **changes))["folder"])
        run = RunDirectory.open(folder)
        costs.append(
            [
                Ledger(run.state_store(f"client {client}").folder / privacy.LEDGER).releases()
                for client in ("client-0", "client-1", "client-2")
            ]
        )
    assert costs[0] == costs[1]


def test_a_private_answer_asked_for_again_has_the_same_bytes(tmp_path: Path) -> None:
    from support.private_runs import private_party

    method, party, request = private_party(tmp_path)
    assert isinstance(method, PrivateAnswers)
    request = replace(request, answer_in=parse_codec("sign"))
    first, again = (
        answer_bytes(method.client_update(party, request), request, party) for _ in range(2)
    )
    assert first == again


def test_what_a_client_keeps_of_a_round_is_one_file_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of an answer that fails, nothing; what is saved again of a round leaves the rest."""
    written: list[str] = []
    write = storage.write_tensors

    def counted(path: Path, tensors: Any) -> str:
        written.append(path.name)
        return write(path, tensors)

    monkeypatch.setattr("fedsp.federation.state_store.write_tensors", counted)
    store = StateStore(tmp_path)
    moments = torch.ones(2)
    with store.together():
        store.save(1, {"prompt/exp_avg.a": moments})
        moments.zero_()  # another client's are in its place before it is written
        store.save(1, {"residual/a": torch.zeros(2)})
        assert not store.rounds()
    assert written == ["round-00001.safetensors"]
    assert sorted(store.load(before=2)) == ["prompt/exp_avg.a", "residual/a"]
    with pytest.raises(PayloadError), store.together():
        store.save(2, {"residual/a": torch.ones(2)})
        raise PayloadError("a value is not finite")
    assert store.rounds() == [1]
    store.save(1, {"residual/a": torch.ones(2)})
    assert torch.equal(store.load(before=2)["prompt/exp_avg.a"], torch.ones(2))


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=6, max_size=6), min_size=1, max_size=5
    ),
    st.sampled_from(CODINGS),
    st.floats(0.01, 10.0),
)
def test_a_client_level_bound_holds_after_decompression(
    rows: list[list[float]], codec: Any, bound: float
) -> None:
    """The server clips what it has read, whatever a codec made of it: one client more or less moves
    the mean by the bound at most."""
    sent = {"a": torch.zeros(2, 3)}
    read = {
        str(index): read_values(
            write_values({"a": torch.tensor(row).view(2, 3)}, sent, codec), sent, codec
        )
        for index, row in enumerate(rows)
    }

    def mean(some: dict[str, Payload]) -> torch.Tensor:
        return as_row(private_mean(sent, some, bound=bound, noise_multiplier=0.0, expected=1.0))

    all_of_them = mean(read)
    one_less = mean({name: payload for name, payload in read.items() if name != "0"})
    assert float((all_of_them - one_less).norm()) <= bound * (1 + 1e-5) + 1e-5


def test_a_client_level_run_is_compressed_too(tmp_path: Path) -> None:
    figures = commands.run(settings(tmp_path, **CLIENT, compression={"up": "int8", "down": "int8"}))
    assert figures["updates"] == 9 and figures["failures"] == 0 and figures["epsilon"] > 0
