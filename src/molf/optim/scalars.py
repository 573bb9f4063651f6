"""Small tensors: from wherever they are as one, and numbers as tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack`` on the first one's device and in the widest dtype among them."""
    return torch.stack(_alike(tensors))


def join(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` of one-dimensional tensors on the first one's device and in the widest dtype among them."""
    return tensors[0] if len(tensors) == 1 else torch.cat(_alike(tensors))


def numbers(values: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` as a tensor where another one is, without the wait for a GPU of ``new_tensor``."""
    made = torch.tensor(values, dtype=dtype or like.dtype, device="cpu", pin_memory=like.is_cuda)
    return made.to(like.device, non_blocking=True)


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1:
        return list(tensors)
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    return [tensor.to(tensors[0].device, dtype) for tensor in tensors]
