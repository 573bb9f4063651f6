"""Routing without the score, for controls: drawn at given shares, or fixed. One function, ``priorities``."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from .config import MoLFConfig


def priorities(
    config: MoLFConfig, scores: Sequence[Sequence[float]], turns: Iterable[tuple[int, int]]
) -> Sequence[Sequence[float]]:
    """What the experts of every module are ranked by, M rows of E, higher first: the scores, but in a control.

    ``random`` draws experts one after the other in proportion to ``random_shares`` w_i, without putting back: the
    order of log(u_i) / w_i with u_i uniform in (0, 1] (Efraimidis and Spirakis 2006, as exponential clocks). The draw
    depends on ``policy_seed``, the module's index and its step alone, so a resumed run repeats it, on any device and
    in every process, and no global generator is touched. ``fixed-dense`` and ``fixed-lora`` bar the other experts.

    Args:
        config: The policy.
        scores: M rows of E.
        turns: Index and number of steps, this one included, of each of the M modules.

    Example:
        >>> priorities(MoLFConfig(policy="fixed-dense"), [[0.1, 0.9]], [(0, 1)])
        [[0.1, -inf]]
    """
    if config.policy == "random":
        return [_draw(config, f"{config.policy_seed}/{index}/{step}") for index, step in turns]
    if config.policy == "fixed-dense":
        return [[row[0], *[-math.inf] * (len(row) - 1)] for row in scores]
    if config.policy == "fixed-lora":
        return [[-math.inf, *row[1:]] for row in scores]
    return scores


def _draw(config: MoLFConfig, key: str) -> list[float]:
    uniform = random.Random(key)  # a string is hashed by SHA-512: the same on every machine, nearby keys unrelated
    draws = [math.log(1 - uniform.random()) for _ in config.experts]
    return [_rank(u, w) if w else -math.inf for u, w in zip(draws, config.random_shares or (), strict=True)]


def _rank(u: float, w: float) -> float:
    """Ordered like u / w for u <= 0 < w, but in the range of floats however small w is."""
    return math.log(w) - math.log(-u) if u else math.inf
