"""One tensor of each of several modules as one tensor, which the passes take in one piece.

Moments, virtual experts, W and masters lie in it, each module's own being views; gradients and a model's weights are
gathered into one and spread again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Slot
from .sharding import local, locals_of


@dataclass(eq=False)
class Part:
    """One tensor of each of K modules with its moments, in the form in which the passes take it.

    K > 1 tensors (r, c) are (K r, c) if ``by_row``, else (K, r c); a single one keeps its shape.

    Attributes:
        slots: Where the tensors are, or of virtual A and B the layers' weights.
        names: Their names.
        members: Which modules of the stack these are.
        parameters: The tensors of the model, K of them; of virtual A and B, which are in no model, the layers' weights.
        states: Their states.
        by_row: Whether rows are ranks: A (R, in) and Bᵀ (R, out).
        turned: Whether rows are the tensor's columns, as of B.
        exp_avg: m of all; without meaning where nothing is trained.
        exp_avg_sq: v of all.
        value: The precise value of all, where the state has it and in one tensor.
    """

    slots: list[Slot]
    names: list[str]
    members: range
    parameters: list[Tensor]
    states: list[dict[str, Tensor]]
    by_row: bool
    turned: bool
    exp_avg: Tensor
    exp_avg_sq: Tensor
    value: Tensor | None = None

    @property
    def is_joined(self) -> bool:
        """Whether its value is in no tensor of the model, or of several."""
        return self.value is not None or len(self.parameters) > 1

    @property
    def stays(self) -> bool:
        """Whether its value is in the same tensor in every step."""
        return self.value is not None or not (self.turned or len(self.parameters) > 1)

    @property
    def has_masters(self) -> bool:
        """Whether the model's tensors take the values rounded."""
        return "base" in self.states[0] and "lora_A" not in self.states[0]

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor per module as one of all; the only one as it is."""
        if self.turned:
            tensors = [tensor.T for tensor in tensors]
        return tensors[0] if len(tensors) == 1 else _joined(_stacked(tensors), self.by_row)

    def spread(self, joined: Tensor, targets: Sequence[Tensor], which: Sequence[int] | None = None) -> None:
        """Copy the parts of one tensor to a tensor per module, or to those of ``which``."""
        if self.turned:
            targets = [target.T for target in targets]
        parts = joined.view(len(targets), *targets[0].shape).unbind()
        chosen = range(len(targets)) if which is None else which
        torch._foreach_copy_([targets[i] for i in chosen], [parts[i] for i in chosen])

    def gradient(self) -> Tensor:
        """G of all parameters, of what this process holds, with the sign in its data.

        Raises:
            ValueError: If the gradient of one is sparse.
        """
        found = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if len(found) < len(self.parameters):
            raise RuntimeError("a gradient disappeared during the step")
        if any(grad.is_sparse for grad in found):
            name = next(name for name, grad in zip(self.names, found, strict=True) if grad.is_sparse)
            raise ValueError(f"{name} has a sparse gradient, which has no moments: make its layer with sparse=False")
        return self.joined([grad.resolve_neg() for grad in locals_of(found)])

    def precise(self, values: Mapping[int, Tensor]) -> list[Tensor]:
        """The precise value of each parameter: one of ``values`` by its id, its master, or itself."""
        pairs = zip(self.parameters, self.states, strict=True)
        return locals_of(values.get(id(parameter), state.get("base", parameter)) for parameter, state in pairs)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).contiguous()  # in whatever memory format a convolution's are


def _joined(stack: Tensor, by_row: bool) -> Tensor:
    return stack.flatten(0, 1) if by_row else stack.view(len(stack), -1)  # numbers without a dimension, too


def shared(states: Sequence[dict[str, Tensor]], name: str, by_row: bool, turned: bool) -> Tensor:
    """The entries of this name as one tensor; if there are several, they become its parts, or are so already."""
    tensors = [local(each[name]) for each in states]
    if turned:
        tensors = [tensor.T for tensor in tensors]
    if len(tensors) == 1:
        return tensors[0]
    whole = tensors[0]._base
    if whole is None or not _are_parts(tensors, whole):
        whole = _stacked(tensors)
        for each, own in zip(states, whole.unbind(), strict=True):
            each[name] = own.T if turned else own
    return _joined(whole, by_row)


def _are_parts(tensors: Sequence[Tensor], whole: Tensor) -> bool:
    """Whether they are all that a tensor holds, in its order."""
    return whole.shape == (len(tensors), *tensors[0].shape) and all(
        each._base is whole and each.data_ptr() == own.data_ptr() and each.is_contiguous()
        for each, own in zip(tensors, whole.unbind(), strict=True)
    )
