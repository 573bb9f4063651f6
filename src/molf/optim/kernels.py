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
from functools import reduce
from itertools import accumulate
from operator import or_
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from .compiled import EPD, PFN, UPDATE, Column, Compiled, Numbers, Table, addresses, packed, spaced
from .jobs import CompileError
from .virtual import Products

PIECE = 8192
"""Elements of a row at most that one program takes."""

BLOCK = 1024
"""Elements that it takes at once."""

TILE = 128
"""Rows and columns of a product that one program takes."""

WIDTH = 64
"""Columns of P that one takes: with more, its registers leave room for no other program beside it."""

DEPTH = 64
"""Terms of its sums that it takes at once; half as many of P's, for the shared memory of smaller GPUs."""

_GRAD, _M, _V, _VALUE, _STORE, _WINNER, _SUMS, _ROWS, _COLUMNS = (tl.constexpr(i) for i in range(9))
_DECAY, _SIZE, _DECAYS, _SIZES, _PIECE, _LINE = (tl.constexpr(i) for i in range(9, 15))
"""Columns of the table of a pass: those of ``Table``, then the numbers of a job's first piece and of its first row."""

_OPTIONS = {"enable_fp_fusion": True}
"""Triton warns of a default that it will change."""

_EPD, _PFN, _UPDATE = tl.constexpr(EPD), tl.constexpr(PFN), tl.constexpr(UPDATE)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Kernels(Compiled):
    """Runs jobs on a GPU."""

    LOW = (torch.bfloat16, torch.float16)
    DEVICE = "cuda"

    def __init__(self) -> None:
        self._sums_compiled = False

    def _pass(self, kind: int, table: Table, numbers: Numbers, like: Tensor) -> Iterator[Sequence[int]]:
        for (grad, store, aligned), chosen in _alike(table).items():
            columns: list[Column] = [*table.addresses, table.rows, table.columns, *table.rates]
            if len(chosen) < len(table.rows):
                columns = [column and [column[i] for i in chosen] for column in columns]
            rows, widths = columns[_ROWS.value] or (), columns[_COLUMNS.value] or ()
            pieces = [0, *accumulate(height * -(-width // PIECE) for height, width in zip(rows, widths, strict=True))]
            lines = [0, *accumulate(rows)]
            jobs = _to_device([*columns, pieces[:-1], lines[:-1]], len(chosen), like)
            terms = like.new_zeros(pieces[-1]) if kind < UPDATE else None  # a closed gate writes none
            if terms is not None and lines[-1] and not self._sums_compiled:  # before the pass has run: it may fail
                with _compiling(like):
                    _sums[(lines[-1],)](jobs, len(chosen), terms, PIECE, BLOCK, **_OPTIONS)
                self._sums_compiled = True
            if pieces[-1]:
                with _compiling(like):
                    _pass[(pieces[-1],)](
                        jobs,
                        len(chosen),
                        terms,
                        numbers.clip,
                        numbers.gate,
                        *numbers[:5],
                        kind,
                        _TYPES[grad or torch.float32],
                        None if store is None else _TYPES[store],
                        aligned,
                        PIECE,
                        BLOCK,
                        **_OPTIONS,
                    )
            if terms is not None and lines[-1]:
                with _compiling(like):
                    _sums[(lines[-1],)](jobs, len(chosen), terms, PIECE, BLOCK, **_OPTIONS)
            yield chosen

    def _superpose(self, listed: Sequence[Products], scales: Tensor) -> None:
        for each in listed:
            rows, columns, dtype = each.left.shape[2], each.right.shape[2], each.targets[0].dtype
            left, right, rank = each.left * scales[:, None], each.right, len(scales)
            if dtype != torch.float32:
                left, right = _halves(left), _halves(right)
            count, tiles = len(each.targets), -(-rows // TILE) * -(-columns // WIDTH)
            places = [addresses(each.targets), addresses(each.bases), spaced(left), spaced(right)]
            aligned = all(_are_aligned(places)) and not (rows | columns) % 16
            lengths = [rows] * count, [columns] * count, range(0, count * tiles, tiles)
            numbers = (_to_device([*places, *lengths], count, scales), count, rank, _TYPES[dtype], _TYPES[left.dtype])
            with _compiling(scales):
                _products[(tiles * count,)](*numbers, aligned, TILE, WIDTH, DEPTH // 2, **_OPTIONS, num_warps=8)

    def gradients(
        self, grads: Sequence[Tensor], A: Tensor, Bt: Tensor, scales: Tensor, out: tuple[Tensor, Tensor], turned: bool
    ) -> bool:
        """As ``Compiled.gradients``, where all is in 16 bits but ``out``."""
        low = A.dtype in self.LOW and all(each.dtype == A.dtype for each in grads)
        plain = self._are_plain([*grads, A, Bt], low=True) and self._are_plain([scales, *out])
        if not (low and plain and A.numel() and Bt.numel() and _multiplies(A)):
            return False
        for left, to, across in ((Bt, out[0], turned), (A, out[1], not turned)):
            count, columns, depth = len(grads), to.shape[2], left.shape[2]
            tiles = -(-columns // TILE)
            places = [addresses(grads), spaced(left), spaced(to)]
            aligned = all(_are_aligned(places)) and not (columns | depth) % 16
            lengths = [columns] * count, [depth] * count, range(0, count * tiles, tiles)
            numbers = (_to_device([*places, *lengths], count, scales), count, scales, len(scales))
            with _compiling(scales):
                _gradients[(tiles * count, -(-len(scales) // TILE))](
                    *numbers, _TYPES[A.dtype], aligned, across, TILE, DEPTH, **_OPTIONS, num_warps=8
                )
        return True

    def _are_products(self, each: Products) -> bool:
        return super()._are_products(each) and (each.targets[0].dtype == torch.float32 or _multiplies(each.left))


def _multiplies(like: Tensor) -> bool:
    """Whether Triton has the device multiply matrices in 16 bits. Before Ampere it does not: torch is faster there."""
    return not like.is_cuda or torch.cuda.get_device_capability(like.device) >= (8, 0)


def _alike(table: Table) -> dict[tuple[torch.dtype | None, torch.dtype | None, bool], list[int]]:
    """The jobs, by number, that one launch takes: by the dtypes of gradient and store, and whether all is aligned."""
    nothing = [None] * len(table.rows)
    aligned = _are_aligned([*table.addresses[: _WINNER.value], table.columns])  # of the others, one is loaded at a time
    jobs: dict[Any, list[int]] = defaultdict(list)
    for i, kind in enumerate(zip(table.grads or nothing, table.stores or nothing, aligned, strict=True)):
        jobs[kind].append(i)
    return jobs


def _are_aligned(columns: Sequence[Column]) -> list[bool]:
    """Of each job whether 16 bytes can be loaded at once at all addresses and after all lengths."""
    return [not reduce(or_, job) % 16 for job in zip(*filter(None, columns), strict=True)]


def _to_device(columns: Sequence[Column], count: int, like: Tensor) -> Tensor:
    """A table of ``count`` jobs on a device, without a wait for it."""
    table = torch.frombuffer(packed(columns, count), dtype=torch.long)
    return (table.pin_memory() if like.is_cuda else table).to(like.device, non_blocking=True)


def _halves(factor: Tensor) -> Tensor:
    """(K, 2 R, n) in bf16: the high halves of the numbers, then the low ones. Both together have 16 bits of them."""
    count, ranks, length = factor.shape
    halves = factor.new_empty(count, 2 * ranks, length, dtype=torch.bfloat16)
    high, low = halves.split(ranks, 1)
    torch.sub(factor, high.copy_(factor), out=low)
    return halves


@contextmanager
def _compiling(like: Tensor) -> Iterator[None]:
    """On the tensor's device; what keeps Triton from compiling, such as a missing C compiler, is a ``CompileError``."""
    try:
        with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
            yield
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        # of the driver's errors Triton says what they are, and no more
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or "[CUDA]: out of memory" in str(error):
            raise
        raise CompileError(f"Triton: {error}") from error


@triton.jit
def _find(table, count, number, FIELD: tl.constexpr):
    """The last job whose ``FIELD``, the number of its first piece, is at most ``number``: its place in a column."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + FIELD * count + middle) <= number
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return table + low


@triton.jit
def _pointer(job, count, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a field of a job."""
    pointer = tl.load(job + FIELD * count).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _length(job, count, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """The number in a field of a job."""
    length = tl.load(job + FIELD * count)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    return length


@triton.jit
def _rate(job, count, FIELD: tl.constexpr, BY_ROW: tl.constexpr, row):
    """A number of a job, or of one of its rows."""
    rates = tl.load(job + BY_ROW * count)
    number = tl.load(job + FIELD * count).to(tl.float64, bitcast=True).to(tl.float32)
    return tl.load(rates.to(tl.pointer_type(tl.float32)) + row, mask=rates != 0, other=number)


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
    lerp,
    beta2,
    square,
    eps,
    inverse_root,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    STORE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of a row; ``element`` of passes.cpp, over blocks."""
    piece = tl.program_id(0)
    job = _find(table, count, piece, _PIECE)
    columns = _length(job, count, _COLUMNS, ALIGNED)
    pieces = (columns + PIECE - 1) // PIECE
    at = piece - tl.load(job + _PIECE * count)
    row = at // pieces
    begin = (at % pieces) * PIECE
    end = tl.minimum(begin + PIECE, columns)
    winner = tl.load(job + _WINNER * count)
    moves = tl.load(winner.to(tl.pointer_type(tl.int8)) + row, mask=winner != 0, other=1) != 0
    if KIND != _UPDATE and gate is not None:
        moves = moves & tl.load(gate).to(tl.int1)
    if moves:
        grad = _pointer(job, count, _GRAD, GRAD, ALIGNED)
        first = _pointer(job, count, _M, tl.float32, ALIGNED)
        second = _pointer(job, count, _V, tl.float32, ALIGNED)
        value = _pointer(job, count, _VALUE, tl.float32, ALIGNED)
        if KIND >= _UPDATE:
            decay = _rate(job, count, _DECAY, _DECAYS, row)
            size = _rate(job, count, _SIZE, _SIZES, row)
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
                moved += tl.div_rn(m * size, root * inverse_root + eps)
                tl.store(value + place, moved, mask=mask)
                if STORE is not None:
                    tl.store(_pointer(job, count, _STORE, STORE, ALIGNED) + place, moved.to(STORE), mask=mask)
        if KIND < _UPDATE:
            tl.store(terms + piece, tl.sum(total, 0))


@triton.jit(do_not_specialize=["count"])
def _sums(table, count, terms, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the terms of a row's pieces, in an order of their own."""
    line = tl.program_id(0)
    job = _find(table, count, line, _LINE)
    pieces = (tl.load(job + _COLUMNS * count) + PIECE - 1) // PIECE
    row = line - tl.load(job + _LINE * count)
    begin = tl.load(job + _PIECE * count) + row * pieces
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, pieces, BLOCK):
        inside = start + tl.arange(0, BLOCK)
        total += tl.load(terms + begin + inside, mask=inside < pieces, other=0.0).to(tl.float64)
    tl.store(_pointer(job, count, _SUMS, tl.float32, False) + row, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["count", "rank"])
def _products(
    table,
    count,
    rank,
    TARGET: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of P = W + leftᵀ right; of factors in two halves, of all their products but that of the low ones."""
    tile = tl.program_id(0)
    job = _find(table, count, tile, 6)
    target = _pointer(job, count, 0, TARGET, ALIGNED)
    base = _pointer(job, count, 1, tl.float32, ALIGNED)
    left = _pointer(job, count, 2, FACTOR, ALIGNED)
    right = _pointer(job, count, 3, FACTOR, ALIGNED)
    rows = _length(job, count, 4, ALIGNED)
    columns = _length(job, count, 5, ALIGNED)
    across = (columns + WIDTH - 1) // WIDTH
    at = tile - tl.load(job + 6 * count)
    row = at // across * TILE + tl.arange(0, TILE)
    column = at % across * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    for start in range(0, rank, DEPTH):
        ranks = start + tl.arange(0, DEPTH)
        from_left = left + ranks[:, None] * rows + row[None, :]
        from_right = right + ranks[:, None] * columns + column[None, :]
        in_left = (ranks < rank)[:, None] & (row < rows)[None, :]
        in_right = (ranks < rank)[:, None] & (column < columns)[None, :]
        a = tl.load(from_left, mask=in_left, other=0.0)
        b = tl.load(from_right, mask=in_right, other=0.0)
        if FACTOR != tl.float32:  # noqa: SIM300
            a_low = tl.load(from_left + rank * rows, mask=in_left, other=0.0)
            b_low = tl.load(from_right + rank * columns, mask=in_right, other=0.0)
            total = tl.dot(tl.trans(a), b_low, total)
            total = tl.dot(tl.trans(a_low), b, total)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    place = row[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    total += tl.load(base + place, mask=mask, other=0.0)
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
    job = _find(table, count, tile, 5)
    grad = _pointer(job, count, 0, GRAD, ALIGNED)
    left = _pointer(job, count, 1, GRAD, ALIGNED)
    out = _pointer(job, count, 2, tl.float32, ALIGNED)
    columns = _length(job, count, 3, ALIGNED)
    depth = _length(job, count, 4, ALIGNED)
    ranks = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = (tile - tl.load(job + 5 * count)) * TILE + tl.arange(0, TILE)
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
