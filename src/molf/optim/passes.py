"""Runs the elementwise functions of ``adamw.py`` over many tensors: in cache-sized blocks, or compiled.

In blocks: a large tensor is cut into pieces and small ones of equal shape are stacked, so that no temporary exceeds
``BLOCK`` elements and the number of calls does not grow with the number of small layers. Compiled, each pass is one
loop over memory: by the C++ compiler on a CPU (``native.py``), by Triton on a GPU (``kernels.py``).
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .adamw import Coefficients
from .jobs import WRITES, CompileError, Job, Pass, adamw_all, track_all
from .quantized import is_quantized

BLOCK = 2**16
"""Elements of a block on the CPU, 256 KiB in fp32: it stays in the cache between the operations of a pass."""

DEVICE_BLOCK = 2**24
"""Elements of a block on an accelerator, which needs large ones to be busy."""

WORTH_COMPILING = {"cpu": 2**20, "cuda": 2**22}
"""``compile="auto"`` compiles from this many trained elements on; with fewer, compiling takes longer than it saves."""


class Passes:
    """Runs the three passes. Make one per optimizer.

    Args:
        compile: True, False, or "auto": compile on a CPU or CUDA device if the work is worth it and compiling works.
        work: Number of trained elements.
        device: Where they are.
    """

    def __init__(self, compile: bool | str, work: int, device: torch.device) -> None:
        self._compile, self._work = compile, work
        self.must_compile = compile is True
        self._set_device(device)

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiler, which is no part of a copy."""
        return {**vars(self), "_compiler": None}

    def move(self, device: torch.device) -> None:
        """Work on another device from now on, if it is another."""
        if device != self._device:
            self._set_device(device)

    def _set_device(self, device: torch.device) -> None:
        self._device, least = device, WORTH_COMPILING.get(device.type, math.inf)
        self._compiler: Any = None
        self.compiles = self.must_compile or (self._compile == "auto" and self._work >= least)

    def run(self, function: Pass, jobs: Sequence[Job], shared: Any, rows: Sequence[int] | None = None) -> Tensor:
        """``function`` over all jobs.

        Args:
            function: One of the three passes.
            jobs: The tensors; of ``track_all`` on one device, with moments of one dtype.
            shared: The numbers that the function takes, of all jobs, or in a list those of each. These may differ in
                decay and step size alone.
            rows: How many rows each job has, over which is summed, or along which numbers or winners vary. None is one
                each, in whatever shape a job's tensors are; 0 leaves a job out.

        Returns:
            What ``track_all`` sums, over every row of every job, one after the other; else nothing.

        Raises:
            CompileError: If compiling fails and was asked for.
        """
        numbers = shared if isinstance(shared, list) else [shared] * len(jobs)
        rows = [1] * len(jobs) if rows is None else rows
        sums = _room(jobs, rows) if function is track_all else torch.empty(0, device=self._device)
        done = self._compiled(function, jobs, shared, rows, sums) if self.compiles else set()
        if len(done) == len(jobs):
            return sums
        groups: dict[Any, list[int]] = defaultdict(list)
        left = {i: job for i, job in enumerate(jobs) if rows[i] and i not in done}
        rest = {i: job if rows[i] != 1 or _differs(function, job, numbers[i]) else flat(job) for i, job in left.items()}
        for i, job in rest.items():
            groups[id(numbers[i]), _alike(job)].append(i)
        found: dict[int, Any] = {}
        for indices in groups.values():
            blocks = _in_blocks(function, [rest[i] for i in indices], numbers[indices[0]])
            found |= zip(indices, blocks, strict=True)
        if function is track_all:
            places = sums.split(list(rows))
            own = [(each.sum() if each.dim() and rows[i] == 1 else each).flatten() for i, each in found.items()]
            torch._foreach_copy_([places[i] for i in found], own)
        return sums

    def prepare(self) -> None:
        """Find out whether compiling works.

        Raises:
            CompileError: If it does not and was asked for.
        """
        if self.compiles:
            self._attempt(lambda compiler: compiler.prepare())

    def squares(self, tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor | None:
        """``Compiled.squares``; None where nothing is compiled."""
        return self._attempt(lambda compiler: compiler.squares(tensors, counts)) if self.compiles else None

    def superpose(self, listed: Sequence[Any], scales: Tensor) -> list[int]:
        """P = W + Σ s_i B_i A_i of layers, compiled; returns which were: the others are left to torch.

        The bits of a P do not depend on what else is written with it, as those of a batched product do.

        Args:
            listed: ``Products``.
            scales: s_i over the ranks, (R,).
        """
        return self._attempt(lambda compiler: compiler.superpose(listed, scales)) or [] if self.compiles else []

    def gradients(self, *arguments: Any) -> bool:
        """``Compiled.gradients``."""
        return self.compiles and bool(self._attempt(lambda compiler: compiler.gradients(*arguments)))

    def _compiled(
        self, function: Pass, jobs: Sequence[Job], shared: Any, rows: Sequence[int], sums: Tensor
    ) -> set[int]:
        """The numbers of the jobs that have run compiled, also where it failed after some."""
        done: set[int] = set()

        def run(compiler: Any) -> None:
            for ran in compiler.run(function, jobs, shared, rows, sums):
                done.update(ran)

        self._attempt(run)
        return done

    def _attempt(self, call: Callable[[Any], Any]) -> Any:
        """What the compiler's function returns; None where compiling fails, and "auto" has stopped then."""
        try:
            return call(self._get_compiler())
        except CompileError as error:
            reason = str(error).strip().split("\n")[0]
            if self.must_compile:
                raise CompileError(f"compile=True, but compiling failed ({reason}): use compile=False") from error
            warnings.warn(f"MoLF's passes run uncompiled, which is slower: {reason}", stacklevel=2)
            self.compiles = False
            return None

    def _get_compiler(self) -> Any:
        """What runs where the optimizer is; imported when it is needed.

        Raises:
            CompileError: If Triton is not installed.
        """
        if self._compiler is None and self._device.type == "cpu":
            from .native import Native

            self._compiler = Native()
        elif self._compiler is None:
            try:
                from .kernels import Kernels
            except ImportError as error:
                raise CompileError(f"Triton: {error}") from error
            self._compiler = Kernels()
        return self._compiler


def _room(jobs: Sequence[Job], rows: Sequence[int]) -> Tensor:
    """For the sums over all rows of jobs (grad, m, v)."""
    if not jobs:
        return torch.empty(0)
    moment = jobs[0][1]
    dtype = torch.float32 if is_quantized(moment) else moment.dtype
    return torch.empty(sum(rows), dtype=dtype, device=moment.device)


def flat(job: Job) -> Job:
    """The tensors as one-dimensional views, so that they can be cut, where all are laid out in the same order."""
    return tuple(t if t is None or t.dim() == 1 else t.view(-1) for t in job) if all(map(_is_flat, job)) else job


def has_quantized(job: Job) -> bool:
    """Whether a tensor of it is in 8 bits."""
    return any(map(is_quantized, job))


def _is_flat(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.is_contiguous() and not is_quantized(tensor))


def _varies(shared: Any) -> bool:
    """Whether the numbers vary along the rows."""
    return isinstance(shared, Coefficients) and shared.by_row


def _differs(function: Pass, job: Job, shared: Any) -> bool:
    """Whether the rows may differ in their numbers, or in who moves."""
    return _varies(shared) or (function is adamw_all and job[-1] is not None)


def _alike(job: Job) -> tuple[Any, ...]:
    return tuple(None if t is None else (t.shape, t.dtype, t.device, is_quantized(t)) for t in job)


def _in_blocks(function: Pass, jobs: Sequence[Job], shared: Any) -> list[Any]:
    """Jobs that are alike: cut if they are larger than a block, stacked if several fit into one."""
    first = next(t for t in jobs[0] if t is not None)
    block = BLOCK if first.device.type == "cpu" else DEVICE_BLOCK
    if has_quantized(jobs[0]):
        return [function([job], shared)[0] for job in jobs]
    by_row = first.dim() == 2 and not _varies(shared)
    if first.numel() > block and (first.dim() == 1 or by_row):
        return [_cut(function, job, shared, max(1, block * len(first) // first.numel())) for job in jobs]
    together = max(1, block // max(1, first.numel()))
    results: list[Any] = []
    for start in range(0, len(jobs), together):
        results += _stacked(function, jobs[start : start + together], shared)
    return results


def _cut(function: Pass, job: Job, shared: Any, rows: int) -> Any:
    """A job in pieces of so many rows, or elements."""
    pieces = zip(*([None] * -(-len(job[0]) // rows) if t is None else t.split(rows) for t in job), strict=True)
    parts = [function([piece], shared)[0] for piece in pieces]
    if parts[0] is None:
        return None
    return torch.stack(parts).sum(0) if parts[0].dim() == 0 else torch.cat(parts)


def _stacked(function: Pass, jobs: Sequence[Job], shared: Any) -> list[Any]:
    if len(jobs) == 1:
        return function(jobs, shared)
    columns = list(zip(*jobs, strict=True))
    stacks = [None if column[0] is None else torch.stack(column) for column in columns]
    result = function([tuple(stacks)], shared)[0]
    for index in WRITES[function]:
        stack = stacks[index]
        if stack is not None:
            torch._foreach_copy_(list(columns[index]), list(stack.unbind()))
    return [None] * len(jobs) if result is None else list(result.unbind())
