"""Looks at every optimizer step of a trainer: winners move, losers keep their bits, the moments of all advance."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import TrainerCallback

from molf import MoLFAdamW
from molf.optim.layout import RoutedModule

Tensors = dict[str, torch.Tensor]


def experts(optimizer: MoLFAdamW, module: RoutedModule) -> dict[str, tuple[Tensors, Tensors]]:
    """Copies of weights and moments of every expert of a module, for virtual and for real LoRA experts."""
    found: dict[str, tuple[Tensors, Tensors]] = {}
    moments = ("exp_avg", "exp_avg_sq")
    parameter = {slot: optimizer.param_groups[slot[0]]["params"][slot[1]] for slot in module.slots}
    if optimizer.config.train_base:
        weights, of_dense = {}, {}
        for slot in [slot for slot in (module.weight, module.bias) if slot is not None]:
            state = optimizer.state[parameter[slot]]
            weights[str(slot)] = state.get("base", parameter[slot]).clone()
            of_dense |= {f"{slot}.{name}": state[name].clone() for name in moments}
        found["dense"] = weights, of_dense
    stop = 0
    for name, rank in zip(optimizer.experts[len(found) :], optimizer.config.expert_ranks, strict=True):
        cut, stop, weights, of_lora = slice(stop, stop + rank), stop + rank, {}, {}
        for kind, slot, at in (("lora_A", module.lora_A, cut), ("lora_B", module.lora_B, (slice(None), cut))):
            state = optimizer.state[parameter[slot or module.slots[0]]]
            value = state[kind] if slot is None else state.get("base", parameter[slot])
            prefix = f"{kind}_" if slot is None else ""
            weights[kind] = value.detach()[at].clone()
            of_lora |= {f"{kind}.{moment}": state[prefix + moment][at].clone() for moment in moments}
        found[name] = weights, of_lora
    return found


class StepWatch(TrainerCallback):
    """Checks every step where it happens.

    Attributes:
        wins: How often every expert won, over modules and steps.
        steps: Steps that were seen.
    """

    def __init__(self) -> None:
        self.wins: Counter[str] = Counter()
        self.steps = 0
        self.optimizer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.optimizer.register_step_pre_hook(lambda *_: self._before())
        self.optimizer.register_step_post_hook(lambda *_: self._after())

    def _before(self) -> None:
        self.saved = {module.name: experts(self.optimizer, module) for module in self.optimizer.modules}

    def _after(self) -> None:
        self.steps += 1
        routing = self.optimizer.routing
        assert list(routing) == self.optimizer.routed_modules, "a module had no gradient"
        for module in self.optimizer.modules:
            winners = routing[module.name].winners
            self.wins.update(winners)
            for name, (weights, moments) in experts(self.optimizer, module).items():
                before, moments_before = self.saved[module.name][name]
                moved = [not torch.equal(before[key], weights[key]) for key in weights]
                assert any(moved) if name in winners else not any(moved), (module.name, name, winners)
                for key, value in moments.items():  # A has a gradient only once B has left zero
                    if key.startswith("lora_A") and not before["lora_B"].any():
                        continue
                    assert not torch.equal(value, moments_before[key]), (module.name, name, key)
