"""Tensors of one shape, from wherever they are, as one."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack`` on the first one's device and in the widest dtype among them."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    if len(kinds) > 1:
        dtype = functools.reduce(torch.promote_types, [dtype for _, dtype in kinds])
        tensors = [tensor.to(tensors[0].device, dtype) for tensor in tensors]
    return torch.stack(list(tensors))


def join(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` of one-dimensional tensors on the first one's device and in the widest dtype among them."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    if len(kinds) > 1:
        dtype = functools.reduce(torch.promote_types, [dtype for _, dtype in kinds])
        tensors = [tensor.to(tensors[0].device, dtype) for tensor in tensors]
    return torch.cat(list(tensors))
