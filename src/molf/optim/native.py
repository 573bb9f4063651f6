"""The passes compiled by the machine's C++ compiler, for CPUs: ``passes.cpp``.

Of the same passes Inductor makes loops that take 1.4 times as long, and needs half a minute to compile them
(docs/performance.md). These are compiled in about a second, once per process, and nothing is kept on disk.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shlex
import subprocess
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adamw import Coefficients, Tracking
from .passes import CompileError, Job, Pass, adamw_all, track_all, unrouted_all

_FLAGS = "-O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp -shared -fPIC"


_EPD, _PFN, _UPDATE, _UNROUTED = range(4)
"""``Kind`` of passes.cpp."""


class Native:
    """Runs jobs of a pass in one call."""

    FAILED = (CompileError,)
    """What is raised, before anything has run, where there is no working compiler."""

    def run(self, function: Pass, jobs: Sequence[Job], shared: Any, by_row: bool = False) -> Iterator[tuple[int, Any]]:
        """Results by the jobs' numbers, as ``Passes.run``, of those that ``_is_taken``."""
        kind, tracking, c = _numbers(function, shared)
        named = [_named(function, job) for job in jobs]
        chosen = [(i, tensors) for i, tensors in enumerate(named) if _is_taken(tensors)]
        if not chosen or (tracking is not None and tracking.gate is not None):
            return
        molf_pass = _library().molf_pass
        rates = (0, 0, 0) if c is None else (c.decay.data_ptr(), c.step_size.data_ptr(), int(c.decay.dim() > 0))
        listed = array("q")  # ``Job`` of passes.cpp, a row each
        results: dict[int, Any] = {}
        written: list[Tensor | None] = []
        for i, tensors in chosen:
            grad, m, v, value, store, _ = tensors
            shape, columns = (m.shape[:-1], m.shape[-1]) if by_row and m.dim() else ((), m.numel())
            results[i] = sums = m.new_empty(shape) if function is track_all else None
            listed.extend([0 if t is None else t.data_ptr() for t in (*tensors, sums)])
            bf16 = grad is not None and grad.dtype == torch.bfloat16
            listed.extend((*rates, math.prod(shape), columns, bf16))
            written += (value, store) if grad is None else (value, store, m, v)
        beta1, beta2 = (0.0, 0.0) if tracking is None else tracking.betas
        molf_pass(
            kind,
            listed.buffer_info()[0],
            len(chosen),
            torch.get_num_threads(),
            *(1 - beta1, beta2, 1 - beta2, shared.eps if c is None else c.eps),
            _address(None if tracking is None else tracking.clip),
            _address(None if c is None else c.inverse_root),
        )
        torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])
        yield from results.items()

    def superpose(
        self,
        targets: Sequence[Tensor],
        bases: Sequence[Tensor],
        A: Tensor,
        Bt: Tensor,
        scales: Tensor,
        transposed: bool,
    ) -> bool:
        """As ``Passes.superpose``, of layers below ``PRODUCT_TO``; targets may be in bf16."""
        if targets[0].numel() >= PRODUCT_TO or not all(map(_is_product, targets, bases)):
            return False
        if not all(_is_plain(each, (torch.float32,)) for each in (A, Bt, scales)):
            return False
        listed = array("q")  # P and W of each
        for target, base in zip(targets, bases, strict=True):
            listed.extend((target.data_ptr(), base.data_ptr()))
        left, right = (A, Bt) if transposed else (Bt, A)
        _library().molf_superpose(
            listed.buffer_info()[0],
            len(targets),
            torch.get_num_threads(),
            *(left.data_ptr(), right.data_ptr(), scales.data_ptr()),
            *(len(scales), left.shape[-1], right.shape[-1]),
            targets[0].dtype == torch.bfloat16,
        )
        torch.autograd.graph.increment_version(targets)
        return True


PRODUCT_TO = 2**15
"""Elements of a weight whose products with its experts are left to torch, which makes better ones of large matrices."""

_PLAIN = (Tensor, torch.nn.Parameter)
"""Of a subclass the data may be elsewhere."""

_TAKEN = [(torch.float32, torch.bfloat16), *[(torch.float32,)] * 3, (torch.bfloat16,), (torch.bool,)]
"""Dtypes of a gradient, m, v, a value, a store and a winner."""


def _is_taken(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are ordinary, contiguous tensors in fp32, but for a gradient or a store in bf16."""
    return all(tensor is None or _is_plain(tensor, dtypes) for tensor, dtypes in zip(tensors, _TAKEN, strict=True))


def _is_product(target: Tensor, base: Tensor) -> bool:
    return _is_plain(target, (torch.float32, torch.bfloat16)) and _is_plain(base, (torch.float32,))


def _is_plain(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> bool:
    return type(tensor) in _PLAIN and tensor.dtype in dtypes and tensor.is_cpu and tensor.is_contiguous()


def _named(function: Pass, job: Job) -> tuple[Any, ...]:
    """Gradient, m, v, value, store and winner of a job, None where it has none."""
    if function is track_all:
        return (*job[:3], None, None, None)
    value, m, v, store, last = job
    return (last, m, v, value, store, None) if function is unrouted_all else (None, m, v, value, store, last)


def _numbers(function: Pass, shared: Any) -> tuple[int, Tracking | None, Coefficients | None]:
    """The kind of a pass, and its numbers."""
    if function is track_all:
        return (_EPD if shared.score_fn == "epd" else _PFN), shared, None
    return (_UPDATE, None, shared) if function is adamw_all else (_UNROUTED, *shared)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _library() -> ctypes.CDLL:
    """passes.cpp, compiled for this machine.

    Raises:
        CompileError: With the compiler's own words.
    """
    compiler = os.environ.get("CXX", "").strip() or "c++"
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            library, source = Path(folder, "passes.so"), Path(__file__).with_name("passes.cpp")
            command = [*shlex.split(compiler), *_FLAGS.split(), str(source), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode:
                raise CompileError(f"{compiler}: {(done.stderr.strip() or 'failed').splitlines()[0]}")
            loaded = ctypes.CDLL(str(library))
    except (OSError, ValueError) as error:
        raise CompileError(f"{compiler}: {error}") from error
    whole, real, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    loaded.molf_pass.argtypes = [whole, pointer, whole, whole, real, real, real, real, pointer, pointer]
    loaded.molf_superpose.argtypes = [pointer, whole, whole, pointer, pointer, pointer, whole, whole, whole, whole]
    for function in (loaded.molf_pass, loaded.molf_superpose):
        function.restype = None
    return loaded
