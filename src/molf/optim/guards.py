"""The look at all gradients before a step changes anything: finite, and how long."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class NonFiniteGradientError(ArithmeticError):
    """A gradient is NaN or infinite. Raised before the step has changed anything."""


class ResumeError(RuntimeError):
    """After a resume a routed module no longer takes part in training."""


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
            f"the gradient of {broken[0]}{more} is not finite; nothing was updated. Lower the learning rate, "
            "clip with max_grad_norm, or look at this batch"
        )
    if limit is None:
        return 1.0
    total = math.sqrt(sum(value**2 for (_, _, counts), value in zip(norms, values, strict=True) if counts))
    return min(1.0, limit / (total + 1e-6))
