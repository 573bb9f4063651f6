"""The step inside the backward pass: each module's as soon as its gradients are there, which are then freed at once.

Routing is per module, so no module needs another's gradient; what needs all of them, clipping by the global norm and
accumulation over several backward passes, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Units = Sequence[Sequence[Tensor]]
"""Parameters that are stepped together: those of a module, or one that is not routed."""


class BackwardHooks:
    """Calls ``on_ready`` for every unit whose gradients are complete, once per step.

    Args:
        units: The parameters, in groups.
        on_ready: Takes the index of a unit and steps it.
    """

    def __init__(self, units: Units, on_ready: Callable[[int], None]) -> None:
        self.units: list[Sequence[Tensor]] = []
        self.on_ready = on_ready
        self.stepped: set[int] = set()
        self._unit: dict[int, int] = {}
        for unit in units:
            self.add(unit)

    def add(self, unit: Sequence[Tensor]) -> None:
        """Watch another unit."""
        for parameter in unit:
            self._unit[id(parameter)] = len(self.units)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
        self.units.append(unit)

    def _on_gradient(self, parameter: Tensor) -> None:
        index = self._unit[id(parameter)]
        if index in self.stepped:
            raise RuntimeError(
                "step_in_backward=True: a second backward pass before step(); it cannot accumulate gradients, so use a "
                "larger batch, or step_in_backward=False"
            )
        unit = self.units[index]
        if all(each.grad is not None for each in unit):
            self.stepped.add(index)
            self.on_ready(index)
            for each in unit:
                each.grad = None
