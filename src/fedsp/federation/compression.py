"""Compression of payloads: the difference from a payload that both ends have is quantized by a
codec, then compressed with zstandard. The sender adds the quantization error (residual) to its next
difference: error feedback (Seide et al., Interspeech 2014, 1-bit SGD; Karimireddy et al., ICML
2019, https://arxiv.org/abs/1901.09847).

Received bytes are untrusted until they match the layout that the codec has for the expected shapes.
Decoding is elementwise addition and multiplication, so it gives the same bits on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import zstandard
from safetensors.torch import load, save
from torch import Tensor

from fedsp.errors import PayloadError
from fedsp.federation.codecs import FLOAT32, Codec
from fedsp.models.payload import UNREADABLE, Payload, Shapes, check, pack, shapes_of, unpack

BLOCK = 64
"""Values that share a scale. A scale is a bfloat16: a quarter of a bit per value."""

BITS = {"int8": 8, "int4": 4, "sign": 1}
LARGEST = {8: 127, 4: 7}
LEVEL, WINDOW = 9, 1 << 27
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def write_values(payload: Payload, known: Payload, codec: Codec) -> bytes:
    """The payload encoded for sending; `known` is the payload that the receiver has. The
    quantization error is discarded; `encode_with_residual` keeps it.

    Raises:
        PayloadError: a difference is not finite, or too large for the codec.
    """
    return (
        pack(payload)
        if codec == FLOAT32
        else encode_with_residual(difference(payload, known), {}, codec)[0]
    )


def read_values(data: bytes, known: Payload, codec: Codec) -> Payload:
    """What `write_values` wrote.

    Raises:
        PayloadError: the bytes are not in that codec, or of other names and shapes than `known`.
    """
    if codec == FLOAT32:
        return unpack(data)
    change = decode(data, codec, shapes_of(known))
    return {name: known[name] + change[name] for name in sorted(known)}


def difference(payload: Payload, known: Payload) -> Payload:
    """The change from what is known."""
    return {name: payload[name] - known[name] for name in sorted(known)}


def encode_with_residual(
    change: Payload, residual: Payload, codec: Codec
) -> tuple[bytes, Payload, Payload]:
    """Encode a change plus the residual of earlier ones (error feedback): the bytes, the change
    that they decode to, and the new residual.

    Raises:
        PayloadError: a number is not finite, or too large for the codec.
    """
    corrected = {
        name: value + residual[name] if name in residual else value
        for name, value in change.items()
    }
    data = encode(corrected, codec)
    decoded = decode(data, codec, shapes_of(corrected))
    return data, decoded, difference(corrected, decoded)


def encode(change: Payload, codec: Codec) -> bytes:
    """A change in a codec other than float32.

    Raises:
        PayloadError: a number is not finite, or too large for the codec.
    """
    parts: dict[str, Tensor] = {}
    for name, values in change.items():
        coded = _parts(values.detach().to("cpu", torch.float32), codec)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in [values, *coded.values()]):
            raise PayloadError(
                f"the change of {name} has values that are not finite or too large for {codec}:"
                " lower the learning rate"
            )
        parts |= {f"{name}/{part}": tensor for part, tensor in coded.items()}
    data: bytes = zstandard.ZstdCompressor(level=LEVEL).compress(save(parts))
    return data


def decode(data: bytes, codec: Codec, shapes: Shapes) -> Payload:
    """Decode a change: float32 tensors with these names and shapes.

    Raises:
        PayloadError: the bytes are not a change in this codec with exactly these tensors.
    """
    layouts = {name: _layout(codec, shape) for name, shape in shapes.items()}
    expected = {
        f"{name}/{part}": where
        for name, layout in layouts.items()
        for part, where in layout.items()
    }
    most = sum(math.prod(shape) * dtype.itemsize for dtype, shape in expected.values()) + 512 * (
        len(expected) + 1
    )
    try:
        with zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(data) as reader:
            plain = reader.read(most + 1)
        if len(plain) > most:
            raise PayloadError(
                f"the {len(data)} bytes received hold more than the {most} that a change in {codec}"
                " can have"
            )
        parts = load(plain)
    except (*UNREADABLE, zstandard.ZstdError) as error:
        raise PayloadError(
            f"the {len(data)} bytes received are not a valid change in {codec}: {error}"
        ) from error
    found: Layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()}
    if found != expected:
        raise PayloadError(
            f"the {len(data)} bytes received are a change in {codec} of something else than"
            f" {sorted(shapes)[:4]} with these shapes"
        )
    change = {
        name: _whole({part: parts[f"{name}/{part}"] for part in layouts[name]}, codec, tuple(shape))
        for name, shape in sorted(shapes.items())
    }
    check(change, shapes)
    return change


def _layout(codec: Codec, shape: tuple[int, ...]) -> Layout:
    """The parts of one coded tensor, with types and shapes."""
    count = math.prod(shape)
    if codec == "float16":
        return {"numbers": (torch.float16, (count,))}
    bits = BITS[codec]
    numbers = (torch.int8, (count,)) if bits == 8 else (torch.uint8, (math.ceil(count * bits / 8),))
    return {"numbers": numbers, "scales": (torch.bfloat16, (math.ceil(count / BLOCK),))}


def _parts(values: Tensor, codec: Codec) -> dict[str, Tensor]:
    """One tensor, coded: integer multiples of each block's scale; with one bit, signs, with the
    block's mean absolute value as the scale."""
    flat = values.flatten()
    if codec == "float16":
        return {"numbers": flat.half()}
    bits, blocks = BITS[codec], _filled(flat, BLOCK)
    if bits == 1:
        sizes = _filled(torch.ones_like(flat), BLOCK).sum(dim=1)
        return {
            "numbers": _packed((flat >= 0).to(torch.uint8), bits),
            "scales": (blocks.abs().sum(dim=1) / sizes).bfloat16(),
        }
    largest = LARGEST[bits]
    scales = (blocks.abs().amax(dim=1) / largest).bfloat16()
    safe = torch.where(scales > 0, scales, torch.ones_like(scales)).float()
    multiples = (blocks / safe[:, None]).round().clamp(-largest, largest)
    numbers = multiples.flatten()[: len(flat)].to(torch.int8)
    if bits == 4:
        numbers = _packed((numbers + 8).to(torch.uint8), bits)
    return {"numbers": numbers, "scales": scales}


def _whole(parts: Mapping[str, Tensor], codec: Codec, shape: tuple[int, ...]) -> Tensor:
    """The tensor that coded parts say."""
    count, numbers = math.prod(shape), parts["numbers"]
    if codec == "float16":
        return numbers.float().view(shape)
    if (bits := BITS[codec]) < 8:
        codes = _unpacked(numbers, count, bits).to(torch.int8)
        numbers = 2 * codes - 1 if bits == 1 else codes - 8
    scales = parts["scales"].float().repeat_interleave(BLOCK)[:count]
    return (numbers.float() * scales).view(shape)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes (N,) of a few bits each, as bytes, the first in the lowest bits."""
    return (_filled(codes, 8 // bits) << torch.arange(0, 8, bits, dtype=torch.uint8)).sum(
        dim=1, dtype=torch.uint8
    )


def _unpacked(packed: Tensor, count: int, bits: int) -> Tensor:
    return (
        packed[:, None] >> torch.arange(0, 8, bits, dtype=torch.uint8) & (1 << bits) - 1
    ).flatten()[:count]


def _filled(flat: Tensor, width: int) -> Tensor:
    """Numbers (N,) in rows of a width, the last one filled with zeros."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % width)).view(-1, width)
