"""The passes by compiled code, which takes tensors by their addresses: all jobs of a pass in one call.

What ``native.py`` and ``kernels.py`` have in common. Compiled code takes ordinary, contiguous tensors in fp32; a
gradient, a store and a weight P may be in 16 bits. Anything else is left to ``passes.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adamw import Coefficients, Tracking
from .passes import Job, Pass, adamw_all, track_all, unrouted_all
from .virtual import Products

SQUARES, EPD, PFN, UPDATE, UNROUTED = range(5)
"""What a pass does: look at gradients; moments and score, by either score; the winners' update; both passes of what is
not routed."""

_PLAIN = (Tensor, torch.nn.Parameter)
"""Of a subclass the data may be elsewhere."""

_FULL = (torch.float32,)

_WHOLE = torch.Size()


class Row(NamedTuple):
    """A job as compiled code takes it: ``Job`` of passes.cpp.

    Attributes:
        addresses: Of the gradient, m, v, the value, the store, the winners and the sums; 0 where there is none.
        rates: Addresses of 1 - ηλ and of -η / (1-β1ⁿ), and whether there is one per row.
        rows: Rows, over each of which is summed.
        columns: Elements of a row.
        dtypes: Of the gradient and of the store.
    """

    addresses: tuple[int, ...]
    rates: tuple[int, int, int]
    rows: int
    columns: int
    dtypes: tuple[torch.dtype | None, torch.dtype | None]


class Numbers(NamedTuple):
    """What all jobs of a pass have in common: 1-β1, β2, 1-β2, ε, and on the device, 0-dimensional, the rest."""

    lerp: float
    beta2: float
    square: float
    eps: float
    clip: Tensor | None
    gate: Tensor | None
    inverse_root: Tensor | None


class Compiled(ABC):
    """Runs jobs of a pass. Make one per optimizer. After a ``CompileError`` a job has run if its result was given."""

    LOW: tuple[torch.dtype, ...] = (torch.bfloat16,)
    """Formats of 16 bits."""

    def prepare(self) -> None:  # noqa: B027
        """Compile what can be compiled before there are jobs.

        Raises:
            CompileError: If that fails.
        """

    def run(self, function: Pass, jobs: Sequence[Job], shared: Any, by_row: bool = False) -> Iterator[tuple[int, Any]]:
        """Results by the jobs' numbers, as ``Passes.run``, of those that are taken."""
        kind, tracking, c = _numbers(function, shared)
        columns = _columns(function, jobs)
        taken = self._taken(columns)
        if not taken:
            return
        if len(taken) < len(jobs):
            columns = [[column[i] for i in taken] for column in columns]
        rates = (0, 0, 0) if c is None else (c.decay.data_ptr(), c.step_size.data_ptr(), int(c.decay.dim() > 0))
        grads, moments, _, _, stores, _ = columns
        shapes = [t.shape[:-1] if by_row and t.dim() else _WHOLE for t in moments]
        heights = [shape.numel() for shape in shapes]
        widths = [t.shape[-1] if by_row and t.dim() else t.numel() for t in moments]
        sums: Sequence[Any] = [None] * len(taken)
        if function is track_all:
            found = moments[0].new_empty(sum(heights))
            pieces = found.unbind() if not any(shapes) else found.split(heights)
            sums = [t if t.shape == shape else t.view(shape) for t, shape in zip(pieces, shapes, strict=True)]
        places = zip(*([0 if t is None else t.data_ptr() for t in column] for column in (*columns, sums)), strict=True)
        dtypes = ([None if t is None else t.dtype for t in column] for column in (grads, stores))
        rows = list(map(Row, places, repeat(rates), heights, widths, zip(*dtypes, strict=True)))
        beta1, beta2 = (0.0, 0.0) if tracking is None else tracking.betas
        clip, gate = (None, None) if tracking is None else (tracking.clip, tracking.gate)
        eps, inverse = (shared.eps, None) if c is None else (c.eps, c.inverse_root)
        numbers = Numbers(1 - beta1, beta2, 1 - beta2, eps, clip, gate, inverse)
        for done in self._pass(kind, rows, numbers, moments[0]):
            # of moments nobody asks for the version
            changed = [t for column in columns[3:5] for t in map(column.__getitem__, done) if t is not None]
            torch.autograd.graph.increment_version(changed)
            yield from ((taken[at], sums[at]) for at in done)

    def squares(self, tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor | None:
        """Σ x² over each of so many equal parts of every tensor, part after part; None if that is left to torch."""
        return None

    def superpose(self, listed: Sequence[Products], scales: Tensor) -> list[int]:
        """Write P of layers whose scales are s_i over the ranks, (R,); returns which it has taken."""
        taken = [i for i, each in enumerate(listed) if self._is_plain(scales) and self._are_products(each)]
        if taken:
            self._superpose([listed[i] for i in taken], scales)
            torch.autograd.graph.increment_version([target for i in taken for target in listed[i].targets])
        return taken

    def gradients(
        self, grads: Sequence[Tensor], A: Tensor, Bt: Tensor, scales: Tensor, out: tuple[Tensor, Tensor], turned: bool
    ) -> bool:
        """dL/dA_i = s_i B_iᵀ G and the transpose of dL/dB_i = s_i G A_iᵀ of K layers, in one call.

        Args:
            grads: G of each, (out, in), or (in, out) if ``turned``.
            A: (K, R, in), in G's dtype.
            Bt: Bᵀ, (K, R, out), likewise.
            scales: s_i over the ranks, (R,).
            out: Where to write them, laid out as A and Bᵀ, in fp32.
            turned: How G is laid out.

        Returns:
            Whether that was done; else it is left to torch.
        """
        return False

    @abstractmethod
    def _pass(self, kind: int, rows: Sequence[Row], numbers: Numbers, like: Tensor) -> Iterator[Sequence[int]]:
        """Run jobs on the device of ``like``; yields which have run."""

    @abstractmethod
    def _superpose(self, listed: Sequence[Products], scales: Tensor) -> None:
        """Write P of layers that are taken."""

    @abstractmethod
    def _is_on(self, tensor: Tensor) -> bool:
        """Whether the tensor is where this code runs."""

    def _is_plain(self, tensor: Tensor, low: bool = False) -> bool:
        """Whether it is ordinary, contiguous and in fp32, or if ``low`` in 16 bits."""
        return self._is_one_of((torch.float32, *self.LOW) if low else _FULL, tensor)

    def _is_one_of(self, dtypes: Sequence[torch.dtype], tensor: Tensor) -> bool:
        fits = tensor.dtype in dtypes and type(tensor) in _PLAIN
        return fits and self._is_on(tensor) and tensor.is_contiguous()

    def _taken(self, columns: Sequence[Sequence[Tensor | None]]) -> list[int]:
        """The jobs, by number, of whose tensors all fit."""
        dtypes = ((*_FULL, *self.LOW), _FULL, _FULL, _FULL, self.LOW, (torch.bool,))
        fits = (
            [t is None or self._is_one_of(those, t) for t in column]
            for column, those in zip(columns, dtypes, strict=True)
        )
        return [i for i, of_job in enumerate(zip(*fits, strict=True)) if all(of_job)]

    def _are_products(self, each: Products) -> bool:
        alike = len({target.dtype for target in each.targets}) == 1
        return (
            alike
            and bool(each.left.numel() and each.right.numel())
            and all(self._is_plain(target, low=True) for target in each.targets)
            and all(map(self._is_plain, each.bases))
            and self._is_plain(each.left)
            and self._is_plain(each.right)
        )


def addresses(
    firsts: Sequence[Tensor], seconds: Sequence[Tensor], left: Tensor, right: Tensor
) -> Iterator[tuple[int, ...]]:
    """By layer: of its own tensor among the first ones and the second ones, if there are any, of left and of right."""
    columns: list[Sequence[int]] = [
        [tensor.data_ptr() for tensor in tensors] for tensors in (firsts, seconds) if tensors
    ]
    for tensor in (left, right):
        size = tensor.element_size() * tensor[0].numel()
        columns.append(range(tensor.data_ptr(), tensor.data_ptr() + size * len(tensor), size))
    return zip(*columns, strict=True)


def _columns(function: Pass, jobs: Sequence[Job]) -> list[Sequence[Any]]:
    """The gradients of all jobs, their m, v, values, stores and winners, None where a job has none."""
    nothing = [None] * len(jobs)
    if function is track_all:
        return [*(zip(*jobs, strict=True) if jobs else [()] * 3), nothing, nothing, nothing]
    values, m, v, stores, last = zip(*jobs, strict=True) if jobs else [()] * 5
    return [last, m, v, values, stores, nothing] if function is unrouted_all else [nothing, m, v, values, stores, last]


def _numbers(function: Pass, shared: Any) -> tuple[int, Tracking | None, Coefficients | None]:
    """The kind of a pass, and its numbers."""
    if function is track_all:
        return (EPD if shared.score_fn == "epd" else PFN), shared, None
    return (UPDATE, None, shared) if function is adamw_all else (UNROUTED, *shared)
