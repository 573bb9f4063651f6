"""MoLFAdamW: AdamW that decides, per layer and step, which expert's update is applied.

The mathematics is in ``reference.py``, line by line; this file does the same on two identities.

(a) Virtual experts. An ordinary layer holds P = W + Σ s_i B_i A_i as its weight. With G = dL/dP:
    dL/dW = G,  dL/dA_i = s_i B_iᵀ G,  dL/dB_i = s_i G A_iᵀ.  W, A, B live in ``state``.
(b) Real experts. A PEFT adapter with scaling c holds A = [A_1; A_2; ...] and B̃ = [f_1 B_1 | f_2 B_2 | ...]
    with f_i = s_i / c, so that c B̃ A = Σ s_i B_i A_i.  dL/dB_i = f_i dL/dB̃_i, and ΔB̃_i = f_i ΔB_i.

Either way a module has one stacked pair A (R, in), B (out, R) with R = Σ r_i; the expert of each rank
is a segment vector, scores are per-rank sums reduced by segment, updates are masked per rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import virtual
from .adamw import Coefficients, Tracking, step_numbers
from .backward import BackwardHooks
from .config import MoLFConfig
from .guards import GradientCheck, ResumeError, check_gradient, check_gradients, look_at
from .layout import RoutedModule
from .passes import Passes, adamw_all, track_all, unrouted_all
from .policy import priorities
from .quantized import is_quantized
from .routing import Decision, Routing, decide
from .scalars import stack
from .sharding import Shards, first_row, local, processes
from .state import MoLFState, Unrouted


class MoLFAdamW(MoLFState):
    """AdamW with MoLF's routing. Make one with ``create_molf_optimizer(model, config)``.

    Every step, for every routed module: moments of all experts advance; every expert is scored from
    its moments; the ``top_k`` best take a full AdamW step, the others keep their weights bit for bit.
    Parameters that are not routed take an ordinary AdamW step.

    ``param_groups`` has one group per expert (key "expert": "dense", "lora_r128", ...), whose ``lr`` and
    ``weight_decay`` are that expert's, "dense_bias" without decay, and "other" / "other_no_decay".
    Groups of virtual experts hold no parameter, only their ``lr`` and ``weight_decay``; the parameters of a stacked
    adapter are in the first LoRA expert's group. Any scheduler works on them.

    ``state[weight]`` holds ``step``, ``exp_avg``, ``exp_avg_sq`` and, for virtual experts, ``base`` (W, laid
    out like the weight), ``lora_A`` (R, in), ``lora_B`` (out, R, true B_i without the scale) and their moments.
    Moments are fp32 for models in bf16 or fp16, and every trained value then has an fp32 master, ``base``. In fp32
    ``base`` is the weight itself until a LoRA expert of the layer wins. With ``keep_base=False`` there is no ``base``.

    Args:
        params: Parameter groups with the key "expert".
        config: Experts, scales, scores and rates.
        modules: The routed modules as slots of ``params``.

    Raises:
        ValueError: For an unsupported setting; the message names the remedy.

    Source: arXiv:2605.07111, sections 4.2 to 4.5.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], config: MoLFConfig, modules: Sequence[RoutedModule] = ()
    ) -> None:
        self.decisions: list[Decision] = []
        self._awaits_gradient: set[str] = set()
        self._coefficients: dict[tuple[Any, ...], Coefficients] = {}
        super().__init__(params, config, modules)
        every = [p for group in self.param_groups for p in group["params"]]
        device = every[0].device if every else torch.device("cpu")
        self._passes = Passes(config.compile, sum(p.numel() for p in every), device)
        self._in_backward: BackwardHooks | None = None
        if config.step_in_backward:
            units = [[self._parameter(slot) for slot in module.slots] for module in self.modules]
            units += [[each.parameter] for each in self._others()]
            self._in_backward = BackwardHooks(units, self._step_unit)

    def __getstate__(self) -> dict[str, Any]:
        """As of the state, with the last decision and what a resume still waits for."""
        own = {name: getattr(self, name) for name in ("decisions", "_awaits_gradient", "_passes")}
        if self.config.step_in_backward:
            raise TypeError(
                "an optimizer with step_in_backward=True has hooks on its model: use state_dict() for copies"
            )
        return {**super().__getstate__(), **own, "_coefficients": {}, "_in_backward": None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state; the first step then looks that every routed module still takes part.

        Raises:
            ValueError: If the state is of other experts, another score or other parameters.
        """
        super().load_state_dict(state_dict)
        steps = {module.name: int(self.state[self._parameter(module.slots[0])]["step"]) for module in self.modules}
        self._awaits_gradient = {name for name, taken in steps.items() if taken == self.steps_taken > 0}

    @property
    def routing(self) -> Mapping[str, Routing]:
        """Experts, scores and winners of the last step for every module that had a gradient; empty before it."""
        return {
            name: Routing(self.experts, tuple(row), tuple(self.experts[index] for index in best))
            for decision in self.decisions
            for name, row, best in zip(decision.modules, decision.scores, decision.winners, strict=True)
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Advance all moments, route, update the winners.

        Raises:
            NonFiniteGradientError: If a gradient is NaN or infinite; nothing has changed then.
            ResumeError: If, after a resume, a module that always had gradients no longer gets one.
            RuntimeError: If processes differ, by ``check_ranks_every``, or the model was sharded after its optimizer
                was made.
            ValueError: If a closure is given, or a gradient is sparse.
        """
        if closure is not None:
            raise ValueError("closure: MoLFAdamW needs gradients of one forward pass; call step() without a closure")
        if self._in_backward is not None:
            self._finish_backward(self._in_backward)
            return
        if processes() > 1:
            self._check_processes()
        self._check_written()
        active = [module for module in self.modules if self._has_gradients(module)]
        self._check_resumed({module.name for module in active})
        self.decisions = []
        self._step(active, [each for each in self._others() if each.parameter.grad is not None])
        self._remember_written()
        every = self.config.check_ranks_every
        if every is not None and processes() > 1 and self.steps_taken % every == 0:
            self.compare_replicas()

    @torch.no_grad()
    def _step_unit(self, index: int) -> None:
        """One module's or parameter's step, in the backward pass."""
        if self._in_backward is not None and len(self._in_backward.stepped) == 1:
            self._check_written()
            self.decisions = []
        if index < len(self.modules):
            self._step([self.modules[index]], [])
        else:
            self._step([], [self._others()[index - len(self.modules)]])

    def _finish_backward(self, hooks: BackwardHooks) -> None:
        """What is left of the step when the backward pass has made it."""
        stepped = {self.modules[index].name for index in hooks.stepped if index < len(self.modules)}
        self._check_resumed(stepped)
        if not hooks.stepped:
            self.decisions = []
        hooks.stepped.clear()
        self._remember_written()

    def _step(self, active: Sequence[RoutedModule], others: Sequence[Unrouted]) -> None:
        """One step of these modules and of these parameters that are not routed.

        On an accelerator the one read of the step is that of the winners. Whether all gradients are finite comes with
        it; until then a gate on the device keeps the moments as they are if that is not so.
        """
        self._coefficients.clear()
        self._pairs.clear()
        steps = [self.state[self._parameter(slot)]["step"] for module in active for slot in module.slots]
        steps += [self.state[each.parameter]["step"] for each in others]
        if not steps:
            return
        counts = dict(zip(map(id, steps), (torch.stack(steps) + 1).tolist(), strict=True))
        check, winners = self._route(active, others, counts)
        torch._foreach_add_(steps, 1)
        # without a W in the state, one is made for each module while it is updated, and not for all at once
        at_once = len(active) if self.config.keep_base else 1
        for start in range(0, len(active), max(1, at_once)):
            self._update(active[start : start + at_once], winners[start : start + at_once], counts)
        self._step_others(others, check, counts)

    def _route(
        self, active: Sequence[RoutedModule], others: Sequence[Unrouted], counts: Mapping[int, float]
    ) -> tuple[GradientCheck, list[list[int]]]:
        """Moments, scores and the winners of every module; nothing has changed if a gradient is not finite."""
        pairs = [list(self._pair_gradients(module)) for module in active] if self.config.expert_ranks else []
        check = self._check_gradients(active, others, pairs)
        if not active:
            check.raise_if_broken(check.gate is None or bool(check.gate))
            return check, []
        scores = self._scores(active, self._track(active, pairs, check))
        names = tuple(module.name for module in active)
        decision = decide(names, scores, self.config.top_k, self._priorities(active, scores, counts), check.gate)
        check.raise_if_broken(decision.finite)
        self.decisions.append(decision)
        return check, decision.winners

    def _track(self, active: Sequence[RoutedModule], pairs: Sequence[Sequence[Tensor]], check: GradientCheck) -> Tensor:
        """Universal momentum tracking; returns what the scores sum over each expert's elements, (M, E)."""
        columns = []
        if self.config.train_base:
            owners = [i for i, module in enumerate(active) for _ in module.dense_slots]
            dense = [self._parameter(slot) for module in active for slot in module.dense_slots]
            jobs = [(_gradient(p), *self._trained(p)[1:3], None) for p in dense]
            sums = stack([each.sum() if each.dim() else each for each in self._run_tracking("dense", jobs, check)])
            total = sums.new_zeros(len(active)).index_add_(0, torch.tensor(owners, device=sums.device), sums)
            columns.append(total[:, None])
        if self.config.expert_ranks:
            jobs = []
            for module, grads in zip(active, pairs, strict=True):
                jobs += [(g, *each[1:3], None) for g, each in zip(grads, self._pair(module), strict=True)]
            found = self._run_tracking(self._lora_experts[0], jobs, check)
            if self.shards is not None:
                found = self._own_sums(active, found, self.shards)
            sums = stack(found).view(len(active), 2, -1).sum(1)
            experts = sums.new_zeros(len(active), len(self._lora_experts))
            columns.append(experts.index_add_(1, self._segments_on(sums.device), sums))
        total = torch.cat([column.to(columns[0].dtype) for column in columns], 1)
        return total if self.shards is None else self.shards.add_up([total])[0]

    def _own_sums(self, active: Sequence[RoutedModule], found: Sequence[Tensor], shards: Shards) -> list[Tensor]:
        """This process's share of the sums per rank of every A and B, (R,) each.

        The sums of A's that are sharded take their places; those of a factor that all processes hold count once.
        """
        shares = []
        for i, module in enumerate(active):
            whole = self._partial_factor(module)
            for factor, sums in enumerate(found[2 * i : 2 * i + 2]):
                share = sums.new_zeros(sum(self.config.expert_ranks))
                if factor != whole or shards.first:
                    start = self._first_rank(module) if factor == 0 else 0
                    share[start : start + len(sums)] = sums
                shares.append(share)
        return shares

    def _run_tracking(self, expert: str, jobs: Sequence[Any], check: GradientCheck) -> list[Tensor]:
        """``track_`` over jobs of one expert's group; sums per row for LoRA experts, which share their tensors."""
        group, results = self._group(expert), [torch.empty(0)] * len(jobs)
        for (device, dtype), places in _by_place(jobs).items():
            shared = Tracking(group["betas"], group["eps"], self.config.score_fn, *check.on(device, dtype))
            found = self._passes.run(track_all, [jobs[i] for i in places], shared, by_row=expert != "dense")
            for i, sums in zip(places, found, strict=True):
                results[i] = sums
        return results

    def _scores(self, active: Sequence[RoutedModule], sums: Tensor) -> Tensor:
        """Scores (M, E) from the sums: (η_i / N_i) Σ for "epd", √(Σ / N_i) for "pfn".  Source: section 4.3."""
        rates = [float(self._group(expert)["lr"]) for expert in self.experts]
        if self.config.score_fn == "epd":
            factors = [[rate / size for rate, size in zip(rates, m.sizes, strict=True)] for m in active]
            return sums * sums.new_tensor(factors)
        return (sums / sums.new_tensor([module.sizes for module in active])).sqrt_()

    def _priorities(self, active: Sequence[RoutedModule], scores: Tensor, counts: Mapping[int, float]) -> Tensor | None:
        """What decides in place of the scores; None in MoLF."""
        if self.config.policy == "score":
            return None
        index = {module.name: i for i, module in enumerate(self.modules)}
        turns = [(index[module.name], int(self._count(module.slots[0], counts))) for module in active]
        return priorities(self.config, scores, turns)

    def _update(
        self, modules: Sequence[RoutedModule], winners: Sequence[Sequence[int]], counts: Mapping[int, float]
    ) -> None:
        """AdamW for the winners of these modules, then P follows. Losers are not touched."""
        first = int(self.config.train_base)
        values: dict[int, Tensor] = {}  # of parameters whose precise value is not in the state
        jobs: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
        for module, best in zip(modules, winners, strict=True):
            lora = [index - first for index in best if index >= first]
            if module.lora_A is None and self.config.expert_ranks:
                self._prepare_base(module, values, bool(lora))
            for slot in module.dense_slots if first and 0 in best else ():
                parameter = self._parameter(slot)
                theta = self._trained(parameter, values)
                key = self._key([self.param_groups[slot[0]]], self._count(slot, counts), theta.value)
                jobs[key].append((*theta, None))
            if lora:
                self._add_lora_jobs(jobs, module, lora, counts, values)
        for key, listed in jobs.items():
            self._passes.run(adamw_all, listed, self._coefficients[key], by_row=self._coefficients[key].decay.dim() > 0)
        for module in modules:
            self._write_module(module, values)

    def _add_lora_jobs(
        self,
        jobs: dict[tuple[Any, ...], list[Any]],
        module: RoutedModule,
        lora: Sequence[int],
        counts: Mapping[int, float],
        values: dict[int, Tensor],
    ) -> None:
        """A and Bᵀ of a module, (R, in) and (R, out), with the ranks of its winners where not all of them win."""
        groups = [self._group(expert) for expert in self._lora_experts]
        count, winner = self._count(module.slots[-1], counts), None
        starts = (self._first_rank(module), 0)
        all_folds = ((1.0,), module.folds(self.config.scales))
        for theta, folds, start in zip(self._pair(module, values), all_folds, starts, strict=True):
            ranks = slice(start, start + len(theta.value))
            if len(lora) < len(groups):
                won = torch.tensor([i in lora for i in range(len(groups))], device=theta.value.device)
                winner = won[self._segments_on(won.device)][ranks, None]
            jobs[self._key(groups, count, theta.value, folds, ranks)].append((*theta, winner))

    def _step_others(self, others: Sequence[Unrouted], check: GradientCheck, counts: Mapping[int, float]) -> None:
        """AdamW for what is not routed."""
        values: dict[int, Tensor] = {}
        jobs: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
        for group, parameter, _ in others:
            theta = self._trained(parameter, values)
            key = self._key([group], counts[id(self.state[parameter]["step"])], theta.value)
            jobs[(*key, group["betas"])].append((*theta, _gradient(parameter)))
        for key, listed in jobs.items():
            c = self._coefficients[key[:-1]]
            clip, _ = check.on(c.decay.device, c.decay.dtype)
            self._passes.run(unrouted_all, listed, (Tracking(key[-1], c.eps, self.config.score_fn, clip), c))
        for _, parameter, _ in others if values else ():
            self._write(parameter, values)

    def _pair_gradients(self, module: RoutedModule) -> tuple[Tensor, Tensor]:
        """dL/dA and (dL/dB)ᵀ, (R, in) and (R, out): the adapter's, or from G = dL/dP as in identity (a)."""
        A, B = self._pair(module)
        if module.lora_A is not None and module.lora_B is not None:
            grad_B = _gradient(self._parameter(module.lora_B)).T
            folds = self._per_rank(module.folds(self.config.scales), A.exp_avg)[:, None]
            return _gradient(self._parameter(module.lora_A)), grad_B * folds
        G = _gradient(self._parameter(module.slots[0])).to(A.value.dtype)
        return virtual.gradients(G.T if module.transposed else G, A.value, B.value, self._scales(A.value))

    def _key(
        self,
        groups: Sequence[Mapping[str, Any]],
        n: float,
        value: Tensor,
        folds: tuple[float, ...] = (1.0,),
        ranks: slice = slice(None),
    ) -> tuple[Any, ...]:
        """Key of the coefficients of these groups at step n: scalars, or of these ranks for LoRA experts' groups."""
        key = (tuple(id(group) for group in groups), n, folds, ranks.start, ranks.stop, value.dtype, value.device)
        if key not in self._coefficients:
            decays, sizes, root = step_numbers(groups, n, folds)
            lora = groups[0]["expert"] in self._lora_experts
            decay, size = (
                self._per_rank(x, value)[ranks, None] if lora else value.new_tensor(x[0]) for x in (decays, sizes)
            )
            self._coefficients[key] = Coefficients(
                decay, size, value.new_tensor(root), value.new_tensor(1 / root), groups[0]["eps"]
            )
        return key

    def _count(self, slot: tuple[int, int], counts: Mapping[int, float]) -> float:
        return counts[id(self.state[self._parameter(slot)]["step"])]

    def _has_gradients(self, module: RoutedModule) -> bool:
        present = [self._parameter(slot).grad is not None for slot in module.slots]
        if any(present) and not all(present):
            raise RuntimeError(
                f"{module.name}: some of its weight, bias and adapter have a gradient and some have none; "
                "set requires_grad on all of them, or make the optimizer after freezing"
            )
        return all(present)

    def _check_gradients(
        self, active: Sequence[RoutedModule], others: Sequence[Unrouted], pairs: Sequence[list[Tensor]]
    ) -> GradientCheck:
        """Whether every gradient is finite, and the clipping factor min(1, c / (‖g‖ + 1e-6)).

        Of sharded weights, the gradients in ``pairs`` that sum over the processes are completed on the way.

        The norm is over the gradients of all trained tensors: W, b, every A and B, and what is not routed. Where
        nothing is clipped, a look at dB = s G Aᵀ is a look at G: what is not finite there is not finite here.
        """
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    check_gradient(name, parameter, self.state[parameter], self.config.keep_base)
        limit = self.config.max_grad_norm
        found: list[tuple[str, Tensor]] = []
        partial: list[tuple[str, int, int]] = []
        for i, module in enumerate(active):
            for slot in module.dense_slots if self.config.train_base else ():
                seen_in_B = bool(pairs) and module.lora_A is None and slot == module.weight and limit is None
                if not seen_in_B:
                    found.append((self._name(slot), _gradient(self._parameter(slot))))
            if pairs:
                factor = self._partial_factor(module)
                found += [(module.name, grad) for j, grad in enumerate(pairs[i]) if j != factor]
                partial += [] if factor is None else [(module.name, i, factor)]
        found += [(each.name, _gradient(each.parameter)) for each in others]
        names, values = [name for name, _ in found], look_at([grad for _, grad in found], limit)
        if self.shards is not None:
            *sums, values = self.shards.add_up([*(pairs[i][factor] for _, i, factor in partial), values])
            for (name, i, factor), total in zip(partial, sums, strict=True):
                pairs[i][factor] = total
                names.append(name)
            values = torch.cat([values, look_at(sums, limit).to(values)])
        return check_gradients(names, values, limit)

    def _partial_factor(self, module: RoutedModule) -> int | None:
        """Which of A (0) and B (1) has a gradient that sums over processes; all hold that factor as a whole."""
        if self.shards is None or module.lora_A is not None:
            return None
        return virtual.partial_factor(self._parameter(module.slots[0]), module.transposed)

    def _first_rank(self, module: RoutedModule) -> int:
        """The first rank of an adapter's A that this process holds; 0 of virtual experts, which have all ranks."""
        return 0 if self.shards is None or module.lora_A is None else first_row(self._parameter(module.lora_A))

    def _name(self, slot: tuple[int, int]) -> str:
        return self.param_groups[slot[0]]["param_names"][slot[1]]

    def _check_resumed(self, active: set[str]) -> None:
        """After a resume, every module that had taken part in all steps must take part again."""
        lost = sorted(self._awaits_gradient - active)
        if lost:
            raise ResumeError(
                f"after the resume no gradient reaches {lost[0]} ({len(lost)} of {len(self.modules)} routed modules), "
                "which had one in every step before: the optimizer holds parameters that the model does not use; "
                "make the optimizer from the model that is trained"
            )
        self._awaits_gradient = set()


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("a gradient disappeared during the step")
    return local(parameter.grad)


def _by_place(jobs: Sequence[Any]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """Indices of the jobs by the device and dtype of their first moment."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, job in enumerate(jobs):
        places[job[1].device, torch.float32 if is_quantized(job[1]) else job[1].dtype].append(index)
    return places
