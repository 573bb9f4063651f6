"""What a pass runs over: the elementwise functions of ``adamw.py``, and jobs, the tensors that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .adamw import adamw_, track_, unrouted_

Job = tuple[Any, ...]
"""Tensors of one shape, as a pass takes them; those that are optional may be None."""


class Held(tuple[Any, ...]):
    """One tensor of every job, the same ones in every step: compiled code looks once at their types and dtypes.

    Attributes:
        seen: Their addresses when it did. Where one is another now, its ``data`` was replaced, and it looks again.
    """

    seen: Sequence[int] = ()


class Jobs(Sequence[Job]):
    """Jobs by columns: of the tensors of all jobs the first, the second, and so on; None where no job has one."""

    def __init__(self, *columns: Sequence[Any] | None) -> None:
        self.columns = columns
        self._count = len(next(column for column in columns if column is not None))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return tuple(None if column is None else column[index] for column in self.columns)


def track_all(jobs: Sequence[Any], shared: Any) -> list[Tensor]:
    """``track_`` of every job (grad, m, v)."""
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

WRITES: dict[Pass, tuple[int, ...]] = {track_all: (1, 2), adamw_all: (0, 3), unrouted_all: (0, 1, 2, 3)}
"""Which tensors of a job a pass writes to."""


class CompileError(RuntimeError):
    """``compile=True``, and there is no working compiler."""
