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
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .compiled import SQUARES, Compiled, Numbers, Row, addresses
from .passes import CompileError
from .virtual import Products

_FLAGS = "-O3 -march=native -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp -shared -fPIC"

PRODUCT_TO = 2**15
"""Elements of a weight whose products with its experts are left to torch, which makes better ones of large matrices."""


class Native(Compiled):
    """Runs jobs on a CPU."""

    def prepare(self) -> None:
        """Compile everything."""
        _library()

    def squares(self, tensors: Sequence[Tensor], counts: Sequence[int]) -> Tensor | None:
        """As ``Compiled.squares``, of tensors that are plain."""
        if not all(self._is_plain(tensor, low=True) for tensor in tensors):
            return None
        sums, rows, place = torch.empty(sum(counts), device="cpu"), [], 0
        for tensor, count in zip(tensors, counts, strict=True):
            places = (tensor.data_ptr(), 0, 0, 0, 0, 0, sums.data_ptr() + place * sums.element_size())
            rows.append(Row(places, (0, 0, 0), count, tensor.numel() // count, (tensor.dtype, None)))
            place += count
        for _ in self._pass(SQUARES, rows, Numbers(0.0, 0.0, 0.0, 0.0, None, None, None), sums):
            pass
        return sums

    def _pass(self, kind: int, rows: Sequence[Row], numbers: Numbers, like: Tensor) -> Iterator[Sequence[int]]:
        if numbers.gate is not None:
            return
        listed = array("q")
        for row in rows:
            listed.extend((*row.addresses, *row.rates, row.rows, row.columns, row.dtypes[0] == torch.bfloat16))
        _library().molf_pass(
            kind,
            listed.buffer_info()[0],
            len(rows),
            torch.get_num_threads(),
            *numbers[:4],
            _address(numbers.clip),
            _address(numbers.inverse_root),
        )
        yield range(len(rows))

    def _superpose(self, listed: Sequence[Products], scales: Tensor) -> None:
        jobs, count = array("q"), 0  # ``Product`` of passes.cpp
        for each in listed:
            rest = (each.left.shape[2], each.right.shape[2], each.targets[0].dtype == torch.bfloat16)
            for own in addresses(*each):
                jobs.extend((*own, *rest))
            count += len(each.targets)
        threads = torch.get_num_threads()
        _library().molf_superpose(jobs.buffer_info()[0], count, threads, scales.data_ptr(), len(scales))

    def _is_on(self, tensor: Tensor) -> bool:
        return tensor.is_cpu

    def _are_products(self, each: Products) -> bool:
        return each.targets[0].numel() < PRODUCT_TO and super()._are_products(each)


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
    loaded.molf_superpose.argtypes = [pointer, whole, whole, pointer, whole]
    for function in (loaded.molf_pass, loaded.molf_superpose):
        function.restype = None
    return loaded
