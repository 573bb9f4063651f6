"""The passes compiled by the machine's C++ compiler, for CPUs: ``passes.cpp``.

Of the same passes Inductor makes loops that take 1.4 times as long, and needs half a minute to compile them
(docs/performance.md). These are compiled in about a second, once per process, and nothing is kept on disk.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .compiled import SQUARES, Compiled, Numbers, Table, addresses, first_addresses, packed, spaced
from .jobs import CompileError
from .virtual import Products

_FLAGS = "-O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp -shared -fPIC"

PRODUCT_TO = 2**15
"""Elements of a weight whose products with its experts are left to torch, which makes better ones of large matrices."""


class Native(Compiled):
    """Runs jobs on a CPU."""

    DEVICE = "cpu"

    def prepare(self) -> None:
        """Compile everything."""
        _library()

    def squares(self, tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor | None:
        """As ``Compiled.squares``, of tensors that are plain."""
        if not self._are_plain(tensors, low=True):
            return None
        sums = torch.empty(sum(counts), dtype=torch.float32, device="cpu")
        widths = [tensor.numel() // count for tensor, count in zip(tensors, counts, strict=True)]
        places = [addresses(tensors), *[None] * 5, first_addresses(sums, counts)]
        table = Table(places, counts, widths, [tensor.dtype for tensor in tensors], None, [None] * 4)
        for _ in self._pass(SQUARES, table, Numbers(), sums):
            pass
        return sums

    def _pass(self, kind: int, table: Table, numbers: Numbers, like: Tensor) -> Iterator[Sequence[int]]:
        if numbers.gate is not None:
            return
        count, low = len(table.rows), table.grads and [dtype == torch.bfloat16 for dtype in table.grads]
        columns = [*table.addresses, table.rows, table.columns, low, *table.rates]  # ``Job`` of passes.cpp
        listed = packed(columns, count)
        _library().molf_pass(
            kind,
            listed.buffer_info()[0],
            count,
            torch.get_num_threads(),
            *numbers[:5],
            None if numbers.clip is None else numbers.clip.data_ptr(),
        )
        yield range(count)

    def _superpose(self, listed: Sequence[Products], scales: Tensor) -> None:
        columns: list[list[int]] = [[] for _ in range(7)]  # ``Product`` of passes.cpp
        for each in listed:
            count, low = len(each.targets), each.targets[0].dtype == torch.bfloat16
            alike = ([number] * count for number in (each.left.shape[2], each.right.shape[2], low))
            own = [*map(addresses, each[:2]), *map(spaced, each[2:]), *alike]
            for column, more in zip(columns, own, strict=True):
                column.extend(more or ())
        total, threads = len(columns[0]), torch.get_num_threads()
        jobs = packed(columns, total)
        _library().molf_superpose(jobs.buffer_info()[0], total, threads, scales.data_ptr(), len(scales))

    def _are_products(self, each: Products) -> bool:
        return each.targets[0].numel() < PRODUCT_TO and super()._are_products(each)


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
    loaded.molf_pass.argtypes = [whole, pointer, whole, whole, *[real] * 5, pointer]
    loaded.molf_superpose.argtypes = [pointer, whole, whole, pointer, whole]
    for function in (loaded.molf_pass, loaded.molf_superpose):
        function.restype = None
    return loaded
