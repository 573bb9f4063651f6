"""What the router decided: scores and winners of a step, and a file with one record per step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

SCHEMA_VERSION = 1


class Routing(NamedTuple):
    """One module's routing at one step.

    Attributes:
        experts: Expert names in index order.
        scores: Score of every expert, in that order, in full precision.
        winners: Names of the updated experts, best first.
    """

    experts: tuple[str, ...]
    scores: tuple[float, ...]
    winners: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """Scores and winners of all modules that took part in a step.

    Attributes:
        modules: Names of the modules, M of them.
        scores: Of every expert, M rows.
        winners: Expert indices, best first, M rows.
    """

    modules: tuple[str, ...]
    scores: list[list[float]]
    winners: list[list[int]]


def read_sums(sums: Tensor, gate: Tensor | None = None) -> tuple[list[list[float]], bool]:
    """What the scores are made of, (M, E), and whether all gradients were finite: a step's one device-to-host copy.

    Args:
        sums: On any device.
        gate: Whether the gradients were, 0-dimensional; None is true.
    """
    if gate is None:
        return to_host(sums), True
    *rows, last = to_host(torch.cat([sums, gate.to(sums).expand(1, sums.shape[1])]))
    return rows, bool(last[0])


def winners_of(ranked: Sequence[Sequence[float]], top_k: int) -> list[list[int]]:
    """The ``top_k`` experts of every module, best first; of equal ones the lower index.

    Source: arXiv:2605.07111, section 4.3.
    """
    return [sorted(range(len(row)), key=row.__getitem__, reverse=True)[:top_k] for row in ranked]


def to_host(rows: Tensor) -> list[list[float]]:
    """The one place where a step waits for its device."""
    return rows.tolist()


class RoutingRecorder:
    """Writes one JSON line per optimizer step: scores in full precision and winners of every module.

    The first line is a header {"schema": 1, "modules": [...], "experts": [...]}; every other line is
    {"step": n, "lr": {expert: η}, "scores": [[...], ...], "winners": [[...], ...]} with one entry per
    module in the header's order: E scores, and the winners' expert indices, best first. A module that
    had no gradient has null. Lines are flushed as they are written, so the log survives a kill; on a
    resume the records after the resumed step are dropped, and a half-written last line with them.

    Example:
        recorder = RoutingRecorder(optimizer, "routing.jsonl")   # records after every optimizer.step()
        ...
        recorder.close()

    Args:
        optimizer: A ``MoLFAdamW``, or what wraps one in an attribute ``optimizer`` (accelerate).
        path: The file, made at the first record; an existing log of the same modules and experts is continued.

    Attributes:
        latest: The latest record, or None before the first.

    Raises:
        ValueError: If ``optimizer`` is another one, or ``path`` exists and is no such log; at the first step, if it
            lacks steps before that one.
    """

    def __init__(self, optimizer: Any, path: str | os.PathLike[str]) -> None:
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        if not hasattr(self.optimizer, "routed_modules"):
            raise ValueError(
                f"optimizer={type(self.optimizer).__name__} routes nothing: record a MoLFAdamW, which a Trainer makes "
                "with optimizer_cls_and_kwargs=(MoLFOptimizerFactory, {'config': config})"
            )
        self.path = Path(path)
        self._header = {
            "schema": SCHEMA_VERSION,
            "modules": self.optimizer.routed_modules,
            "experts": list(self.optimizer.experts),
        }
        if self.path.exists() and read_routing(self.path)[0] != self._header:
            raise ValueError(f"{self.path} holds the routing of other modules or experts: choose another path")
        self.latest: dict[str, Any] | None = None
        self._template = _template(self.optimizer.experts, len(self._header["modules"]), self.optimizer.config.top_k)
        self._ahead: Tensor | None = None  # of all parameters one with the most steps, and how many these are
        self._taken = 0
        self._file: IO[bytes] | None = None
        self._hook = self.optimizer.register_step_post_hook(lambda *_: self.record())

    def _open(self, step: int) -> IO[bytes]:
        """The log with the records before ``step``; where there is none, a log that is there is kept as ``.old``.

        Raises:
            ValueError: If it lacks some between its first one and ``step``.
        """
        kept = ""
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)  # a line without its end is not among the records
            records = read_routing(self.path)[1]
            kept = "".join(line for line, record in zip(lines[1:], records, strict=False) if record["step"] < step)
            steps = {record["step"] for record in records if record["step"] < step}
            missing = set(range(min(steps, default=step), step)) - steps
            if missing:
                raise ValueError(
                    f"{self.path} has no record of step {min(missing)}, and the run goes on with step {step}: restore "
                    "the log, or move it away to begin another"
                )
            if not kept:
                self.path.replace(self.path.with_name(self.path.name + ".old"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps(self._header, separators=(",", ":")) + "\n" + kept)
        with partial.open() as file:
            os.fsync(file.fileno())
        partial.replace(self.path)
        return self.path.open("ab")

    def record(self) -> None:
        """Append the optimizer's latest routing decision."""
        step, last = self._steps_taken(), 0 if self.latest is None else self.latest["step"]
        goes_back = step < last or (step == last and bool(self.optimizer.decisions))
        if self._file is not None and goes_back:  # an earlier state was loaded: what followed it is dropped
            self._file.close()
            self._file = None
        if self._file is None:
            self._file = self._open(step)
        groups = {group["expert"]: float(group["lr"]) for group in self.optimizer.param_groups}
        rates = {expert: groups[expert] for expert in self.optimizer.experts}
        scores, winners = self._of_all_modules()
        self.latest = {"step": step, "lr": rates, "scores": scores, "winners": winners}
        self._file.write(self._line(self.latest).encode())
        self._file.flush()

    def _steps_taken(self) -> int:
        """The optimizer's, without a look at every parameter where the one with the most steps has made another."""
        state = self.optimizer.state
        if self._ahead not in state or int(state[self._ahead]["step"]) != self._taken + 1:
            self._ahead = max(state, key=lambda parameter: int(state[parameter]["step"]))
        self._taken = int(state[self._ahead]["step"])
        return self._taken

    def _line(self, record: dict[str, Any]) -> str:
        """The record as JSON; where every module took part by one format, which is sooner done than the encoder."""
        if None not in record["scores"]:
            scores = list(chain.from_iterable(record["scores"]))
            if math.isfinite(sum(scores)):  # JSON has names for what is not, the format has others
                winners = chain.from_iterable(record["winners"])
                return self._template % (record["step"], *record["lr"].values(), *scores, *winners)
        return json.dumps(record, separators=(",", ":")) + "\n"

    def _of_all_modules(self) -> tuple[list[Any], list[Any]]:
        """Scores and winners in the header's order; None for a module that took no part."""
        decisions, modules = self.optimizer.decisions, self._header["modules"]
        if len(decisions) == 1 and len(decisions[0].modules) == len(modules):  # all of them, in their order
            return decisions[0].scores, decisions[0].winners
        rows = {
            name: row
            for decision in decisions
            for name, *row in zip(decision.modules, decision.scores, decision.winners, strict=True)
        }
        found = [rows.get(name, (None, None)) for name in modules]
        return [scores for scores, _ in found], [winners for _, winners in found]

    def sync(self) -> None:
        """Wait until what was recorded would survive a power loss."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Stop recording and close the file."""
        self._hook.remove()
        if self._file is not None:
            self._file.close()


def _template(experts: Sequence[str], modules: int, top_k: int) -> str:
    """A record's line for ``%``; 17 digits tell any two floats apart, and cost less than the fewest that do."""
    rates = ",".join(json.dumps(expert).replace("%", "%%") + ":%r" for expert in experts)
    scores, winners = (
        ",".join(["[" + ",".join([one] * count) + "]"] * modules)
        for one, count in (("%.17g", len(experts)), ("%d", top_k))
    )
    return f'{{"step":%d,"lr":{{{rates}}},"scores":[{scores}],"winners":[{winners}]}}\n'


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def stream_routing(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Header of a routing log, and its records one by one; a half-written last line is left out.

    Raises:
        ValueError: If the file is no routing log of this schema version, or its header is damaged.
    """
    path = Path(path)
    records = _lines(path)
    try:
        header = next(records)
        version = header["schema"]
    except StopIteration as error:
        raise ValueError(f"{path} is no routing log: it is empty") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no routing log: {error}") from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} has routing schema {version}, this version reads {SCHEMA_VERSION}: update molf")
    for key in ("modules", "experts"):
        names = header.get(key)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}, line 1, is damaged: {key} is {names!r} and no list of names; restore the file")
    return header, records


def read_routing(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records of a routing log; a half-written last line is left out.

    Raises:
        ValueError: If the file is no routing log of this schema version, or damaged.
    """
    header, records = stream_routing(path)
    try:
        return header, list(records)
    except ValueError as error:
        raise ValueError(f"{path} is no routing log: {error}") from error


def unscored(record: dict[str, Any]) -> bool:
    """Whether all scores of a step are 0, as at a learning rate of 0: nothing was compared, and the first expert won.

    Reports and training logs leave such a step out, which the warm-up of most schedules begins with; the log has it,
    and ``expert_share`` counts it.
    """
    rows = [row for row in record["scores"] if row is not None]
    return bool(rows) and not any(map(any, rows))


def expert_share(records: list[dict[str, Any]], expert: int) -> float:
    """Share of (step, module) decisions in which the expert of this index was among the winners; nan if none."""
    winners = [row for record in records for row in record["winners"] if row is not None]
    return sum(expert in row for row in winners) / len(winners) if winners else math.nan
