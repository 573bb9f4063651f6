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

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .backward import BackwardHooks, release
from .config import MoLFConfig
from .guards import ResumeError
from .layout import RoutedModule
from .routing import Routing
from .sharding import processes
from .step import MoLFStep


class MoLFAdamW(MoLFStep):
    """AdamW with MoLF's routing. Make one with ``create_molf_optimizer(model, config)``.

    Every step, for every routed module: moments of all experts advance; every expert is scored from
    its moments; the ``top_k`` best take a full AdamW step, the others keep their weights bit for bit.
    Parameters that are not routed take an ordinary AdamW step.

    ``param_groups`` has one group per expert (key "expert": "dense", "lora_r128", ...), whose ``lr`` and
    ``weight_decay`` are that expert's, "dense_bias" without decay, "other" / "other_no_decay", and "base" for weights
    under virtual experts that have no dense one.
    Groups of virtual experts hold no parameter, only their ``lr`` and ``weight_decay``; the parameters of a stacked
    adapter are in the first LoRA expert's group. Schedulers work on them; ``OneCycleLR``, ``CyclicLR`` and
    ``SWALR`` need a list of rates, one per group.

    ``state[weight]`` holds ``step``, ``exp_avg``, ``exp_avg_sq`` and, for virtual experts, ``base`` (W, laid
    out like the weight), ``lora_A`` (R, in), ``lora_B`` (out, R, true B_i without the scale) and their moments.
    Moments are fp32 for models in bf16 or fp16, and every trained value then has an fp32 master, ``base``. In fp32
    ``base`` is the weight itself until a LoRA expert of the layer, or of a small layer stepped with it,
    wins. With ``keep_base=False`` there is no ``base``.

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
        if not modules:
            raise ValueError("modules=(): nothing would be routed; make it by create_molf_optimizer(model, config)")
        self._awaits_gradient: set[str] = set()
        self._in_backward: BackwardHooks | None = None
        super().__init__(params, config, modules)
        if config.step_in_backward:
            units = [[self._parameter(slot) for slot in module.slots] for module in self.modules]
            units += [[self._parameter(slot)] for slot in self._unrouted()]
            self._in_backward = BackwardHooks(units, self._step_unit)

    def __getstate__(self) -> dict[str, Any]:
        """As of the state, with the last decision and what a resume still waits for."""
        if self.config.step_in_backward:
            raise TypeError(
                "an optimizer with step_in_backward=True has hooks on its model: use state_dict() for copies"
            )
        return {**super().__getstate__(), "_awaits_gradient": self._awaits_gradient, "_in_backward": None}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of the state; with ``step_in_backward`` these parameters, too, are stepped in the backward pass."""
        super().add_param_group(param_group)
        release(self.param_groups[-1]["params"])
        self._stacks = None
        if self._in_backward is not None:
            for parameter in self.param_groups[-1]["params"]:
                self._in_backward.add([parameter])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of every optimizer; with ``step_in_backward`` a backward pass that ended with an error is over."""
        super().zero_grad(set_to_none)
        if self._in_backward is not None:
            self._in_backward.stepped.clear()

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
            ProcessesDifferError: If they do, by ``check_ranks_every``, or the model was sharded after its optimizer
                was made.
            RuntimeError: If the model was converted, resized or written to since the optimizer was made, or of a module
                some parameters have a gradient and some have none.
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
        present = self._present()
        whole = all(map(all, present))
        active = [module for module in self.modules if whole or _has_gradients(module, present)]
        if self._awaits_gradient:
            self._check_resumed({module.name for module in active})
        self.decisions = []
        others = [(i, j) for i, j in self._unrouted() if present[i][j]]
        if not active and not others:
            _warn_of_nothing(5)
        self._step(self.stacks(), active, others)
        self._remember_written()
        every = self.config.check_ranks_every
        if every is not None and processes() > 1 and self.steps_taken % every == 0:
            self.compare_replicas()

    @torch.no_grad()
    def _step_unit(self, index: int) -> None:
        """One module's or parameter's step, in the backward pass."""
        first = self._in_backward is not None and len(self._in_backward.stepped) == 1
        if first:
            self._check_written()
            self.decisions = []
        known = self.stacks() if first or self._stacks is None else self._stacks  # a look at all tensors only once
        if index < len(self.modules):
            self._step(known, [self.modules[index]], [])
        else:
            self._step(known, [], [self._unrouted()[index - len(self.modules)]])

    def _finish_backward(self, hooks: BackwardHooks) -> None:
        """What is left of the step when the backward pass has made it."""
        hooks.finish()
        present = self._present()
        for index, module in enumerate(self.modules):
            if index not in hooks.stepped:
                _has_gradients(module, present)  # a module that still waits for one of them is an error
        stepped = {self.modules[index].name for index in hooks.stepped if index < len(self.modules)}
        self._check_resumed(stepped)
        if not hooks.stepped:
            self.decisions = []
            _warn_of_nothing(6)
        hooks.stepped.clear()
        self._remember_written()

    def _present(self) -> list[list[bool]]:
        """Which parameters have a gradient, by group."""
        return [[p.grad is not None for p in group["params"]] for group in self.param_groups]

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


def _warn_of_nothing(stacklevel: int) -> None:
    """Warn the caller of ``step``, which torch wraps twice."""
    warnings.warn(
        "step: no parameter of this optimizer has a gradient, nothing was updated; make the optimizer from the model "
        "that is trained",
        stacklevel=stacklevel,
    )


def _has_gradients(module: RoutedModule, present: Sequence[Sequence[bool]]) -> bool:
    """Whether the module takes part in a step; ``present`` says by group which parameters have a gradient.

    Raises:
        RuntimeError: If some of the module's have one and some have none.
    """
    found = [present[group][index] for group, index in module.slots]
    if any(found) and not all(found):
        raise RuntimeError(
            f"{module.name}: some of its weight, bias and adapter have a gradient and some have none; "
            "set requires_grad on all of them, or make the optimizer after freezing"
        )
    return all(found)
