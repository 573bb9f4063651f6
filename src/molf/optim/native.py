"""The passes compiled by the machine's C++ compiler, for CPUs: ``passes.cpp``.

Of the same passes Inductor makes loops that take 1.4 times as long, for want of prefetching, and needs some 20 times as
long to compile them (docs/performance.md). These ones are compiled in half a second, once per process, and nothing is
kept on disk.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adamw import Coefficients, Tracking
from .passes import Job, Pass, adamw_all, track_all, unrouted_all
from .quantized import is_quantized

_FLAGS = "-O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp -shared -fPIC"


class CompileError(RuntimeError):
    """There is no working C++ compiler."""


class _Job(ctypes.Structure):
    """``Job`` of passes.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "grad m v value store winner decay size sums".split()),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_int32) for name in ("per_row", "bf16")),
    ]


class _Numbers(ctypes.Structure):
    """``Numbers`` of passes.cpp."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("lerp", "beta2", "square", "eps")),
        *((name, ctypes.c_void_p) for name in ("clip", "inverse_root")),
    ]


class Native:
    """Runs jobs of a pass in one call."""

    FAILED = (CompileError,)
    """What is raised, before anything has run, where there is no working compiler."""

    def takes(self, function: Pass, job: Job, shared: Any) -> bool:
        """Whether a job is of contiguous tensors in fp32, with a gradient or a store in bf16 if need be."""
        grad, m, v, value, store, winner = _named(function, job)
        tracking, _ = _numbers(function, shared)
        return (
            (tracking is None or tracking.gate is None)
            and all(_is_plain(t, torch.float32) for t in (m, v, value))
            and (_is_plain(grad, torch.float32) or _is_plain(grad, torch.bfloat16))
            and _is_plain(store, torch.bfloat16)
            and _is_plain(winner, torch.bool)
        )

    def run(
        self, function: Pass, jobs: Mapping[int, Job], shared: Any, by_row: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Results of the jobs by their numbers, as ``Passes.run``."""
        molf_pass = _library().molf_pass
        tracking, c = _numbers(function, shared)
        numbers = _Numbers()
        if tracking is not None:
            beta1, beta2 = tracking.betas
            numbers = _Numbers(1 - beta1, beta2, 1 - beta2, tracking.eps, _address(tracking.clip))
        if c is not None:
            numbers.eps, numbers.inverse_root = c.eps, _address(c.inverse_root)
        updating = (None, None, False) if c is None else (c.decay.data_ptr(), c.step_size.data_ptr(), c.decay.dim() > 0)
        listed, results, written = (_Job * len(jobs))(), {}, []
        for place, (i, job) in enumerate(jobs.items()):
            tensors = grad, m, v, value, store, _ = _named(function, job)
            results[i] = m.new_empty(m.shape[:-1]) if function is track_all else None
            listed[place] = _Job(
                *map(_address, tensors),
                *updating[:2],
                _address(results[i]),
                math.prod(m.shape[:-1]),
                m.shape[-1] if m.dim() else 1,
                updating[2],
                grad is not None and grad.dtype == torch.bfloat16,
            )
            written += [t for t in (value, store, *((m, v) if grad is not None else ())) if t is not None]
        kind = 2 if tracking is None else 3 if c is not None else 0 if tracking.score_fn == "epd" else 1
        molf_pass(kind, listed, ctypes.c_int64(len(jobs)), ctypes.byref(numbers), torch.get_num_threads())
        torch.autograd.graph.increment_version(written)
        yield from results.items()


def _named(function: Pass, job: Job) -> tuple[Any, ...]:
    """Gradient, m, v, value, store and winner of a job, None where it has none."""
    if function is track_all:
        return (*job[:3], None, None, None)
    value, m, v, store, last = job
    return (last, m, v, value, store, None) if function is unrouted_all else (None, m, v, value, store, last)


def _numbers(function: Pass, shared: Any) -> tuple[Tracking | None, Coefficients | None]:
    if function is unrouted_all:
        return shared
    return (None, shared) if function is adamw_all else (shared, None)


def _is_plain(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    return tensor is None or (
        tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous() and not is_quantized(tensor)
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _library() -> ctypes.CDLL:
    """passes.cpp, compiled for this machine.

    Raises:
        CompileError: With the compiler's own words.
    """
    compiler = os.environ.get("CXX", "c++")
    source = Path(__file__).with_name("passes.cpp")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = Path(folder, "passes.so")
        command = [*shlex.split(compiler), *_FLAGS.split(), str(source), "-o", str(library)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompileError(f"{compiler}: {(done.stderr.strip() or 'failed').splitlines()[0]}")
            return ctypes.CDLL(str(library))
        except OSError as error:
            raise CompileError(f"{compiler}: {error}") from error
