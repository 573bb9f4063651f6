"""The look at all gradients before a step changes anything: finite, and how long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class NonFiniteError(ArithmeticError):
    """A loss, gradient, weight or moment is NaN or infinite. Raised before anything is updated or saved from it."""


class NonFiniteGradientError(NonFiniteError):
    """A gradient is NaN or infinite. Raised before the step has changed anything."""


class ResumeError(RuntimeError):
    """After a resume a routed module no longer takes part in training."""


class WrittenTensors:
    """Notices when someone else writes into a tensor that the optimizer rewrites from its state.

    A tensor's version counter tells for nothing; only where it moved the content is compared.
    """

    def __init__(self) -> None:
        self._versions: list[tuple[int, int]] = []

    def remember(self, tensors: Sequence[tuple[str, Tensor, Callable[[], Tensor]]]) -> None:
        """Take the tensors as they are now: name, tensor, and the state's idea of its content."""
        self._versions = [(id(tensor), tensor._version) for _, tensor, _ in tensors]

    def check(self, tensors: Sequence[tuple[str, Tensor, Callable[[], Tensor]]]) -> None:
        """Raise if a tensor no longer holds what the state says.

        Raises:
            RuntimeError: Naming the tensor; the step would have undone the change.
        """
        now = [(id(tensor), tensor._version) for _, tensor, _ in tensors]
        if now == self._versions:
            return
        for name, tensor, content in tensors:
            if not torch.equal(content().to(tensor.dtype), tensor):
                raise RuntimeError(
                    f"{name} was changed since the optimizer was made, and the step would undo that: load weights "
                    "before making the optimizer, or call sync_weights() to return to the optimizer's state"
                )
        self._versions = now


def check_gradient(name: str, parameter: Tensor, state: dict[str, Any]) -> None:
    """Refuse a gradient that has no moments, and a parameter whose dtype is no longer that of its moments.

    Raises:
        ValueError: If the gradient is sparse.
        RuntimeError: If the model was converted after its optimizer was made.
    """
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise ValueError(f"{name} has a sparse gradient, which has no moments: make its layer with sparse=False")
    if "base" not in state and state["exp_avg"].dtype != parameter.dtype:
        raise RuntimeError(f"{name} is {parameter.dtype} now: convert the model before its optimizer is made")


def gradient_norm(grad: Tensor) -> Tensor:
    """L2 norm, accumulated in fp32 at least; 0-dimensional."""
    return torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))


def clip_factor(norms: Sequence[tuple[str, Tensor, bool]], limit: float | None) -> float:
    """min(1, c / (n + 1e-6)) with n the root of the sum of squared norms; 1 without a limit c.

    Reads all norms in one device-to-host copy.

    Args:
        norms: Name, norm, and whether it counts in n, of every gradient.
        limit: c, the largest n that is left alone.

    Raises:
        NonFiniteGradientError: Naming the first gradient that is not finite.
    """
    if not norms:
        return 1.0
    device = norms[0][1].device
    values = torch.stack([norm.to(device) for _, norm, _ in norms]).tolist()
    broken = [name for (name, _, _), value in zip(norms, values, strict=True) if not math.isfinite(value)]
    if broken:
        more = f" (and of {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise NonFiniteGradientError(
            f"the gradient of {broken[0]}{more} or its norm is not finite; nothing was updated. Lower the learning "
            "rate, clip with max_grad_norm, or look at this batch"
        )
    if limit is None:
        return 1.0
    total = math.sqrt(sum(value**2 for (_, _, counts), value in zip(norms, values, strict=True) if counts))
    return min(1.0, limit / (total + 1e-6))
