"""Peak of the memory that tensors made inside a block hold, counted as they are made and freed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakTracker(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, until it is freed.

    With fake tensors this is the memory that the same operations would take, while nothing is allocated.

    Example:
        >>> with PeakTracker() as tracker:
        ...     x = torch.zeros(1024)
        ...     y = (x + 1).sum()
        >>> tracker.peak
        8196

    Attributes:
        now: Bytes that are held at the moment.
        peak: The most that were held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "OptimState8bit" for kind in types):  # it does its own operations, which are counted
            return NotImplemented
        kwargs = kwargs or {}
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16 and is_fake(args[0]):
            result = _grouped_product(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage(), given)
        return result

    def _add(self, storage: Any, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given:  # a view, or a tensor from outside the block
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """What the product of a mixture of experts gives: torch (2.13) has it for fake tensors in bf16 alone.

    Args:
        a: (T, K) or (G, M, K); of the gradient of the experts' weights (M, T).
        b: (G, K, N) or (K, T); of that gradient (T, N).
        offs: Where each of the G groups ends; none if both are (G, ...).
    """
    groups = [len(offs)] if a.dim() == b.dim() == 2 and offs is not None else []
    groups += [len(a)] if a.dim() == b.dim() == 3 else []
    return a.new_empty([*groups, a.shape[-2], b.shape[-1]])
