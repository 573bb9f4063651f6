"""Rounds in turn: A B C A B C ..., so that what drifts on the machine drifts for all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from .contenders import Contender
from .device import compilations, free, peak_mib, reset_peak
from .results import Results
from .workload import Workload


def interleave(
    contenders: Sequence[Contender],
    make: Callable[[Contender], Workload],
    results: Results,
    *,
    rounds: int,
    warmup: int,
    turns: int = 0,
) -> None:
    """Warm every contender up, then time round after round, in each every contender once.

    Args:
        contenders: What to compare, in this order.
        make: Builds one.
        results: Where the measurements go.
        rounds: How many rounds.
        warmup: Steps before the rounds, at least 2: the first one makes state and compiles, and where LoRA won it, what
            later winners need is compiled in the second.
        turns: 0 keeps all contenders alive at once. Where memory has no room for that, N builds them one after the
            other, N times over, each time for rounds / N rounds: A A A B B B A A A B B B. A round's ratio is then of
            times that lie a turn apart, and a drift shorter than a turn does not cancel.
    """
    groups = [[contender] for contender in contenders] if turns else [list(contenders)]
    for turn in range(max(turns, 1)):
        numbers = range(*(rounds * end // max(turns, 1) for end in (turn, turn + 1)))
        for group in groups:
            _block(group, make, results, numbers, warmup, rounds)
            free()


def _block(
    contenders: Sequence[Contender],
    make: Callable[[Contender], Workload],
    results: Results,
    numbers: range,
    warmup: int,
    rounds: int,
) -> None:
    """Rounds of contenders that are alive together; one that finds no memory is noted and left out."""
    alive: dict[str, Workload] = {}
    for contender in contenders:
        label = contender.label
        if "error" in results.entry(label):
            continue
        before = compilations()
        reset_peak()
        try:
            alive[label] = make(contender)
            results.add_warmup(label, alive[label].warm_up(warmup))
        except torch.OutOfMemoryError as error:
            alive.pop(label, None)
            results.add_facts(label, {"error": str(error).splitlines()[0]})
        results.add_compilations(label, compilations() - before)
        say(f"{label}: {results.entry(label).get('error', 'ready')}")
    before = compilations()
    for number in numbers:
        for label, workload in alive.items():
            results.add_round(label, workload.round(workload.settings.steps))
            say(f"round {number + 1}/{rounds}: {label}: {results.totals(label)[-1]:.2f} ms")
    results.compilations_in_rounds += compilations() - before
    for label, workload in alive.items():
        peak = {"peak_mib": peak_mib()} if len(contenders) == 1 and workload.settings.device == "cuda" else {}
        results.add_facts(label, {**workload.facts(), **peak})


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
