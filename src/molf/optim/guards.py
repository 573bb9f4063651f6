"""The look before a step changes anything: at all gradients, finite and how long, and at the tensors it writes to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .adamw import moment_dtype
from .passes import Passes
from .scalars import join, stack
from .sharding import locals_of


class NonFiniteError(ArithmeticError):
    """A loss, gradient, weight or moment is NaN or infinite. Raised before anything is updated or saved from it."""


class NonFiniteGradientError(NonFiniteError):
    """A gradient is NaN or infinite. Raised before the step has changed anything."""


class ResumeError(RuntimeError):
    """After a resume a routed module no longer takes part in training."""


class WrittenTensors:
    """Notices when someone else writes into a tensor that the optimizer rewrites from its state.

    A tensor's version counter and address tell for nothing; only where one is another the content is compared. A write
    through ``tensor.data`` is not counted by torch and goes unnoticed, but for the first step, which compares all.
    """

    def __init__(self) -> None:
        self._versions: list[list[int]] = []  # nothing was seen: the first step compares everything

    def remember(self, tensors: Iterable[Tensor]) -> None:
        """Take the tensors as they are now."""
        self._versions = _versions(tensors)

    def check(
        self, tensors: Iterable[Tensor], derived: Callable[[], Iterable[tuple[str, Tensor, Tensor, float]]]
    ) -> None:
        """Raise if a tensor no longer holds what the state says.

        Args:
            tensors: As they were remembered.
            derived: Of each the name, the tensor, what it has to hold before it is rounded, and by how much that may
                differ; asked for only if a counter moved.

        Raises:
            RuntimeError: Naming the tensor; the step would have undone the change.
        """
        now = _versions(tensors)
        if now == self._versions:
            return
        for name, tensor, content, slack in derived():
            if not _holds(tensor, content, slack):
                raise RuntimeError(
                    f"{name} was changed since the optimizer was made, and the step would undo that: load weights "
                    "before making the optimizer, or call sync_weights() to return to the optimizer's state"
                )
        self._versions = now


def _holds(tensor: Tensor, content: Tensor, slack: float) -> bool:
    """Whether a tensor is its content, or that of one within ``slack`` of it, rounded."""
    if torch.allclose(content.to(tensor.dtype), tensor, rtol=0, atol=0, equal_nan=True):
        return True
    least, most = ((content + sign * slack).to(tensor.dtype) for sign in (-1, 1))
    return slack > 0 and bool(((least <= tensor) & (tensor <= most)).all())


def _versions(tensors: Iterable[Tensor]) -> list[list[int]]:
    """Of all tensors who they are, their versions and their addresses."""
    listed = list(tensors)
    own = locals_of(listed)
    return [list(map(id, listed)), list(map(attrgetter("_version"), own)), list(map(Tensor.data_ptr, own))]


def check_unchanged(name: str, parameter: Tensor, state: dict[str, Any], keep_base: bool) -> None:
    """Refuse a parameter whose dtype or shape is no longer that of its moments.

    Raises:
        RuntimeError: If the model was converted, or a tensor of it resized, after its optimizer was made.
    """
    if "exp_avg" in state and state["exp_avg"].shape != parameter.shape:
        found, made = tuple(parameter.shape), tuple(state["exp_avg"].shape)
        raise RuntimeError(f"{name} is {found} now and was {made}: resize the model before its optimizer is made")
    if "base" in state or "exp_avg" not in state:
        return
    dtype = moment_dtype(parameter)
    rounds = not keep_base and parameter.dtype == torch.bfloat16
    if state["exp_avg"].dtype != dtype or not (parameter.dtype == dtype or rounds):
        raise RuntimeError(f"{name} is {parameter.dtype} now: convert the model before its optimizer is made")


@dataclass(frozen=True)
class GradientCheck:
    """What is known of all gradients before a step.

    Attributes:
        names: Of the gradients that were looked at.
        values: A number of each that is finite if and only if the gradient is, on the first one's device.
        clip: The clipping factor, 0-dimensional; None does not clip.
        gate: On an accelerator whether all values are finite, 0-dimensional; None on the CPU, where that is known.
        outcome: What an error says of the weights.
    """

    names: tuple[str, ...]
    values: Tensor
    clip: Tensor | None
    gate: Tensor | None
    outcome: str = "nothing was updated"

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """``clip`` and ``gate`` for tensors of this device and dtype."""
        clip = None if self.clip is None else self.clip.to(device, dtype)
        return clip, None if self.gate is None else self.gate.to(device)

    def raise_if_broken(self, finite: bool) -> None:
        """Raise unless ``finite``.

        Raises:
            NonFiniteGradientError: Naming the first gradient that is not.
        """
        if finite:
            return
        broken = [
            name for name, value in zip(self.names, self.values.tolist(), strict=True) if not math.isfinite(value)
        ]
        more = f" (and of {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise NonFiniteGradientError(
            f"the gradient of {broken[0]}{more} or its norm is not finite; {self.outcome}. Lower the "
            "learning rate, clip with max_grad_norm, or look at this batch"
        )


def look_at(
    grads: Sequence[tuple[Sequence[str], Tensor]], limit: float | None, passes: Passes
) -> tuple[list[str], Tensor]:
    """A number of each gradient that is finite if and only if the gradient is: its squared norm if there is a limit.

    Either is a sum over elements: those of the parts of a tensor add up to the tensor's.

    Args:
        grads: Names and gradients; several names go with one tensor that holds their gradients one after the other.
        limit: The largest norm that is left alone, or None.
        passes: Finds the squared norms of all at once, where they are compiled.

    Returns:
        The names and their numbers.
    """
    squares = passes.squares([grad for _, grad in grads], [len(names) for names, _ in grads])
    if squares is not None:
        return [name for names, _ in grads for name in names], squares if limit is None else squares.double()
    single = [grad for names, grad in grads if len(names) == 1]
    several = [(names, grad.view(len(names), -1)) for names, grad in grads if len(names) > 1]
    listed = [names[0] for names, _ in grads if len(names) == 1] + [name for names, _ in several for name in names]
    numbers = [stack(norms(single))] if single else []
    for _, rows in several:
        numbers.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32)))
    found = join(numbers) if numbers else torch.zeros(0)
    return listed, found if limit is None else found.double().square()


def check_gradients(
    names: Sequence[str], values: Tensor, limit: float | None, in_backward: bool = False
) -> GradientCheck:
    """Whether all gradients are finite, and with a limit c the clipping factor min(1, c / (‖g‖ + 1e-6)).

    Args:
        names: Of the gradients.
        values: Of each what ``look_at`` saw.
        limit: c, the largest total norm ‖g‖ that is left alone.
        in_backward: Whether these are the gradients of one module alone, in the backward pass.

    Raises:
        NonFiniteGradientError: On the CPU, if a gradient is not finite; elsewhere ``gate`` will tell.
    """
    clip = None
    if not names:
        return GradientCheck((), values, None, None)
    if limit is not None:
        clip = (limit / (values.sum().sqrt() + 1e-6)).clamp(max=1.0)
    names = tuple(names)
    outcome = "what came before it in the backward pass was updated" if in_backward else "nothing was updated"
    if not on_host(values):
        return GradientCheck(names, values, clip, values.isfinite().all(), outcome)
    check = GradientCheck(names, values, None if clip is None or clip == 1.0 else clip, None, outcome)
    check.raise_if_broken(math.isfinite(sum(values.tolist())))
    return check


def on_host(values: Tensor) -> bool:
    """Whether reading the values waits for no device."""
    return values.device.type == "cpu"


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """L2 norms, 0-dimensional, accumulated in fp32 at least; in a few calls for all of a device and dtype."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, g in enumerate(tensors):
        groups[g.device, g.dtype].append(i)
    found: dict[int, Tensor] = {}
    for (_, dtype), indices in groups.items():
        wide = torch.promote_types(dtype, torch.float32)
        found |= zip(indices, torch._foreach_norm([tensors[i] for i in indices], dtype=wide), strict=True)
    return [found[i] for i in range(len(tensors))]
