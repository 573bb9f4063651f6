"""From the results of a sweep to a table and a verdict.

The rule was fixed before any run. Per method the learning rate with the best mean validation score over seeds is
chosen (of equal scores the lower rate); its test scores, which no choice saw, are reported as mean ± sd over seeds.
Method a is better than b if the 95 % t-interval of the paired differences of their test scores over seeds lies above
zero; with fewer than three seeds nothing is called better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student_t

RULE = (
    "Learning rates are chosen per method by the mean validation score over seeds; scores are of a test split that no "
    "choice saw. a is better than b if the 95 % t-interval of their paired differences over seeds lies above zero; "
    "with fewer than 3 seeds nothing is called better."
)


@dataclass(frozen=True)
class Row:
    """One method at its chosen learning rate.

    Attributes:
        method: Its name.
        learning_rate: The chosen rate, or nan if no run of the method ended well.
        scores: Test score per seed, in percent.
        validation: Mean validation score, in percent.
        seconds: Mean training time of a run.
        memory_mib: Mean peak memory of a run.
        failed: Runs of the method, at any rate, that failed or diverged.
        dense_share: Mean share of decisions that the dense expert won, or None.
    """

    method: str
    learning_rate: float
    scores: dict[int, float]
    validation: float
    seconds: float
    memory_mib: float
    failed: int
    dense_share: float | None


def summarise(results: Sequence[dict[str, Any]], primary: str) -> list[Row]:
    """One row per method, best test score first.

    A learning rate counts only if all seeds of the sweep ended well with it, so that every mean is over the same seeds.
    """
    seeds = {result["arguments"]["seed"] for result in results}
    rows = []
    for method in dict.fromkeys(result["arguments"]["method"] for result in results):
        own = [result for result in results if result["arguments"]["method"] == method]
        rates: dict[float, list[dict[str, Any]]] = {}
        for result in own:
            if result["status"] == "done":
                rates.setdefault(result["arguments"]["learning_rate"], []).append(result)
        whole = {rate: runs for rate, runs in rates.items() if {r["arguments"]["seed"] for r in runs} == seeds}
        failed = sum(result["status"] != "done" for result in own)
        if not whole:
            rows.append(Row(method, math.nan, {}, math.nan, math.nan, math.nan, failed, None))
            continue
        means = {rate: fmean(r["metrics"]["validation"][primary] for r in runs) for rate, runs in whole.items()}
        best = min(means, key=lambda rate: (-means[rate], rate))
        runs = whole[best]
        shares = [r["metrics"].get("expert_share", {}).get("dense") for r in runs]
        rows.append(
            Row(
                method,
                best,
                {r["arguments"]["seed"]: r["metrics"]["test"][primary] for r in runs},
                means[best],
                fmean(r["metrics"]["seconds"] for r in runs),
                fmean(r["metrics"]["peak_memory_mib"] for r in runs),
                failed,
                None if None in shares else fmean(shares),
            )
        )
    return sorted(rows, key=lambda row: -fmean(row.scores.values()) if row.scores else math.inf)


def interval(a: Row, b: Row) -> tuple[float, float, float]:
    """Mean and 95 % t-interval of the paired differences a - b over seeds; the interval is infinite below 2 seeds."""
    differences = [a.scores[seed] - b.scores[seed] for seed in sorted(a.scores)]
    mean = fmean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = float(student_t.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def markdown(rows: Sequence[Row], primary: str) -> str:
    """The table: test score mean ± sd, chosen rate, cost."""
    lines = [
        f"| method | {primary}, test | validation | learning rate | dense wins | seconds | peak MiB | failed runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row.scores:
            lines.append(f"| {row.method} | no learning rate ended well with all seeds | | | | | | {row.failed} |")
            continue
        values = list(row.scores.values())
        spread = f"{fmean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
        dense = "-" if row.dense_share is None else f"{100 * row.dense_share:.1f} %"
        lines.append(
            f"| {row.method} | {spread} | {row.validation:.2f} | {row.learning_rate:g} | {dense} | {row.seconds:.1f} "
            f"| {row.memory_mib:.0f} | {row.failed} |"
        )
    return "\n".join(lines)


def verdict(rows: Sequence[Row], rates: Sequence[float]) -> str:
    """Plain language: the best method, its gap to each other one, whether that is certain, and what each costs."""
    good = [row for row in rows if row.scores]
    if not good:
        return "No method ended well: lower the learning rates, and read the logs of the runs."
    best = good[0]
    seeds = len(best.scores)
    near = [best]
    lines = [f"Best on the test split: {best.method} at learning rate {best.learning_rate:g} ({seeds} seed(s))."]
    for other in good[1:]:
        mean, low, high = interval(best, other)
        certain = "better" if seeds >= 3 and low > 0 else "not distinguishable"
        near += [other] if certain != "better" else []
        bounds = f"95 % interval {low:+.2f} to {high:+.2f}" if math.isfinite(low) else "no interval from one seed"
        lines.append(
            f"Against {other.method}: {mean:+.2f} points ({bounds}), {certain}; it takes "
            f"{best.seconds / other.seconds:.2f}x the time and {best.memory_mib / other.memory_mib:.2f}x the memory."
        )
    if len(near) > 1:
        fastest, smallest = (min(near, key=attrgetter(name)).method for name in ("seconds", "memory_mib"))
        lines.append(
            f"Of the {len(near)} that are not distinguishable, {fastest} takes the least time and {smallest} the least "
            "memory."
        )
    if len(rates) > 1:
        edges = [row.method for row in good if row.learning_rate in (min(rates), max(rates))]
        if edges:
            lines.append(f"At the edge of the learning rates, so the optimum may lie outside: {', '.join(edges)}.")
    return "\n".join([*lines, RULE])
