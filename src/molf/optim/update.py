"""The update of a step of ``MoLFAdamW``: AdamW for the winners and for what is not routed, and the model follows.

As in ``step.py``, which decides who wins, everything is of stacks: K modules of one shape (``stacks.py``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .adamw import Coefficients, Tracking, step_numbers
from .config import MoLFConfig
from .guards import GradientCheck
from .jobs import adamw_all, unrouted_all
from .layout import RoutedModule
from .parts import Part
from .scalars import numbers
from .sharding import first_row, locals_of
from .stacks import OtherStack, Stack
from .state import MoLFState
from .virtual import Products, products

Written = tuple[Part, Tensor, Sequence[Tensor], Sequence[int]]
"""A part of several modules, its new value, where the modules keep theirs if not there, and which of them take it."""


class MoLFUpdate(MoLFState):
    """The update of ``MoLFAdamW``; arguments as of ``MoLFState``."""

    def __init__(
        self, params: Iterable[dict[str, Any]], config: MoLFConfig, modules: Sequence[RoutedModule] = ()
    ) -> None:
        self._coefficients: dict[tuple[Any, ...], Coefficients] = {}
        self._keys: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        super().__init__(params, config, modules)

    def __getstate__(self) -> dict[str, Any]:
        """As of the state."""
        return {**super().__getstate__(), "_coefficients": {}, "_keys": {}}

    def _update(self, stacks: Sequence[Stack], winners: Mapping[str, Sequence[int]]) -> None:
        """AdamW for the winners of these modules, then P follows. Losers are not touched."""
        first = int(self.config.train_base)
        values: dict[int, Tensor] = {}  # of parameters whose precise value is not in the state
        jobs: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
        written: list[Written] = []
        for stack in stacks:
            won = [winners[module.name] for module in stack.modules]
            lora = [[index - first for index in best if index >= first] for best in won]
            if self._is_virtual(stack.modules[0]):
                # small layers: as one tensor, every W costs little memory and saves gathering them
                gathered = any(lora) and self._passes.compiles and len(stack.weights) < len(stack)
                for module, moves in zip(stack.modules, lora, strict=True):
                    if moves or gathered or not self.config.keep_base:
                        self._prepare_base(module, values)
            for part in stack.dense:
                moving = [i for i, k in enumerate(part.members) if 0 in won[k]]
                if moving:
                    winner = None
                    if part.value is not None and len(moving) < len(part.members):
                        winner = numbers([[i in moving] for i in range(len(part.members))], part.value, torch.bool)
                    job = self._job(part, winner, moving, values, written)
                    jobs[self._key([self.param_groups[part.slots[0][0]]], stack.count, job)].append(job)
            if any(lora):
                self._add_lora_jobs(jobs, stack, lora, values, written)
        for key, listed in jobs.items():
            c = self._coefficients[key]
            for masked in (False, True):
                chosen = [job for job in listed if (job[-1] is not None) == masked]
                rows = [len(job[0]) for job in chosen] if masked or c.decay.dim() > 0 else None
                self._passes.run(adamw_all, chosen, c, rows)
        for each in written:
            self._write_part(*each)
        self._write_products([each for stack in stacks for each in self._follow(stack, values)])

    def _job(
        self, part: Part, winner: Tensor | None, which: Sequence[int], values: dict[int, Tensor], written: list[Written]
    ) -> tuple[Any, ...]:
        """What ``adamw_`` takes of a part. Values of several modules are gathered; ``written`` says what to do then."""
        if part.value is not None or len(part.parameters) > 1:
            held = part.precise({}) if part.value is None else ()
            value = part.joined(held) if part.value is None else part.value
            written.append((part, value, held, which))
            return value, part.exp_avg, part.exp_avg_sq, None, winner
        value, store = self._precise(part.parameters[0], values)
        if part.turned:
            value, store = value.T, None if store is None else store.T
        return value, part.exp_avg, part.exp_avg_sq, store, winner

    def _add_lora_jobs(
        self,
        jobs: dict[tuple[Any, ...], list[Any]],
        stack: Stack,
        lora: Sequence[Sequence[int]],
        values: dict[int, Tensor],
        written: list[Written],
    ) -> None:
        """A and Bᵀ, (K R, in) and (K R, out), with the ranks of the winners where not all of them win."""
        groups, winner = [self._group(expert) for expert in self._lora_experts], None
        starts, folds = (self._first_rank(stack.modules[0]), 0), ((1.0,), stack.modules[0].folds(self.config.scales))
        which = [k for k, each in enumerate(lora) if each]
        for part, fold, start in zip(stack.pair or (), folds, starts, strict=True):
            ranks = slice(start, start + len(part.exp_avg) // len(stack))
            if any(len(each) < len(groups) for each in lora):
                segments = self._segments_on(part.exp_avg.device)
                won = numbers([[i in each for i in range(len(groups))] for each in lora], segments, torch.bool)
                winner = won[:, segments][:, ranks].reshape(-1, 1)
            job = self._job(part, winner, which, values, written)
            jobs[self._key(groups, stack.count, job, fold, ranks, len(stack))].append(job)

    def _write_part(self, part: Part, joined: Tensor, held: Sequence[Tensor], which: Sequence[int]) -> None:
        """Let the tensors of several modules take their new values, and those of the model that follow a master."""
        if held:
            part.spread(joined, held, which)
        if "base" in part.states[0] and "lora_A" not in part.states[0]:
            part.spread(joined, part.parameters, which)

    def _follow(self, stack: Stack, values: Mapping[int, Tensor]) -> list[Products]:
        """Let what has no virtual experts follow its precise value; returns what the weights that have will be."""
        virtual_experts = bool(stack.weights) and self._is_virtual(stack.modules[0])
        for parameter in stack.parameters if values else ():
            if id(parameter) in values and not (virtual_experts and parameter.dim() == 2):
                self._write(parameter, values)
        if not virtual_experts:
            return []
        weights = locals_of(weight for part in stack.weights for weight in part.parameters)
        bases = [base for part in stack.weights for base in part.precise(values)]
        return [products(weights, bases, *stack.virtual_pair(), stack.modules[0].transposed)]

    def _step_others(self, others: Sequence[OtherStack], grads: Sequence[Tensor], check: GradientCheck) -> None:
        """AdamW for what is not routed."""
        values: dict[int, Tensor] = {}
        written: list[Written] = []
        jobs: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
        for other, grad in zip(others, grads, strict=True):
            *job, _ = self._job(other.part, None, range(len(other.names)), values, written)
            key = (*self._key([other.group], other.count, job), other.group["betas"])
            jobs[key].append((*job, grad))
        for key, listed in jobs.items():
            c = self._coefficients[key[:-1]]
            clip, _ = check.on(c.decay.device, c.decay.dtype)
            self._passes.run(unrouted_all, listed, (Tracking(key[-1], c.eps, self.config.score_fn, clip), c))
        for each in written:
            self._write_part(*each)
        for parameter in [each for other in others for each in other.part.parameters] if values else ():
            self._write(parameter, values)

    def _key(
        self,
        groups: Sequence[Mapping[str, Any]],
        n: float,
        job: Sequence[Any],
        folds: tuple[float, ...] = (1.0,),
        ranks: slice = slice(None),
        times: int = 1,
    ) -> tuple[Any, ...]:
        """Key of the coefficients of these groups at step n: scalars, or one per rank where LoRA experts' differ.

        Jobs of one key are alike in what varies along their rows; ranks of ``times`` modules follow each other.
        """
        value, ids = job[0], tuple(map(id, groups))
        asked = (ids, n, folds, ranks.start, ranks.stop, times, value.dtype, value.device)
        if asked in self._keys:
            return self._keys[asked]
        decays, sizes, root = step_numbers(groups, n, folds)
        alike = all(len(set(x)) == 1 for x in (decays, sizes))
        rows = () if alike else (ranks.start, ranks.stop, times)
        key = (ids, n, folds, rows, value.dtype, value.device)
        if key not in self._coefficients:
            decay, size, correction, inverse = numbers([decays[0], sizes[0], root, 1 / root], value).unbind()
            if not alike:
                decay, size = (self._per_rank(x, value)[ranks].repeat(times)[:, None] for x in (decays, sizes))
            self._coefficients[key] = Coefficients(decay, size, correction, inverse, groups[0]["eps"])
        self._keys[asked] = key
        return key

    def _first_rank(self, module: RoutedModule) -> int:
        """The first rank of an adapter's A that this process holds; 0 of virtual experts, which have all ranks."""
        return 0 if self.shards is None or module.lora_A is None else first_row(self._parameter(module.lora_A))
