"""Routed modules as a step works on them: what is small of those of one shape, as one.

What a step of small tensors costs is calls, not arithmetic. A ``Stack`` is K modules of one shape. Their LoRA experts'
moments, with the experts where they are virtual, and the moments of weights and biases that are small, with their W or
masters, lie in tensors that the modules share, each module's own being views of them, so that the calls of a step go by
the number of stacks. Large weights stay as they are.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import MoLFConfig
from .layout import RoutedModule, Slot
from .parts import Part, shared
from .quantized import is_quantized
from .sharding import is_distributed
from .virtual import shares_storage

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
class OtherStack:
    """K parameters of one shape and group that are not routed; attributes as of ``Stack``."""

    group: dict[str, Any]
    names: list[str]
    positions: list[int]
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
    """

    modules: tuple[RoutedModule, ...]
    parameters: list[Tensor]
    positions: list[list[int]]
    weights: list[Part]
    dense: list[Part]
    pair: tuple[Part, Part] | None
    count: float = 0.0

    def __len__(self) -> int:
        return len(self.modules)

    def virtual_pair(self) -> tuple[Tensor, Tensor]:
        """Virtual A (K, R, in) and Bᵀ (K, R, out)."""
        A, B = (part.value for part in self.pair or () if part.value is not None)
        rank = len(A) // len(self)  # a process may hold no row of a weight, and so no column of B
        return A.view(len(self), rank, A.shape[1]), B.view(len(self), rank, B.shape[1])


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
        others: The stacks of parameters that are not routed.
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
        self._others = others
        self._index = {module.name: i for i, module in enumerate(modules)}
        self.all = [self._make(group) for group in self._grouped(modules)]
        self._singles: dict[str, Stack] = {}
        self.others = [self._make_other(group) for group in self._grouped_others()]
        self._single_others: dict[str, OtherStack] = {}
        parts = [part for stack in self.all for part in (*stack.weights, *stack.dense)]
        parts += [part for stack in self.all for part in stack.pair or ()] + [other.part for other in self.others]
        self._gathered = {id(each) for part in parts if len(part.parameters) > 1 for each in part.parameters}
        self._held, self._held_firm, self._shapes = self._tensors(), self._firm(), self._shapes_now()

    def fit(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Whether the optimizer still holds the groups, whose rates are read, and the tensors that these stacks are of.

        ``load_state_dict`` of torch replaces the groups.
        """
        if groups is not self._groups or state is not self._state or self._shapes_now() != self._shapes:
            return False
        found = self._tensors()
        if _same(found, self._held):
            return True
        # a W of its own in the place of the weight: nothing here refers to that of a layer that is not gathered
        self._held = found
        return _same(self._firm(), self._held_firm)

    def of(self, active: Sequence[RoutedModule], others: Sequence[Unrouted]) -> tuple[list[Stack], list[OtherStack]]:
        """What takes part in a step: whole stacks, and one by one what is left of a stack or has made other steps."""
        numbers = (self._steps + 1).tolist()
        names = {module.name for module in active}
        stacks: list[Stack] = []
        for stack in self.all if len(active) > 1 else ():
            here = [module for module in stack.modules if module.name in names]
            together = len(here) == len(stack) and len({numbers[each[0]] for each in stack.positions}) == 1
            stacks += [stack] if together else map(self._single, here)
        if len(active) == 1:  # as in the backward pass, where every module has its own step
            stacks = [self._single(active[0])]
        for stack in stacks:
            stack.count = numbers[stack.positions[0][0]]
        taking = {each.name: each for each in others}
        other_stacks: list[OtherStack] = []
        for other in self.others if others else ():
            present = [taking[name] for name in other.names if name in taking]
            together = len(present) == len(other.names) and len({numbers[i] for i in other.positions}) == 1
            other_stacks += [other] if together else map(self._single_other, present)
        for other in other_stacks:
            other.count = numbers[other.positions[0]]
        return stacks, other_stacks

    def order(self, stacks: Sequence[Stack]) -> list[int]:
        """Where each module is, in model order, among those of the stacks."""
        places = [self._index[module.name] for stack in stacks for module in stack.modules]
        return sorted(range(len(places)), key=places.__getitem__)

    def advance(self, stacks: Sequence[Stack], others: Sequence[OtherStack]) -> None:
        """Count a step of these modules and of these parameters."""
        moved = [each for stack in stacks for positions in stack.positions for each in positions]
        moved += [each for other in others for each in other.positions]
        if len(moved) == len(self._steps):
            self._steps.add_(1)
        else:
            self._steps[moved] += 1

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

    def _single_other(self, other: Unrouted) -> OtherStack:
        if other.name not in self._single_others:
            self._single_others[other.name] = self._make_other([other])
        return self._single_others[other.name]

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

    def _grouped_others(self) -> list[list[Unrouted]]:
        """As ``_grouped``, of parameters that are not routed."""
        groups: dict[Any, list[Unrouted]] = defaultdict(list)
        for other in self._others:
            tensor, held = other.parameter, self._state[other.parameter]
            single = not self._config.keep_base or any(map(_is_special, self._with_states([tensor])))
            kind = (id(other.group), tensor.shape, tensor.dtype, tensor.device, tuple(held))
            groups[other.name if single or tensor.numel() >= STACK_FROM else kind].append(other)
        return list(groups.values())

    def _make_other(self, others: Sequence[Unrouted]) -> OtherStack:
        parameters = [each.parameter for each in others]
        positions = [self.position[id(each)] for each in parameters]
        return OtherStack(
            others[0].group, [each.name for each in others], positions, self._part_of(parameters, MOMENTS)
        )

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
        return Part(list(slots), members, parameters, states, by_row, turned, *tensors)


def _same(found: Sequence[Any], held: Sequence[Any]) -> bool:
    return len(found) == len(held) and all(map(operator.is_, found, held))


def _is_special(tensor: Tensor) -> bool:
    return is_distributed(tensor) or is_quantized(tensor)
