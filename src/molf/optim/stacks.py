"""All modules of an optimizer in stacks: which are stepped together, and in which tensors what is small of them lies.

What a step of small tensors costs is calls, not arithmetic. A ``Stack`` is K modules of one shape. Their LoRA experts'
moments, with the experts where they are virtual, and the moments of weights and biases that are small, with their W or
masters, lie in tensors that the modules share, each module's own being views of them, so that the calls of a step go by
the number of stacks. Large weights stay as they are.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .config import MoLFConfig
from .layout import RoutedModule, Slot
from .parts import Part, shared
from .quantized import is_quantized
from .selection import Other, Selection, Stack, same
from .sharding import is_distributed
from .virtual import shares_storage, storage

STACK_FROM = 2**15
"""Tensors of the model with this many elements are not gathered: their gradients would be copied for nothing."""

STACK_TO = 2**20
"""Elements of the weights of a stack at most, if they are gathered."""

PAIR_TO = {"cpu": 2**20, "cuda": 2**26}
"""Elements of the A, and of the B, of a stack of large modules at most, by device."""

MOMENTS = ("exp_avg", "exp_avg_sq")
VIRTUAL = tuple((f"{name}_exp_avg", f"{name}_exp_avg_sq", name) for name in ("lora_A", "lora_B"))
"""Names in a weight's state of virtual A and B, each after its moments."""


class Stacks:
    """All modules of an optimizer in stacks, and the step counters of all its parameters in one tensor.

    Args:
        modules: The routed modules, in model order.
        others: Where the parameters are that are not routed.
        groups: The optimizer's ``param_groups``.
        state: Its state, whose moments, virtual experts and counters become views of shared tensors.
        config: Which experts there are, and whether W is kept.

    Attributes:
        all: The stacks; those of modules that are alike follow each other.
        others: The parameters that are not routed, by where they are.
    """

    def __init__(
        self,
        modules: Sequence[RoutedModule],
        others: Sequence[Slot],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Tensor]],
        config: MoLFConfig,
    ) -> None:
        self._groups, self._state, self._config = groups, state, config
        slots = [(i, j) for i, group in enumerate(groups) for j in range(len(group["params"]))]
        parameters = [self._parameter(slot) for slot in slots]
        self._position = {slot: i for i, slot in enumerate(slots)}
        self._steps = torch.stack([state[each]["step"] for each in parameters])
        for parameter, step in zip(parameters, self._steps.unbind(), strict=True):
            state[parameter]["step"] = step
        self._views: list[Tensor] = []
        self._storages: list[int] = []
        self._watch(state[parameters[0]], ["step"])
        self._index = {module.name: i for i, module in enumerate(modules)}
        self._selections: dict[Any, Selection] = {}
        self.all = [self._make(group) for group in self._grouped(modules)]
        self._singles: dict[str, Stack] = {}
        self.others = {slot: Other(self._position[slot], self._part([slot], MOMENTS)) for slot in others}
        self._held, self._shapes = list(self._held_now()), self._shapes_now()

    def fit(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Whether the optimizer still holds the groups, whose rates are read, and the tensors that these stacks are of.

        ``load_state_dict`` of torch replaces the groups, and so does who moves a state to another device and back.
        """
        return (
            groups is self._groups
            and state is self._state
            and same(list(self._held_now()), self._held)
            and self._shapes_now() == self._shapes
            and list(map(storage, self._views)) == self._storages
        )

    def of(self, active: Sequence[RoutedModule], others: Sequence[Slot]) -> Selection:
        """What takes part in a step: whole stacks, and one by one what is left of a stack or has made other steps."""
        counts = [n + 1 for n in self._steps.tolist()]
        own = [counts[self._position[slot]] for slot in chain(*(each.slots for each in active), others)]
        # how many steps each is ahead of the first says what can be stepped together
        key = tuple(each.name for each in active), tuple(others), array("d", [n - own[0] for n in own]).tobytes()
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

    def _select(self, active: Sequence[RoutedModule], others: Sequence[Slot], counts: Sequence[float]) -> Selection:
        names = {module.name for module in active}
        stacks: list[Stack] = []
        for stack in self.all if len(active) > 1 else ():
            here = [module for module in stack.modules if module.name in names]
            together = len(here) == len(stack) and len({counts[each[0]] for each in stack.positions}) == 1
            stacks += [stack] if together else map(self._single, here)
        if len(active) == 1:  # as in the backward pass, where every module has its own step
            stacks = [self._single(active[0])]
        return Selection(stacks, [self.others[slot] for slot in others], self._index)

    def advance(self, selection: Selection) -> None:
        """Count a step of these modules and of these parameters."""
        if len(selection.positions) == len(self._steps):
            self._steps.add_(1)
        else:
            self._steps[selection.positions] += 1

    def _shapes_now(self) -> list[torch.Size]:
        return [parameter.shape for group in self._groups for parameter in group["params"]]

    def _held_now(self) -> Iterator[Any]:
        """All that a stack refers to, themselves and not their ids, which are given again, and the model's dtypes."""
        parameters = [parameter for group in self._groups for parameter in group["params"]]
        states = self._state.values()
        dtypes, tensors = map(attrgetter("dtype"), parameters), chain.from_iterable(map(dict.values, states))
        return chain(self._groups, parameters, dtypes, states, tensors)

    def _watch(self, first: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """Remember what the first of some views is of: a tensor whose ``data`` is replaced is one no longer.

        Who does so, as to move a state to another device and back, does it with all tensors.
        """
        found = [first[name] for name in names]
        self._views += found
        self._storages += map(storage, found)

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
        positions = [[self._position[slot] for slot in m.slots] for m in modules]
        return Stack(tuple(modules), parameters, positions, weights, dense, pair)

    def _parts(self, slots: Sequence[Slot | None], names: Sequence[str]) -> list[Part]:
        """One part of all tensors if they are small, else one of each."""
        listed = [slot for slot in slots if slot is not None]
        if self._parameter(listed[0]).numel() < STACK_FROM:
            return [self._part(listed, names)]
        return [self._part([slot], names, first=i) for i, slot in enumerate(listed)]

    def _part(
        self,
        slots: Sequence[Slot | None],
        names: Sequence[str],
        first: int = 0,
        by_row: bool = False,
        turned: bool = False,
    ) -> Part:
        """A part of these; their moments, and their precise values where these are in the state, become its parts."""
        listed = [slot for slot in slots if slot is not None]
        parameters = [self._parameter(slot) for slot in listed]
        states = [self._state[each] for each in parameters]
        tensors = [shared(states, name, by_row, turned) for name in names] or [torch.empty(0)] * 2
        members = range(first, first + len(parameters))
        own = (
            "base" in state and not shares_storage(state["base"], each)
            for each, state in zip(parameters, states, strict=True)
        )
        if len(tensors) == 2 and len(parameters) > 1 and all(own):
            tensors.append(shared(states, "base", by_row, turned))
            names = (*names, "base")
        if turned or len(parameters) > 1:
            self._watch(states[0], names)
        named = [self._groups[group]["param_names"][i] for group, i in listed]
        return Part(listed, named, members, parameters, states, by_row, turned, *tensors)


def _is_special(tensor: Tensor) -> bool:
    return is_distributed(tensor) or is_quantized(tensor)
