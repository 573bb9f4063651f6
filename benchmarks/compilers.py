"""The passes by the C++ compiler against the same by Inductor, and uncompiled, on the layers of ``cpu-small``.

python benchmarks/compilers.py    # two threads; writes benchmarks/results/compilers.json

A large tensor is written before every measurement, so that nothing is in the cache. The first call compiles, with
Inductor's own cache on disk empty.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from molf.bench.environment import environment
from molf.optim.adamw import Coefficients, Tracking, track_
from molf.optim.jobs import adamw_all, track_all
from molf.optim.passes import Passes

SHAPES = 8 * (4 * [(512, 512)] + 2 * [(1408, 512)] + [(512, 1408)])
ROUNDS = 15
LIST = 8
"""Tensors per call of what Inductor made: a call costs as much as some 10,000 elements."""


def inductor(function: Callable[..., Any], jobs: Sequence[Any], shared: Any) -> None:
    """A pass compiled by Inductor, sizes being symbols.

    Inductor otherwise computes the new moments twice, once to sum their score and once to store them, in two loops
    over memory; a lower ``realize_opcount_threshold`` makes it store them and sum what it has just stored.
    """
    compiled = torch.compile(function, dynamic=True, options={"realize_opcount_threshold": 10})
    for start in range(0, len(jobs), LIST):
        compiled(jobs[start : start + LIST], shared)


def track_by_row(jobs: Sequence[Any], shared: Any) -> list[torch.Tensor]:
    """``track_`` of (grad, m, v, ones), so that one loop stores the moments and sums each row.

    The column of ones varies along the rows, which keeps Inductor from flattening the loop that stores.
    """
    return [track_(grad * ones, m, v, shared) for grad, m, v, ones in jobs]


def runs() -> dict[str, Callable[[], object]]:
    """Both passes by every compiler, and torch's fused AdamW."""
    g = torch.Generator().manual_seed(0)
    grads, m, v, weights = ([torch.randn(shape, generator=g) * 1e-3 for shape in SHAPES] for _ in range(4))
    v = [each.square() for each in v]
    tracking = Tracking((0.9, 0.999), 1e-8, "epd")
    numbers = Coefficients(*map(torch.tensor, (0.99999, -1e-4, 0.3, 1 / 0.3)), 1e-8)
    of_track = list(zip(grads, m, v, strict=True))
    with_ones = [(*job, torch.ones(len(job[0]), 1)) for job in of_track]
    of_adamw = [(*each, None, None) for each in zip(weights, m, v, strict=True)]
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    fused = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    found: dict[str, Callable[[], object]] = {"fused AdamW": lambda: fused.step()}
    for name, compiles in (("C++", True), ("uncompiled", False)):
        passes = Passes(compiles, 0, torch.device("cpu"))
        found[f"{name}: moments, score"] = lambda p=passes: p.run(track_all, of_track, tracking)
        found[f"{name}: update"] = lambda p=passes: p.run(adamw_all, of_adamw, numbers)
    found["Inductor: moments, score"] = lambda: inductor(track_by_row, with_ones, tracking)
    found["Inductor: update"] = lambda: inductor(adamw_all, of_adamw, numbers)
    return found


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(2)
    evicting = torch.zeros(150_000_000)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        every, first, times = runs(), {}, {}
        for name, run in every.items():
            start = time.perf_counter()
            run()
            first[name], times[name] = 1e3 * (time.perf_counter() - start), []
        for _ in range(ROUNDS):
            for name, run in every.items():
                evicting.add_(1)
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
    result = {
        "environment": environment("cpu", 0, []) | {"command": "python benchmarks/compilers.py"},
        "elements": sum(a * b for a, b in SHAPES),
        "first": first,
        "ms": times,
    }
    Path(__file__).with_name("results").joinpath("compilers.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
