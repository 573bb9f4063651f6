"""The elementwise arithmetic: moments with score, and the update. Pure functions of tensors.

Symbols, here and in the whole package: θ a parameter, g its gradient, m and v its first and second
moment (``exp_avg``, ``exp_avg_sq``), η the learning rate, λ the weight decay, n the step count.
Every operation is in the order of ``torch.optim.AdamW``'s single-tensor path, so that with one
expert the result is that optimizer's, bit for bit. ``passes.py`` runs these functions over many tensors,
as they stand or compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .quantized import as_float


class Coefficients(NamedTuple):
    """The numbers of an AdamW step.

    Attributes:
        decay: 1 - ηλ; one per row of what is updated, (rows, 1), where rows have rates of their own.
        step_size: -η / (1-β1ⁿ), likewise.
        root_correction: √(1-β2ⁿ).
        inverse_root: Its inverse: compiled, a product takes the place of a division.
        eps: ε.
    """

    decay: float | Tensor
    step_size: float | Tensor
    root_correction: float
    inverse_root: float
    eps: float

    @property
    def by_row(self) -> bool:
        """Whether there is a decay and a step size per row."""
        return isinstance(self.decay, Tensor)


class Tracking(NamedTuple):
    """What the moments and the score need beside the tensors.

    Attributes:
        betas: β1, β2.
        eps: ε.
        score_fn: "epd" or "pfn".
        clip: The clipping factor, 0-dimensional; None does not clip.
        gate: Bool, 0-dimensional: false leaves the moments as they are. None is true.
    """

    betas: tuple[float, float]
    eps: float
    score_fn: str
    clip: Tensor | None = None
    gate: Tensor | None = None


def moment_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's moments: fp32 if it is in a 16-bit format, else its own."""
    return torch.float32 if parameter.dtype in (torch.bfloat16, torch.float16) else parameter.dtype


def step_numbers(
    groups: Sequence[Mapping[str, Any]], n: float, folds: tuple[float, ...] = (1.0,)
) -> tuple[list[float], list[float], float]:
    """Per group 1 - ηλ and -f η / (1-β1ⁿ), and √(1-β2ⁿ), in double precision.

    Args:
        groups: Parameter groups; β1 and β2 are the first one's.
        n: The step count.
        folds: f, one for all groups or one per group.
    """
    beta1, beta2 = map(float, groups[0]["betas"])  # each of them may be a tensor
    rates = [float(group["lr"]) for group in groups]
    decays = [1 - rate * float(group["weight_decay"]) for rate, group in zip(rates, groups, strict=True)]
    folds = folds * len(groups) if len(folds) == 1 else folds
    sizes = [-(rate / (1 - beta1**n)) * fold for rate, fold in zip(rates, folds, strict=True)]
    return decays, sizes, (1 - beta2**n) ** 0.5


def update_moments_(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, t: Tracking) -> tuple[Tensor, Tensor]:
    """Advance the moments in place:  m ← m + (1-β1)(g - m),  v ← β2 v + (1-β2) g².

    Returns them as plain tensors, which they are already unless they are kept in 8 bits.

    Source: arXiv:2605.07111, Eqs. 2-3.
    """
    beta1, beta2 = t.betas
    m, v = as_float(exp_avg), as_float(exp_avg_sq)
    grad = grad.to(m.dtype)
    if t.clip is not None:
        grad = grad * t.clip
    if t.gate is not None:
        m.copy_(torch.where(t.gate, m.lerp(grad, 1 - beta1), m))
        v.copy_(torch.where(t.gate, v.mul(beta2).addcmul_(grad, grad, value=1 - beta2), v))
    else:
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if m is not exp_avg:
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
    return m, v


def track_(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, t: Tracking) -> Tensor:
    """Advance the moments and sum what the score of an expert sums over its elements, along the last dimension.

    "epd": m² / (√v + ε);  "pfn": (m / (√v + ε))²;  of the new moments, without bias correction.

    Args:
        grad: g, of the moments' shape and any floating dtype.
        exp_avg: m, in place.
        exp_avg_sq: v, in place.
        t: The numbers.

    Source: arXiv:2605.07111, section 4.3.
    """
    m, v = update_moments_(grad, exp_avg, exp_avg_sq, t)
    root = v.sqrt().add_(t.eps)
    terms = m.square().div_(root) if t.score_fn == "epd" else torch.div(m, root).square_()
    return terms.sum(-1)


def adamw_(
    value: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, store: Tensor | None, winner: Tensor | None, c: Coefficients
) -> None:
    """AdamW with decoupled weight decay:  θ ← (1 - ηλ) θ - η/(1-β1ⁿ) · m / (√v / √(1-β2ⁿ) + ε).

    Args:
        value: θ, in place.
        exp_avg: m.
        exp_avg_sq: v.
        store: Takes the result, rounded to its dtype, if there is one.
        winner: Bool, broadcastable to θ; where it is false θ keeps its bits. None: all win.
        c: The coefficients.
    """
    m, v = as_float(exp_avg), as_float(exp_avg_sq)
    denominator = (v.sqrt() / c.root_correction).add_(c.eps)
    update = (m * c.step_size).div_(denominator)
    if winner is None:
        value.mul_(c.decay).add_(update)
    else:
        update.add_(value * c.decay)
        value.copy_(torch.where(winner, update, value))
    if store is not None:
        store.copy_(value)


def unrouted_(
    value: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    store: Tensor | None,
    grad: Tensor,
    numbers: tuple[Tracking, Coefficients],
) -> None:
    """The whole step of a tensor that is not routed: moments, then AdamW."""
    update_moments_(grad, exp_avg, exp_avg_sq, numbers[0])
    adamw_(value, exp_avg, exp_avg_sq, store, None, numbers[1])
