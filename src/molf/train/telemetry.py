"""Routing as numbers of a training log: shares, margin, switches, and updates that a 16-bit weight does not show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..optim import MoLFAdamW
from ..optim.layout import Slot
from ..optim.names import places
from ..optim.routing import unscored
from ..optim.sharding import local

SAMPLE = 4096
"""Elements per weight that ``LostUpdates`` looks at."""
TOGETHER = 32
"""Steps that ``RoutingMetrics`` counts at once: one by one, numpy's calls cost more than what they count."""


class RoutingMetrics:
    """Averages routing records between two entries of a log.

    ``molf/dense_share`` is the share of decisions that the dense expert won; ``molf/share/<projection>`` that of the
    first expert (dense, or in MoLF-Efficient the first LoRA expert) among the modules of one projection;
    ``molf/margin`` the mean of 1 - S₂ / S₁, best score and next; ``molf/switch_rate`` the share of decisions whose best
    expert is another one than at the module's decision before. A step whose scores are all 0 is not counted.

    Args:
        modules: Names of the routed modules.
        experts: Names of the experts.
        top_k: How many of them win.
    """

    def __init__(self, modules: Sequence[str], experts: Sequence[str], top_k: int = 1) -> None:
        self.experts, self._top_k = tuple(experts), top_k
        kinds = [projection for _, projection in places(modules)]
        self.projections = list(dict.fromkeys(kinds))
        self._projection = np.array([self.projections.index(kind) for kind in kinds], dtype=int)  # of every module
        self._before = np.full(len(kinds), -1)  # the best expert of its decision before
        self._waiting: list[dict[str, Any]] = []
        self._reset()

    def _reset(self) -> None:
        self._decisions, self._first = np.zeros((2, len(self.projections)))
        self._margins, self._clear, self._switches, self._pairs = 0.0, 0, 0, 0

    def follow(self, records: Iterable[dict[str, Any]]) -> None:
        """Take the best experts of the records that a resumed run goes on from for those of the decisions before."""
        for record in records:
            if not unscored(record):
                best = np.array([-1 if row is None else row[0] for row in record["winners"]])
                self._before = np.where(best >= 0, best, self._before)

    def add(self, record: dict[str, Any]) -> None:
        """Take note of one step, as ``RoutingRecorder.latest`` has it."""
        if not unscored(record):
            self._waiting.append(record)
        if len(self._waiting) == TOGETHER:
            self._count()

    def _count(self) -> None:
        """Count the steps that wait: S steps of M modules, with E scores and K winners each."""
        shape = (len(self._waiting), len(self._projection), -1)
        scores = _flat([each["scores"] for each in self._waiting], [math.nan] * len(self.experts)).reshape(shape)
        won = _flat([each["winners"] for each in self._waiting], [-1] * self._top_k).reshape(shape)
        best, first = won[..., 0], (won == 0).any(-1)
        self._waiting = []
        self._decisions += np.bincount(self._projection, (best >= 0).sum(0), len(self.projections))
        self._first += np.bincount(self._projection, first.sum(0), len(self.projections))
        for row in best:
            both = (row >= 0) & (self._before >= 0)
            self._pairs += int(both.sum())
            self._switches += int((both & (row != self._before)).sum())
            self._before = np.where(row >= 0, row, self._before)
        if len(self.experts) > 1:
            runner_up, top = np.moveaxis(np.partition(scores, -2)[..., -2:], -1, 0)
            clear = top > 0  # nan, of a module that took no part, is not
            self._clear += int(clear.sum())
            self._margins += float((1 - runner_up[clear] / top[clear]).sum())

    def take(self) -> dict[str, float]:
        """The averages since the last call; empty if there was no decision."""
        if self._waiting:
            self._count()
        total = self._decisions.sum()
        found: dict[str, float] = {}
        if total and self.experts[0] == "dense":
            found["molf/dense_share"] = float(self._first.sum() / total)
        for projection, first, count in zip(self.projections, self._first, self._decisions, strict=True):
            if count:
                found[f"molf/share/{projection}"] = float(first / count)
        if self._clear:
            found["molf/margin"] = self._margins / self._clear
        if self._pairs:
            found["molf/switch_rate"] = self._switches / self._pairs
        self._reset()
        return found


def _flat(steps: Sequence[Sequence[Sequence[float] | None]], absent: Sequence[float]) -> np.ndarray:
    """All numbers of rows of modules of steps; an array is sooner made of a flat list than of nested ones."""
    return np.array([number for rows in steps for row in rows for number in (absent if row is None else row)])


class LostUpdates:
    """Share of the dense winners' elements that a step left at the same 16-bit value, by a sample of each weight.

    With an fp32 master nothing is lost for good: the master moved, and the weight follows when it has moved enough. The
    share says how much of training lives in the master alone, and what bf16 weights without one would lose.

    Args:
        optimizer: The optimizer; fp32 weights are not looked at.
    """

    def __init__(self, optimizer: MoLFAdamW) -> None:
        self._optimizer = optimizer
        self._before: dict[int, Tensor] = {}

    def before_step(self) -> None:
        """Remember the samples."""
        slots = {i: module.weight for i, module in enumerate(self._optimizer.modules)}
        half = (torch.bfloat16, torch.float16)
        wanted = {i: slot for i, slot in slots.items() if slot and self._weight(slot).dtype in half}
        self._before = {
            i: self._sample(slot).clone() for i, slot in wanted.items() if self._optimizer.config.train_base
        }

    def after_step(self, winners: Sequence[Sequence[int] | None]) -> float | None:
        """The share for the step since; None if no 16-bit weight's dense expert won it, or nothing was remembered.

        Args:
            winners: Expert indices of every module's winners.
        """
        same = []
        for i, before in self._before.items():
            slot = self._optimizer.modules[i].weight
            if slot is not None and 0 in (winners[i] or ()):
                same.append(self._sample(slot) == before)
        self._before = {}
        return float(torch.cat(same).float().mean()) if same else None

    def _sample(self, slot: Slot) -> Tensor:
        """At most 4,096 elements at even distances; of a sharded weight, of this process's part."""
        flat = local(self._weight(slot).detach()).flatten()
        return flat[:: max(1, -(-flat.numel() // SAMPLE))]

    def _weight(self, slot: Slot) -> Tensor:
        weight: Tensor = self._optimizer.param_groups[slot[0]]["params"][slot[1]]
        return weight
