"""The step of ``MoLFAdamW`` up to its decision: gradients of the experts, moments, scores, winners.

Everything here works on stacks: K modules of one shape (``stacks.py``). ``update.py`` applies what is decided. See
``molf_adamw.py`` for the mathematics.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import virtual
from .adamw import Tracking
from .config import MoLFConfig
from .guards import GradientCheck, check_gradients, check_unchanged, look_at
from .jobs import Jobs, track_all
from .layout import RoutedModule, Slot
from .policy import priorities
from .routing import Decision, read_sums, winners_of
from .scalars import join
from .selection import Selection, Stack
from .sharding import Shards
from .stacks import Stacks
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
            self._follow_devices()
            for group in self.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    check_unchanged(name, parameter, self.state[parameter], self.config.keep_base)
            self._stacks = Stacks(self.modules, self._unrouted(), self.param_groups, self.state, self.config)
        return self._stacks

    def _step(self, known: Stacks, active: Sequence[RoutedModule], others: Sequence[Slot]) -> None:
        """One step of these modules and of these parameters that are not routed; ``known`` are all stacks.

        On an accelerator the one read of the step is that of the sums that scores are made of. Whether all gradients
        are finite comes with it; until then a gate on the device keeps the moments as they are if that is not so.
        """
        if not active and not others:
            return
        selection = known.of(active, others)
        other_grads = [each.part.gradient() for each in selection.others]
        check, winners = self._route(selection, other_grads)
        known.advance(selection)
        self._step_others(selection, other_grads, check)  # a GPU works on it while the host prepares what follows
        # without a W in the state, one is made for each module while it is updated, and not for all at once
        for each in [selection] if self.config.keep_base else selection.single:
            self._update(each, winners)

    def _route(self, selection: Selection, other_grads: Sequence[Tensor]) -> tuple[GradientCheck, dict[str, list[int]]]:
        """Moments, scores and the winners of every module; nothing has changed if a gradient is not finite."""
        grads = [self._gradients(stack) for stack in selection.stacks]
        check = self._check_gradients(selection, grads, other_grads)
        if not selection.stacks:
            check.raise_if_broken(check.gate is None or bool(check.gate))
            return check, {}
        sums, finite = read_sums(self._track(selection, grads, check), check.gate)
        check.raise_if_broken(finite)
        scores = selection.in_model_order(self._scores(selection, sums))
        ranked = priorities(self.config, scores, self._turns(selection))
        decision = Decision(selection.names, scores, winners_of(ranked, self.config.top_k))
        self.decisions.append(decision)
        return check, dict(zip(selection.names, decision.winners, strict=True))

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

    def _track(self, selection: Selection, grads: Sequence[Gradients], check: GradientCheck) -> Tensor:
        """Universal momentum tracking; returns what the scores sum over each expert's elements, (M, E)."""
        given = [grad for each in grads for grad in each.dense]
        given += [each.pair[factor] for factor in (0, 1) for each in grads if each.pair]
        sums = self._run_tracking(selection, given, check)
        dense, pairs = sums.tensor_split([selection.dense_rows])
        columns = [selection.by_module(dense)[:, None]] if self.config.train_base else []
        if self.config.expert_ranks:
            pairs = pairs if self.shards is None else self._own_sums(selection.stacks, pairs, self.shards)
            per_rank = pairs.view(2, -1, sum(self.config.expert_ranks)).sum(0)
            columns += [own.sum(1, keepdim=True) for own in per_rank.split(list(self.config.expert_ranks), 1)]
        total = torch.cat(columns, 1)
        return total if self.shards is None else self.shards.add_up([total])[0]

    def _run_tracking(self, selection: Selection, grads: Sequence[Tensor], check: GradientCheck) -> Tensor:
        """``track_`` over all parts: the sums over the rows of each, one after the other."""
        batches = selection.batches(self._is_uniform()).tracked
        found: dict[int, Tensor] = {}
        for batch in batches:
            group = self._group_of(batch.parts[0])
            shared = Tracking(group["betas"], group["eps"], self.config.score_fn, *check.on(*batch.place))
            jobs = Jobs([grads[i] for i in batch.indices], batch.exp_avg, batch.exp_avg_sq)
            sums = self._passes.run(track_all, jobs, shared, batch.rows)
            if len(batches) == 1:
                return sums
            found |= zip(batch.indices, sums.split(batch.rows), strict=True)
        return join([found[i] for i in range(len(found))])

    def _own_sums(self, stacks: Sequence[Stack], found: Tensor, shards: Shards) -> Tensor:
        """This process's share of the sums per rank of every A, and then of every B, (R,) each.

        The sums of A's that are sharded take their places; those of a factor that all processes hold count once.
        """
        shares = []
        pairs = [(stack.modules[0], stack.pair) for stack in stacks if stack.pair]  # sharded ones are not stacked
        parts = [(factor, module, pair[factor]) for factor in (0, 1) for module, pair in pairs]
        sizes = [len(part.exp_avg) for *_, part in parts]
        for (factor, module, _), sums in zip(parts, found.split(sizes), strict=True):
            share = sums.new_zeros(sum(self.config.expert_ranks))
            if factor != self._partial_factor(module) or shards.first:
                start = self._first_rank(module) if factor == 0 else 0
                share[start : start + len(sums)] = sums
            shares.append(share)
        return torch.cat(shares)

    def _scores(self, selection: Selection, sums: Sequence[Sequence[float]]) -> list[list[float]]:
        """Of M rows of E sums the scores: (η_i / N_i) Σ for "epd", √(Σ / N_i) for "pfn".  Source: section 4.3."""
        rates = [float(self._group(expert)["lr"]) for expert in self.experts]
        epd = self.config.score_fn == "epd"
        scores: list[list[float]] = []
        for start, stack in selection.starts:
            sizes, rows = stack.modules[0].sizes, sums[start : start + len(stack)]
            if epd:
                factors = [rate / size for rate, size in zip(rates, sizes, strict=True)]
                scores += [list(map(operator.mul, factors, row)) for row in rows]
            else:
                scores += [list(map(math.sqrt, map(operator.truediv, row, sizes))) for row in rows]
        return scores

    def _turns(self, selection: Selection) -> Iterator[tuple[int, int]]:
        """Index and number of steps of every module, for a policy that asks for them."""
        index = {module.name: i for i, module in enumerate(self.modules)}
        counts = {name: int(stack.count) for stack in selection.stacks for name in stack.names}
        yield from ((index[name], counts[name]) for name in selection.names)

    def _check_gradients(
        self, selection: Selection, grads: Sequence[Gradients], other_grads: Sequence[Tensor]
    ) -> GradientCheck:
        """Whether every gradient is finite, and the clipping factor min(1, c / (‖g‖ + 1e-6)).

        The norm is over the gradients of all trained tensors: W, b, every A and B, and what is not routed. Where
        nothing is clipped, a look at dB = s G Aᵀ is a look at G: what is not finite there is not finite here.
        Of sharded weights, the gradients of A or B that sum over the processes are completed on the way.
        """
        limit = self.config.max_grad_norm
        found: list[tuple[Sequence[str], Tensor]] = []
        partial: list[tuple[str, int, int]] = []
        for i, (stack, own) in enumerate(zip(selection.stacks, grads, strict=True)):
            seen_in_B = bool(own.pair) and stack.modules[0].lora_A is None and limit is None
            looked_at = list(zip(stack.dense, own.dense, strict=True))[len(stack.weights) if seen_in_B else 0 :]
            found += [(part.names, grad) for part, grad in looked_at]
            factor = self._partial_factor(stack.modules[0])
            found += [(stack.names, grad) for j, grad in enumerate(own.pair) if j != factor]
            partial += [] if factor is None or not own.pair else [(stack.names[0], i, factor)]
        found += [(other.part.names, grad) for other, grad in zip(selection.others, other_grads, strict=True)]
        seen, numbers = look_at(found, limit, self._passes)
        if self.shards is not None:
            *sums, numbers = self.shards.add_up([*(grads[i].pair[factor] for _, i, factor in partial), numbers])
            for (_, i, factor), total in zip(partial, sums, strict=True):
                grads[i].pair[factor] = total
            completed = [([name], total) for (name, _, _), total in zip(partial, sums, strict=True)]
            more, added = look_at(completed, limit, self._passes)
            seen, numbers = [*seen, *more], torch.cat([numbers, added.to(numbers)])
        return check_gradients(seen, numbers, limit, self.config.step_in_backward)

    def _partial_factor(self, module: RoutedModule) -> int | None:
        """Which of A (0) and B (1) has a gradient that sums over processes; all hold that factor as a whole."""
        if self.shards is None or module.lora_A is not None:
            return None
        return virtual.partial_factor(self._parameter(module.slots[0]), module.transposed)
