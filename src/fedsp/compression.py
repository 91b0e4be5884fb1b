"""Payloads in few bytes: the difference from what both ends know, coded, then compressed by zstandard. Whoever codes gets back what was left out and adds
it to the next difference: error feedback (Seide et al., Interspeech 2014, 1-bit SGD; Karimireddy et al., ICML 2019, https://arxiv.org/abs/1901.09847).

What is read is hostile until it has been held against the one layout that a coding has for these shapes. Decoding is additions and multiplications
element by element, so both ends, and every machine, come to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import zstandard
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedsp.codings import Coding
from fedsp.errors import PayloadError
from fedsp.payload import Payload, Shapes, check, pack, shapes_of, unpack

BLOCK = 64
"""Numbers that share a scale. A scale is a bfloat16: a quarter of a bit for each number."""

LARGEST = {8: 127, 4: 7}
LEVEL, WINDOW = 9, 1 << 27
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def write_values(payload: Payload, known: Payload, coding: Coding) -> bytes:
    """The payload as it travels in a coding; `known` is what the other end has. What the coding leaves out is forgotten: see `say`.

    Raises:
        PayloadError: a difference is not finite, or too large for the coding.
    """
    return pack(payload) if coding.exact else say(difference(payload, known), {}, coding)[0]


def read_values(data: bytes, known: Payload, coding: Coding) -> Payload:
    """What `write_values` wrote.

    Raises:
        PayloadError: the bytes are not in that coding, or of other names and shapes than `known`.
    """
    if coding.exact:
        return unpack(data)
    change = decode(data, coding, shapes_of(known))
    return {name: known[name] + change[name] for name in sorted(known)}


def difference(payload: Payload, known: Payload) -> Payload:
    """The change from what is known."""
    return {name: payload[name] - known[name] for name in sorted(known)}


def say(change: Payload, owed: Payload, coding: Coding) -> tuple[bytes, Payload, Payload]:
    """A change, with what is `owed` from earlier ones, in a coding: the bytes, the change that they say, and what is owed now.

    Raises:
        PayloadError: a number is not finite, or too large for the coding.
    """
    meant = {name: value + owed[name] if name in owed else value for name, value in change.items()}
    data = encode(meant, coding)
    said = decode(data, coding, shapes_of(meant))
    return data, said, difference(meant, said)


def encode(change: Payload, coding: Coding) -> bytes:
    """A change in a coding other than float32.

    Raises:
        PayloadError: a number is not finite, or too large for the coding.
    """
    parts: dict[str, Tensor] = {}
    for name, values in change.items():
        coded = _parts(values.detach().to("cpu", torch.float32), coding) if bool(torch.isfinite(values).all()) else {"": values}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in coded.values()):
            raise PayloadError(f"{name} has changed by numbers that are not finite, or by more than {coding} can say")
        parts |= {f"{name}/{part}": tensor for part, tensor in coded.items()}
    data: bytes = zstandard.ZstdCompressor(level=LEVEL).compress(save(parts))
    return data


def decode(data: bytes, coding: Coding, shapes: Shapes) -> Payload:
    """The change, float32, that bytes in a coding say of tensors with these names and shapes.

    Raises:
        PayloadError: the bytes are not exactly that.
    """
    layouts = {name: _layout(coding, shape) for name, shape in shapes.items()}
    expected = {f"{name}/{part}": where for name, layout in layouts.items() for part, where in layout.items()}
    most = sum(math.prod(shape) * dtype.itemsize for dtype, shape in expected.values()) + 512 * (len(expected) + 1)
    try:
        with zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(data) as reader:
            plain = reader.read(most + 1)
        if len(plain) > most:
            raise PayloadError(f"the {len(data)} bytes received hold more than the {most} that a change in {coding} can have")
        parts = load(plain)
    except (zstandard.ZstdError, SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise PayloadError(f"the {len(data)} bytes received are no change in {coding}: {error}") from error
    found: Layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()}
    if found != expected:
        raise PayloadError(f"the {len(data)} bytes received are a change in {coding} of something else than {sorted(shapes)[:4]} with these shapes")
    change = {name: _whole({part: parts[f"{name}/{part}"] for part in layouts[name]}, coding, tuple(shape)) for name, shape in sorted(shapes.items())}
    check(change, shapes)
    return change


def _layout(coding: Coding, shape: tuple[int, ...]) -> Layout:
    """The parts of one coded tensor, with types and shapes."""
    count = math.prod(shape)
    if coding.kind == "float16":
        return {"numbers": (torch.float16, (count,))}
    if coding.kind == "top_k":
        kept = _kept(coding, count)
        return {"gaps": (torch.uint8, (4, kept)), **_rounded_layout(kept, 8)}
    if coding.kind == "low_rank":
        rows, columns, rank = _matrix(coding, shape)
        sides = {"left": rows * rank, "right": rank * columns}
        return {f"{side}.{part}": where for side, size in sides.items() for part, where in _rounded_layout(size, 8).items()}
    return _rounded_layout(count, _bits(coding))


def _parts(values: Tensor, coding: Coding) -> dict[str, Tensor]:
    """One tensor, coded."""
    flat = values.flatten()
    if coding.kind == "float16":
        return {"numbers": flat.half()}
    if coding.kind == "top_k":
        where = torch.argsort(flat.abs(), descending=True, stable=True)[: _kept(coding, len(flat))].sort().values
        gaps = torch.diff(where, prepend=torch.tensor([-1])) - 1
        return {"gaps": torch.stack([(gaps >> shift & 255).to(torch.uint8) for shift in (0, 8, 16, 24)]), **_round(flat[where], 8)}
    if coding.kind == "low_rank":
        rows, columns, rank = _matrix(coding, tuple(values.shape))
        left, right = _factors(flat.view(rows, columns).double(), rank)
        return {f"{side}.{part}": tensor for side, factor in (("left", left), ("right", right)) for part, tensor in _round(factor.flatten(), 8).items()}
    return _round(flat, _bits(coding))


def _whole(parts: Mapping[str, Tensor], coding: Coding, shape: tuple[int, ...]) -> Tensor:
    """The tensor that coded parts say."""
    count = math.prod(shape)
    if coding.kind == "float16":
        return parts["numbers"].float().view(shape)
    if coding.kind == "top_k":
        planes = parts["gaps"].long()
        where = (planes[0] + (planes[1] << 8) + (planes[2] << 16) + (planes[3] << 24) + 1).cumsum(0) - 1
        if count and int(where[-1]) >= count:
            raise PayloadError(f"the change in {coding} names numbers that are not there")
        return torch.zeros(count).index_copy(0, where, _unround(parts, _kept(coding, count), 8)).view(shape)
    if coding.kind == "low_rank":
        rows, columns, rank = _matrix(coding, shape)
        sides = {side: {part: parts[f"{side}.{part}"] for part in ("numbers", "scales")} for side in ("left", "right")}
        left, right = _unround(sides["left"], rows * rank, 8).view(rows, rank), _unround(sides["right"], rank * columns, 8).view(rank, columns)
        whole = torch.zeros(rows, columns)
        for each in range(rank):  # not a matrix product: its sums would differ from machine to machine
            whole = whole + left[:, each, None] * right[each]
        return whole.view(shape)
    return _unround(parts, count, _bits(coding)).view(shape)


def _bits(coding: Coding) -> int:
    return {"int8": 8, "int4": 4, "sign": 1}[coding.kind]


def _kept(coding: Coding, count: int) -> int:
    return min(count, max(1, round(coding.share * count)))


def _matrix(coding: Coding, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows, columns and rank of a tensor read as a matrix: its first dimension by all others."""
    rows = shape[0] if shape else 1
    columns = math.prod(shape[1:])
    return rows, columns, min(coding.rank, rows, columns)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a rank: an orthonormal basis, and what each vector of it takes."""
    if matrix.shape[0] > matrix.shape[1]:
        right, left = _factors(matrix.T, rank)
        return left.T, right.T
    basis = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]
    return basis.float(), (basis.T @ matrix).float()


def _rounded_layout(count: int, bits: int) -> Layout:
    numbers = (torch.int8, (count,)) if bits == 8 else (torch.uint8, (math.ceil(count * bits / 8),))
    return {"numbers": numbers, "scales": (torch.bfloat16, (math.ceil(count / BLOCK),))}


def _round(flat: Tensor, bits: int) -> dict[str, Tensor]:
    """Numbers (N,) as whole multiples of a scale for each block; in one bit their signs, and the mean of their sizes as the scale."""
    blocks = _filled(flat, BLOCK)
    if bits == 1:
        sizes = _filled(torch.ones_like(flat), BLOCK).sum(dim=1)
        return {"numbers": _packed((flat >= 0).to(torch.uint8), bits), "scales": (blocks.abs().sum(dim=1) / sizes).bfloat16()}
    largest = LARGEST[bits]
    scales = (blocks.abs().amax(dim=1) / largest).bfloat16()
    safe = torch.where(scales > 0, scales, torch.ones_like(scales)).float()
    numbers = (blocks / safe[:, None]).round().clamp(-largest, largest).flatten()[: len(flat)].to(torch.int8)
    return {"numbers": _packed((numbers + 8).to(torch.uint8), bits) if bits == 4 else numbers, "scales": scales}


def _unround(parts: Mapping[str, Tensor], count: int, bits: int) -> Tensor:
    numbers = parts["numbers"]
    if bits < 8:
        codes = _unpacked(numbers, count, bits).to(torch.int8)
        numbers = 2 * codes - 1 if bits == 1 else codes - 8
    return numbers.float() * parts["scales"].float().repeat_interleave(BLOCK)[:count]


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes (N,) of a few bits each, as bytes, the first in the lowest bits."""
    return (_filled(codes, 8 // bits) << torch.arange(0, 8, bits, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def _unpacked(packed: Tensor, count: int, bits: int) -> Tensor:
    return (packed[:, None] >> torch.arange(0, 8, bits, dtype=torch.uint8) & (1 << bits) - 1).flatten()[:count]


def _filled(flat: Tensor, width: int) -> Tensor:
    """Numbers (N,) in rows of a width, the last one filled with zeros."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % width)).view(-1, width)
