"""What a step works on: modules of one shape as one, and batches of their tensors, which a pass takes in one call.

``stacks.py`` makes the stacks. What takes part in a step is a ``Selection``, kept for the steps in which the same
modules do, so that a step looks at little but its gradients.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .jobs import Held
from .layout import RoutedModule
from .parts import Part
from .quantized import is_quantized
from .scalars import numbers
from .virtual import Products


@dataclass(eq=False)
class Other:
    """A parameter that is not routed.

    Attributes:
        position: Where its step counter is among all.
        part: It alone.
        count: Number of steps, the present one included.
    """

    position: int
    part: Part
    count: float = 0.0


@dataclass(eq=False)
class Stack:
    """K modules of one shape.

    Attributes:
        modules: The modules.
        parameters: All their parameters.
        positions: Where the step counters of each module's parameters are among all.
        weights: Their weights, as one part of all or one of each; none where these are frozen under an adapter.
        dense: The parts of weights, and those of biases, where they are trained.
        pair: A and Bᵀ, each of all modules.
        count: Number of steps, the present one included.
        products: What the weights are made of where every W is one of its own, as it was last found.
    """

    modules: tuple[RoutedModule, ...]
    parameters: list[Tensor]
    positions: list[list[int]]
    weights: list[Part]
    dense: list[Part]
    pair: tuple[Part, Part] | None
    count: float = 0.0
    products: Products | None = None

    def __len__(self) -> int:
        return len(self.modules)

    @cached_property
    def names(self) -> list[str]:
        """Of the modules."""
        return [module.name for module in self.modules]

    def owns_bases(self) -> bool:
        """Whether every W was found to be one of its own, and is so still: someone may have let a weight be its W."""
        if self.products is None:
            return False
        targets, bases = (map(Tensor.data_ptr, each) for each in self.products[:2])
        return not any(map(operator.eq, targets, bases))

    def virtual_pair(self) -> tuple[Tensor, Tensor]:
        """Virtual A (K, R, in) and Bᵀ (K, R, out)."""
        A, B = (part.value for part in self.pair or () if part.value is not None)
        rank = len(A) // len(self)  # a process may hold no row of a weight, and so no column of B
        return A.view(len(self), rank, A.shape[1]), B.view(len(self), rank, B.shape[1])


@dataclass(eq=False)
class Batch:
    """Parts that a pass takes in one call.

    Attributes:
        place: Device and dtype of their values.
        indices: Their numbers among all that were grouped.
        stacks: The stack of each; all are of as many steps.
        parts: The parts.
        modules: Of each the numbers of its modules in the order of all stacks.
        rows: Of each how many modules it has, or ranks: over each the scores sum.
        exp_avg: Their m.
        exp_avg_sq: Their v.
        values: Their precise values and what takes these rounded, where both stay the same from step to step.
        bases: The W or master of each when ``values`` was made.
    """

    place: tuple[torch.device, torch.dtype]
    indices: list[int]
    stacks: list[Any]
    parts: list[Part]
    modules: list[range]
    rows: list[int]
    exp_avg: Held
    exp_avg_sq: Held
    values: tuple[Held, Held] | None = None
    bases: Sequence[Tensor | None] = ()


class Batches(NamedTuple):
    """The batches of a step.

    Attributes:
        tracked: Weights and biases, then every A, and then every Bᵀ.
        dense: Weights and biases, those of as many steps together.
        lora: Every A and Bᵀ, likewise.
        others: What is not routed, likewise.
    """

    tracked: list[Batch]
    dense: list[Batch]
    lora: list[Batch]
    others: list[Batch]


def in_batches(listed: Iterable[tuple[Any, int, Any, Part]]) -> list[Batch]:
    """Parts of one key, device and dtype together.

    Args:
        listed: Keys, numbers of the stacks' first modules, stacks, parts.
    """
    groups: dict[Any, list[Any]] = defaultdict(list)
    for i, (key, start, stack, part) in enumerate(listed):
        m = part.exp_avg
        place = m.device, torch.float32 if is_quantized(m) else m.dtype
        modules = range(start + part.members.start, start + part.members.stop)
        rows = len(m) if part.by_row else len(modules)
        groups[key, place].append((i, stack, part, modules, rows))
    made = []
    for (_, place), group in groups.items():
        columns: list[Any] = [list(column) for column in zip(*group, strict=True)]
        columns += [Held(part.exp_avg for part in columns[2]), Held(part.exp_avg_sq for part in columns[2])]
        made.append(Batch(place, *columns))
    return made


class Selection:
    """What takes part in a step, with what there is to know of it before its gradients.

    Args:
        stacks: Whole stacks, and one by one what is left of a stack or has made other steps.
        others: Parameters that are not routed.
        index: The number of each module in model order, by its name.

    Attributes:
        names: Of the modules, in model order.
        positions: Where the step counters of all parameters are.
        starts: The stacks, each after the number of its first module in the order of all stacks.
        dense_rows: How many rows the weights and biases have, over each of which a score sums.
    """

    def __init__(self, stacks: list[Stack], others: list[Other], index: Mapping[str, int]) -> None:
        self.stacks, self.others, self._index = stacks, others, index
        self.starts = list(zip(accumulate(map(len, stacks), initial=0), stacks, strict=False))
        listed = [name for stack in stacks for name in stack.names]
        self._order = sorted(range(len(listed)), key=lambda i: index[listed[i]])
        self.names = tuple(self.in_model_order(listed))
        rows = [start + k for start, stack in self.starts for part in stack.dense for k in part.members]
        self.dense_rows = len(rows)
        self._module_of_row = None if rows == list(range(len(rows))) else rows
        self.positions = [each for stack in stacks for positions in stack.positions for each in positions]
        self.positions += [other.position for other in others]
        self._kept: dict[Any, Any] = {}

    def batches(self, uniform: bool) -> Batches:
        """What passes take; of several parameter groups together if all have the same betas and ε."""
        return self._keep(uniform, lambda: self._make_batches(uniform))

    def _make_batches(self, uniform: bool) -> Batches:
        dense = [(start, stack, part) for start, stack in self.starts for part in stack.dense]
        pairs = [(start, stack, stack.pair) for start, stack in self.starts if stack.pair is not None]
        lora = [(start, stack, pair[factor]) for factor in (0, 1) for start, stack, pair in pairs]
        groups = [None if uniform else part.slots[0][0] for *_, part in dense]
        own = [None if uniform else other.part.slots[0][0] for other in self.others]
        kinds = [*groups, *[None if uniform else "lora"] * len(lora)]
        return Batches(
            in_batches((kind, *each) for kind, each in zip(kinds, [*dense, *lora], strict=True)),
            in_batches(((group, each[1].count), *each) for group, each in zip(groups, dense, strict=True)),
            in_batches((each[1].count, *each) for each in lora),
            in_batches(((group, each.count), 0, each, each.part) for group, each in zip(own, self.others, strict=True)),
        )

    @cached_property
    def single(self) -> list[Selection]:
        """The stacks one by one."""
        return [Selection([stack], [], self._index) for stack in self.stacks]

    def in_model_order(self, rows: list[Any]) -> list[Any]:
        """Something of each module, which come in the stacks' order."""
        return [rows[i] for i in self._order]

    def by_module(self, sums: Tensor) -> Tensor:
        """The sums of weights and of biases together, (M,), in the stacks' order."""
        if self._module_of_row is None:
            return sums
        # two terms of a sum are the same in either order
        rows = self._module_of_row
        index = self._keep(sums.device, lambda: numbers(rows, sums, torch.long))
        return sums.new_zeros(len(self.names)).index_add_(0, index, sums)

    def _keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, which is asked once for a key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def same(found: Sequence[Any], held: Sequence[Any]) -> bool:
    """Whether both have the same things."""
    return len(found) == len(held) and all(map(operator.is_, found, held))
