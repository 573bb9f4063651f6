"""Run directories as a report reads them: configuration, metrics, what was logged, and the routing log as arrays."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json
from ..optim.routing import stream_routing, unscored

_OTHER_TRAINER: dict[str, Any] = {"method": {"method": "-", "model_name_or_path": ""}, "molf": {}, "training": {}}


@dataclass(frozen=True)
class RoutingLog:
    """A routing log: T steps, M modules, E experts. Steps whose scores are all 0 are left out.

    Attributes:
        modules: Module names.
        experts: Expert names.
        steps: Step numbers, (T,).
        scores: (T, M, E), float32; nan where a module had no gradient.
        best: Index of the best winner, (T, M); -1 where a module had no gradient.
        won: Which experts were updated, (T, M, E), bool.
    """

    modules: tuple[str, ...]
    experts: tuple[str, ...]
    steps: np.ndarray
    scores: np.ndarray
    best: np.ndarray
    won: np.ndarray

    @property
    def took_part(self) -> np.ndarray:
        """Which modules had a gradient at which step, (T, M), bool."""
        took_part: np.ndarray = self.best >= 0
        return took_part


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        name: What the report calls it: its folder, as far as the runs' folders differ.
        folder: The directory.
        config: ``run.json``: "method", "molf", "training", "versions"; all but empty for another trainer's folder.
        metrics: ``metrics.json``; empty if the run has not ended.
        history: What the Trainer logged, from ``trainer_state.json``, or of the newest checkpoint.
        routing: The routing log, or None for a method that does not route.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    routing: RoutingLog | None

    @property
    def finished(self) -> bool:
        """Whether it has its metrics, which other trainers do not write."""
        return bool(self.metrics) or self.config is _OTHER_TRAINER


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, named by what tells them apart.

    Raises:
        ValueError: If a folder is no run directory, is damaged or given twice; one line that says which and why.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given twice: name each run once")
    common = common_folder(paths)
    names = [path.name if len(paths) == 1 else os.path.relpath(path, common) for path in paths]
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def common_folder(paths: Sequence[Path]) -> Path:
    """The run's own folder, or of several runs the folder that holds them all."""
    return Path(os.path.commonpath(paths))


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the output_dir of a run")
    log, own = folder / "routing.jsonl", (folder / "run.json").is_file()
    if not own and not log.is_file():
        inside = sorted(str(path.parent) for path in folder.glob("*/run.json"))
        hint = f"; the runs in it are {' '.join(inside)}" if inside else ""
        raise ValueError(f"{folder} is no run, because it has no run.json and no routing.jsonl{hint}")
    config: dict[str, Any] = read_json(folder / "run.json") if own else _OTHER_TRAINER
    for part in ("method", "molf", "training", "versions"):
        if not isinstance(config.get(part, {} if part == "versions" else None), dict):
            raise ValueError(f"{folder / 'run.json'} has no {part!r}: it was not written by molf train")
    task = config["method"].get("task")
    if not isinstance(task, str | None):
        raise ValueError(f"{folder / 'run.json'} is damaged: task is {task!r} and no name")
    _check_list(folder / "run.json", "expert_ranks", config["molf"].get("expert_ranks", []))
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
    for part in ("expert_share", "validation", "test"):
        if not isinstance(metrics.get(part, {}), dict):
            raise ValueError(f"{folder / 'metrics.json'} is damaged: {part} is {metrics[part]!r} and no mapping")
    routing = read_routing_log(log) if log.is_file() else None
    if routing is not None and not len(routing.steps):  # killed before its first step that compared anything
        routing = None
    return Run(name, folder, config, metrics, _history(folder), routing)


def _history(folder: Path) -> list[dict[str, Any]]:
    """The log of the finished run, or else of its newest checkpoint that has one."""
    checkpoints = [(int(found[1]), path) for path in folder.glob("checkpoint-*") if (found := _numbered(path.name))]
    for path in [folder, *(path for _, path in sorted(checkpoints, reverse=True))]:
        if (path / "trainer_state.json").is_file():
            history = read_json(path / "trainer_state.json").get("log_history", [])
            _check_list(path / "trainer_state.json", "log_history", history)
            return [entry for entry in history if isinstance(entry, dict) and number(entry.get("step")) is not None]
    return []


def _check_list(path: Path, name: str, value: Any) -> None:
    if not isinstance(value, list):
        raise ValueError(f"{path} is damaged: {name} is {value!r:.60} and no list")


def number(value: Any) -> float | None:
    """A value of JSON, if it is a number and finite."""
    found = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if found else None


def _numbered(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", name)


def read_routing_log(path: Path) -> RoutingLog:
    """A routing log as arrays: for 100,000 steps of 200 modules with two experts about 220 MB.

    Raises:
        ValueError: If the file is no routing log, or a record is damaged; names the line.
    """
    header, records = stream_routing(path)
    modules, experts = tuple(header["modules"]), tuple(header["experts"])
    with path.open("rb") as file:
        count = max(0, sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")) - 1)
    shape = (count, len(modules), len(experts))
    scores = np.full(shape, np.nan, dtype=np.float32)
    won = np.zeros(shape, dtype=bool)
    best = np.full(shape[:2], -1, dtype=np.int16)
    steps = np.zeros(count, dtype=np.int64)
    row = left_out = 0
    try:
        for record in islice(records, count):  # a run that goes on writes more meanwhile
            if unscored(record):
                left_out += 1
                continue
            steps[row] = record["step"]
            took_part = np.array([winners is not None for winners in record["winners"]], dtype=bool)
            if took_part.any():
                winners = np.array([w for w in record["winners"] if w is not None], dtype=np.int16)
                scores[row, took_part] = [s for s in record["scores"] if s is not None]
                best[row, took_part] = winners[:, 0]
                for place in winners.T:
                    won[row, took_part.nonzero()[0], place] = True
            row += 1
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}, line {row + left_out + 2}, is damaged: {error}") from error
    return RoutingLog(modules, experts, *(x[:row] for x in (steps, scores, best, won)))
