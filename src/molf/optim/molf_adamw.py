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

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import virtual
from .adamw import (
    Coefficients,
    Trained,
    adamw_,
    scaled_gradient,
    score_terms,
    step_numbers,
    update_moments_,
)
from .config import MoLFConfig
from .guards import ResumeError, check_gradient, clip_factor, gradient_norm
from .layout import RoutedModule
from .policy import priorities
from .routing import Decision, Routing, decide, read_if_free
from .state import MoLFState


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
    Moments are fp32 for models in bf16 or fp16, and every trained value then has an fp32 master, ``base``.

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
        self.decision: Decision | None = None
        self._routing: dict[str, Routing] = {}
        self._awaits_gradient: set[str] = set()
        self._coefficients: dict[tuple[Any, ...], Coefficients] = {}
        super().__init__(params, config, modules)

    def __getstate__(self) -> dict[str, Any]:
        """As of the state, with the last decision and what a resume still waits for."""
        own = {name: getattr(self, name) for name in ("decision", "_routing", "_awaits_gradient")}
        return {**super().__getstate__(), **own, "_coefficients": {}}

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
        """Experts, scores and winners of the last step for every module that had a gradient; empty before it.

        Copied from the device once per step, when it is first asked for.
        """
        if self.decision is not None and not self._routing:
            scores, winners = self.decision.to_host()
            self._routing = {
                name: Routing(self.experts, tuple(row), tuple(self.experts[index] for index in best))
                for name, row, best in zip(self.decision.modules, scores, winners, strict=True)
            }
        return self._routing

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Advance all moments, route, update the winners.

        Raises:
            NonFiniteGradientError: If a gradient is NaN or infinite; nothing has changed then.
            ResumeError: If, after a resume, a module that always had gradients no longer gets one.
            ValueError: If a closure is given, or a gradient is sparse.
        """
        if closure is not None:
            raise ValueError("closure: MoLFAdamW needs gradients of one forward pass; call step() without a closure")
        self._coefficients.clear()
        self._written.check(self._derived())
        active = [module for module in self.modules if self._has_gradients(module)]
        self._check_resumed({module.name for module in active})
        clip = self._check_gradients(active)
        self.decision, self._routing = None, {}
        if active:
            sums = torch.stack([self._track(module, clip) for module in active])
            names, scores = tuple(module.name for module in active), self._scores(active, sums)
            self.decision = decide(names, scores, self.config.top_k, self._priorities(names, scores))
            for module, winners in zip(active, self.decision.mask, strict=True):
                self._update(module, winners)
        self._step_other(clip)
        self._written.remember(self._derived())

    def _track(self, module: RoutedModule, clip: float) -> Tensor:
        """Universal momentum tracking; returns what the scores sum over each expert's elements, (E,)."""
        sums = []
        for slot in module.slots:
            self.state[self._parameter(slot)]["step"] += 1
        if self.config.train_base:
            group = self._group("dense")
            terms = []
            for slot in module.dense_slots:
                parameter = self._parameter(slot)
                tensor = self._trained(parameter)
                update_moments_(tensor, scaled_gradient(parameter.grad, tensor, clip), group["betas"])
                terms.append(score_terms(tensor, group["eps"], self.config.score_fn).sum())
            sums.append(torch.stack(terms).sum(0, keepdim=True))
        if self.config.expert_ranks:
            group = self._group(self._lora_experts[0])
            per_rank = []
            for tensor, grad, dim in zip(self._pair(module), self._pair_gradients(module, clip), (1, 0), strict=True):
                update_moments_(tensor, grad, group["betas"])
                per_rank.append(score_terms(tensor, group["eps"], self.config.score_fn).sum(dim))
            zeros = per_rank[0].new_zeros(len(self._lora_experts))
            sums.append(zeros.index_add_(0, self._segments_on(zeros.device), per_rank[0] + per_rank[1]))
        return torch.cat(sums)

    def _scores(self, active: Sequence[RoutedModule], sums: Tensor) -> Tensor:
        """Scores (M, E) from the sums: (η_i / N_i) Σ for "epd", √(Σ / N_i) for "pfn".  Source: section 4.3."""
        rates = [float(self._group(expert)["lr"]) for expert in self.experts]
        if self.config.score_fn == "epd":
            factors = [[rate / size for rate, size in zip(rates, m.sizes, strict=True)] for m in active]
            return sums * sums.new_tensor(factors)
        return (sums / sums.new_tensor([module.sizes for module in active])).sqrt_()

    def _priorities(self, active: Sequence[str], scores: Tensor) -> Tensor | None:
        """What decides in place of the scores; None in MoLF."""
        if self.config.policy == "score":
            return None
        steps = [int(self.state[self._parameter(module.slots[0])]["step"]) for module in self.modules]
        turns = [(i, step) for i, step in enumerate(steps) if self.modules[i].name in active]
        return priorities(self.config, scores, turns)

    def _update(self, module: RoutedModule, winners: Tensor) -> None:
        """AdamW for the winners, (E,) bool; then P follows. Losers are skipped where that is known, else masked."""
        known = read_if_free(winners)
        first = int(self.config.train_base)
        for slot in module.dense_slots if self.config.train_base else ():
            if known is None or known[0]:
                group, parameter = self.param_groups[slot[0]], self._parameter(slot)
                tensor = self._trained(parameter)
                c = self._coefficients_of([group], tensor, self.state[parameter]["step"])
                adamw_(tensor, c, None if known else winners[0])
        if self.config.expert_ranks and (known is None or any(known[first:])):
            mask = None if known and all(known[first:]) else winners[first:][self._segments_on(winners.device)]
            groups = [self._group(expert) for expert in self._lora_experts]
            step = self.state[self._parameter(module.slots[-1])]["step"]
            A, B = self._pair(module)
            c = self._coefficients_of(groups, A, step)
            adamw_(A, c.by_row(), None if mask is None else mask[:, None])
            c = self._coefficients_of(groups, B, step, module.folds(self.config.scales))
            adamw_(B, c, mask)
        for slot in module.slots:
            self._write(self._parameter(slot), module)

    def _step_other(self, clip: float) -> None:
        """AdamW for what is not routed."""
        for group, parameter in self._others():
            if parameter.grad is None:
                continue
            state, tensor = self.state[parameter], self._trained(parameter)
            state["step"] += 1
            update_moments_(tensor, scaled_gradient(parameter.grad, tensor, clip), group["betas"])
            adamw_(tensor, self._coefficients_of([group], tensor, state["step"]))
            self._write(parameter)

    def _pair_gradients(self, module: RoutedModule, clip: float) -> tuple[Tensor, Tensor]:
        """dL/dA (R, in) and dL/dB (out, R): the adapter's, or from G = dL/dP as in identity (a)."""
        A, B = self._pair(module)
        if module.lora_A is not None and module.lora_B is not None:
            grad_A = scaled_gradient(self._parameter(module.lora_A).grad, A, clip)
            grad_B = scaled_gradient(self._parameter(module.lora_B).grad, B, clip)
            return grad_A, grad_B * self._per_rank(module.folds(self.config.scales), grad_B)
        G = scaled_gradient(self._parameter(module.slots[0]).grad, B, clip)
        return virtual.gradients(G, A.value, B.value, self._per_rank(self.config.scales, G), module.transposed)

    def _coefficients_of(
        self, groups: Sequence[Mapping[str, Any]], tensor: Trained, step: Tensor, folds: tuple[float, ...] = (1.0,)
    ) -> Coefficients:
        """Decay and step size per group, spread over the ranks where the groups are LoRA experts'."""
        n, value = float(step), tensor.value
        key = (tuple(id(group) for group in groups), n, folds, value.dtype, value.device)
        if key not in self._coefficients:
            decays, sizes, root = step_numbers(groups, n, folds)
            lora = groups[0]["expert"] in self._lora_experts
            decay, size = (self._per_rank(x, value) if lora else value.new_tensor(x[0]) for x in (decays, sizes))
            self._coefficients[key] = Coefficients(decay, size, root, groups[0]["eps"])
        return self._coefficients[key]

    def _has_gradients(self, module: RoutedModule) -> bool:
        present = [self._parameter(slot).grad is not None for slot in module.slots]
        if any(present) and not all(present):
            raise RuntimeError(
                f"{module.name}: some of its weight, bias and adapter have a gradient and some have none; "
                "set requires_grad on all of them, or make the optimizer after freezing"
            )
        return all(present)

    def _check_gradients(self, active: Sequence[RoutedModule]) -> float:
        """The clipping factor min(1, c / (‖g‖ + 1e-6)), after a look that every gradient is finite.

        The norm is over the gradients of all trained tensors: W, b, every A and B, and what is not routed.
        """
        found: list[tuple[str, Tensor, bool]] = []
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    check_gradient(name, parameter, self.state[parameter])
                    counts = group["expert"] != "base" and group["expert"] not in self._lora_experts
                    found.append((name, gradient_norm(parameter.grad), counts))
        limit = self.config.max_grad_norm
        if limit is not None and self.config.expert_ranks:
            for module in active:
                found += [(module.name, gradient_norm(grad), True) for grad in self._pair_gradients(module, 1.0)]
        return clip_factor(found, limit)

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
