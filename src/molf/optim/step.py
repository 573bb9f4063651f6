"""The step of ``MoLFAdamW`` up to its decision: gradients of the experts, moments, scores, winners.

Everything here works on stacks: K modules of one shape (``stacks.py``). ``update.py`` applies what is decided. See
``molf_adamw.py`` for the mathematics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import virtual
from .adamw import Tracking
from .config import MoLFConfig
from .guards import GradientCheck, check_gradients, check_unchanged, look_at, refuse_sparse
from .jobs import track_all
from .layout import RoutedModule, Slot
from .parts import Part
from .policy import priorities
from .quantized import is_quantized
from .routing import Decision, decide
from .scalars import join, numbers
from .sharding import Shards
from .stacks import OtherStack, Stack, Stacks, Unrouted
from .update import MoLFUpdate


class Gradients(NamedTuple):
    """Of a stack: of W and b where they are trained, and of A and Bᵀ where there are LoRA experts."""

    dense: list[Tensor]
    pair: list[Tensor]


class MoLFStep(MoLFUpdate):
    """The step of ``MoLFAdamW``, without what surrounds it; arguments as of ``MoLFState``."""

    def __init__(
        self, params: Iterable[dict[str, Any]], config: MoLFConfig, modules: Sequence[RoutedModule] = ()
    ) -> None:
        self.decisions: list[Decision] = []
        self._stacks: Stacks | None = None
        super().__init__(params, config, modules)

    def __getstate__(self) -> dict[str, Any]:
        """As of the state, with the last decision."""
        return {**super().__getstate__(), "decisions": self.decisions, "_stacks": None}

    def stacks(self) -> Stacks:
        """The modules as a step works on them; made anew when someone has replaced a tensor of the optimizer."""
        if self._stacks is None or not self._stacks.fit(self.param_groups, self.state):
            for group in self.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    check_unchanged(name, parameter, self.state[parameter], self.config.keep_base)
            self._stacks = Stacks(self.modules, self._others(), self.param_groups, self.state, self.config)
        return self._stacks

    def _step(self, active: Sequence[RoutedModule], others: Sequence[Unrouted]) -> None:
        """One step of these modules and of these parameters that are not routed.

        On an accelerator the one read of the step is that of the winners. Whether all gradients are finite comes with
        it; until then a gate on the device keeps the moments as they are if that is not so.
        """
        self._coefficients.clear()
        self._keys.clear()
        if not active and not others:
            return
        known = self.stacks()
        stacks, other_stacks = known.of(active, others)
        other_grads = [each.part.gradient() for each in other_stacks]
        check, winners = self._route(stacks, known.order(stacks), other_stacks, other_grads)
        known.advance(stacks, other_stacks)
        self._step_others(other_stacks, other_grads, check)  # a GPU works on it while the host prepares what follows
        # without a W in the state, one is made for each module while it is updated, and not for all at once
        at_once = len(stacks) if self.config.keep_base else 1
        for start in range(0, len(stacks), max(1, at_once)):
            self._update(stacks[start : start + at_once], winners)

    def _route(
        self, stacks: Sequence[Stack], order: Sequence[int], others: Sequence[OtherStack], other_grads: Sequence[Tensor]
    ) -> tuple[GradientCheck, dict[str, list[int]]]:
        """Moments, scores and the winners of every module; nothing has changed if a gradient is not finite."""
        grads = [self._gradients(stack) for stack in stacks]
        check = self._check_gradients(stacks, grads, others, other_grads)
        if not stacks:
            check.raise_if_broken(check.gate is None or bool(check.gate))
            return check, {}
        sums = self._track(stacks, grads, check)
        scores = self._scores(stacks, sums)
        active = [module for stack in stacks for module in stack.modules]
        counts = [stack.count for stack in stacks for _ in stack.modules]
        if list(order) != list(range(len(order))):
            active, counts = [active[i] for i in order], [counts[i] for i in order]
            scores = scores[numbers(order, scores, torch.long)]
        names = tuple(module.name for module in active)
        decision = decide(names, scores, self.config.top_k, self._priorities(active, scores, counts), check.gate)
        check.raise_if_broken(decision.finite)
        self.decisions.append(decision)
        return check, dict(zip(names, decision.winners, strict=True))

    def _gradients(self, stack: Stack) -> Gradients:
        """Gradients of W and b, and of A and Bᵀ: the adapters', or from G = dL/dP as in identity (a)."""
        weights = [part.gradient() for part in stack.weights]
        dense = [*weights, *(part.gradient() for part in stack.dense[len(weights) :])] if stack.dense else []
        if stack.pair is None:
            return Gradients(dense, [])
        first = stack.modules[0]
        if first.lora_A is not None:
            A, B = stack.pair
            folds = self._per_rank(first.folds(self.config.scales), A.exp_avg).repeat(len(stack))[:, None]
            return Gradients(dense, [A.gradient(), B.gradient() * folds])
        if not weights:
            raise RuntimeError(f"{first.name} has virtual experts without a weight")
        values = stack.virtual_pair()
        found = torch.empty_like(values[0]), torch.empty_like(values[1])
        dtype = weights[0].dtype if virtual.multiplies(weights[0]) else values[0].dtype
        scales, turned = self._scales(values[0]), first.transposed
        values = values[0].to(dtype), values[1].to(dtype)
        result = Gradients(dense, [each.flatten(0, 1) for each in found])
        tensors = [(*values, *found)]
        if len(weights) < len(stack):  # all of them in one
            weights = [weights[0].view(len(stack), *stack.weights[0].parameters[0].shape)]
        elif self._passes.gradients(weights, *values, self._per_rank(self.config.scales, found[0]), found, turned):
            return result
        else:
            tensors = list(zip(*(each.unbind() for each in tensors[0]), strict=True))
        for G, (a, bt, *to) in zip(weights, tensors, strict=True):
            virtual.gradients((G.mT if turned else G).to(dtype), a, bt, scales, (to[0], to[1]))
        return result

    def _track(self, stacks: Sequence[Stack], grads: Sequence[Gradients], check: GradientCheck) -> Tensor:
        """Universal momentum tracking; returns what the scores sum over each expert's elements, (M, E)."""
        columns = []
        if self.config.train_base:
            parts = [part for stack in stacks for part in stack.dense]
            given = [grad for each in grads for grad in each.dense]
            found = self._run_tracking("dense", parts, given, [len(part.members) for part in parts], check)
            columns.append(_totals(stacks, found)[:, None])
        if self.config.expert_ranks:
            parts = [stack.pair[factor] for factor in (0, 1) for stack in stacks if stack.pair is not None]
            given = [each.pair[factor] for factor in (0, 1) for each in grads if each.pair]
            rows = [len(part.exp_avg) for part in parts]
            sums = self._run_tracking(self._lora_experts[0], parts, given, rows, check)
            if self.shards is not None:
                sums = self._own_sums(stacks, sums.split(rows), self.shards)
            per_rank = sums.view(2, -1, sum(self.config.expert_ranks)).sum(0)
            columns += [own.sum(1, keepdim=True) for own in per_rank.split(list(self.config.expert_ranks), 1)]
        total = torch.cat([column.to(columns[0]) for column in columns], 1)
        return total if self.shards is None else self.shards.add_up([total])[0]

    def _run_tracking(
        self, expert: str, parts: Sequence[Part], grads: Sequence[Tensor], rows: Sequence[int], check: GradientCheck
    ) -> Tensor:
        """``track_`` over parts of one expert's group: the sums over every row of each, one after the other."""
        group, results = self._group(expert), [torch.empty(0)] * len(parts)
        places: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for i, part in enumerate(parts):
            m = part.exp_avg
            places[m.device, torch.float32 if is_quantized(m) else m.dtype].append(i)
        for place, chosen in places.items():
            jobs = [(grads[i], parts[i].exp_avg, parts[i].exp_avg_sq) for i in chosen]
            own = [rows[i] for i in chosen]
            shared = Tracking(group["betas"], group["eps"], self.config.score_fn, *check.on(*place))
            found = self._passes.run(track_all, jobs, shared, own)
            if len(places) == 1:
                return found
            for i, sums in zip(chosen, found.split(own), strict=True):
                results[i] = sums
        return join(results)

    def _own_sums(self, stacks: Sequence[Stack], found: Sequence[Tensor], shards: Shards) -> Tensor:
        """This process's share of the sums per rank of every A, and then of every B, (R,) each.

        The sums of A's that are sharded take their places; those of a factor that all processes hold count once.
        """
        shares = []
        modules = [stack.modules[0] for stack in stacks]  # sharded modules are not stacked
        for (factor, module), sums in zip(product((0, 1), modules), found, strict=True):
            share = sums.new_zeros(sum(self.config.expert_ranks))
            if factor != self._partial_factor(module) or shards.first:
                start = self._first_rank(module) if factor == 0 else 0
                share[start : start + len(sums)] = sums
            shares.append(share)
        return torch.cat(shares)

    def _scores(self, stacks: Sequence[Stack], sums: Tensor) -> Tensor:
        """Scores (M, E) from the sums: (η_i / N_i) Σ for "epd", √(Σ / N_i) for "pfn".  Source: section 4.3."""
        rates = [float(self._group(expert)["lr"]) for expert in self.experts]
        epd, factors = self.config.score_fn == "epd", []
        for stack in stacks:
            sizes = stack.modules[0].sizes
            factors += [[rate / size for rate, size in zip(rates, sizes, strict=True)] if epd else sizes] * len(stack)
        return sums * numbers(factors, sums) if epd else (sums / numbers(factors, sums)).sqrt_()

    def _priorities(self, active: Sequence[RoutedModule], scores: Tensor, counts: Sequence[float]) -> Tensor | None:
        """What decides in place of the scores; None in MoLF."""
        if self.config.policy == "score":
            return None
        index = {module.name: i for i, module in enumerate(self.modules)}
        turns = [(index[module.name], int(count)) for module, count in zip(active, counts, strict=True)]
        return priorities(self.config, scores, turns)

    def _check_gradients(
        self,
        stacks: Sequence[Stack],
        grads: Sequence[Gradients],
        others: Sequence[OtherStack],
        other_grads: Sequence[Tensor],
    ) -> GradientCheck:
        """Whether every gradient is finite, and the clipping factor min(1, c / (‖g‖ + 1e-6)).

        The norm is over the gradients of all trained tensors: W, b, every A and B, and what is not routed. Where
        nothing is clipped, a look at dB = s G Aᵀ is a look at G: what is not finite there is not finite here.
        Of sharded weights, the gradients of A or B that sum over the processes are completed on the way.
        """
        for group in self.param_groups:
            refuse_sparse(group["param_names"], group["params"])
        limit = self.config.max_grad_norm
        found: list[tuple[Sequence[str], Tensor]] = []
        partial: list[tuple[str, int, int]] = []
        for i, (stack, own) in enumerate(zip(stacks, grads, strict=True)):
            seen_in_B = bool(own.pair) and stack.modules[0].lora_A is None and limit is None
            looked_at = list(zip(stack.dense, own.dense, strict=True))[len(stack.weights) if seen_in_B else 0 :]
            found += [([self._name(slot) for slot in part.slots], grad) for part, grad in looked_at]
            names, factor = [module.name for module in stack.modules], self._partial_factor(stack.modules[0])
            found += [(names, grad) for j, grad in enumerate(own.pair) if j != factor]
            partial += [] if factor is None or not own.pair else [(names[0], i, factor)]
        found += [(other.names, grad) for other, grad in zip(others, other_grads, strict=True)]
        seen, numbers = look_at(found, limit, self._passes)
        if self.shards is not None:
            *sums, numbers = self.shards.add_up([*(grads[i].pair[factor] for _, i, factor in partial), numbers])
            for (_, i, factor), total in zip(partial, sums, strict=True):
                grads[i].pair[factor] = total
            completed = [([name], total) for (name, _, _), total in zip(partial, sums, strict=True)]
            more, added = look_at(completed, limit, self._passes)
            seen, numbers = [*seen, *more], torch.cat([numbers, added.to(numbers)])
        return check_gradients(seen, numbers, limit)

    def _partial_factor(self, module: RoutedModule) -> int | None:
        """Which of A (0) and B (1) has a gradient that sums over processes; all hold that factor as a whole."""
        if self.shards is None or module.lora_A is not None:
            return None
        return virtual.partial_factor(self._parameter(module.slots[0]), module.transposed)

    def _name(self, slot: Slot) -> str:
        return self.param_groups[slot[0]]["param_names"][slot[1]]


def _totals(stacks: Sequence[Stack], sums: Tensor) -> Tensor:
    """Sums of weight and bias together, (M,), from those of all parts."""
    starts = zip(_starts(stacks), stacks, strict=True)
    modules = [start + k for start, stack in starts for part in stack.dense for k in part.members]
    if modules == list(range(len(modules))):
        return sums
    # two terms of a sum are the same in either order
    return sums.new_zeros(max(modules) + 1).index_add_(0, numbers(modules, sums, torch.long), sums)


def _starts(stacks: Sequence[Stack]) -> list[int]:
    """The number of each stack's first module among all."""
    return [0, *accumulate(len(stack) for stack in stacks)][:-1]
