"""Moments in 8 bits, by torchao's optimizer-state tensors; there is no quantiser of our own here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share a scale, torchao's own default."""


def zeros(like: Tensor, *, signed: bool) -> Tensor:
    """Zero moments of a tensor's shape: 8 bits and a shared fp32 scale per 256 elements.

    In full precision where that does not fit, and for float64, which 8 bits would make pointless.

    Raises:
        ValueError: If torchao is not installed.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if dtype != torch.float32 or like.numel() % BLOCK or like.numel() < 4096:  # as torchao's own optimizers decide
        return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ValueError(f"moments_8bit=True needs torchao ({error}): pip install 'molf[quantized]'") from error
    return OptimState8bit.zeros(like.shape, signed=signed, block_size=BLOCK, device=like.device)


def is_quantized(tensor: Tensor | None) -> bool:
    """Whether it is such a tensor."""
    return type(tensor).__name__ == "OptimState8bit"


def as_float(tensor: Tensor) -> Tensor:
    """The tensor itself, or the fp32 values that its 8 bits stand for.

    A v that 8 bits round to 0, beside a larger one of its block, is the least that they can say above 0: its m, which
    is not as small beside its own block's, would else be divided by ε alone.
    """
    if not is_quantized(tensor):
        return tensor
    values: Any = tensor
    found = values.dequantize()
    if values.signed:
        return found
    least = values.scale * values.qmap.where(values.qmap > 0, torch.inf).amin()
    return found.view(len(least), -1).maximum(least[:, None]).view_as(found)
