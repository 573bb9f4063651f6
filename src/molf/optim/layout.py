"""Where the tensors of a routed layer are in an optimizer: positions, never references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Slot = tuple[int, int]
"""Index of a parameter group, and position in its ``params``."""


@dataclass(frozen=True)
class RoutedModule:
    """A routed layer as the optimizer knows it: positions in ``param_groups``, never a Parameter.

    Sharding and ``accelerate`` replace the entries of ``group["params"]``; a position stays right.

    Attributes:
        name: Module name in the model.
        weight: Slot (group, position) of the layer's weight, or None if the base is frozen under an adapter.
        bias: Slot of the bias if the dense expert has one.
        lora_A: Slot of the adapter's A, or None for virtual experts.
        lora_B: Slot of the adapter's B, or None.
        transposed: Whether the weight is stored as (in, out).
        scaling: The adapter's own factor c on B A; 1 for virtual experts.
        sizes: Number of elements N_i of every expert, the dense one with its bias.
    """

    name: str
    weight: Slot | None
    bias: Slot | None
    lora_A: Slot | None
    lora_B: Slot | None
    transposed: bool
    scaling: float
    sizes: tuple[int, ...]

    @cached_property
    def slots(self) -> list[Slot]:
        """Every slot of the module, the weight first where it has one."""
        return [slot for slot in (self.weight, self.bias, self.lora_A, self.lora_B) if slot is not None]

    def folds(self, scales: Sequence[float]) -> tuple[float, ...]:
        """f_i = s_i / c of a real adapter, by which B̃_i = f_i B_i; 1 for virtual experts."""
        return tuple(1.0 if self.lora_A is None else scale / self.scaling for scale in scales)
