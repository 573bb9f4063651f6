"""The step inside the backward pass: each module's as soon as its gradients are there, which are then freed at once.

Routing is per module, so no module needs another's gradient; what needs all of them, clipping by the global norm and
accumulation over several backward passes, is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Units = Sequence[Sequence[Tensor]]
"""Parameters that are stepped together: those of a module, or one that is not routed."""

_HANDLES: Any = WeakTensorKeyDictionary()
"""The hook of each parameter, until another optimizer takes the parameter."""


class BackwardHooks:
    """Calls ``on_ready`` for every unit whose gradients are complete, once per step, as long as its object is there.

    Args:
        units: The parameters, in groups.
        on_ready: A method that takes the index of a unit and steps it.
    """

    def __init__(self, units: Units, on_ready: Callable[[int], None]) -> None:
        self.units: list[Sequence[Tensor]] = []
        self.stepped: set[int] = set()
        self._on_ready = weakref.WeakMethod(on_ready)
        self._unit: dict[int, int] = {}
        for unit in units:
            self.add(unit)

    def add(self, unit: Sequence[Tensor]) -> None:
        """Watch another unit."""
        for parameter in unit:
            self._unit[id(parameter)] = len(self.units)
            if parameter.requires_grad:
                hook = weakref.WeakMethod(self._on_gradient)
                _HANDLES[parameter] = parameter.register_post_accumulate_grad_hook(lambda p, hook=hook: _call(hook, p))
        self.units.append(unit)

    def finish(self) -> None:
        """Step units whose gradients came by no hook: someone gave them, or they were frozen when they were added."""
        for index in range(len(self.units)):
            if index not in self.stepped:
                self._step_if_complete(index)

    def _on_gradient(self, parameter: Tensor) -> None:
        index = self._unit[id(parameter)]
        if index in self.stepped:
            raise RuntimeError(
                "step_in_backward=True: a second backward pass before step(); it cannot accumulate gradients, so use a "
                "larger batch, or step_in_backward=False. After one that ended with an error, call "
                "optimizer.zero_grad(); of a module in two checkpoints, use_reentrant=False"
            )
        self._step_if_complete(index)

    def _step_if_complete(self, index: int) -> None:
        unit = self.units[index]
        if all(each.grad is not None for each in unit):
            self.stepped.add(index)
            _call(self._on_ready, index)
            for each in unit:
                each.grad = None


def release(parameters: Iterable[Tensor]) -> None:
    """Take the hooks off parameters, which are another optimizer's now."""
    for parameter in parameters:
        if parameter in _HANDLES:
            _HANDLES.pop(parameter).remove()


def _call(method: weakref.WeakMethod[Any], argument: Any) -> None:
    """Call a method, unless its object is gone."""
    found = method()
    if found is not None:
        found(argument)
