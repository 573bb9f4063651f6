"""torch.compile for the passes. Imported when something is compiled, because it takes as long as torch itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.fx.experimental import _config as symbolic

COMPILING_FAILED = (TorchDynamoException, InductorError)
"""What is raised, before anything has run, where there is no working compiler."""

_VARIANTS = 32
"""Compilations of one pass: list lengths, one or two dimensions, dtypes, with or without clipping."""


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """A pass compiled by Inductor, once per process.

    Inductor otherwise computes the new moments twice, once to sum their score and once to store them, in two loops
    over memory; a lower ``realize_opcount_threshold`` makes it store them and sum what it has just stored.
    """
    return torch.compile(function, dynamic=True, options={"realize_opcount_threshold": 10})


def run_compiled(function: Callable[..., Any], calls: Sequence[Sequence[Any]], shared: Any) -> Iterator[list[Any]]:
    """The results of ``function(jobs, shared)``, compiled, for the jobs of every call.

    Every size is a symbol of its own: other shapes need no new compilation. The numbers, β and ε, are constants of the
    loops, which would otherwise read and convert them for every vector.
    """
    compiled = _compile(function)
    with (
        symbolic.patch(  # type: ignore[attr-defined]
            use_duck_shape=False
        ),
        torch._dynamo.config.patch(recompile_limit=_VARIANTS, specialize_float=True),
    ):
        for jobs in calls:
            yield compiled(jobs, shared)
