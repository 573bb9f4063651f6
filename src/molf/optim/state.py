"""What MoLFAdamW keeps: groups, masters, experts and moments; how the model follows them, and how they are saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import virtual
from .adamw import Trained, moment_dtype, new_state
from .checkpoint import check_loadable
from .config import MoLFConfig
from .guards import WrittenTensors
from .layout import RoutedModule, Slot

_IN_EVERY_GROUP = tuple("betas eps expert_ranks scales score_fn top_k policy random_shares policy_seed".split())


class MoLFState(Optimizer):
    """The state of ``MoLFAdamW``, without its step; see there for what is in ``param_groups`` and ``state``.

    Args:
        params: Parameter groups with the key "expert".
        config: Experts, scales, scores and rates.
        modules: The routed modules as slots of ``params``.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], config: MoLFConfig, modules: Sequence[RoutedModule] = ()
    ) -> None:
        self.config = config
        self.experts = config.experts
        self.modules = tuple(modules)
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
        own = ("config", "experts", "modules", "_written")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_segments": {}}

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
            self.state[parameter].update(new_state(parameter, moments=group["expert"] != "base"))

    @property
    def routed_modules(self) -> list[str]:
        """Names of the routed modules, in model order."""
        return [module.name for module in self.modules]

    @property
    def steps_taken(self) -> int:
        """Number of optimizer steps so far."""
        return max((int(state["step"]) for state in self.state.values()), default=0)

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Rewrite every weight of the model from the state, after someone has written to the state."""
        for module in self.modules:
            for slot in module.slots:
                self._write(self._parameter(slot), module)
        for _, parameter in self._others():
            self._write(parameter)
        self._written.remember(self._derived())

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
            for key, value in state_dict["state"][index].items():  # in place: accelerate loads the state into itself
                self.state[parameter][key].copy_(value)
        self.sync_weights()

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

    def _derived(self) -> list[tuple[str, Tensor, Callable[[], Tensor]]]:
        """The model's tensors that this optimizer rewrites: name, tensor, and what the state says it holds."""
        entries: list[tuple[str, Tensor, Any]] = [
            (m.name, self._parameter(slot), m) for m in self.modules for slot in m.slots
        ]
        entries += [("an unrouted parameter", parameter, None) for _, parameter in self._others()]
        return [(name, p, partial(self._stored, p, m)) for name, p, m in entries if "base" in self.state[p]]

    def _others(self) -> list[tuple[dict[str, Any], Tensor]]:
        groups = [group for group in self.param_groups if group["expert"].startswith("other")]
        return [(group, parameter) for group in groups for parameter in group["params"]]

    def _parameter(self, slot: Slot) -> Tensor:
        return self.param_groups[slot[0]]["params"][slot[1]]

    def _group(self, expert: str) -> dict[str, Any]:
        return next(group for group in self.param_groups if group["expert"] == expert)

    @property
    def _lora_experts(self) -> tuple[str, ...]:
        return self.experts[int(self.config.train_base) :]

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

    def _per_rank(self, per_expert: Sequence[float], like: Tensor) -> Tensor:
        """One number per LoRA expert, spread over the rank axis, (R,)."""
        return like.new_tensor(per_expert)[self._segments_on(like.device)]

    def _segments_on(self, device: torch.device) -> Tensor:
        """The LoRA expert of every rank: ranks (2, 3) give [0, 0, 1, 1, 1]."""
        if device not in self._segments:
            ranks = torch.tensor(self.config.expert_ranks, dtype=torch.long)
            self._segments[device] = torch.arange(len(ranks)).repeat_interleave(ranks).to(device)
        return self._segments[device]


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)
