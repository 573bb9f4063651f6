"""The result file: raw times of every round, medians, quartiles and ratios; whole on disk after every measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from ..files import write_json

DIGITS = 4
"""Decimals that are kept: 0.1 microseconds."""

UNITS = {"step": "ms", "train": "ms", "memory": "MiB"}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles.

    Example:
        >>> summary([4.0, 1.0, 2.0, 3.0, 5.0])
        {'median': 3.0, 'q1': 2.0, 'q3': 4.0}
    """
    q1, _, q3 = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "q1": q1, "q3": q3}


def ratio(ours: Sequence[float], peers: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios of each round: drift that both share in a round cancels.

    Example:
        >>> ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])["median"]
        2.0
    """
    return summary([own / peer for own, peer in zip(ours, peers, strict=False)])


class Results:
    """Collects measurements and keeps the file up to date, so that a killed bench leaves what it has.

    Args:
        path: The JSON file.
        bench: "step", "train" or "memory".
        header: Settings, environment and command.
        labels: The contenders, in the order of measurement.
        baselines: Contenders that all others are divided by.
        tokens: Per training step, for tokens/s; 0 where there are none.

    Attributes:
        complete: Whether the run has ended.
        compilations_in_rounds: Graphs compiled while times were taken; the times are of steps alone if it is 0.
    """

    def __init__(
        self,
        path: Path,
        bench: str,
        header: Mapping[str, Any],
        labels: Sequence[str],
        baselines: Sequence[str],
        tokens: int = 0,
    ) -> None:
        self.path = path
        self.bench = bench
        self.header = dict(header)
        self.labels = list(labels)
        self.baselines = list(baselines)
        self.tokens = tokens
        self.complete = False
        self.compilations_in_rounds = 0
        self._facts: dict[str, dict[str, Any]] = {label: {} for label in labels}
        self._warmup: dict[str, list[float]] = {label: [] for label in labels}
        self._rounds: dict[str, list[Mapping[str, float]]] = {label: [] for label in labels}

    def add_facts(self, label: str, facts: Mapping[str, Any]) -> None:
        """What was measured once, or is known without measuring."""
        self._facts[label].update(facts)
        self.write()

    def add_warmup(self, label: str, values: Sequence[float]) -> None:
        """The steps before the rounds; the first one's includes what is made or compiled on first use."""
        self._warmup[label] += [round(value, DIGITS) for value in values]
        self.write()

    def add_compilations(self, label: str, graphs: int) -> None:
        """Graphs compiled while a contender warmed up; what an earlier one has compiled is not compiled again."""
        self.add_facts(label, {"compilations": graphs + self._facts[label].get("compilations", 0)})

    def add_round(self, label: str, parts: Mapping[str, float]) -> None:
        """One round's measurement: "total", and its parts."""
        self._rounds[label].append({key: round(value, DIGITS) for key, value in parts.items()})
        self.write()

    def totals(self, label: str) -> list[float]:
        """The measurements of all rounds so far."""
        return [parts["total"] for parts in self._rounds[label]]

    def entry(self, label: str) -> dict[str, Any]:
        """What the file says of a contender; ratios are of the whole and of a step without its matmuls."""
        rounds = self._rounds[label]
        keys = list(rounds[0]) if rounds else []
        speed = {"tokens_per_s": 1e3 * self.tokens / median(self.totals(label))} if self.tokens and rounds else {}
        compared = [key for key in keys if key in ("total", "without_matmuls")]
        return {
            **self._facts[label],
            **speed,
            "warmup": self._warmup[label],
            "rounds": {key: [parts[key] for parts in rounds] for key in keys},
            "summary": {key: summary([parts[key] for parts in rounds]) for key in keys},
            "ratios": {
                peer: {key: ratio([parts[key] for parts in rounds], self.totals(peer)) for key in compared}
                for peer in self.baselines
                if keys and min(self.totals(peer), default=0) > 0  # a tiny model's memory may be too little to measure
            },
        }

    def write(self) -> None:
        """Replace the file."""
        contenders = {label: self.entry(label) for label in self.labels}
        head: dict[str, Any] = {"bench": self.bench, "unit": UNITS[self.bench], "complete": self.complete}
        head["compilations_in_rounds"] = self.compilations_in_rounds
        write_json(self.path, {**head, **self.header, "contenders": contenders})

    def table(self) -> str:
        """Medians, quartiles and ratios as an aligned text table."""
        unit = UNITS[self.bench]
        speed = ["tokens/s"] if self.tokens else []
        rows = [["contender", f"{unit}, median", "quartiles", *speed, *(f"/ {peer}" for peer in self.baselines)]]
        for label in self.labels:
            entry = self.entry(label)
            if not entry["summary"]:
                rows.append([label, entry.get("error", "-"), *[""] * (len(rows[0]) - 2)])
                continue
            own = entry["summary"]["total"]
            cells = [f"{own['median']:.2f}", f"{own['q1']:.2f} to {own['q3']:.2f}"]
            cells += [f"{entry['tokens_per_s']:.0f}"] if self.tokens else []
            peers = [entry["ratios"].get(peer) for peer in self.baselines]
            rows.append([label, *cells, *(f"{peer['total']['median']:.3f}" if peer else "-" for peer in peers)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        return "\n".join(lines)
