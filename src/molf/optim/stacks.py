"""Routed modules as a step works on them: what is small of those of one shape, as one.

What a step of small tensors costs is calls, not arithmetic. A ``Stack`` is K modules of one shape. Their LoRA experts'
moments, with the experts where they are virtual, and the moments of weights and biases that are small, with their W or
masters, lie in tensors that the modules share, each module's own being views of them, so that the calls of a step go by
the number of stacks. Large weights stay as they are.
"""

from __future__ import annotations

import math
import operator
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import MoLFConfig
from .jobs import Held
from .layout import RoutedModule, Slot
from .parts import Part, shared
from .quantized import is_quantized
from .scalars import numbers
from .sharding import is_distributed
from .virtual import Products, shares_storage

STACK_FROM = 2**15
"""Tensors of the model with this many elements are not gathered: their gradients would be copied for nothing."""

STACK_TO = 2**20
"""Elements of the weights of a stack at most, if they are gathered."""

PAIR_TO = {"cpu": 2**20, "cuda": 2**26}
"""Elements of the A, and of the B, of a stack of large modules at most, by device."""

MOMENTS = ("exp_avg", "exp_avg_sq")
VIRTUAL = tuple((f"{name}_exp_avg", f"{name}_exp_avg_sq", name) for name in ("lora_A", "lora_B"))
"""Names in a weight's state of virtual A and B, each after its moments."""


class Unrouted(NamedTuple):
    """A parameter that is not routed, with its group and name."""

    group: dict[str, Any]
    parameter: Tensor
    name: str


@dataclass(eq=False)
class Other:
    """A parameter that is not routed; attributes as of ``Unrouted`` and ``Stack``."""

    group: dict[str, Any]
    name: str
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
        """Whether every W was found to be one of its own, and is the same since."""
        if self.products is None:
            return False
        bases = [state.get("base") for part in self.weights for state in part.states]
        targets, own = self.products.targets, self.products.bases
        # someone may have let a weight be its W again
        return same(bases, own) and not any(map(operator.eq, map(Tensor.data_ptr, targets), map(Tensor.data_ptr, own)))

    def virtual_pair(self) -> tuple[Tensor, Tensor]:
        """Virtual A (K, R, in) and Bᵀ (K, R, out)."""
        A, B = (part.value for part in self.pair or () if part.value is not None)
        rank = len(A) // len(self)  # a process may hold no row of a weight, and so no column of B
        return A.view(len(self), rank, A.shape[1]), B.view(len(self), rank, B.shape[1])


@dataclass(eq=False)
class Batch:
    """Parts that a pass takes in one call.

    Attributes:
        key: What they have in common.
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

    key: Any
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
        tracked: Weights and biases, then every A, and then every Bᵀ; the key is a parameter group's index.
        dense: Weights and biases by their number of steps.
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
        groups[key, place].append((i, stack, part, modules, len(m) if part.by_row else len(modules)))
    made = []
    for (key, place), group in groups.items():
        columns: list[Any] = [list(column) for column in zip(*group, strict=True)]
        columns += [Held(getattr(part, name) for part in columns[2]) for name in MOMENTS]
        made.append(Batch(key, place, *columns))
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
    """

    def __init__(self, stacks: list[Stack], others: list[Other], index: Mapping[str, int]) -> None:
        self.stacks, self.others, self._index = stacks, others, index
        self.starts = list(zip(accumulate(map(len, stacks), initial=0), stacks, strict=False))
        listed = [name for stack in stacks for name in stack.names]
        self._order = sorted(range(len(listed)), key=lambda i: index[listed[i]])
        self.names = tuple(listed[i] for i in self._order)
        self.positions = [each for stack in stacks for positions in stack.positions for each in positions]
        self.positions += [other.position for other in others]
        self._kept: dict[Any, Any] = {}

    def batches(self, lora: int | None) -> Batches:
        """What passes take, of several parameter groups in one batch.

        Args:
            lora: None if all groups have the same betas and ε. Else they are apart, and this is the index of the LoRA
                experts' first one.
        """
        return self.keep(lora, lambda: self._make_batches(lora))

    def _make_batches(self, lora: int | None) -> Batches:
        dense = [(start, stack, part) for start, stack in self.starts for part in stack.dense]
        pairs = [(start, stack, stack.pair) for start, stack in self.starts if stack.pair is not None]
        factors = [(start, stack, pair[factor]) for factor in (0, 1) for start, stack, pair in pairs]
        groups = [0 if lora is None else part.slots[0][0] for *_, part in dense]
        own = [0 if lora is None else id(other.group) for other in self.others]
        tracked = zip([*groups, *[lora or 0] * len(factors)], [*dense, *factors], strict=True)
        return Batches(
            in_batches((group, *each) for group, each in tracked),
            in_batches(((group, each[1].count), *each) for group, each in zip(groups, dense, strict=True)),
            in_batches((each[1].count, *each) for each in factors),
            in_batches(((group, each.count), 0, each, each.part) for group, each in zip(own, self.others, strict=True)),
        )

    @cached_property
    def dense_rows(self) -> list[int]:
        """Of every row of the weights and biases its module's number in the order of all stacks."""
        return [start + k for start, stack in self.starts for part in stack.dense for k in part.members]

    @cached_property
    def single(self) -> list[Selection]:
        """The stacks one by one."""
        return [Selection([stack], [], self._index) for stack in self.stacks]

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, which is asked once for a key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def in_model_order(self, rows: Tensor) -> Tensor:
        """One row of each module, which come in the stacks' order."""
        if self._order == list(range(len(self._order))):
            return rows
        return rows[self.keep(("order", rows.device), lambda: numbers(self._order, rows, torch.long))]

    def by_module(self, sums: Tensor) -> Tensor:
        """The sums of weights and of biases together, (M,), in the stacks' order."""
        if self.dense_rows == list(range(len(self.dense_rows))):
            return sums
        index = self.keep(("dense", sums.device), lambda: numbers(self.dense_rows, sums, torch.long))
        # two terms of a sum are the same in either order
        return sums.new_zeros(max(self.dense_rows) + 1).index_add_(0, index, sums)


class Stacks:
    """All modules of an optimizer in stacks, and the step counters of all its parameters in one tensor.

    Args:
        modules: The routed modules, in model order.
        others: The parameters that are not routed.
        groups: The optimizer's ``param_groups``.
        state: Its state, whose moments, virtual experts and counters become views of shared tensors.
        config: Which experts there are, and whether W is kept.

    Attributes:
        all: The stacks; those of modules that are alike follow each other.
        others: The parameters that are not routed, by the parameter's id.
        position: Where each parameter's step counter is, by the parameter's id.
    """

    def __init__(
        self,
        modules: Sequence[RoutedModule],
        others: Sequence[Unrouted],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Tensor]],
        config: MoLFConfig,
    ) -> None:
        self._groups, self._state, self._config = groups, state, config
        parameters = [each for group in groups for each in group["params"]]
        self.position = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._steps = torch.stack([state[each]["step"] for each in parameters])
        for parameter, step in zip(parameters, self._steps.unbind(), strict=True):
            state[parameter]["step"] = step
        self._index = {module.name: i for i, module in enumerate(modules)}
        self._selections: dict[Any, Selection] = {}
        self.all = [self._make(group) for group in self._grouped(modules)]
        self._singles: dict[str, Stack] = {}
        self.others = {id(each.parameter): self._make_other(each) for each in others}  # names may be the same
        parts = [part for stack in self.all for part in (*stack.weights, *stack.dense)]
        parts += [part for stack in self.all for part in stack.pair or ()] + [
            other.part for other in self.others.values()
        ]
        self._gathered = {id(each) for part in parts if len(part.parameters) > 1 for each in part.parameters}
        self._held, self._held_firm, self._shapes = self._tensors(), self._firm(), self._shapes_now()

    def fit(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Whether the optimizer still holds the groups, whose rates are read, and the tensors that these stacks are of.

        ``load_state_dict`` of torch replaces the groups.
        """
        if groups is not self._groups or state is not self._state or self._shapes_now() != self._shapes:
            return False
        found = self._tensors()
        if same(found, self._held):
            return True
        # a W of its own in the place of the weight: nothing here refers to that of a layer that is not gathered
        self._held = found
        return same(self._firm(), self._held_firm)

    def of(self, active: Sequence[RoutedModule], others: Sequence[Unrouted]) -> Selection:
        """What takes part in a step: whole stacks, and one by one what is left of a stack or has made other steps."""
        counts = [n + 1 for n in self._steps.tolist()]
        least = min(counts) if len(active) + len(others) > 1 else math.inf
        # how many steps each is ahead says what can be stepped together
        ahead = array("d", [n - least for n in counts]).tobytes() if least < math.inf else b""
        key = tuple(each.name for each in active), tuple(id(each.parameter) for each in others), ahead
        if key not in self._selections:
            # of modules that change from step to step, as of a mixture of experts, few selections come again
            while sum(len(each.positions) for each in self._selections.values()) > 4 * len(counts):
                del self._selections[next(iter(self._selections))]
            self._selections[key] = self._select(active, others, counts)
        selection = self._selections[key]
        for stack in selection.stacks:
            stack.count = counts[stack.positions[0][0]]
        for other in selection.others:
            other.count = counts[other.position]
        return selection

    def _select(self, active: Sequence[RoutedModule], others: Sequence[Unrouted], counts: Sequence[float]) -> Selection:
        names = {module.name for module in active}
        stacks: list[Stack] = []
        for stack in self.all if len(active) > 1 else ():
            here = [module for module in stack.modules if module.name in names]
            together = len(here) == len(stack) and len({counts[each[0]] for each in stack.positions}) == 1
            stacks += [stack] if together else map(self._single, here)
        if len(active) == 1:  # as in the backward pass, where every module has its own step
            stacks = [self._single(active[0])]
        return Selection(stacks, [self.others[id(each.parameter)] for each in others], self._index)

    def advance(self, selection: Selection) -> None:
        """Count a step of these modules and of these parameters."""
        if len(selection.positions) == len(self._steps):
            self._steps.add_(1)
        else:
            self._steps[selection.positions] += 1

    def _shapes_now(self) -> list[torch.Size]:
        return [parameter.shape for group in self._groups for parameter in group["params"]]

    def _tensors(self) -> list[Any]:
        """All that a stack refers to, themselves and not their ids, which are given again, and the model's dtypes."""
        found: list[Any] = [parameter for group in self._groups for parameter in group["params"]]
        found += [parameter.dtype for parameter in found]
        for entries in self._state.values():
            found += entries.values()
        return found

    def _firm(self) -> list[Any]:
        """``_tensors`` without the W's and masters of parameters that are not gathered."""
        found = self._tensors()[: 2 * len(self.position)]
        for parameter, entries in self._state.items():
            gathered = id(parameter) in self._gathered
            found += [tensor for key, tensor in entries.items() if gathered or key != "base"]
        return found

    def _parameter(self, slot: Slot) -> Tensor:
        return self._groups[slot[0]]["params"][slot[1]]

    def _single(self, module: RoutedModule) -> Stack:
        if module.name not in self._singles:
            self._singles[module.name] = self._make([module])
        return self._singles[module.name]

    def _grouped(self, modules: Iterable[RoutedModule]) -> list[list[RoutedModule]]:
        """Modules that are alike together, kind after kind, as many to a stack as it may have."""
        groups: dict[tuple[int, Any], list[RoutedModule]] = defaultdict(list)
        for module in modules:
            tensors, most = [self._parameter(slot) for slot in module.slots], self._most(module)
            kind = (
                module.transposed,
                module.scaling,
                module.sizes,
                *(slot is None for slot in (module.weight, module.bias, module.lora_A, module.lora_B)),
                *((tensor.shape, tensor.dtype, tensor.device, tuple(self._state[tensor])) for tensor in tensors),
            )
            groups[most, kind if most > 1 else module.name].append(module)
        return [group[i : i + most] for (most, _), group in groups.items() for i in range(0, len(group), most)]

    def _most(self, module: RoutedModule) -> int:
        """How many modules like this one a stack may have."""
        tensors = [self._parameter(slot) for slot in module.slots]
        if not self._config.keep_base or any(map(_is_special, self._with_states(tensors))):
            return 1
        largest = max(tensor.numel() for tensor in tensors)
        if largest < STACK_FROM:
            return max(1, STACK_TO // largest)
        adapter = [self._parameter(slot) for slot in (module.lora_A, module.lora_B) if slot is not None]
        virtual = [factor for name, factor in self._state[tensors[0]].items() if name in ("lora_A", "lora_B")]
        largest = max((factor.numel() for factor in adapter or virtual), default=0)
        return max(1, PAIR_TO.get(tensors[0].device.type, 0) // largest) if largest else 1

    def _with_states(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Tensors and their states."""
        return (each for tensor in tensors for each in (tensor, *self._state[tensor].values()))

    def _make_other(self, other: Unrouted) -> Other:
        position = self.position[id(other.parameter)]
        return Other(other.group, other.name, position, self._part_of([other.parameter], MOMENTS))

    def _make(self, modules: Sequence[RoutedModule]) -> Stack:
        """A stack; of several modules, their moments and virtual experts become views of tensors that they share."""
        first, trained = modules[0], self._config.train_base
        weights, dense, pair = [], [], None
        if first.weight is not None:
            weights = self._parts([m.weight for m in modules], MOMENTS if trained else ())
        if trained and first.weight is not None:
            biases = [m.bias for m in modules if m.bias is not None]
            dense = [*weights, *(self._parts(biases, MOMENTS) if biases else ())]
        if first.lora_A is not None:
            slots_A, slots_B = ([getattr(m, name) for m in modules] for name in ("lora_A", "lora_B"))
            pair = self._part(slots_A, MOMENTS, by_row=True), self._part(slots_B, MOMENTS, by_row=True, turned=True)
        elif self._config.expert_ranks:
            slots, (A, B) = [m.weight for m in modules], VIRTUAL
            pair = self._part(slots, A, by_row=True), self._part(slots, B, by_row=True, turned=True)
        parameters = [self._parameter(slot) for module in modules for slot in module.slots]
        positions = [[self.position[id(self._parameter(slot))] for slot in m.slots] for m in modules]
        return Stack(tuple(modules), parameters, positions, weights, dense, pair)

    def _parts(self, slots: Sequence[Slot | None], names: Sequence[str]) -> list[Part]:
        """One part of all tensors if they are small, else one of each."""
        listed = [slot for slot in slots if slot is not None]
        if self._parameter(listed[0]).numel() < STACK_FROM:
            return [self._part(listed, names)]
        return [self._part([slot], names, first=i) for i, slot in enumerate(listed)]

    def _part(self, slots: Sequence[Slot | None], names: Sequence[str], first: int = 0, **laid_out: bool) -> Part:
        listed = [slot for slot in slots if slot is not None]
        return self._part_of([self._parameter(slot) for slot in listed], names, listed, first, **laid_out)

    def _part_of(
        self,
        parameters: list[Tensor],
        names: Sequence[str],
        slots: Sequence[Slot] = (),
        first: int = 0,
        by_row: bool = False,
        turned: bool = False,
    ) -> Part:
        """A part of these; their moments, and their precise values where these are in the state, become its parts."""
        states = [self._state[each] for each in parameters]
        tensors = [shared(states, name, by_row, turned) for name in names] or [torch.empty(0)] * 2
        members = range(first, first + len(parameters))
        own = (
            "base" in state and not shares_storage(state["base"], each)
            for each, state in zip(parameters, states, strict=True)
        )
        if len(tensors) == 2 and len(parameters) > 1 and all(own):
            tensors.append(shared(states, "base", by_row, turned))
        named = [self._groups[group]["param_names"][i] for group, i in slots]
        return Part(list(slots), named, members, parameters, states, by_row, turned, *tensors)


def same(found: Sequence[Any], held: Sequence[Any]) -> bool:
    """Whether both have the same things."""
    return len(found) == len(held) and all(map(operator.is_, found, held))


def _is_special(tensor: Tensor) -> bool:
    return is_distributed(tensor) or is_quantized(tensor)
