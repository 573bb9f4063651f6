# mypy: disable-error-code="no-untyped-def,no-untyped-call,type-arg"
"""The passes and the products P = W + Σ s_i B_i A_i as Triton kernels, for GPUs: one launch for all that are alike.

A kernel gets a table with the addresses of every job's tensors and finds its job by a binary search. Inductor, of the
passes as they stand in ``adamw.py``, needs a launch for every few tensors, so that the host takes several times as
long as the GPU, and two minutes to compile (docs/performance.md); these take seconds, and Triton keeps them on disk.
"""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from .compiled import EPD, PFN, UPDATE, Compiled, Numbers, Row, addresses
from .passes import CompileError
from .scalars import numbers as to_device
from .virtual import Products

PIECE = 8192
"""Elements of a row at most that one program takes."""

BLOCK = 1024
"""Elements that it takes at once."""

TILE = 128
"""Rows and columns of a product that one program takes."""

DEPTH = 64
"""Terms of its sums in 16 bits that it takes at once; half as many in fp32, for the shared memory of smaller GPUs."""

_GRAD, _M, _V, _VALUE, _STORE, _WINNER, _SUMS, _DECAY, _SIZE, _PER_ROW, _ROWS, _COLUMNS, _PIECE, _LINE, _FIELDS = (
    tl.constexpr(i) for i in range(15)
)
"""Fields of a job in the table of a pass: ``Row``, then the numbers of its first piece and of its first row."""

_OPTIONS = {"enable_fp_fusion": True}
"""Triton warns of a default that it will change."""

_EPD, _PFN, _UPDATE = tl.constexpr(EPD), tl.constexpr(PFN), tl.constexpr(UPDATE)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Kernels(Compiled):
    """Runs jobs on a GPU."""

    LOW = (torch.bfloat16, torch.float16)

    def __init__(self) -> None:
        self._sums_compiled = False

    def _pass(self, kind: int, rows: Sequence[Row], numbers: Numbers, like: Tensor) -> Iterator[Sequence[int]]:
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):  # of winners and sums, one is loaded at a time
            alike[row.dtypes, _is_aligned(row.addresses[: _WINNER.value], row.columns)].append(i)
        for ((grad, store), aligned), chosen in alike.items():
            listed, pieces, lines = [], 0, 0
            for row in (rows[i] for i in chosen):
                listed.append((*row.addresses, *row.rates, row.rows, row.columns, pieces, lines))
                pieces, lines = pieces + row.rows * -(-row.columns // PIECE), lines + row.rows
            table = to_device(listed, like, torch.long)
            terms = like.new_empty(pieces) if kind < UPDATE else None
            if terms is not None and lines and not self._sums_compiled:  # before the pass has run: it may fail
                with _compiling(like):
                    _sums[(lines,)](table, len(listed), terms.zero_(), PIECE, BLOCK, **_OPTIONS)
                self._sums_compiled = True
            if pieces:
                with _compiling(like):
                    _pass[(pieces,)](
                        table,
                        len(listed),
                        terms,
                        numbers.clip,
                        numbers.gate,
                        numbers.inverse_root,
                        *numbers[:4],
                        kind,
                        _TYPES[grad or torch.float32],
                        None if store is None else _TYPES[store],
                        aligned,
                        PIECE,
                        BLOCK,
                        **_OPTIONS,
                    )
            if terms is not None and lines:
                with _compiling(like):
                    _sums[(lines,)](table, len(listed), terms, PIECE, BLOCK, **_OPTIONS)
            yield chosen

    def _superpose(self, listed: Sequence[Products], scales: Tensor) -> None:
        for each in listed:
            rows, columns, dtype = each.left.shape[2], each.right.shape[2], each.targets[0].dtype
            left, right, depth = each.left * scales[:, None], each.right, DEPTH // 2
            if dtype != torch.float32:
                left, right, depth = _halves(left, first=True), _halves(right, first=False), DEPTH
            tiles = -(-rows // TILE) * -(-columns // TILE)
            owns = addresses(each.targets, each.bases, left, right)
            table = [(*own, rows, columns, i * tiles) for i, own in enumerate(owns)]
            aligned = all(_is_aligned(row[:4], rows, columns) for row in table)
            numbers = (to_device(table, scales, torch.long), len(table), left.shape[1])
            with _compiling(scales):
                _products[(tiles * len(table),)](
                    *numbers, _TYPES[dtype], _TYPES[left.dtype], aligned, TILE, depth, **_OPTIONS, num_warps=8
                )

    def gradients(
        self, grads: Sequence[Tensor], A: Tensor, Bt: Tensor, scales: Tensor, out: tuple[Tensor, Tensor], turned: bool
    ) -> bool:
        """As ``Compiled.gradients``, where all is in 16 bits but ``out``."""
        low = A.dtype in self.LOW and all(each.dtype == A.dtype for each in grads)
        plain = all(self._is_plain(each, low=True) for each in (*grads, A, Bt))
        if not (low and plain and all(map(self._is_plain, (scales, *out))) and A.numel() and Bt.numel()):
            return False
        for left, to, across in ((Bt, out[0], turned), (A, out[1], not turned)):
            table, tiles = [], 0
            for own in addresses(grads, (), left, to):
                table.append((*own, to.shape[2], left.shape[2], tiles))
                tiles += -(-to.shape[2] // TILE)
            aligned = all(_is_aligned(row[:3], *row[3:5]) for row in table)
            numbers = (to_device(table, scales, torch.long), len(table), scales, len(scales))
            with _compiling(scales):
                _gradients[(tiles, -(-len(scales) // TILE))](
                    *numbers, _TYPES[A.dtype], aligned, across, TILE, DEPTH, **_OPTIONS, num_warps=8
                )
        return True

    def _is_on(self, tensor: Tensor) -> bool:
        return tensor.is_cuda


def _is_aligned(addresses: Sequence[int], *lengths: int) -> bool:
    """Whether 16 bytes can be loaded at once, of every row."""
    return all(address % 16 == 0 for address in addresses) and all(length % 16 == 0 for length in lengths)


def _halves(factor: Tensor, first: bool) -> Tensor:
    """Three times as many ranks, (K, 3 R, n) in bf16, so that the product of both factors has all parts but the least.

    A number of fp32 is a high half and a low one, which have 16 bits of it: high high + high low + low high.
    """
    high = factor.to(torch.bfloat16)
    low = (factor - high).to(torch.bfloat16)
    return torch.cat([high, high, low] if first else [high, low, high], 1)


@contextmanager
def _compiling(like: Tensor) -> Iterator[None]:
    """On the tensor's device; what keeps Triton from compiling, such as a missing C compiler, is a ``CompileError``."""
    try:
        with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
            yield
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
            raise
        raise CompileError(f"Triton: {error}") from error


@triton.jit
def _find(table, count, number, FIELD: tl.constexpr, FIELDS: tl.constexpr):
    """The last job whose ``FIELD``, the number of its first piece, is at most ``number``."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * FIELDS + FIELD) <= number
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _pointer(job, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a field of a job."""
    pointer = tl.load(job + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _length(job, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """The number in a field of a job."""
    length = tl.load(job + FIELD)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    return length


@triton.jit
def _moments(g, m, v, lerp, beta2, square):
    """The new moments."""
    m = tl.where(lerp < 0.5, m + lerp * (g - m), g - (g - m) * (1 - lerp))
    return m, v * beta2 + square * g * g


@triton.jit(do_not_specialize=["count"])
def _pass(
    table,
    count,
    terms,
    clip,
    gate,
    inverse_root,
    lerp,
    beta2,
    square,
    eps,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    STORE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of a row; ``element`` of passes.cpp, over blocks."""
    piece = tl.program_id(0)
    job = table + _find(table, count, piece, _PIECE, _FIELDS) * _FIELDS
    columns = _length(job, _COLUMNS, ALIGNED)
    pieces = (columns + PIECE - 1) // PIECE
    at = piece - tl.load(job + _PIECE)
    row = at // pieces
    begin = (at % pieces) * PIECE
    end = tl.minimum(begin + PIECE, columns)
    winner = tl.load(job + _WINNER)
    moves = tl.load(winner.to(tl.pointer_type(tl.int8)) + row, mask=winner != 0, other=1) != 0
    if KIND != _UPDATE and gate is not None:
        moves = moves & tl.load(gate).to(tl.int1)
    if moves:
        grad = _pointer(job, _GRAD, GRAD, ALIGNED)
        first = _pointer(job, _M, tl.float32, ALIGNED)
        second = _pointer(job, _V, tl.float32, ALIGNED)
        value = _pointer(job, _VALUE, tl.float32, ALIGNED)
        if KIND >= _UPDATE:
            per_row = row * tl.load(job + _PER_ROW)
            decay = tl.load(_pointer(job, _DECAY, tl.float32, False) + per_row)
            size = tl.load(_pointer(job, _SIZE, tl.float32, False) + per_row)
            inverse = tl.load(inverse_root)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(begin, end, BLOCK):
            inside = start + tl.arange(0, BLOCK)
            mask = inside < end
            place = row * columns + inside
            m = tl.load(first + place, mask=mask, other=0.0)
            v = tl.load(second + place, mask=mask, other=0.0)
            if KIND != _UPDATE:
                g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
                if clip is not None:
                    g = g * tl.load(clip)
                m, v = _moments(g, m, v, lerp, beta2, square)
                tl.store(first + place, m, mask=mask)
                tl.store(second + place, v, mask=mask)
            root = tl.sqrt_rn(v)
            if KIND == _EPD:
                total += tl.where(mask, tl.div_rn(m * m, root + eps), 0.0)
            elif KIND == _PFN:
                ratio = tl.div_rn(m, root + eps)
                total += tl.where(mask, ratio * ratio, 0.0)
            else:
                moved = tl.load(value + place, mask=mask, other=0.0) * decay
                moved += tl.div_rn(m * size, root * inverse + eps)
                tl.store(value + place, moved, mask=mask)
                if STORE is not None:
                    tl.store(_pointer(job, _STORE, STORE, ALIGNED) + place, moved.to(STORE), mask=mask)
        if KIND < _UPDATE:
            tl.store(terms + piece, tl.sum(total, 0))


@triton.jit(do_not_specialize=["count"])
def _sums(table, count, terms, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the terms of a row's pieces, in an order of their own."""
    line = tl.program_id(0)
    job = table + _find(table, count, line, _LINE, _FIELDS) * _FIELDS
    pieces = (tl.load(job + _COLUMNS) + PIECE - 1) // PIECE
    row = line - tl.load(job + _LINE)
    begin = tl.load(job + _PIECE) + row * pieces
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, pieces, BLOCK):
        inside = start + tl.arange(0, BLOCK)
        total += tl.load(terms + begin + inside, mask=inside < pieces, other=0.0).to(tl.float64)
    tl.store(_pointer(job, _SUMS, tl.float32, False) + row, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["count", "rank"])
def _products(
    table,
    count,
    rank,
    TARGET: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of P = W + leftᵀ right."""
    tile = tl.program_id(0)
    job = table + _find(table, count, tile, 6, 7) * 7
    target = _pointer(job, 0, TARGET, ALIGNED)
    base = _pointer(job, 1, tl.float32, ALIGNED)
    left = _pointer(job, 2, FACTOR, ALIGNED)
    right = _pointer(job, 3, FACTOR, ALIGNED)
    rows = _length(job, 4, ALIGNED)
    columns = _length(job, 5, ALIGNED)
    across = (columns + TILE - 1) // TILE
    at = tile - tl.load(job + 6)
    row = at // across * TILE + tl.arange(0, TILE)
    column = at % across * TILE + tl.arange(0, TILE)
    place = row[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.load(base + place, mask=mask, other=0.0)
    for start in range(0, rank, DEPTH):
        ranks = start + tl.arange(0, DEPTH)
        there = (ranks < rank)[:, None]
        a = tl.load(left + ranks[:, None] * rows + row[None, :], mask=there & (row < rows)[None, :], other=0.0)
        b = tl.load(right + ranks[:, None] * columns + column, mask=there & (column < columns)[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    tl.store(target + place, total.to(TARGET), mask=mask)


@triton.jit(do_not_specialize=["count", "rank"])
def _gradients(
    table,
    count,
    scales,
    rank,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    TURNED: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of s ⊙ left G (rank, columns), with left (rank, depth) and G (depth, columns), or its transpose."""
    tile = tl.program_id(0)
    job = table + _find(table, count, tile, 5, 6) * 6
    grad = _pointer(job, 0, GRAD, ALIGNED)
    left = _pointer(job, 1, GRAD, ALIGNED)
    out = _pointer(job, 2, tl.float32, ALIGNED)
    columns = _length(job, 3, ALIGNED)
    depth = _length(job, 4, ALIGNED)
    ranks = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = (tile - tl.load(job + 5)) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        there = inner < depth
        a = tl.load(left + ranks[:, None] * depth + inner, mask=(ranks < rank)[:, None] & there, other=0.0)
        if TURNED:
            b = tl.load(grad + column[:, None] * depth + inner, mask=(column < columns)[:, None] & there, other=0.0)
            b = tl.trans(b)
        else:
            b = tl.load(grad + inner[:, None] * columns + column, mask=there[:, None] & (column < columns), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    s = tl.load(scales + ranks, mask=ranks < rank, other=0.0)
    mask = (ranks < rank)[:, None] & (column < columns)[None, :]
    tl.store(out + ranks[:, None] * columns + column, total * s[:, None], mask=mask)
