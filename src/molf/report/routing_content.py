"""What the report shows of one routing log, as plain lists and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..optim.names import places
from .runs import RoutingLog
from .statistics import margins, shares, specialised, switch_rate, window_medians, windows

WINDOWS = 100


def routing_content(log: RoutingLog) -> dict[str, Any]:
    """Shares by window of modules and of projections, and the step from which each module kept its winner.

    Long logs are averaged over at most 100 windows of steps, whose first and last steps are given with them.
    """
    layers, projections, cells = grid(log.modules)
    edges = windows(len(log.steps), WINDOWS)
    margin = margins(log.scores)
    columns = [np.array([cell[1] == p for cell in cells]) for p in range(len(projections))]
    return {
        "experts": list(log.experts),
        "layers": ["–" if layer is None else str(layer) for layer in layers],
        "projections": projections,
        "cells": cells,
        "modules": list(log.modules),
        "windows": _spans(log, edges),
        "shares": plain(shares(log.won, log.took_part, edges).transpose(2, 0, 1), 3),
        "whole": plain(_whole(log).T, 4),
        "projection_shares": plain(np.stack([_pooled(log, column, edges) for column in columns]).transpose(2, 0, 1), 4),
        "projection_margins": plain([window_medians(margin[:, column], edges) for column in columns], 4),
        "specialised": [int(step) for step in specialised(log.best, log.steps)],
        "first_step": int(log.steps[0]),
        "last_step": int(log.steps[-1]),
    }


def grid(modules: Sequence[str]) -> tuple[list[int | None], list[str], list[tuple[int, int]]]:
    """Layers, projections, and the (row, column) of every module in a table of them.

    Example:
        >>> grid(["layers.0.q", "layers.0.k", "layers.1.q"])
        ([0, 1], ['q', 'k'], [(0, 0), (0, 1), (1, 0)])
    """
    found = places(modules)
    layers = sorted({layer for layer, _ in found}, key=lambda layer: -1 if layer is None else layer)
    projections = list(dict.fromkeys(projection for _, projection in found))
    return layers, projections, [(layers.index(layer), projections.index(projection)) for layer, projection in found]


def sentences(log: RoutingLog) -> list[str]:
    """The log in a few plain sentences."""
    whole, took_part = _whole(log), log.took_part
    steps, kept = log.steps, specialised(log.best, log.steps)
    total = [log.won[:, :, expert].sum() / max(1, took_part.sum()) for expert in range(len(log.experts))]
    lines = [
        f"{took_part.sum():,} decisions: {len(log.modules)} modules at {len(steps):,} steps. "
        + ", ".join(f"{name} won {100 * share:.1f}\u00a0%" for name, share in zip(log.experts, total, strict=True))
        + "."
    ]
    first, name = np.nan_to_num(whole[:, 0], nan=-1.0), log.experts[0]
    if len(log.modules) > 1 and len(log.experts) > 1:
        most, least = int(first.argmax()), int(np.where(first < 0, np.inf, first).argmin())
        modules = [module.removeprefix("base_model.model.") for module in log.modules]  # PEFT's
        lines.append(
            f"{name} won most often in {modules[most]} ({100 * first[most]:.0f}\u00a0% of steps) and least often "
            f"in {modules[least]} ({100 * first[least]:.0f}\u00a0%)."
        )
    rate = switch_rate(log.best)
    half = int(((kept >= 0) & (kept <= (steps[0] + steps[-1]) / 2)).sum())
    changes = "" if math.isnan(rate) else f"The winner changed in {100 * rate:.1f}\u00a0% of decisions; "
    lines.append(f"{changes}{half} of {len(log.modules)} modules kept one winner through the second half.")
    return lines


def _whole(log: RoutingLog) -> np.ndarray:
    """Share of each expert over the whole log, (M, E)."""
    return shares(log.won, log.took_part, np.array([0, len(log.steps)]))[0]


def _pooled(log: RoutingLog, modules: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of each expert per window in the decisions of several modules together, (W, E)."""
    won, took_part = (x[:, modules].sum(1, keepdims=True) for x in (log.won, log.took_part))
    return shares(won, took_part, edges)[:, 0]


def _spans(log: RoutingLog, edges: np.ndarray) -> list[list[int]]:
    return [[int(log.steps[a]), int(log.steps[b - 1])] for a, b in pairwise(edges)]


def plain(values: Any, digits: int) -> Any:
    """Arrays as nested lists of rounded numbers; JSON has no NaN and no infinity, so they are null."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, list):
        return [plain(value, digits) for value in values]
    return round(values, digits) if math.isfinite(values) else None
