"""What the report says of runs: headline, curves, costs and configuration, as plain lists and numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..tasks import TASKS, get_task
from .routing_content import routing_content, sentences
from .runs import Run, number
from .statistics import windows

CURVE_POINTS = 1000
SCORED_ON = ("dataset_path", "max_examples", "validation_size", "test_size", "split_seed")
"""What decides the records of a score where there is no ``eval_dataset_path``."""
LOG_SCALE_FROM = 4.0
"""Largest by smallest loss from which its axis is logarithmic: else the first entries flatten all that follows."""


def content(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the page shows. Long curves are means over windows; the page says so."""
    return {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "subtitle": _subtitle(runs),
        "notes": [unfinished(run) for run in runs if not run.finished],
        "tiles": tiles(runs),
        "log_scale_from": LOG_SCALE_FROM,
        "columns": COLUMNS,
        "rows": [headline(run) for run in runs],
        "runs": [_run(run) for run in runs],
        "configuration": configuration(runs),
    }


def unfinished(run: Run) -> str:
    """A line for a run without its metrics."""
    steps = [entry["step"] for entry in run.history]
    if run.routing is not None:
        steps += run.routing.steps[-1:].tolist()
    return f"{run.name} is not finished (it has no metrics.json); it is shown up to step {max(steps, default=0):,}."


COLUMNS: list[dict[str, Any]] = [
    {"key": "run", "label": "Run"},
    {"key": "method", "label": "Method"},
    {"key": "ranks", "label": "LoRA ranks"},
    {"key": "lr", "label": "LR", "digits": None},
    {"key": "lora_lr", "label": "LoRA LR", "digits": None},
    {"key": "score", "label": "Score", "digits": 1, "bar": True},
    {"key": "loss", "label": "Train loss", "digits": 3},
    {"key": "steps", "label": "Steps", "digits": 0},
    {"key": "seconds", "label": "Seconds", "digits": 1, "bar": True},
    {"key": "speed", "label": "Tokens/s", "digits": 0, "bar": True},
    {"key": "memory", "label": "Peak MiB", "digits": 0, "bar": True},
    {"key": "dense", "label": "Dense wins, %", "digits": 1, "bar": True},
]
"""The headline table; a column with "digits" is numeric (None: as few digits as tell the number), one with "bar" has
bars to compare the runs by."""


def headline(run: Run) -> dict[str, Any]:
    """One row of the headline table; None where a run has no such number."""
    method, molf, metrics = run.config["method"], run.config["molf"], run.metrics
    has_lora, has_dense = bool(molf.get("expert_ranks")), bool(molf.get("train_base"))
    share = number(metrics.get("expert_share", {}).get("dense"))
    if run.routing is not None and "dense" in run.routing.experts:  # first, and without the steps that are left out
        share = float(run.routing.won[:, :, 0].sum() / max(1, run.routing.took_part.sum()))
    return {
        "run": run.name,
        "method": str(method.get("method")),
        "ranks": ", ".join(str(rank) for rank in molf.get("expert_ranks", [])) or None,
        "lr": number(molf.get("lr")) if has_dense else None,
        "lora_lr": number(molf.get("lora_lr")) if has_lora else None,
        "score": score(run)[1],
        "loss": number(metrics.get("train_loss")),
        "steps": number(metrics.get("steps")),
        "seconds": _seconds(run),
        "speed": _speed(run),
        "memory": number(metrics.get("peak_memory_mib")),
        "dense": None if share is None else 100 * share,
    }


def tiles(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The numbers to see first: of one run its own, of several the best and the run, by index, that has it.

    Scores of different tasks or records have no best.
    """
    rows, one = [headline(run) for run in runs], len(runs) == 1
    found = []
    for key, label, best, choose in (
        ("score", "Score", "Best score", max),
        ("seconds", "Training time", "Shortest training", min),
        ("memory", "Peak memory", "Least memory", min),
        ("dense", "Dense won", "Most dense wins", max),
    ):
        known = {index: row[key] for index, row in enumerate(rows) if row[key] is not None}
        if len(known) < (1 if one else 2) or (key == "score" and len(set(map(scored_on, runs))) > 1):
            continue
        index = choose(known, key=known.__getitem__)
        found.append(
            {"label": label if one else best, "value": _tile(key, known[index]), "run": None if one else index}
        )
    return found


def _tile(key: str, value: float) -> str:
    if key == "seconds":
        return duration(value)
    if key == "memory":
        return f"{value:.0f} MiB" if value < 2048 else f"{value / 1024:.1f} GiB"
    return f"{value:.1f}" + (" %" if key == "dense" else "")


def duration(seconds: float) -> str:
    """A time with the unit that suits it.

    Example:
        >>> duration(20.44), duration(600), duration(9000)
        ('20.4 s', '10.0 min', '2.5 h')
    """
    unit, size = ("h", 3600) if seconds >= 7200 else ("min", 60) if seconds >= 120 else ("s", 1)
    return f"{seconds / size:.1f} {unit}"


def score(run: Run) -> tuple[str, float | None]:
    """Name and value of the task's primary metric, of the test or validation part where there is one."""
    if (task := _task(run)) not in TASKS:
        return "", None
    primary = get_task(task).primary
    metrics = run.metrics.get("test", run.metrics.get("validation", run.metrics))
    return primary, number(metrics.get(primary))


def scored_on(run: Run) -> str:
    """Task and records of a run's score: those of ``eval_dataset_path``, or what is trained on and how it is split."""
    own = ("eval_dataset_path",) if run.config["method"].get("eval_dataset_path") else SCORED_ON
    return json.dumps([_task(run), *(run.config["method"].get(name) for name in own)])


def _task(run: Run) -> str:
    """The task of a run, which is ``completion`` where none was named; of another trainer's run none."""
    method = run.config["method"]
    return (method["task"] or "completion") if "task" in method else ""


def _seconds(run: Run) -> float | None:
    """Training time; of a run that was resumed that of all its processes, as the log counts it up to its last entry."""
    own = number(run.metrics.get("seconds"))
    logged = [seconds for entry in run.history if (seconds := number(entry.get("seconds"))) is not None]
    return own if own is None or "resumed_from" not in run.metrics else max([own, *logged])


def _speed(run: Run) -> float | None:
    """Tokens per second over the run: weighted by the time of each entry of the log."""
    pairs = [(number(entry.get("seconds")), number(entry.get("tokens_per_second"))) for entry in run.history]
    known = [(seconds, speed) for seconds, speed in pairs if seconds is not None and speed is not None]
    spans = np.diff([0.0, *(seconds for seconds, _ in known)])
    total = float(spans.sum())
    return float(np.dot(spans, [speed for _, speed in known])) / total if total > 0 else None


def _subtitle(runs: Sequence[Run]) -> str:
    """Model, task and package versions, where the runs agree on them."""
    facts = [
        ("", [Path(str(run.config["method"].get("model_name_or_path"))).name for run in runs]),
        ("task ", [run.config["method"].get("task") for run in runs]),
        ("", [_text(run.config.get("versions", {}).get("device", "")) for run in runs]),
        ("torch ", [_text(run.config.get("versions", {}).get("torch", "")) for run in runs]),
    ]
    return " · ".join(f"{label}{values[0]}" for label, values in facts if values[0] and len(set(values)) == 1)


def _run(run: Run) -> dict[str, Any]:
    (name, value), evaluated = score(run), evaluations(run)
    return {
        "name": run.name,
        "curve": curve(run.history),
        "evaluations": evaluated,
        "scored_on": scored_on(run),
        "score_name": name if any(one is not None for one in (value, *evaluated["score"])) else "",
        "score": value,
        "steps": number(run.metrics.get("steps")),
        "seconds": _seconds(run),
        "memory": number(run.metrics.get("peak_memory_mib")),
        "sentences": [] if run.routing is None else sentences(run.routing),
        "routing": None if run.routing is None else routing_content(run.routing),
    }


def curve(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Loss against step, seconds and tokens; of more than 1,000 entries the means over windows of them."""
    entries = [entry for entry in history if number(entry.get("loss")) is not None]
    edges = windows(len(entries), CURVE_POINTS)
    points: dict[str, Any] = {"logged": len(entries), "averaged": int(edges[1]) if entries else 1}
    for key, name in (("step", "steps"), ("seconds", "seconds"), ("num_tokens", "tokens"), ("loss", "loss")):
        values = np.array([number(entry.get(key)) for entry in entries], dtype=float)
        known = len(entries) > 0 and not np.isnan(values).any()
        means = [values[a:b].mean() for a, b in pairwise(edges)] if known else []
        points[name] = [float(f"{mean:.6g}") for mean in means]
    return points


def evaluations(run: Run) -> dict[str, Any]:
    """Loss and score of the evaluations while training went on; "records" is how many records each looked at, at most.

    An entry without a score, as of a run without a task, has None. Tokens are between the training log's, by step.
    """
    name, _ = score(run)
    entries = [
        entry for entry in run.history if all(number(entry.get(key)) is not None for key in ("eval_loss", "seconds"))
    ]
    tokens = {0: 0.0} | {entry["step"]: entry["num_tokens"] for entry in run.history if number(entry.get("num_tokens"))}
    steps = [entry["step"] for entry in entries]
    between = np.interp(steps, list(tokens), list(tokens.values())) if len(tokens) > 1 else np.empty(0)
    return {
        "records": number(run.config["method"].get("eval_examples")),
        "steps": steps,
        "seconds": [float(f"{entry['seconds']:.6g}") for entry in entries],
        "tokens": [round(count) for count in between.tolist()],
        "loss": [float(f"{entry['eval_loss']:.6g}") for entry in entries],
        "score": [number(entry.get(f"eval_{name}")) for entry in entries],
    }


def configuration(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every resolved option and metric of every run, by section; "differs" where the runs do not agree."""
    sections = []
    for title, parts in (
        ("Method", [run.config["method"] for run in runs]),
        ("Experts", [run.config["molf"] for run in runs]),
        ("Training", [run.config["training"] for run in runs]),
        ("Versions", [run.config.get("versions", {}) for run in runs]),
        ("Metrics", [_flat(run.metrics) for run in runs]),
    ):
        keys = dict.fromkeys(key for part in parts for key in part)
        rows = []
        for key in keys:
            values = [_text(part[key]) if key in part else "" for part in parts]
            rows.append({"key": key, "values": values, "differs": len(set(values)) > 1})
        sections.append({"title": title, "rows": rows})
    return sections


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
