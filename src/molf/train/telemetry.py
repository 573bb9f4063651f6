"""Routing as numbers of a training log: shares, margin, switches, and updates that a 16-bit weight does not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..optim import MoLFAdamW
from ..optim.layout import Slot
from ..optim.names import places

SAMPLE = 4096
"""Elements per weight that ``LostUpdates`` looks at."""


class RoutingMetrics:
    """Averages routing records between two entries of a log.

    ``molf/dense_share`` is the share of decisions that the dense expert won; ``molf/share/<projection>`` that of the
    first expert (dense, or in MoLF-Efficient the first LoRA expert) among the modules of one projection;
    ``molf/margin`` the mean of 1 - S₂ / S₁, best score and next; ``molf/switch_rate`` the share of decisions whose best
    expert is another one than at the module's decision before.

    Args:
        modules: Names of the routed modules.
        experts: Names of the experts.
    """

    def __init__(self, modules: Sequence[str], experts: Sequence[str]) -> None:
        self.experts = tuple(experts)
        self.projections = [projection for _, projection in places(modules)]
        self._before: list[int | None] = [None] * len(modules)
        self._reset()

    def _reset(self) -> None:
        self._decisions = dict.fromkeys(self.projections, 0)
        self._first = dict.fromkeys(self.projections, 0)
        self._margins, self._clear, self._switches, self._pairs = 0.0, 0, 0, 0

    def add(self, record: dict[str, Any]) -> None:
        """Count one step, as ``RoutingRecorder.latest`` has it."""
        for index, (scores, winners) in enumerate(zip(record["scores"], record["winners"], strict=True)):
            if winners is None:
                continue
            projection, best = self.projections[index], winners[0]
            self._decisions[projection] += 1
            self._first[projection] += 0 in winners
            before, self._before[index] = self._before[index], best
            if before is not None:
                self._pairs += 1
                self._switches += before != best
            second, first = sorted(scores)[-2:] if len(scores) > 1 else (0.0, 0.0)
            if first > 0:
                self._margins += 1 - second / first
                self._clear += 1

    def take(self) -> dict[str, float]:
        """The averages since the last call; empty if there was no decision."""
        total = sum(self._decisions.values())
        found: dict[str, float] = {}
        if total and self.experts[0] == "dense":
            found["molf/dense_share"] = sum(self._first.values()) / total
        for projection, count in self._decisions.items():
            if count:
                found[f"molf/share/{projection}"] = self._first[projection] / count
        if self._clear:
            found["molf/margin"] = self._margins / self._clear
        if self._pairs:
            found["molf/switch_rate"] = self._switches / self._pairs
        self._reset()
        return found


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
        samples = {i: self._sample(slot) for i, slot in slots.items() if slot and self._optimizer.config.train_base}
        half = (torch.bfloat16, torch.float16)
        self._before = {i: sample.clone() for i, sample in samples.items() if sample.dtype in half}

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
        weight = self._optimizer.param_groups[slot[0]]["params"][slot[1]].detach()
        flat = getattr(weight, "_local_tensor", weight).flatten()
        return flat[:: max(1, -(-flat.numel() // SAMPLE))]
