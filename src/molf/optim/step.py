"""The step of ``MoLFAdamW``: gradients of the experts, moments, scores, winners, updates, and the model follows.

Everything here works on stacks: K modules of one shape (``stacks.py``). See ``molf_adamw.py`` for the mathematics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import virtual
from .adamw import Coefficients, Tracking, step_numbers
from .config import MoLFConfig
from .guards import GradientCheck, check_gradient, check_gradients, look_at
from .layout import RoutedModule, Slot
from .passes import Passes, adamw_all, track_all, unrouted_all
from .policy import priorities
from .quantized import is_quantized
from .routing import Decision, decide
from .scalars import join
from .sharding import Shards, first_row
from .stacks import OtherStack, Part, Stack, Stacks, Unrouted
from .state import MoLFState


class Gradients(NamedTuple):
    """Of a stack: of W and b where they are trained, and of A and Bᵀ where there are LoRA experts."""

    dense: list[Tensor]
    pair: list[Tensor]


Written = tuple[Part, Tensor, Sequence[Tensor], Sequence[int]]
"""A part of several modules, its new value, where the modules keep theirs, and which of them take it."""


class MoLFStep(MoLFState):
    """The step of ``MoLFAdamW``, without what surrounds it; arguments as of ``MoLFState``."""

    def __init__(
        self, params: Iterable[dict[str, Any]], config: MoLFConfig, modules: Sequence[RoutedModule] = ()
    ) -> None:
        self.decisions: list[Decision] = []
        self._coefficients: dict[tuple[Any, ...], Coefficients] = {}
        self._stacks: Stacks | None = None
        super().__init__(params, config, modules)
        every = [p for group in self.param_groups for p in group["params"]]
        device = every[0].device if every else torch.device("cpu")
        self._passes = Passes(config.compile, sum(p.numel() for p in every), device)

    def __getstate__(self) -> dict[str, Any]:
        """As of the state, with the last decision."""
        own = {"decisions": self.decisions, "_passes": self._passes, "_coefficients": {}, "_stacks": None}
        return {**super().__getstate__(), **own}

    def stacks(self) -> Stacks:
        """The modules as a step works on them; made anew when someone has replaced a tensor of the optimizer."""
        if self._stacks is None or not self._stacks.fit(self.param_groups, self.state):
            self._stacks = Stacks(self.modules, self._others(), self.param_groups, self.state, self.config)
        return self._stacks

    def _step(self, active: Sequence[RoutedModule], others: Sequence[Unrouted]) -> None:
        """One step of these modules and of these parameters that are not routed.

        On an accelerator the one read of the step is that of the winners. Whether all gradients are finite comes with
        it; until then a gate on the device keeps the moments as they are if that is not so.
        """
        self._coefficients.clear()
        if not active and not others:
            return
        known = self.stacks()
        stacks, other_stacks = known.of(active, others)
        other_grads = [each.part.gradient() for each in other_stacks]
        check, winners = self._route(stacks, known.order(stacks), other_stacks, other_grads)
        known.advance(stacks, other_stacks)
        # without a W in the state, one is made for each module while it is updated, and not for all at once
        at_once = len(stacks) if self.config.keep_base else 1
        for start in range(0, len(stacks), max(1, at_once)):
            self._update(stacks[start : start + at_once], winners)
        self._step_others(other_stacks, other_grads, check)

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
        active = [module for stack in stacks for module in stack.modules]
        counts = [stack.count for stack in stacks for _ in stack.modules]
        if list(order) != list(range(len(order))):
            active, counts, sums = [active[i] for i in order], [counts[i] for i in order], sums[list(order)]
        scores = self._scores(active, sums)
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
        for part, G in zip(stack.weights, weights, strict=True):
            several = len(part.members) > 1
            G = (G.view(len(stack), *part.parameters[0].shape) if several else G).to(values[0].dtype)
            own = [each if several else each[part.members.start] for each in (*values, *found)]
            virtual.gradients(G.mT if first.transposed else G, own[0], own[1], self._scales(own[0]), (own[2], own[3]))
        return Gradients(dense, [each.flatten(0, 1) for each in found])

    def _track(self, stacks: Sequence[Stack], grads: Sequence[Gradients], check: GradientCheck) -> Tensor:
        """Universal momentum tracking; returns what the scores sum over each expert's elements, (M, E)."""
        columns = []
        if self.config.train_base:
            jobs = [
                (g, part.exp_avg, part.exp_avg_sq, None)
                for stack, each in zip(stacks, grads, strict=True)
                for g, part in zip(each.dense, stack.dense, strict=True)
            ]
            rows = [len(part.members) for stack in stacks for part in stack.dense]
            found = iter(self._run_tracking("dense", jobs, rows, check))
            columns.append(join([_total([next(found) for _ in stack.dense], stack) for stack in stacks])[:, None])
        if self.config.expert_ranks:
            jobs = [
                (g, part.exp_avg, part.exp_avg_sq, None)
                for stack, each in zip(stacks, grads, strict=True)
                for g, part in zip(each.pair, stack.pair or (), strict=True)
            ]
            sums = self._run_tracking(self._lora_experts[0], jobs, [2] * len(jobs), check)
            if self.shards is not None:
                sums = self._own_sums(stacks, sums, self.shards)
            per_rank = join(sums[0::2]).add_(join(sums[1::2])).view(-1, sum(self.config.expert_ranks))
            experts = per_rank.new_zeros(len(per_rank), len(self._lora_experts))
            columns.append(experts.index_add_(1, self._segments_on(per_rank.device), per_rank))
        total = torch.cat([column.to(columns[0]) for column in columns], 1)
        return total if self.shards is None else self.shards.add_up([total])[0]

    def _run_tracking(
        self, expert: str, jobs: Sequence[Any], rows: Sequence[int], check: GradientCheck
    ) -> list[Tensor]:
        """``track_`` over jobs of one expert's group: sums per row, or over the whole of a job that is one row."""
        group, results = self._group(expert), [torch.empty(0)] * len(jobs)
        for (device, dtype, by_row), places in _by_place(jobs, rows).items():
            shared = Tracking(group["betas"], group["eps"], self.config.score_fn, *check.on(device, dtype))
            found = self._passes.run(track_all, [jobs[i] for i in places], shared, by_row=by_row)
            for i, sums in zip(places, found, strict=True):
                results[i] = sums
        return results

    def _own_sums(self, stacks: Sequence[Stack], found: Sequence[Tensor], shards: Shards) -> list[Tensor]:
        """This process's share of the sums per rank of every A and B, (R,) each.

        The sums of A's that are sharded take their places; those of a factor that all processes hold count once.
        """
        shares = []
        for i, stack in enumerate(stacks):
            module = stack.modules[0]  # sharded modules are not stacked
            whole = self._partial_factor(module)
            for factor, sums in enumerate(found[2 * i : 2 * i + 2]):
                share = sums.new_zeros(sum(self.config.expert_ranks))
                if factor != whole or shards.first:
                    start = self._first_rank(module) if factor == 0 else 0
                    share[start : start + len(sums)] = sums
                shares.append(share)
        return shares

    def _scores(self, active: Sequence[RoutedModule], sums: Tensor) -> Tensor:
        """Scores (M, E) from the sums: (η_i / N_i) Σ for "epd", √(Σ / N_i) for "pfn".  Source: section 4.3."""
        rates = [float(self._group(expert)["lr"]) for expert in self.experts]
        if self.config.score_fn == "epd":
            factors = [[rate / size for rate, size in zip(rates, m.sizes, strict=True)] for m in active]
            return sums * sums.new_tensor(factors)
        return (sums / sums.new_tensor([module.sizes for module in active])).sqrt_()

    def _priorities(self, active: Sequence[RoutedModule], scores: Tensor, counts: Sequence[float]) -> Tensor | None:
        """What decides in place of the scores; None in MoLF."""
        if self.config.policy == "score":
            return None
        index = {module.name: i for i, module in enumerate(self.modules)}
        turns = [(index[module.name], int(count)) for module, count in zip(active, counts, strict=True)]
        return priorities(self.config, scores, turns)

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
                for module, moves in zip(stack.modules, lora, strict=True):
                    if moves or not self.config.keep_base:
                        self._prepare_base(module, values)
            for part in stack.dense:
                moving = [i for i, k in enumerate(part.members) if 0 in won[k]]
                if moving:
                    found = self._dense_jobs(part, moving, values, written)
                    jobs[self._key([self.param_groups[part.slots[0][0]]], stack.count, found[0])] += found
            if any(lora):
                self._add_lora_jobs(jobs, stack, lora, values, written)
        for key, listed in jobs.items():
            c = self._coefficients[key]
            for masked in (False, True):
                chosen = [job for job in listed if (job[-1] is not None) == masked]
                self._passes.run(adamw_all, chosen, c, by_row=masked or c.decay.dim() > 0)
        for each in written:
            self._write_part(*each)
        for stack in stacks:
            self._write_stack(stack, values)

    def _job(
        self, part: Part, winner: Tensor | None, which: Sequence[int], values: dict[int, Tensor], written: list[Written]
    ) -> tuple[Any, ...]:
        """What ``adamw_`` takes of a part. Values of several modules are gathered; ``written`` says what to do then."""
        if part.virtual is not None:
            return part.virtual, part.exp_avg, part.exp_avg_sq, None, winner
        if len(part.parameters) > 1:
            held = part.precise({})
            value = part.joined(held)
            written.append((part, value, held, which))
            return value, part.exp_avg, part.exp_avg_sq, None, winner
        value, _, _, store = self._trained(part.parameters[0], values)
        if part.turned:
            value, store = value.T, None if store is None else store.T
        return value, part.exp_avg, part.exp_avg_sq, store, winner

    def _dense_jobs(
        self, part: Part, which: Sequence[int], values: dict[int, Tensor], written: list[Written]
    ) -> list[tuple[Any, ...]]:
        """What ``adamw_`` takes of weights or biases; where any number of jobs is one call, nothing is gathered."""
        if len(part.parameters) == 1 or not self._passes.in_one_call:
            return [self._job(part, None, which, values, written)]
        held = part.precise(values)
        stores = part.parameters if self._follows_master(part) else [None] * len(held)
        moments = [(state["exp_avg"], state["exp_avg_sq"]) for state in part.states]
        return [(held[i], *moments[i], stores[i], None) for i in which]

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
                won = torch.tensor([[i in each for i in range(len(groups))] for each in lora])
                winner = won.to(part.exp_avg.device)[:, self._segments_on(part.exp_avg.device)][:, ranks].reshape(-1, 1)
            job = self._job(part, winner, which, values, written)
            jobs[self._key(groups, stack.count, job, fold, ranks, len(stack))].append(job)

    def _write_part(self, part: Part, joined: Tensor, held: Sequence[Tensor], which: Sequence[int]) -> None:
        """Let the tensors of several modules take their new values, and those of the model that follow a master."""
        part.spread(joined, held, which)
        if self._follows_master(part):
            part.spread(joined, part.parameters, which)

    def _follows_master(self, part: Part) -> bool:
        """Whether the model's tensors are roundings of masters, and not weights over virtual experts."""
        return "base" in part.states[0] and "lora_A" not in part.states[0]

    def _write_stack(self, stack: Stack, values: Mapping[int, Tensor]) -> None:
        """Let the weights of these modules follow: P = W + Σ s_i B_i A_i, accumulated and rounded once."""
        virtual_experts = bool(stack.weights) and self._is_virtual(stack.modules[0])
        for parameter in stack.parameters if values else ():
            if id(parameter) in values and not (virtual_experts and parameter.dim() == 2):
                self._write(parameter, values)
        # one by one: a product of several modules at once rounds otherwise than ``sync_weights``, so than a resume
        if virtual_experts:
            (A, Bt), transposed = stack.virtual_pair(), stack.modules[0].transposed
            weights = [weight for part in stack.weights for weight in part.parameters]
            bases = [base for part in stack.weights for base in part.precise(values)]
            for weight, base, a, b in zip(weights, bases, A.unbind(), Bt.mT.unbind(), strict=True):
                self._write_weight(weight, base, a, b, transposed)

    def _step_others(self, others: Sequence[OtherStack], grads: Sequence[Tensor], check: GradientCheck) -> None:
        """AdamW for what is not routed."""
        values: dict[int, Tensor] = {}
        written: list[Written] = []
        jobs: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
        for other, grad in zip(others, grads, strict=True):
            *job, _ = self._job(other.part, None, range(len(other.names)), values, written)
            jobs[(*self._key([other.group], other.count, job), other.group["betas"])].append((*job, grad))
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
        value, ids = job[0], tuple(id(group) for group in groups)
        decays, sizes, root = step_numbers(groups, n, folds)
        alike = all(len(set(x)) == 1 for x in (decays, sizes))
        rows = () if alike else (ranks.start, ranks.stop, times)
        key = (ids, n, folds, rows, value.dtype, value.device)
        if key not in self._coefficients:
            decay, size = (
                value.new_tensor(x[0]) if alike else self._per_rank(x, value)[ranks].repeat(times)[:, None]
                for x in (decays, sizes)
            )
            self._coefficients[key] = Coefficients(
                decay, size, value.new_tensor(root), value.new_tensor(1 / root), groups[0]["eps"]
            )
        return key

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
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    check_gradient(name, parameter, self.state[parameter], self.config.keep_base)
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
        seen, numbers = look_at(found, limit)
        if self.shards is not None:
            *sums, numbers = self.shards.add_up([*(grads[i].pair[factor] for _, i, factor in partial), numbers])
            for (_, i, factor), total in zip(partial, sums, strict=True):
                grads[i].pair[factor] = total
            more, added = look_at([([name], total) for (name, _, _), total in zip(partial, sums, strict=True)], limit)
            seen, numbers = [*seen, *more], torch.cat([numbers, added.to(numbers)])
        return check_gradients(seen, numbers, limit)

    def _partial_factor(self, module: RoutedModule) -> int | None:
        """Which of A (0) and B (1) has a gradient that sums over processes; all hold that factor as a whole."""
        if self.shards is None or module.lora_A is not None:
            return None
        return virtual.partial_factor(self._parameter(module.slots[0]), module.transposed)

    def _first_rank(self, module: RoutedModule) -> int:
        """The first rank of an adapter's A that this process holds; 0 of virtual experts, which have all ranks."""
        return 0 if self.shards is None or module.lora_A is None else first_row(self._parameter(module.lora_A))

    def _name(self, slot: Slot) -> str:
        return self.param_groups[slot[0]]["param_names"][slot[1]]


def _total(sums: Sequence[Tensor], stack: Stack) -> Tensor:
    """Sums of weight and bias together, (K,), from those of the parts; of one module's they may come per row."""
    parts = zip(sums, stack.dense, strict=True)
    each = [(found.sum() if len(part.members) == 1 and found.dim() else found).reshape(-1) for found, part in parts]
    return join(each).view(-1, len(stack)).sum(0)


def _by_place(jobs: Sequence[Any], rows: Sequence[int]) -> dict[tuple[torch.device, torch.dtype, bool], list[int]]:
    """Indices of the jobs by the device and dtype of their first moment, and whether they have several rows."""
    places: dict[tuple[torch.device, torch.dtype, bool], list[int]] = defaultdict(list)
    for index, (job, several) in enumerate(zip(jobs, rows, strict=True)):
        dtype = torch.float32 if is_quantized(job[1]) else job[1].dtype
        places[job[1].device, dtype, several > 1].append(index)
    return places
