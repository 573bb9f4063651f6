"""Runs the elementwise functions of ``adamw.py`` over many tensors: in cache-sized blocks, or compiled.

In blocks: a large tensor is cut into pieces and small ones of equal shape are stacked, so that no temporary exceeds
``BLOCK`` elements and the number of calls does not grow with the number of small layers. Compiled: Inductor makes
one loop over memory of each pass. Lists of ``LIST`` tensors share a call, sizes are symbols, so that five
functions are compiled at most twice each, whatever the model. Small tensors are never compiled.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .adamw import Coefficients, adamw_, track_, unrouted_
from .quantized import is_quantized

BLOCK = 2**16
"""Elements of a block on the CPU, 256 KiB in fp32: it stays in the cache between the operations of a pass."""

DEVICE_BLOCK = 2**24
"""Elements of a block on an accelerator, which needs large ones to be busy."""

LIST = 8
"""Tensors per call of a compiled function: a call costs as much as some 10,000 elements."""

COMPILE_FROM = 2**13
"""Tensors with fewer elements are worked on in blocks even where the passes are compiled."""

WORTH_COMPILING = 2**22
"""``compile="auto"`` compiles from this many trained elements on; with fewer, compiling takes longer than it saves."""

Job = tuple[Any, ...]
"""Tensors of one shape, as a pass takes them; those that are optional may be None."""


def track_all(jobs: Sequence[Any], shared: Any) -> list[Tensor]:
    """``track_`` of every job (grad, m, v, ones)."""
    return [track_(*(*job, shared)) for job in jobs]


def adamw_all(jobs: Sequence[Any], shared: Any) -> list[None]:
    """``adamw_`` of every job (value, m, v, store, winner)."""
    for job in jobs:
        adamw_(*(*job, shared))
    return [None] * len(jobs)


def unrouted_all(jobs: Sequence[Any], shared: Any) -> list[None]:
    """``unrouted_`` of every job (value, m, v, store, grad)."""
    for job in jobs:
        unrouted_(*(*job, shared))
    return [None] * len(jobs)


Pass = Callable[[Sequence[Any], Any], list[Any]]

_WRITES: dict[Pass, tuple[int, ...]] = {track_all: (1, 2), adamw_all: (0, 3), unrouted_all: (0, 1, 2, 3)}
"""Which tensors of a job a pass writes to."""


class Passes:
    """Runs the three passes. Make one per optimizer.

    Args:
        compile: True, False, or "auto": compile on a CPU or CUDA device if the work is worth it and compiling works.
        work: Number of trained elements.
        device: Where they are.
    """

    def __init__(self, compile: bool | str, work: int, device: torch.device) -> None:
        self._ones: dict[tuple[Any, ...], Tensor] = {}
        self.must_compile = compile is True
        self.compiles = compile is True or (
            compile == "auto" and work >= WORTH_COMPILING and device.type in ("cpu", "cuda")
        )

    def run(self, function: Pass, jobs: Sequence[Job], shared: Any, by_row: bool = False) -> list[Any]:
        """``function`` over all jobs; returns its results in their order.

        Args:
            function: One of the three passes.
            jobs: The tensors.
            shared: What all jobs have in common: numbers, and tensors that broadcast to theirs.
            by_row: Whether something is summed or varies along the rows; else a tensor's shape does not matter, and
                what is summed may be so over any of its dimensions.

        Raises:
            RuntimeError: If compiling fails and was asked for.
        """
        results: dict[int, Any] = {}
        large = [i for i, job in enumerate(jobs) if self.compiles and _compilable(job)]
        large.sort(key=lambda i: -_size(jobs[i]))  # Inductor decides by the first list whether a loop is parallel
        whole = len(large) - len(large) % LIST
        calls = [*(large[i : i + LIST] for i in range(0, whole, LIST)), *([i] for i in large[whole:])]
        found = self._compiled(
            function, [[self._for_compiler(function, jobs[i], by_row) for i in call] for call in calls], shared
        )
        results |= zip(large, found, strict=False)  # those of the calls before one that could not be compiled
        groups: dict[Any, list[int]] = defaultdict(list)
        rest = {i: job if by_row else flat(job) for i, job in enumerate(jobs) if i not in results}
        for i, job in rest.items():
            groups[_alike(job)].append(i)
        for indices in groups.values():
            found = _in_blocks(function, [rest[i] for i in indices], shared)
            results |= zip(indices, found, strict=True)
        return [results[i] for i in range(len(jobs))]

    def _for_compiler(self, function: Pass, job: Job, by_row: bool) -> Job:
        """A job as Inductor makes the fewest loops of it: matrices with ``ones`` where sums are taken, else flat."""
        first = job[0]
        if function is not track_all:
            return job if by_row else flat(job)
        if first.dim() != 2:
            return flat(job)
        key = (len(first), job[1].dtype, first.device)
        if key not in self._ones:
            self._ones[key] = torch.ones(len(first), 1, dtype=job[1].dtype, device=first.device)
        return (*job[:3], self._ones[key])

    def _compiled(self, function: Pass, calls: Sequence[Sequence[Job]], shared: Any) -> list[Any]:
        """The compiled pass, call by call; "auto" stops at one that cannot be compiled, of which nothing is done."""
        results: list[Any] = []
        if not calls:
            return results
        from .compiling import COMPILING_FAILED, run_compiled

        try:
            for found in run_compiled(function, calls, shared):
                results += found
        except COMPILING_FAILED as error:
            reason = str(error).strip().split("\n")[0]
            if self.must_compile:
                raise RuntimeError(f"compile=True, but compiling failed ({reason}): use compile=False") from error
            warnings.warn(f"MoLF's passes run uncompiled, which is slower: {reason}", stacklevel=2)
            self.compiles = False
        return results


def flat(job: Job) -> Job:
    """The tensors as one-dimensional views, so that they can be cut, where all are laid out in the same order."""
    return tuple(t if t is None else t.view(-1) for t in job) if all(map(_is_flat, job)) else job


def _is_flat(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.is_contiguous() and not is_quantized(tensor))


def _size(job: Job) -> int:
    return job[0].numel() if job[0] is not None else 0


def _compilable(job: Job) -> bool:
    return _size(job) >= COMPILE_FROM and not any(t is not None and is_quantized(t) for t in job)


def _alike(job: Job) -> tuple[Any, ...]:
    return tuple(None if t is None else (t.shape, t.dtype, t.device, is_quantized(t)) for t in job)


def _in_blocks(function: Pass, jobs: Sequence[Job], shared: Any) -> list[Any]:
    """Jobs that are alike: cut if they are larger than a block, stacked if several fit into one."""
    first = next(t for t in jobs[0] if t is not None)
    block = BLOCK if first.device.type == "cpu" else DEVICE_BLOCK
    if any(t is not None and is_quantized(t) for t in jobs[0]):
        return [function([job], shared)[0] for job in jobs]
    by_row = first.dim() == 2 and not (isinstance(shared, Coefficients) and shared.decay.dim() > 0)
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
    for index in _WRITES[function]:
        stack = stacks[index]
        if stack is not None:
            torch._foreach_copy_(list(columns[index]), list(stack.unbind()))
    return [None] * len(jobs) if result is None else list(result.unbind())
