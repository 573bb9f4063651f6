"""Statistics of a routing log: pure functions of arrays with T steps, M modules and E experts.

A decision is one module at one step. A module without a gradient at a step took no part: nothing here counts it.
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np


def windows(count: int, most: int) -> np.ndarray:
    """Edges of at most ``most`` windows of nearly equal length over ``count`` records, (windows + 1,).

    Example:
        >>> windows(5, 2)
        array([0, 2, 5])
        >>> windows(3, 10)
        array([0, 1, 2, 3])
    """
    number = max(1, min(count, most))
    return np.arange(number + 1) * count // number


def shares(won: np.ndarray, took_part: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of decisions that each expert won, per window and module, (W, M, E); nan where there was no decision.

    With ``top_k`` above 1 several experts win a decision, and the shares sum to ``top_k``.

    Args:
        won: Which experts were updated, (T, M, E), bool; or how often, where modules are pooled.
        took_part: Whether, or how often, there was a decision, (T, M).
        edges: Window edges, (W + 1,).
    """
    return _ratio(_sums(won, edges), _sums(took_part, edges)[:, :, None])


def margins(scores: np.ndarray) -> np.ndarray:
    """How clear each decision was, (T, M): 1 - S₂ / S₁ of the best score and the next one.

    0 is a tie, 1 a runner-up with score 0; nan where the module took no part, or with one expert or scores of 0.
    """
    if scores.shape[2] < 2:
        return np.full(scores.shape[:2], np.nan, dtype=scores.dtype)
    top = np.partition(scores, -2, axis=2)
    return 1 - _ratio(top[:, :, -2], top[:, :, -1])


def window_medians(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Median over the steps of each window and its columns, (W,); nan where there is no value."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice", category=RuntimeWarning)
        return np.array([np.nanmedian(values[a:b]) for a, b in pairwise(edges)])


def switch_rate(best: np.ndarray) -> float:
    """Share of decisions whose best expert is another one than at the step before; nan with fewer than two steps."""
    both = (best[1:] >= 0) & (best[:-1] >= 0)
    return float(((best[1:] != best[:-1]) & both).sum() / both.sum()) if both.any() else float("nan")


def specialised(best: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The step from which a module's best expert no longer changes, (M,); -1 for a module that never took part.

    The last decision of a log always agrees with itself: a module that changes until the end has one of the last steps.

    Source: arXiv:2605.07111, Figures 4 to 6.
    """
    found = np.full(best.shape[1], -1, dtype=np.int64)
    for module, column in enumerate(best.T):
        rows = np.flatnonzero(column >= 0)
        if rows.size:
            differs = np.flatnonzero(column[rows] != column[rows[-1]])
            found[module] = steps[rows[differs[-1] + 1 if differs.size else 0]]
    return found


def _sums(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.stack([values[a:b].sum(0) for a, b in pairwise(edges)])


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The ratio; nan where the denominator is not positive."""
    result = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.divide(numerator, denominator, out=result, where=denominator > 0)
