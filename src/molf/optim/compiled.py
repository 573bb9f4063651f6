"""The passes by compiled code, which takes tensors by their addresses: all jobs of a pass in one call.

What ``native.py`` and ``kernels.py`` have in common. Compiled code takes ordinary, contiguous tensors in fp32; a
gradient, a store and a weight P may be in 16 bits. Anything else is left to ``passes.py``.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .adamw import Coefficients, Tracking
from .jobs import Held, Job, Jobs, Pass, track_all, unrouted_all
from .sharding import PLAIN
from .virtual import Products

SQUARES, EPD, PFN, UPDATE, UNROUTED = range(5)
"""What a pass does: look at gradients; moments and score, by either score; the winners' update; both passes of what is
not routed."""

_FULL = (torch.float32,)

_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")

Column = Sequence[Any] | None
"""Something of every job; None where no job has it."""


class Table(NamedTuple):
    """The jobs of a pass as compiled code takes them, by columns.

    Attributes:
        addresses: Of the gradients, m, v, the values, the stores, the winners and the sums; 0 where a job has none.
        rows: Rows, over each of which is summed.
        columns: Elements of a row.
        grads: Dtypes of the gradients.
        stores: Dtypes of the stores.
        rates: 1 - ηλ and -η / (1-β1ⁿ), the bits of double numbers; where they are one per row, their addresses.
    """

    addresses: Sequence[Column]
    rows: Sequence[int]
    columns: Sequence[int]
    grads: Column
    stores: Column
    rates: Sequence[Column]


class Numbers(NamedTuple):
    """What all jobs of a pass have in common: 1-β1, β2, 1-β2, ε, 1 / √(1-β2ⁿ), and on the device the rest."""

    lerp: float = 0.0
    beta2: float = 0.0
    square: float = 0.0
    eps: float = 0.0
    inverse_root: float = 1.0
    clip: Tensor | None = None
    gate: Tensor | None = None


class Compiled(ABC):
    """Runs jobs of a pass. Make one per optimizer. After a ``CompileError`` those have run whose numbers were given."""

    LOW: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)
    """Formats of 16 bits."""

    DEVICE: ClassVar[str]
    """Type of the devices on which this code runs."""

    def prepare(self) -> None:  # noqa: B027
        """Compile what can be compiled before there are jobs.

        Raises:
            CompileError: If that fails.
        """

    def run(
        self, function: Pass, jobs: Sequence[Job], shared: Any, rows: Sequence[int], sums: Tensor
    ) -> Iterator[Sequence[int]]:
        """As ``Passes.run``; yields the numbers of jobs when these have run.

        Args:
            function: The pass.
            jobs: The tensors.
            shared: The numbers, those of each job in a list. They may differ in nothing but decay and step size.
            rows: How many rows each job has; of one without any nothing is done.
            sums: Takes the sums over all rows.
        """
        columns = _columns(function, jobs)
        places = list(map(addresses, columns))
        writes = sums.dtype == torch.float32 or function is not track_all
        taken = self._taken(columns, places, len(jobs)) if writes else ()
        if not taken:
            return
        places.append(first_addresses(sums, rows) if function is track_all else None)
        kind, numbers, rates = _numbers(function, shared, len(jobs))
        if len(taken) < len(jobs):
            columns, places, rates = (
                [column and [column[i] for i in taken] for column in each] for each in (columns, places, rates)
            )
            rows = [rows[i] for i in taken]
        grads, moments, _, values, stores, _ = columns
        widths = [t.numel() // max(1, count) for t, count in zip(moments or (), rows, strict=True)]
        dtypes = grads and list(map(_DTYPE, grads)), stores and [t if t is None else t.dtype for t in stores]
        for done in self._pass(kind, Table(places, rows, widths, *dtypes, rates), numbers, (moments or ())[0]):
            # of moments nobody asks for the version
            moved = [column[i] for column in (values, stores) if column for i in done if rows[i]]
            if moved:
                torch.autograd.graph.increment_version([tensor for tensor in moved if tensor is not None])
            yield done if len(taken) == len(jobs) else [taken[i] for i in done]

    def squares(self, tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor | None:
        """Σ x² over each of so many equal parts of every tensor, part after part; None if that is left to torch."""
        return None

    def superpose(self, listed: Sequence[Products], scales: Tensor) -> list[int]:
        """Write P of layers whose scales are s_i over the ranks, (R,); returns which it has taken."""
        taken = [i for i, each in enumerate(listed) if self._are_plain([scales]) and self._are_products(each)]
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
    def _pass(self, kind: int, table: Table, numbers: Numbers, like: Tensor) -> Iterator[Sequence[int]]:
        """Run jobs on the device of ``like``; yields which have run."""

    @abstractmethod
    def _superpose(self, listed: Sequence[Products], scales: Tensor) -> None:
        """Write P of layers that are taken."""

    def _are_plain(self, tensors: Sequence[Tensor], low: bool = False) -> bool:
        """Whether all are ordinary, contiguous, where this code runs, and in fp32, or if ``low`` in 16 bits."""
        return self._fit((*_FULL, *self.LOW) if low else _FULL, tensors)

    def _fit(self, dtypes: Iterable[torch.dtype], tensors: Sequence[Tensor]) -> bool:
        return (
            set(map(type, tensors)) <= PLAIN
            and set(map(_DTYPE, tensors)) <= set(dtypes)
            and all(device.type == self.DEVICE for device in set(map(_DEVICE, tensors)))
            and all(map(Tensor.is_contiguous, tensors))
        )

    def _taken(self, columns: Sequence[Column], places: Sequence[Column], count: int) -> Sequence[int]:
        """The jobs, by number, of whose tensors all fit; ``places`` are the addresses of the columns."""
        dtypes = ((*_FULL, *self.LOW), _FULL, _FULL, _FULL, self.LOW, (torch.bool,))
        there = [
            (those, column, place)
            for those, column, place in zip(dtypes, columns, places, strict=True)
            if column and place
        ]
        if all(self._all_fit(those, column, place) for those, column, place in there):
            return range(count)
        return [
            i
            for i in range(count)
            if all(column[i] is None or self._fit(those, column[i : i + 1]) for those, column, _ in there)
        ]

    def _all_fit(self, dtypes: Iterable[torch.dtype], column: Sequence[Any], places: Sequence[int]) -> bool:
        """Whether all tensors of a column do; of one that is held, where they were and contiguous, that is so."""
        present = [tensor for tensor in column if tensor is not None]
        if isinstance(column, Held) and column.seen == places:
            return all(map(Tensor.is_contiguous, present))  # ``data`` may have been transposed in its place
        fit = self._fit(dtypes, present)
        if isinstance(column, Held) and fit:
            column.seen = places
        return fit

    def _are_products(self, each: Products) -> bool:
        alike = len({target.dtype for target in each.targets}) == 1
        return (
            alike
            and bool(each.left.numel() and each.right.numel())
            and self._are_plain(each.targets, low=True)
            and self._are_plain([*each.bases, each.left, each.right])
        )


def addresses(tensors: Column) -> Column:
    """Of tensors their addresses, 0 where there is none."""
    return tensors and [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def spaced(tensor: Tensor) -> range:
    """The addresses of what a tensor holds along its first dimension."""
    size, place = tensor.element_size() * tensor[0].numel(), tensor.data_ptr()
    return range(place, place + size * len(tensor), size)


def first_addresses(sums: Tensor, rows: Sequence[int]) -> list[int]:
    """Where the sums over each job's rows begin."""
    place, size = sums.data_ptr(), sums.element_size()
    return [place + size * start for start in accumulate(rows, initial=0)][:-1]


def packed(columns: Iterable[Column], count: int) -> array[int]:
    """Numbers of ``count`` jobs, column after column; 0 where there are none."""
    listed: list[int] = []
    for column in columns:
        listed += column or [0] * count
    return array("q", listed)


def _columns(function: Pass, jobs: Sequence[Job]) -> list[Column]:
    """The gradients of all jobs, their m, v, values, stores and winners."""
    columns: list[Column] = list(jobs.columns if isinstance(jobs, Jobs) else zip(*jobs, strict=True))
    if not columns:
        return [None] * 6
    if function is track_all:
        return [*columns, None, None, None]
    values, m, v, *rest = columns
    stores, last = (column if column and any(t is not None for t in column) else None for column in rest)
    return [last, m, v, values, stores, None] if function is unrouted_all else [None, m, v, values, stores, last]


def _numbers(function: Pass, shared: Any, count: int) -> tuple[int, Numbers, list[Column]]:
    """The kind of a pass, what its jobs have in common, and their rates."""
    listed = shared if isinstance(shared, list) else [shared] * count
    if function is track_all:
        return (EPD if listed[0].score_fn == "epd" else PFN), _moment_numbers(listed[0]), [None] * 4
    kind, numbers = UPDATE, Numbers()
    if function is unrouted_all:
        kind, numbers = UNROUTED, _moment_numbers(listed[0][0])
        listed = [c for _, c in listed]
    numbers = numbers._replace(eps=float(listed[0].eps), inverse_root=listed[0].inverse_root)
    rates = {key: _rates(c) for key, c in {id(c): c for c in listed}.items()}
    return kind, numbers, list(zip(*(rates[id(c)] for c in listed), strict=True))


def _rates(c: Coefficients) -> tuple[int, int, int, int]:
    """As in a ``Table``."""
    if isinstance(c.decay, Tensor) and isinstance(c.step_size, Tensor):
        return 0, 0, c.decay.data_ptr(), c.step_size.data_ptr()
    decay, size = struct.unpack("2q", struct.pack("2d", c.decay, c.step_size))
    return decay, size, 0, 0


def _moment_numbers(t: Tracking) -> Numbers:
    beta1, beta2 = map(float, t.betas)  # which may be tensors
    return Numbers(1 - beta1, beta2, 1 - beta2, float(t.eps), clip=t.clip, gate=t.gate)
