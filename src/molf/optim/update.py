"""The update of a step of ``MoLFAdamW``: AdamW for the winners and for what is not routed, and the model follows.

As in ``step.py``, which decides who wins, everything is of stacks: K modules of one shape (``stacks.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adamw import Coefficients, Tracking, step_numbers
from .guards import GradientCheck
from .jobs import Held, Jobs, adamw_all, unrouted_all
from .layout import RoutedModule
from .parts import Part
from .scalars import numbers
from .selection import Batch, Selection, Stack, same
from .sharding import first_row, locals_of
from .state import MoLFState
from .virtual import Products, products, shares_storage

Written = tuple[Part, Tensor, Sequence[Tensor], Sequence[int]]
"""A part of several modules, its new value, where the modules keep theirs if not there, and which of them take it."""


class _Update(NamedTuple):
    """What an update remembers until its passes have run.

    Attributes:
        values: Precise values that are in no state, by the parameter's id.
        written: What takes the new values of several modules.
    """

    values: dict[int, Tensor]
    written: list[Written]


class MoLFUpdate(MoLFState):
    """The update of ``MoLFAdamW``; arguments as of ``MoLFState``."""

    def _update(self, selection: Selection, winners: Mapping[str, Sequence[int]]) -> None:
        """AdamW for the winners of these modules, then P follows. Losers are not touched."""
        first = int(self.config.train_base)
        won = [winners[module.name] for stack in selection.stacks for module in stack.modules]
        lora = [[index - first for index in best if index >= first] for best in won]
        update = _Update({}, [])
        for start, stack in selection.starts:
            if self._is_virtual(stack.modules[0]) and not stack.owns_bases():
                stack.products = None
                self._prepare(stack, lora[start : start + len(stack)], update.values)
        dense = [0 in best for best in won] if self.config.train_base else []
        if any(dense):
            self._update_dense(selection, dense, update)
        if any(lora):
            self._update_lora(selection, lora, update)
        for each in update.written:
            self._write_part(*each)
        self._write_products([each for stack in selection.stacks for each in self._follow(stack, update.values)])

    def _prepare(self, stack: Stack, lora: Sequence[Sequence[int]], values: dict[int, Tensor]) -> None:
        """W's of their own for modules that LoRA experts have won; without W in the state, in ``values`` for all."""
        # small layers: as one tensor, every W costs little memory and saves gathering them
        gathered = any(lora) and self._passes.compiles and len(stack.weights) < len(stack)
        for module, moves in zip(stack.modules, lora, strict=True):
            if moves or gathered or not self.config.keep_base:
                self._prepare_base(module, values)

    def _update_dense(self, selection: Selection, won: Sequence[bool], update: _Update) -> None:
        """W and b of the modules that dense has won, which are numbered in the stacks' order."""
        for batch in selection.batches(self._is_uniform()).dense:
            moving = [[i for i, k in enumerate(modules) if won[k]] for modules in batch.modules]
            if not any(moving):
                continue
            masks: list[Tensor | None] = [None] * len(moving)
            for i, part in enumerate(batch.parts):
                if part.value is not None and 0 < len(moving[i]) < len(part.members):
                    masks[i] = numbers([[won[k]] for k in batch.modules[i]], part.value, torch.bool)
            rates = self._rates([self._group_of(part) for part in batch.parts], batch)
            self._run_update(batch, rates, moving, masks, update)

    def _update_lora(self, selection: Selection, lora: Sequence[Sequence[int]], update: _Update) -> None:
        """A and Bᵀ, (K R, in) and (K R, out), with the ranks of the winners where not all of them win."""
        groups = [self._group(expert) for expert in self._lora_experts]
        for batch in selection.batches(self._is_uniform()).lora:
            moving = [[i for i, k in enumerate(modules) if lora[k]] for modules in batch.modules]
            if not any(moving):
                continue
            masks: list[Tensor | None] = [None] * len(moving)
            ranks = [self._ranks(stack, part) for stack, part in zip(batch.stacks, batch.parts, strict=True)]
            for i, modules in enumerate(batch.modules):
                if moving[i] and any(len(lora[k]) < len(groups) for k in modules):
                    segments = self._segments_on(batch.place[0])
                    won = numbers([[j in lora[k] for j in range(len(groups))] for k in modules], segments, torch.bool)
                    masks[i] = won[:, segments][:, ranks[i]].reshape(-1, 1)
            self._run_update(batch, self._lora_rates(groups, batch, ranks), moving, masks, update)

    def _ranks(self, stack: Stack, part: Part) -> slice:
        """The ranks of which a process holds a part of A or Bᵀ."""
        start = 0 if part.turned else self._first_rank(stack.modules[0])
        return slice(start, start + len(part.exp_avg) // len(stack))

    def _rates(self, groups: Sequence[dict[str, Any]], batch: Batch) -> list[Coefficients]:
        """The numbers of a batch's parts, which are of these groups."""
        n, known = batch.stacks[0].count, {}
        for group in groups:
            if id(group) not in known:
                (decay,), (size,), root = step_numbers([group], n)
                known[id(group)] = Coefficients(decay, size, root, 1 / root, group["eps"])
        return [known[id(group)] for group in groups]

    def _lora_rates(self, groups: Sequence[dict[str, Any]], batch: Batch, ranks: Sequence[slice]) -> list[Coefficients]:
        """The same of LoRA experts' parts of these ranks: one number each, or one per row if rates differ by rank."""
        known: dict[Any, Coefficients] = {}
        listed, n = [], batch.stacks[0].count
        numbers_of = functools.cache(lambda folds: step_numbers(groups, n, folds))
        for stack, part, own in zip(batch.stacks, batch.parts, ranks, strict=True):
            folds = stack.modules[0].folds(self.config.scales) if part.turned else (1.0,)
            *rates, root = numbers_of(folds)
            alike = all(len(set(each)) == 1 for each in rates)
            key = folds, *(() if alike else (own.start, own.stop, len(stack)))
            if key not in known:
                decay, size = (
                    each[0] if alike else self._per_rank(each, part.exp_avg)[own].repeat(len(stack))[:, None]
                    for each in rates
                )
                known[key] = Coefficients(decay, size, root, 1 / root, groups[0]["eps"])
            listed.append(known[key])
        return listed

    def _run_update(
        self,
        batch: Batch,
        rates: list[Coefficients],
        moving: Sequence[Sequence[int]],
        masks: Sequence[Tensor | None],
        update: _Update,
    ) -> None:
        """``adamw_`` of parts, of each of which some modules move: where there is a mask, rows of it."""
        values, stores = self._values(batch, moving, update)
        rows = [
            0 if not moves else len(value) if c.by_row or mask is not None else 1
            for moves, value, mask, c in zip(moving, values, masks, rates, strict=True)
        ]
        self._passes.run(adamw_all, Jobs(values, batch.exp_avg, batch.exp_avg_sq, stores, masks), rates, rows)

    def _values(self, batch: Batch, moving: Sequence[Sequence[int]], update: _Update) -> tuple[Held, Held]:
        """Precise values of all parts, or of those of which something moves, and what takes these rounded."""
        bases = [part.states[0].get("base") for part in batch.parts]
        if batch.values is not None and same(bases, batch.bases):
            values, stores = batch.values
        else:
            # a process's parts of sharded tensors are made anew in every step
            stay = self.config.keep_base and self.shards is None and all(part.stays for part in batch.parts)
            found = [
                self._value(part, update.values) if stay or moves else (None, None)
                for part, moves in zip(batch.parts, moving, strict=True)
            ]
            values, stores = (Held(column) for column in zip(*found, strict=True))
            if stay:
                batch.values, batch.bases = (values, stores), bases
        for part, value, moves in zip(batch.parts, values, moving, strict=True):
            if moves and part.is_joined and (part.value is None or part.has_masters):
                update.written.append((part, value, part.precise({}) if part.value is None else (), moves))
        return values, stores

    def _value(self, part: Part, values: dict[int, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What ``adamw_`` takes of a part: its precise value, gathered if it is of several modules, and a store."""
        if part.is_joined:
            return part.joined(part.precise({})) if part.value is None else part.value, None
        value, store = self._precise(part.parameters[0], values)
        return (value.T, None if store is None else store.T) if part.turned else (value, store)

    def _write_part(self, part: Part, joined: Tensor, held: Sequence[Tensor], which: Sequence[int]) -> None:
        """Let the tensors of several modules take their new values, and those of the model that follow a master."""
        if held:
            part.spread(joined, held, which)
        if part.has_masters:
            part.spread(joined, part.parameters, which)

    def _follow(self, stack: Stack, values: Mapping[int, Tensor]) -> list[Products]:
        """Let what has no virtual experts follow its precise value; returns what the weights that have will be.

        Nothing is returned of those whose W is the weight itself, as while B = 0.
        """
        virtual_experts = bool(stack.weights) and self._is_virtual(stack.modules[0])
        for parameter in stack.parameters if values else ():
            if id(parameter) in values and not (virtual_experts and parameter.dim() == 2):
                self._write(parameter, values)
        if not virtual_experts:
            return []
        if stack.products is not None:
            return [stack.products]
        weights = locals_of(weight for part in stack.weights for weight in part.parameters)
        bases = [base for part in stack.weights for base in part.precise(values)]
        made = products(weights, bases, *stack.virtual_pair(), stack.modules[0].transposed)
        own = [i for i, pair in enumerate(zip(bases, weights, strict=True)) if not shares_storage(*pair)]
        if len(own) < len(bases):
            chosen = numbers(own, made.left, torch.long)
            targets, bases = ([tensors[i] for i in own] for tensors in made[:2])
            made = Products(targets, bases, made.left[chosen], made.right[chosen])
        elif self.config.keep_base and self.shards is None:
            stack.products = made
        return [made] if own else []

    def _step_others(self, selection: Selection, grads: Sequence[Tensor], check: GradientCheck) -> None:
        """AdamW for what is not routed."""
        update = _Update({}, [])
        for batch in selection.batches(self._is_uniform()).others:
            rates = self._rates([self._group_of(part) for part in batch.parts], batch)
            values, stores = self._values(batch, [part.members for part in batch.parts], update)
            clip, _ = check.on(*batch.place)
            tracking = Tracking(self._group_of(batch.parts[0])["betas"], rates[0].eps, self.config.score_fn, clip)
            shared = {id(c): (tracking, c) for c in rates}
            given = [grads[i] for i in batch.indices]
            jobs = Jobs(values, batch.exp_avg, batch.exp_avg_sq, stores, given)
            self._passes.run(unrouted_all, jobs, [shared[id(c)] for c in rates])
        for other in selection.others if update.values else ():
            self._write(other.part.parameters[0], update.values)

    def _first_rank(self, module: RoutedModule) -> int:
        """The first rank of an adapter's A that this process holds; 0 of virtual experts, which have all ranks."""
        return 0 if self.shards is None or module.lora_A is None else first_row(self._parameter(module.lora_A))
