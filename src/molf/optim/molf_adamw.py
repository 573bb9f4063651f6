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

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import virtual
from .adamw import Coefficients, Trained, adamw_, moment_dtype, scaled_gradient, score_terms, update_moments_
from .checkpoint import check_loadable
from .config import MoLFConfig
from .guards import ResumeError, WrittenTensors, check_gradient, clip_factor, gradient_norm
from .layout import RoutedModule, Slot
from .policy import priorities
from .routing import Decision, Routing, decide, read_if_free

_IN_EVERY_GROUP = tuple("betas eps expert_ranks scales score_fn top_k policy random_shares policy_seed".split())


class MoLFAdamW(Optimizer):
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
        self.config = config
        self.experts = config.experts
        self.modules = tuple(modules)
        self.decision: Decision | None = None
        self._routing: dict[str, Routing] = {}
        self._awaits_gradient: set[str] = set()
        self._coefficients: dict[tuple[Any, ...], Coefficients] = {}
        self._segments: dict[torch.device, Tensor] = {}
        self._written = WrittenTensors()
        defaults = {
            "lr": config.lr,
            "weight_decay": 0.0,
            "expert": "other",
            **{name: getattr(config, name) for name in _IN_EVERY_GROUP},
        }
        super().__init__(params, defaults)
        for module in self.modules:
            if module.lora_A is None and config.expert_ranks:
                weight = self._parameter(module.slots[0])
                rank, dtype = sum(config.expert_ranks), moment_dtype(weight)
                virtual.make_experts(self.state[weight], weight, rank, module.transposed, dtype)
        self._written.remember(self._derived())

    def __getstate__(self) -> dict[str, Any]:
        """All attributes but the caches and the hooks, so that copies and pickles work."""
        own = ("config", "experts", "modules", "decision", "_routing", "_awaits_gradient", "_written")
        caches: dict[str, Any] = {"_coefficients": {}, "_segments": {}}
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, **caches}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make the state of its parameters at once; a group without "expert" is not routed.

        Raises:
            ValueError: If "expert" is none of this optimizer's groups.
        """
        known = {*self.experts, "dense_bias", "base", "other", "other_no_decay"}
        if param_group.setdefault("expert", "other") not in known:
            raise ValueError(f"expert={param_group['expert']!r}: choose one of {', '.join(sorted(known))}")
        params = param_group["params"] = _listed(param_group["params"])
        param_group.setdefault("param_names", [f"added.{len(self.param_groups)}.{i}" for i in range(len(params))])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            state = self.state[parameter]
            state["step"] = torch.tensor(0.0)
            dtype = moment_dtype(parameter)
            if dtype != parameter.dtype:
                state["base"] = parameter.detach().to(dtype, copy=True)
            if group["expert"] != "base":
                state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)

    @property
    def routed_modules(self) -> list[str]:
        """Names of the routed modules, in model order."""
        return [module.name for module in self.modules]

    @property
    def steps_taken(self) -> int:
        """Number of optimizer steps so far."""
        return max((int(state["step"]) for state in self.state.values()), default=0)

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

    def _stored(self, parameter: Tensor, module: RoutedModule | None = None) -> Tensor:
        """What the model's tensor has to hold: P = W + Σ s_i B_i A_i, or the master, or else itself."""
        state = self.state[parameter]
        if "lora_A" in state and module is not None:
            return virtual.merged(state, self._per_rank(self.config.scales, state["lora_B"]), module.transposed)
        return state.get("base", parameter)

    def _write(self, parameter: Tensor, module: RoutedModule | None = None) -> None:
        stored = self._stored(parameter, module)
        if stored is not parameter:
            parameter.copy_(stored)

    def _others(self) -> list[tuple[dict[str, Any], Tensor]]:
        groups = [group for group in self.param_groups if group["expert"].startswith("other")]
        return [(group, parameter) for group in groups for parameter in group["params"]]

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Rewrite every weight of the model from the state, after someone has written to the state."""
        for module in self.modules:
            for slot in module.slots:
                self._write(self._parameter(slot), module)
        for _, parameter in self._others():
            self._write(parameter)
        self._written.remember(self._derived())

    def _parameter(self, slot: Slot) -> Tensor:
        return self.param_groups[slot[0]]["params"][slot[1]]

    def _group(self, expert: str) -> dict[str, Any]:
        return next(group for group in self.param_groups if group["expert"] == expert)

    def _trained(self, parameter: Tensor) -> Trained:
        state = self.state[parameter]
        return Trained(state.get("base", parameter), state["exp_avg"], state["exp_avg_sq"])

    def _pair(self, module: RoutedModule) -> tuple[Trained, Trained]:
        """The stacked A (R, in) and B (out, R) with their moments."""
        if module.lora_A is not None and module.lora_B is not None:
            return self._trained(self._parameter(module.lora_A)), self._trained(self._parameter(module.lora_B))
        state = self.state[self._parameter(module.slots[0])]
        return (
            Trained(state["lora_A"], state["lora_A_exp_avg"], state["lora_A_exp_avg_sq"]),
            Trained(state["lora_B"], state["lora_B_exp_avg"], state["lora_B_exp_avg_sq"]),
        )

    def _pair_gradients(self, module: RoutedModule, clip: float) -> tuple[Tensor, Tensor]:
        """dL/dA (R, in) and dL/dB (out, R): the adapter's, or from G = dL/dP as in identity (a)."""
        A, B = self._pair(module)
        if module.lora_A is not None and module.lora_B is not None:
            grad_A = scaled_gradient(self._parameter(module.lora_A).grad, A, clip)
            grad_B = scaled_gradient(self._parameter(module.lora_B).grad, B, clip)
            return grad_A, grad_B * self._per_rank(module.folds(self.config.scales), grad_B)
        G = scaled_gradient(self._parameter(module.slots[0]).grad, B, clip)
        return virtual.gradients(G, A.value, B.value, self._per_rank(self.config.scales, G), module.transposed)

    def _per_rank(self, per_expert: Sequence[float], like: Tensor) -> Tensor:
        """One number per LoRA expert, spread over the rank axis, (R,)."""
        return like.new_tensor(per_expert)[self._segments_on(like.device)]

    def _segments_on(self, device: torch.device) -> Tensor:
        """The LoRA expert of every rank: ranks (2, 3) give [0, 0, 1, 1, 1]."""
        if device not in self._segments:
            ranks = torch.tensor(self.config.expert_ranks, dtype=torch.long)
            self._segments[device] = torch.arange(len(ranks)).repeat_interleave(ranks).to(device)
        return self._segments[device]

    @property
    def _lora_experts(self) -> tuple[str, ...]:
        return self.experts[int(self.config.train_base) :]

    def _coefficients_of(
        self, groups: Sequence[Mapping[str, Any]], tensor: Trained, step: Tensor, folds: tuple[float, ...] = (1.0,)
    ) -> Coefficients:
        """Decay and step size per group, spread over the ranks where the groups are LoRA experts'."""
        n, value = float(step), tensor.value
        key = (tuple(id(group) for group in groups), n, folds, value.dtype, value.device)
        if key not in self._coefficients:
            beta1, beta2 = groups[0]["betas"]
            rates = [float(group["lr"]) for group in groups]
            decays = [1 - rate * group["weight_decay"] for rate, group in zip(rates, groups, strict=True)]
            folds = folds * len(groups) if len(folds) == 1 else folds
            sizes = [-(rate / (1 - beta1**n)) * fold for rate, fold in zip(rates, folds, strict=True)]
            lora = groups[0]["expert"] in self._lora_experts
            decay, size = (self._per_rank(x, value) if lora else value.new_tensor(x[0]) for x in (decays, sizes))
            self._coefficients[key] = Coefficients(decay, size, (1 - beta2**n) ** 0.5, groups[0]["eps"])
        return self._coefficients[key]

    def _derived(self) -> list[tuple[str, Tensor, Callable[[], Tensor]]]:
        """The model's tensors that this optimizer rewrites: name, tensor, and what the state says it holds."""
        entries: list[tuple[str, Tensor, Any]] = [
            (m.name, self._parameter(slot), m) for m in self.modules for slot in m.slots
        ]
        entries += [("an unrouted parameter", parameter, None) for _, parameter in self._others()]
        return [(name, p, partial(self._stored, p, m)) for name, p, m in entries if "base" in self.state[p]]

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

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state saved by ``state_dict``, every tensor in the precision that this optimizer keeps it in.

        torch casts the state of a bf16 parameter to bf16 on load; here masters and moments stay fp32, and
        the next step is bit-identical to the uninterrupted run's. The model's weights follow the state. Nothing
        changes if an error is raised.

        Raises:
            ValueError: If the state is of other experts, another score or other parameters.
        """
        check_loadable(self, state_dict)
        kept = self.state
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state = kept
        for index, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            for key, value in state_dict["state"][index].items():
                device = torch.device("cpu") if key == "step" else parameter.device
                self.state[parameter][key] = value.to(device, self.state[parameter][key].dtype, copy=True)
        self.sync_weights()
        steps = {module.name: int(self.state[self._parameter(module.slots[0])]["step"]) for module in self.modules}
        self._awaits_gradient = {name for name, taken in steps.items() if taken == self.steps_taken > 0}


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)
