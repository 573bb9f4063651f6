"""The elementwise arithmetic: moments, scores, update. Pure functions of tensors.

Symbols, here and in the whole package: θ a parameter, g its gradient, m and v its first and second
moment (``exp_avg``, ``exp_avg_sq``), η the learning rate, λ the weight decay, n the step count.
Every operation is in the order of ``torch.optim.AdamW``'s single-tensor path, so that with one
expert the result is that optimizer's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trained:
    """A trained tensor with its moments: all of one shape, dtype and device."""

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Coefficients(NamedTuple):
    """The numbers of an AdamW step, broadcastable to the tensor that they update.

    Attributes:
        decay: 1 - ηλ.
        step_size: -η / (1-β1ⁿ).
        root_correction: √(1-β2ⁿ).
        eps: ε.
    """

    decay: Tensor
    step_size: Tensor
    root_correction: float
    eps: float

    def by_row(self) -> Coefficients:
        """The same numbers along the rows of a matrix instead of its columns."""
        return self._replace(decay=self.decay[:, None], step_size=self.step_size[:, None])


def moment_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's moments: fp32 if it is in a 16-bit format, else its own."""
    return torch.float32 if parameter.dtype in (torch.bfloat16, torch.float16) else parameter.dtype


def new_state(parameter: Tensor, *, moments: bool) -> dict[str, Tensor]:
    """``step``, ``base`` (a 16-bit parameter's fp32 master) and, with ``moments``, ``exp_avg`` and ``exp_avg_sq``."""
    dtype = moment_dtype(parameter)
    state = {"step": torch.tensor(0.0)}
    if dtype != parameter.dtype:
        state["base"] = parameter.detach().to(dtype, copy=True)
    if moments:
        state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
    return state


def scaled_gradient(grad: Tensor | None, tensor: Trained, clip: float) -> Tensor:
    """The gradient in the dtype of the moments, times the clipping factor."""
    if grad is None:
        raise RuntimeError("a gradient disappeared during the step")
    grad = grad.to(tensor.exp_avg.dtype)
    return grad if clip == 1.0 else grad * clip


def step_numbers(
    groups: Sequence[Mapping[str, Any]], n: float, folds: tuple[float, ...] = (1.0,)
) -> tuple[list[float], list[float], float]:
    """Per group 1 - ηλ and -f η / (1-β1ⁿ), and √(1-β2ⁿ), in double precision.

    Args:
        groups: Parameter groups; β1 and β2 are the first one's.
        n: The step count.
        folds: f, one for all groups or one per group.
    """
    beta1, beta2 = groups[0]["betas"]
    rates = [float(group["lr"]) for group in groups]
    decays = [1 - rate * group["weight_decay"] for rate, group in zip(rates, groups, strict=True)]
    folds = folds * len(groups) if len(folds) == 1 else folds
    sizes = [-(rate / (1 - beta1**n)) * fold for rate, fold in zip(rates, folds, strict=True)]
    return decays, sizes, (1 - beta2**n) ** 0.5


def update_moments_(tensor: Trained, grad: Tensor, betas: tuple[float, float]) -> None:
    """Advance the moments:  m ← m + (1-β1)(g - m),  v ← β2 v + (1-β2) g².  Source: arXiv:2605.07111, Eqs. 2-3."""
    beta1, beta2 = betas
    tensor.exp_avg.lerp_(grad, 1 - beta1)
    tensor.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


def score_terms(tensor: Trained, eps: float, score_fn: str) -> Tensor:
    """What the score of an expert sums over its elements, of the shape of the tensor.

    "epd": m² / (√v + ε);  "pfn": (m / (√v + ε))²;  both of the moments without bias correction.

    Source: arXiv:2605.07111, section 4.3.
    """
    root = tensor.exp_avg_sq.sqrt().add_(eps)
    if score_fn == "epd":
        return tensor.exp_avg.square().div_(root)
    return torch.div(tensor.exp_avg, root, out=root).square_()


def adamw_(tensor: Trained, c: Coefficients, winner: Tensor | None = None) -> None:
    """AdamW with decoupled weight decay:  θ ← (1 - ηλ) θ - η/(1-β1ⁿ) · m / (√v / √(1-β2ⁿ) + ε).

    Args:
        tensor: What to update, in place.
        c: The coefficients.
        winner: Bool, broadcastable to the tensor; where it is false θ keeps its bits. None: all win.
    """
    denominator = (tensor.exp_avg_sq.sqrt() / c.root_correction).add_(c.eps)
    update = torch.div(tensor.exp_avg * c.step_size, denominator, out=denominator)
    if winner is None:
        tensor.value.mul_(c.decay).add_(update)
    else:
        update.add_(tensor.value * c.decay)
        torch.where(winner, update, tensor.value, out=tensor.value)
