"""The passes compiled by Inductor, for GPUs. Imported when it is needed: it takes as long to import as torch itself.

Lists of ``LIST`` tensors share a call and sizes are symbols, so that five functions are compiled at most twice each,
whatever the model. It works on CPUs as well, where ``native.py`` is faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.fx.experimental import _config as symbolic

from .passes import Job, Pass, flat, has_quantized, size_of, track_all

LIST = 8
"""Tensors per call of a compiled function: a call costs as much as some 10,000 elements."""

COMPILE_FROM = 2**15
"""Tensors with fewer elements are left to be worked on in blocks."""

_VARIANTS = 32
"""Compilations of one pass: list lengths, one or two dimensions, dtypes, with or without clipping."""


class Inductor:
    """Runs jobs of a pass, compiled. Make one per optimizer."""

    FAILED = (TorchDynamoException, InductorError)
    """What is raised, before anything has run, where there is no working compiler."""

    def __init__(self) -> None:
        self._ones: dict[tuple[Any, ...], Tensor] = {}

    def run(self, function: Pass, jobs: Sequence[Job], shared: Any, by_row: bool = False) -> Iterator[tuple[int, Any]]:
        """Results by the jobs' numbers, as ``Passes.run``, of those that are worth it and of ordinary tensors.

        Every size and number is a symbol of its own: other shapes, or a β that a scheduler moves, need no new
        compilation.
        """
        large = [i for i, job in enumerate(jobs) if size_of(job) >= COMPILE_FROM and not has_quantized(job)]
        large.sort(key=lambda i: -size_of(jobs[i]))  # the first list decides whether a loop is parallel
        whole, compiled = len(large) - len(large) % LIST, _compile(function)
        with (
            symbolic.patch(  # type: ignore[attr-defined]
                use_duck_shape=False
            ),
            torch._dynamo.config.patch(recompile_limit=_VARIANTS),
        ):
            for call in [*(large[i : i + LIST] for i in range(0, whole, LIST)), *([i] for i in large[whole:])]:
                yield from zip(
                    call, compiled([self._prepared(function, jobs[i], by_row) for i in call], shared), strict=True
                )

    def superpose(self, *_: Any) -> bool:
        """Nothing: torch's own products are good."""
        return False

    def _prepared(self, function: Pass, job: Job, by_row: bool) -> Job:
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


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """A pass compiled by Inductor, once per process.

    Inductor otherwise computes the new moments twice, once to sum their score and once to store them, in two loops
    over memory; a lower ``realize_opcount_threshold`` makes it store them and sum what it has just stored.
    """
    return torch.compile(function, dynamic=True, options={"realize_opcount_threshold": 10})
