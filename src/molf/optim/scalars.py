"""Tensors from wherever they are, as one."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack`` on the first one's device and in the widest dtype among them."""
    return torch.stack(_alike(tensors))


def join(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` of one-dimensional tensors on the first one's device and in the widest dtype among them."""
    return torch.cat(_alike(tensors))


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1:
        return list(tensors)
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    return [tensor.to(tensors[0].device, dtype) for tensor in tensors]
